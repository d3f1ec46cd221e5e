"""Exact greedy answers on the held-out questions, with transformers."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from transformers import Lfm2ForCausalLM

from bench.demo_rounding import rounded_weights
from bench.demo_tokenizer import IM_END, ChatEncoder

BATCH = 50


@torch.no_grad()
def wrong_answers(
    model: Lfm2ForCausalLM, tokenizer: Tokenizer, questions: list[dict]
) -> list[tuple[dict, str]]:
    """The questions that greedy decoding does not answer exactly, and the text it prefers.

    Greedy decoding gives the exact answer just when the right token is the most likely one at
    every position of the right answer, <|im_end|> included: one forward pass a question.
    """
    encoder = ChatEncoder(tokenizer)
    wrong: list[tuple[dict, str]] = []
    ordered = sorted(questions, key=lambda row: len(str(row["messages"])))
    for start in range(0, len(ordered), BATCH):
        rows = ordered[start : start + BATCH]
        prompts = [encoder.encode(row["messages"], answer_next=True)[0] for row in rows]
        answers = [
            [*tokenizer.encode(row["answer"], add_special_tokens=False).ids, IM_END] for row in rows
        ]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        # Padding stands on the right, where a causal model does not look.
        ids = torch.tensor(
            [p + a + [0] * (width - len(p) - len(a)) for p, a in zip(prompts, answers, strict=True)]
        )
        best = model(ids, use_cache=False).logits.argmax(-1)
        for row, prompt, answer, choice in zip(rows, prompts, answers, best, strict=True):
            given = choice[len(prompt) - 1 : len(prompt) - 1 + len(answer)].tolist()
            if given != answer:
                wrong.append((row, tokenizer.decode(given, skip_special_tokens=False)))
    return wrong


def accuracies(
    model: Lfm2ForCausalLM, tokenizer: Tokenizer, held_out: dict[str, list[dict]], kind: str
) -> dict[str, float]:
    """Share of exact answers per skill, with the weights as a file of this kind holds them."""
    with rounded_weights(model, kind):
        return {
            skill: 1 - len(wrong_answers(model, tokenizer, rows)) / len(rows)
            for skill, rows in held_out.items()
        }
