"""The training loop of the demonstration model: batches, learning rate, optimizers, steps."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from transformers import Lfm2ForCausalLM

from bench.demo_rounding import rounded_weights
from bench.demo_text import training_chat
from bench.demo_tokenizer import ChatEncoder

TOKENS_PER_STEP = 4096
# Row lengths: chats grow in the course of the training.
SHORT_ROW, ROW, LONG_ROW = 128, 256, 2048
TOKENS_PER_TURN = 18  # less than the average, so that rows are full
IGNORE = -100
MATRIX_RATE, OTHER_RATE = 4e-3, 2e-3
SAVE_EVERY = 500


@dataclass(frozen=True)
class Schedule:
    """What changes in the course of the training; shares are of its length."""

    steps: int
    warmup: int = 100
    longer_from: float = 0.35
    longest_from: float = 0.75
    decay_from: float = 0.65
    rounding_from: float = 0.75

    def rate(self, step: int) -> float:
        """The share of the full learning rate: warm-up, constant, linearly to zero."""
        left = (self.steps - step) / (self.steps * (1 - self.decay_from))
        return min(1.0, (step + 1) / self.warmup, left)

    def weights(self, step: int) -> str:
        """The kind of file the weights are rounded for in this step."""
        if step < self.rounding_from * self.steps:
            return "BF16"
        return ("Q4_0", "BF16", "Q4_0", "Q8_0")[step % 4]

    def row(self, step: int) -> int:
        if step >= self.longest_from * self.steps and step % 24 == 0:
            return LONG_ROW
        return ROW if step >= self.longer_from * self.steps else SHORT_ROW


def batch(encoder: ChatEncoder, row: int, rng: Random) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets), both (TOKENS_PER_STEP / row, row); IGNORE where nothing is learnt."""
    n_rows = TOKENS_PER_STEP // row
    ids = np.zeros((n_rows, row + 1), np.int64)
    targets = np.full((n_rows, row + 1), IGNORE, np.int64)
    for i in range(n_rows):
        chat_ids, mask = encoder.encode(training_chat(rng, row // TOKENS_PER_TURN))
        n = min(row + 1, len(chat_ids))
        ids[i, :n] = chat_ids[:n]
        targets[i, :n] = np.where(mask[:n], chat_ids[:n], IGNORE)
    return torch.from_numpy(ids[:, :-1]), torch.from_numpy(targets[:, 1:])


def make_optimizers(model: Lfm2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (half the steps of AdamW here), AdamW for embedding, norms, kernels."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=MATRIX_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Trainer:
    """Owns the model, its optimizers and the step count; saves and resumes all three."""

    def __init__(self, model: Lfm2ForCausalLM, encoder: ChatEncoder, schedule: Schedule, seed: int):
        self.model, self.encoder, self.schedule, self.seed = model, encoder, schedule, seed
        self.optimizers = make_optimizers(model)
        self.base_rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.step = 0
        self.loss = 0.0
        model.train()
        model.set_attn_implementation("eager")  # faster than the CPU's fused one at these lengths
        self._compiled = model.model
        if shutil.which("c++") or shutil.which("g++"):
            self._compiled = torch.compile(model.model, dynamic=False)

    def save(self, path: Path) -> None:
        optimizers = [o.state_dict() for o in self.optimizers]
        state = {"step": self.step, "model": self.model.state_dict(), "optimizers": optimizers}
        torch.save(state, path)

    def resume(self, path: Path) -> None:
        state = torch.load(path)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def _learn(self) -> float:
        """One step; returns its loss."""
        row = self.schedule.row(self.step)
        ids, targets = batch(self.encoder, row, Random(f"text-{self.seed}-{self.step}"))
        wanted = targets != IGNORE
        body = self.model.model if row == LONG_ROW else self._compiled
        with rounded_weights(self.model, self.schedule.weights(self.step)):
            with torch.autocast("cpu", torch.bfloat16):
                hidden = body(input_ids=ids, use_cache=False).last_hidden_state
                logits = self.model.lm_head(hidden[wanted])
            loss = torch.nn.functional.cross_entropy(logits.float(), targets[wanted])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * self.schedule.rate(self.step)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def run(self, report: Callable[[str], None]) -> Iterator[int]:
        """Trains to the end; yields the step count every SAVE_EVERY steps and at the end."""
        started, first = time.monotonic(), self.step
        while self.step < self.schedule.steps:
            loss = self._learn()
            self.loss = loss if self.step == first else 0.97 * self.loss + 0.03 * loss
            self.step += 1
            if self.step % 50 == 0:
                seconds = time.monotonic() - started
                speed = (self.step - first) * TOKENS_PER_STEP / seconds
                report(f"step {self.step} loss {self.loss:.4f} {seconds:.0f} s {speed:.0f} tokens/s")
            if self.step % SAVE_EVERY == 0 or self.step == self.schedule.steps:
                yield self.step
