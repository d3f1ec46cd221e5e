"""The parity check: both models on the same tokens, prefill then token by token, then every verdict.

A file whose weights are all F32 must equal transformers to float32 rounding, intermediate by intermediate. Any other
file, and an f16 KV cache, has lost something itself, so three questions are asked instead: are its weights the
checkpoint's, as far as their types can hold them; is each of our operations what float64 makes of the same inputs
and stored weights; and is the whole no farther from transformers than such a file has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lfm2cpp import reference
from lfm2cpp.arch.lfm2 import HParams
from lfm2cpp.errors import UsageError
from lfm2cpp.ggml import GGMLType

from . import limits
from .intermediates import LOGITS, Intermediate, intermediates
from .measure import checksum, first_row_above, kl_divergence, max_abs, relative_rms, top1_agreement
from .oracle import each_operation, reference_trace
from .report import Line, Score
from .rounding import activation_roundings, linear_names
from .runners import Runner, Trace

Limit = Callable[[str, str], float]  # (phase, name of the intermediate) -> the largest relative RMS


@dataclass(frozen=True)
class Runs:
    """Both sides' intermediates of the same tokens: the prompt at once, then `continuation` one by one."""

    hparams: HParams
    tokens: list[int]
    continuation: list[int]  # HF's greedy choice
    hf: dict[str, Trace]  # by phase: prefill, decode
    ours: dict[str, Trace]

    @property
    def phases(self) -> dict[str, slice]:
        """Phase -> the rows of its tokens among all tokens."""
        n = len(self.tokens)
        return {"prefill": slice(0, n)} | ({"decode": slice(n, None)} if self.continuation else {})

    @property
    def all_tokens(self) -> list[int]:
        return self.tokens + self.continuation

    def n_tokens(self, phase: str) -> int:
        return len(self.tokens if phase == "prefill" else self.continuation)


@dataclass(frozen=True)
class File:
    """What the judge knows of the GGUF: its weights in float64 and their stored types, by canonical name."""

    model: reference.Model
    types: Mapping[str, GGMLType]
    kv_type: str = "f32"

    @property
    def is_exact(self) -> bool:
        """Nothing may be rounded to less than float32."""
        return set(self.types.values()) == {GGMLType.F32} and self.kv_type == "f32"


def run_both(hf: Runner, ours: Runner, tokens: Sequence[int], n_decode: int) -> Runs:
    """Prefill both with `tokens`, then feed both the `n_decode` tokens that HF finds most likely."""
    bad = [t for t in tokens if not 0 <= t < hf.hparams.n_vocab]
    if bad or not tokens:
        found = f"token id {bad[0]}" if bad else "an empty prompt"
        raise UsageError(f"{found} cannot be evaluated; expected ids of 0 to {hf.hparams.n_vocab - 1}")
    hf.reset()
    ours.reset()
    hf_steps, our_steps = [hf.evaluate(tokens)], [ours.evaluate(tokens)]
    continuation: list[int] = []
    for _ in range(n_decode):
        continuation.append(int(hf_steps[-1][LOGITS][-1].argmax()))
        hf_steps.append(hf.evaluate(continuation[-1:]))
        our_steps.append(ours.evaluate(continuation[-1:]))
    return Runs(ours.hparams, list(tokens), continuation, _by_phase(hf_steps), _by_phase(our_steps))


def greedy_choices(runs: Runs) -> list[int]:
    """Our most likely token at each place of HF's continuation."""
    logits = _all_rows(runs.ours)[LOGITS][len(runs.tokens) - 1 :]
    return [int(row.argmax()) for row in logits[: len(runs.continuation)]]


def judge(runs: Runs, file: File) -> tuple[list[Line], list[Score]]:
    """A verdict on every intermediate of both phases, and on the logits."""
    if file.is_exact:
        lines = compare(runs, lambda phase, name: limits.FLOAT32)
        if not all(line.ok for line in lines):
            lines = compare(runs, _allow_rounding(runs, reference_trace(file.model, runs.all_tokens)))
        return lines, _scores(runs, lines, {phase: limits.FLOAT32_KL for phase in runs.phases})
    roundings = activation_roundings(runs.hparams, file.types, file.kv_type)
    rounded = reference_trace(file.model, runs.all_tokens, roundings)
    lines = compare(runs, _allow_file(runs, rounded)) + check_arithmetic(runs, file)
    return lines, _scores(runs, lines, _allowed_kl(runs, rounded))


def compare(runs: Runs, limit: Limit) -> list[Line]:
    """Every intermediate against HF's, in the order of computation; what HF does not show is left out.

    One that we do not show fails: a hole in the check must not look like a pass.
    """
    return [
        _line(phase, item, runs.ours[phase].get(item.name), runs.hf[phase][item.name], limit(phase, item.name))
        for phase in runs.phases
        for item in intermediates(runs.hparams)
        if item.name in runs.hf[phase]
    ]


def check_arithmetic(runs: Runs, file: File) -> list[Line]:
    """Each of our operations against float64 on the same inputs and stored weights."""
    ours = _all_rows(runs.ours)
    roundings = activation_roundings(runs.hparams, file.types, file.kv_type)
    exact = each_operation(file.model, runs.all_tokens, ours)
    rounded = each_operation(file.model, runs.all_tokens, ours, roundings)
    linear = linear_names(runs.hparams)
    lines = []
    for item in intermediates(runs.hparams):
        limit = limits.EXACT_OP
        if item.name in linear:
            limit += limits.LINEAR_RATIO * relative_rms(rounded[item.name], exact[item.name])
        elif item.part == "attn" and file.kv_type == "f16":
            limit = limits.F16_KV_ATTENTION
        lines.append(_line("arithmetic", item, ours.get(item.name), exact[item.name], limit))
    return lines


def _allow_rounding(runs: Runs, exact: Trace) -> Limit:
    """Where transformers itself is far from exact arithmetic, ours need not be nearer to it than that."""

    def limit(phase: str, name: str) -> float:
        own = relative_rms(runs.hf[phase][name], exact[name][runs.phases[phase]])
        return max(limits.FLOAT32, limits.ROUNDING_RATIO * own if own <= limits.ROUNDING_MAX else 0.0)

    return limit


def _allow_file(runs: Runs, rounded: Trace) -> Limit:
    """As far from transformers as the file's weights and rounded activations are."""

    def limit(phase: str, name: str) -> float:
        error = relative_rms(rounded[name][runs.phases[phase]], runs.hf[phase][name])
        return limits.FLOAT32 + limits.slack(runs.n_tokens(phase)) * error

    return limit


def _allowed_kl(runs: Runs, rounded: Trace) -> dict[str, float]:
    """The same for KL, which grows with the square of the error."""
    return {
        phase: limits.FLOAT32_KL
        + limits.slack(runs.n_tokens(phase)) ** 2 * kl_divergence(rounded[LOGITS][rows], runs.hf[phase][LOGITS])
        for phase, rows in runs.phases.items()
    }


def _scores(runs: Runs, lines: Sequence[Line], kl_limits: Mapping[str, float]) -> list[Score]:
    """What the errors of the logits mean for the next token."""
    scores = []
    for line in lines:
        if line.name == LOGITS and line.phase in runs.phases and np.isfinite(line.rel_rms):
            ours, theirs = runs.ours[line.phase][LOGITS], runs.hf[line.phase][LOGITS]
            scores.append(Score(line.phase, "relative RMS", line.rel_rms, line.limit))
            scores.append(Score(line.phase, "KL(HF || ours), nats", kl_divergence(ours, theirs), kl_limits[line.phase]))
            scores.append(Score(line.phase, "top-1 agreement", top1_agreement(ours, theirs)))
    return scores


def _line(phase: str, item: Intermediate, ours: np.ndarray | None, theirs: np.ndarray, limit: float) -> Line:
    """One verdict; an array that is missing or of another shape is infinitely far away."""
    far = float("inf")
    if ours is None or ours.shape != theirs.shape:
        return Line(phase, item.il, item.name, far, far, limit, 0, "", checksum(theirs))
    error = relative_rms(ours, theirs)
    row = None if error <= limit else first_row_above(ours, theirs, limit)
    return Line(
        phase, item.il, item.name, max_abs(ours, theirs), error, limit, row, checksum(ours), checksum(theirs)
    )  # fmt: skip


def _by_phase(steps: list[Trace]) -> dict[str, Trace]:
    return {"prefill": steps[0]} | ({"decode": _joined(steps[1:])} if steps[1:] else {})


def _all_rows(traces: dict[str, Trace]) -> Trace:
    return _joined(list(traces.values()))


def _joined(traces: Sequence[Trace]) -> Trace:
    """Traces of consecutive tokens as one; a name that is not in all of them is dropped."""
    names = [name for name in traces[0] if all(name in trace for trace in traces)]
    return {name: np.concatenate([trace[name] for trace in traces]) for name in names}
