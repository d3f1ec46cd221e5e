"""What a parity check found: lines with a verdict each, as a table and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

PHASES = ("weights", "prefill", "decode", "arithmetic")


@dataclass(frozen=True)
class Line:
    """One array of ours against its counterpart; relative RMS is judged against `limit`."""

    phase: str  # weights: GGUF tensor / prefill, decode: intermediate, against HF / arithmetic: against float64
    il: int  # -1 before the layers, n_layer after them
    name: str
    max_abs: float
    rel_rms: float
    limit: float
    row: int | None = None  # the first token (of a weight: the row) that is over the limit
    checksum: str = ""
    checksum_hf: str = ""

    @property
    def ok(self) -> bool:
        return self.rel_rms <= self.limit


@dataclass(frozen=True)
class Score:
    """A figure of a phase's logits, or of the prompt's tokens; `limit` is inf when it is only told, not judged."""

    phase: str  # prompt, prefill, decode
    name: str
    value: float
    limit: float = math.inf

    @property
    def ok(self) -> bool:
        return self.value <= self.limit


@dataclass
class Report:
    """All that `lfm2cpp parity` says about two models and a prompt."""

    hf: str
    gguf: str
    versions: dict[str, str]
    mode: str  # "float32": weights and KV cache; "rounded": anything else
    kinds: list[str]  # of each layer: conv or attention
    tokens: list[int]
    hf_tokens: list[int]  # HF's greedy continuation
    our_tokens: list[int]  # ours, on HF's continuation up to each token
    lines: list[Line] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(line.ok for line in self.lines) and all(score.ok for score in self.scores)

    @property
    def first_divergence(self) -> int | None:
        """The first token of the continuation that differs."""
        pairs = zip(self.our_tokens, self.hf_tokens, strict=True)
        return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)

    def place(self, il: int) -> str:
        """ "layer 3 (conv)", or what stands before and after the layers."""
        if 0 <= il < len(self.kinds):
            return f"layer {il} ({self.kinds[il]})"
        return "the embedding" if il < 0 else "the output"

    def failure(self) -> str | None:
        """One line about the first thing that is wrong: where the computation leaves HF's, then which weights do."""
        bad = [line for line in self.lines if not line.ok]
        computed = [line for line in bad if line.phase != "weights"]
        # An operation that is wrong on its own inputs tells more than one that got wrong inputs.
        computed.sort(key=lambda line: line.phase != "arithmetic")
        said = [_describe(self.place(line.il), line) for line in computed[:1]]
        weights = [line for line in bad if line.phase == "weights"]
        if weights:
            more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
            said.append(_describe(self.place(weights[0].il), weights[0]) + more)
        if not said:
            said = [f"{s.phase}: {s.name} {s.value:.3g}, limit {s.limit:.3g}" for s in self.scores if not s.ok][:1]
        return "; ".join(said) or None

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        value["lines"] = [{**asdict(line), "ok": line.ok} for line in self.lines]
        value["scores"] = [{**asdict(score), "ok": score.ok} for score in self.scores]
        return _finite({**value, "ok": self.ok, "first_divergence": self.first_divergence, "failure": self.failure()})


def _describe(place: str, line: Line) -> str:
    at = "" if line.row is None else f", first at {'row' if line.phase == 'weights' else 'token'} {line.row}"
    what = {
        "weights": f"{line.name} is not the checkpoint's",
        "arithmetic": f"{line.name} is not what float64 makes of the same inputs",
    }.get(line.phase, f"{line.name} diverges in {line.phase}")
    return f"{place}: {what} (relative RMS {line.rel_rms:.2e}, limit {line.limit:.2e}{at})"


def _finite(value: Any) -> Any:
    """JSON has no inf: it becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(report: Report, *, verbose: bool = False) -> str:
    """The report for a terminal: one line a layer (its worst intermediate), or with `verbose` every intermediate."""
    rows = [("phase", "where", "worst of it", "max abs", "rel RMS", "limit", "crc32 ours", "HF", "verdict")]
    for phase in PHASES:
        lines = [line for line in report.lines if line.phase == phase]
        rows += [_row(report, line) for line in (lines if verbose else _worst_per_layer(lines))]
    for score in report.scores:
        limit = f"{score.limit:.1e}" if math.isfinite(score.limit) else "-"
        where = "tokenizer" if score.phase == "prompt" else "the logits"
        rows.append((score.phase, where, score.name, "", f"{score.value:.3g}", limit, "", "", _verdict(score.ok)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*_head(report), *text, _continuation(report), *(f"note: {note}" for note in report.notes)])


def _head(report: Report) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    how = "float32: equal up to rounding" if report.mode == "float32" else "judged by what its types must lose"
    return [f"HF    {report.hf}", f"GGUF  {report.gguf} ({how})", f"with  {versions}", ""]


def _worst_per_layer(lines: list[Line]) -> list[Line]:
    """Of each layer the line farthest over, or nearest to, its limit; checksums are those of the layer's output."""
    worst: dict[int, Line] = {}
    for line in lines:
        if line.il not in worst or line.rel_rms / line.limit > worst[line.il].rel_rms / worst[line.il].limit:
            worst[line.il] = line
    last = {line.il: line for line in lines}  # of a layer, l_out
    return [
        Line(**{**asdict(line), "checksum": last[il].checksum, "checksum_hf": last[il].checksum_hf})
        for il, line in worst.items()
    ]


def _row(report: Report, line: Line) -> tuple[str, ...]:
    figures = (f"{line.max_abs:.1e}", f"{line.rel_rms:.1e}", f"{line.limit:.1e}")
    return (
        line.phase, report.place(line.il), line.name, *figures, line.checksum, line.checksum_hf, _verdict(line.ok),
    )  # fmt: skip


def _verdict(ok: bool) -> str:
    return "ok" if ok else "FAILED"


def _continuation(report: Report) -> str:
    n, at = len(report.hf_tokens), report.first_divergence
    if n == 0:
        return "greedy continuation: none asked for"
    if at is None:
        return f"greedy continuation: {n} of {n} tokens equal"
    ours, theirs = report.our_tokens[at], report.hf_tokens[at]
    return f"greedy continuation: {at} of {n} tokens equal, then {ours} instead of HF's {theirs}"
