"""Trains the demonstration model's tokenizer: LFM2's kind, a small vocabulary.

Byte-level BPE with LFM2's pre-tokenizer, special tokens at ids 0-13 and ignore_merges. Digits
stay single tokens, because the text it learns from has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from bench.demo_text import Message

SPECIAL_TOKENS = [
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>",
    "<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>",
    "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>",
    "<|tool_response_end|>",
]  # fmt: skip
PAD, BOS, IM_START, IM_END = 0, 1, 6, 7
LFM2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The answer stands in {% generation %}, as in LFM2.5's templates.
CHAT_TEMPLATE = (
    "{{- bos_token -}}\n"
    "{%- for message in messages -%}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' -}}\n"
    "    {%- if message['role'] == 'assistant' -%}\n"
    "        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}\n"
    "        {{- '\\n' -}}\n"
    "    {%- else -%}\n"
    "        {{- message['content'] + '<|im_end|>\\n' -}}\n"
    "    {%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "    {{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of vocab_size tokens, learnt from texts (their digits are left out)."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LFM2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((re.sub(r"\d", " ", text) for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|>:0 $A:0",
        pair="<|startoftext|>:0 $A:0 <|startoftext|>:1 $B:1",
        special_tokens=[("<|startoftext|>", BOS)],
    )
    return tokenizer


class ChatEncoder:
    """Turns chats into token ids and a mask of the tokens the model has to produce."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._roles = {
            role: [IM_START, *self._encode(f"{role}\n")] for role in ("system", "user", "assistant")
        }
        self._newline = self._encode("\n")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, chat: list[Message], *, answer_next: bool = False) -> tuple[list[int], list[int]]:
        """(ids, mask): mask is 1 on an assistant's text and its <|im_end|>.

        answer_next appends the opening of the assistant's next message.
        """
        ids, mask = [BOS], [0]
        for message in chat:
            opening = self._roles[message["role"]]
            content = [*self._encode(message["content"]), IM_END]
            ids += [*opening, *content, *self._newline]
            wanted = int(message["role"] == "assistant")
            mask += [0] * len(opening) + [wanted] * len(content) + [0] * len(self._newline)
        if answer_next:
            ids += self._roles["assistant"]
            mask += [0] * len(self._roles["assistant"])
        return ids, mask
