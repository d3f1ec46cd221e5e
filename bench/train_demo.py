#!/usr/bin/env python
"""Trains the demonstration model and writes lfm2cpp/demo/: checkpoint, held-out questions, logits.

    python bench/train_demo.py

needs the `parity` extra (torch, transformers). The same seed gives the same text and the same
tokenizer everywhere, and weights that differ between machines only through the rounding of
their arithmetic. `--steps 50 --out /tmp/demo` tries it in a minute; the whole training takes 40 on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from random import Random

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import Lfm2ForCausalLM
from transformers.utils import logging as transformers_logging

from bench.demo_evaluate import accuracies, wrong_answers
from bench.demo_held_out import SKILLS, held_out_questions
from bench.demo_model import TOKENIZER_SIZE, build_model, load_checkpoint, save_checkpoint
from bench.demo_rounding import rounded_weights
from bench.demo_text import training_chat
from bench.demo_tokenizer import ChatEncoder, train_tokenizer
from bench.demo_trainer import Schedule, Trainer

DEMO = Path(__file__).resolve().parent.parent / "lfm2cpp" / "demo"
QUESTIONS_PER_SKILL = 100
STEPS = 5000
STORED_PROMPTS = [
    [{"role": "user", "content": "What is 23 + 45?"}],
    [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Sort: pear, apple, fig"},
    ],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada."},
        {"role": "user", "content": "What is my name?"},
    ],
]


def report(line: str) -> None:
    print(line, flush=True)


def make_tokenizer(seed: int) -> Tokenizer:
    rng = Random(f"tokenizer-{seed}")
    chats = (training_chat(rng, 10) for _ in range(4000))
    return train_tokenizer((m["content"] for chat in chats for m in chat), TOKENIZER_SIZE)


def report_accuracies(
    model: Lfm2ForCausalLM, tokenizer: Tokenizer, held_out: dict[str, list[dict]], kinds: list[str]
) -> None:
    for kind in kinds:
        result = accuracies(model, tokenizer, held_out, kind)
        report(f"{kind:5s} " + " ".join(f"{skill} {share:.3f}" for skill, share in result.items()))


@torch.no_grad()
def write_logits(model: Lfm2ForCausalLM, tokenizer: Tokenizer, path: Path) -> None:
    """ids_N (n,) int32 and logits_N (n, n_vocab) float32 of every position of each prompt.

    error_Q8_0 and error_Q4_0 are the logits' relative RMS change when only the weights are
    rounded to these types: what a runtime's error is to be judged by.
    """
    encoder = ChatEncoder(tokenizer)
    prompts = [encoder.encode(chat, answer_next=True)[0] for chat in STORED_PROMPTS]

    def logits() -> list[np.ndarray]:
        return [model(torch.tensor([ids]), use_cache=False).logits[0].numpy() for ids in prompts]

    exact = logits()
    arrays = {f"ids_{i}": np.array(ids, np.int32) for i, ids in enumerate(prompts)}
    arrays |= {f"logits_{i}": rows for i, rows in enumerate(exact)}
    flat = np.concatenate(exact)
    for kind in ("Q8_0", "Q4_0"):
        with rounded_weights(model, kind):
            change = np.concatenate(logits()) - flat
        arrays[f"error_{kind}"] = np.array(np.sqrt(np.square(change).sum() / np.square(flat).sum()))
    np.savez_compressed(path, **arrays)


def write_demo(model: Lfm2ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Saves the checkpoint, loads it again, judges it on unseen questions, stores its logits."""
    save_checkpoint(model, tokenizer, out / "model")
    held_out = {skill: held_out_questions(skill, QUESTIONS_PER_SKILL) for skill in SKILLS}
    text = ",\n".join(
        f'"{skill}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]"
        for skill, rows in held_out.items()
    )
    (out / "held_out.json").write_text("{\n" + text + "\n}\n", encoding="ascii")
    saved, saved_tokenizer = load_checkpoint(out / "model")
    write_logits(saved, saved_tokenizer, out / "expected_logits.npz")
    report("the saved checkpoint, in float32, on the held-out questions:")
    report_accuracies(saved, saved_tokenizer, held_out, ["BF16", "Q8_0", "Q4_0"])
    for skill, rows in held_out.items():
        for row, given in wrong_answers(saved, saved_tokenizer, rows):
            question = row["messages"][-1]["content"]
            report(f"  {skill}: {question!r} wants {row['answer']!r}, gets {given!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEMO)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--state", type=Path, help="save the training here, and resume from it")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    tokenizer = make_tokenizer(options.seed)
    model = build_model(options.seed)
    trainer = Trainer(model, ChatEncoder(tokenizer), Schedule(options.steps), options.seed)
    if options.state and options.state.exists():
        trainer.resume(options.state)
    # Questions of its own: the shipped ones are looked at once, when all is done.
    watched = {skill: held_out_questions(skill, 60, seed=1) for skill in SKILLS}
    for step in trainer.run(report):
        model.eval()
        report_accuracies(model, tokenizer, watched, ["BF16"] if step % 1500 else ["BF16", "Q4_0"])
        model.train()
        if options.state:
            trainer.save(options.state)
    write_demo(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
