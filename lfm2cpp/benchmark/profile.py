"""Where the time of a step goes: ops grouped by kind, each beside what the machine could do at most.

A kind's limit is the larger of two times: its bytes at the measured read bandwidth, its multiply-adds at the measured
peak: int8 for block types, float32 for the rest and for attention, twice that for BF16 where its products are twice as
fast. Decode runs into the first, prefill into the second.

What others on the machine leave of the bandwidth changes from second to second, so it is measured between the
repetitions, and the medians of both are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lfm2cpp.engine.engine import Engine
from lfm2cpp.engine.plan import Op
from lfm2cpp.kernels.library import Progress, library
from lfm2cpp.kernels.widths import BF16_PAIRS, MATRICES, PAGE_TOKENS

from .limits import KERNELS, READ_STEP, Limits, Memory, f32_rate, int8_rates, read_rate
from .measure import Base, ModelInfo, Runner, Setup, Test, open_engine

READS = 2  # times that the memory is read before a repetition; the faster counts
FLOATS = ("attention", "F32", "F16", "BF16")  # last words of the labels of float products


@dataclass
class Kind:
    """All ops with the same label in one step: how many, their nanoseconds, bytes read and multiply-adds."""

    label: str
    n_ops: int = 0
    ns: float = 0.0
    nbytes: float = 0.0
    macs: float = 0.0

    def share_of_limit(self, read: float, limits: Limits) -> float:
        """The shortest time that the machine allows over the time taken; 0 for ops that neither stream nor multiply."""
        shortest = max(self.nbytes / read, self.macs / self._peak(limits))
        return 1e9 * shortest / self.ns if self.ns else 0.0

    def _peak(self, limits: Limits) -> float:
        """Multiply-adds a second, at most."""
        kind = self.label.split()[-1]
        if kind not in FLOATS:
            return limits.int8_macs_per_s
        is_double = BF16_PAIRS and kind == "BF16"  # products of pairs
        return limits.f32_macs_per_s * (2 if is_double else 1)


@dataclass
class Profile:
    """A step (a token of decode, or a whole prompt): the mean of the middle half of `n_steps` by time.

    Now and then something else holds a step up for long. `reads` are bandwidths from before the first repetition to
    after the last, `read_bytes_per_s` is what the step is compared with.
    """

    setup: Setup
    test: Test
    model: ModelInfo
    limits: Limits
    reads: Reads
    n_steps: int
    step_ns: float
    kinds: list[Kind] = field(default_factory=list)

    @property
    def read_bytes_per_s(self) -> float:
        """Of memory, or of the mapped weights where they are read faster: caches may hold a small model."""
        return max(self.limits.read_bytes_per_s, self.reads.of_weights)

    @property
    def total(self) -> Kind:
        total = Kind("sum of ops")
        for kind in self.kinds:
            total.n_ops += kind.n_ops
            total.ns += kind.ns
            total.nbytes += kind.nbytes
            total.macs += kind.macs
        return total

    @property
    def ops_share(self) -> float:
        """The ops' own times over the step's."""
        return self.total.ns / self.step_ns

    @property
    def share_of_limit(self) -> float:
        """The shortest time of all kinds over the step's."""
        return sum(k.ns * k.share_of_limit(self.read_bytes_per_s, self.limits) for k in self.kinds) / self.step_ns

    def to_json(self) -> dict[str, Any]:
        read = self.read_bytes_per_s
        return {
            "model_filename": self.model.filename,
            "model_type": self.model.type,
            "n_threads": self.setup.n_threads,
            "n_batch": self.setup.n_batch,
            "type_k": self.setup.kv_type,
            "test": self.test.name,
            "n_steps": self.n_steps,
            "step_ns": round(self.step_ns),
            "ops_share": self.ops_share,
            "share_of_limit": self.share_of_limit,
            "limits": self.limits.to_json(),
            "weights_read_bytes_per_s": self.reads.of_weights,
            "read_samples_bytes_per_s": self.reads.memory,
            "weights_read_samples_bytes_per_s": self.reads.weights,
            "ops": [
                {
                    "kind": k.label,
                    "n": k.n_ops,
                    "ns": round(k.ns),
                    "bytes": round(k.nbytes),
                    "macs": round(k.macs),
                    "share_of_limit": k.share_of_limit(read, self.limits),
                }
                for k in self.kinds
            ],
        }


def run_profiles(
    setup: Setup, tests: list[Test], repetitions: int, *, progress: Progress | None = None
) -> Iterator[Profile]:
    """Profile every pp and tg test. Takes up to a gigabyte of memory beside the model's."""
    n_ctx = max(test.n_depth + test.n_tokens for test in tests)
    with open_engine(setup, n_ctx, progress) as engine:
        library().load(KERNELS, progress)
        model, base, n = ModelInfo.of(engine), Base(engine), setup.n_threads
        probe = ReadProbe(engine, n)  # kept to the end: while the system takes it back, a step now and then takes long
        int8, f32 = int8_rates(n), f32_rate(n)
        for test in tests:
            reads = Reads()
            steps = _profile_test(Runner(engine, base.at(test.n_depth)), test, repetitions, probe, reads)
            limits = Limits(n, reads.of_memory, *int8, f32, probe.memory.nbytes)
            yield Profile(setup, test, model, limits, reads, *steps)


@dataclass
class Reads:
    """Bytes read a second, of memory and of the mapped weights, one after the other."""

    memory: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    @property
    def of_memory(self) -> float:
        return statistics.median(self.memory)

    @property
    def of_weights(self) -> float:
        return statistics.median(self.weights or [0.0])


class ReadProbe:
    """How fast `n_threads` read memory, and the mapped weights where they lie, as a decode step has to."""

    def __init__(self, engine: Engine, n_threads: int) -> None:
        infos = [info for info in engine.gguf.tensors.values() if info.file == 0]
        self._first = min(engine.gguf.locate(info.name) for info in infos)
        self._nbytes = max(engine.gguf.locate(info.name) + info.nbytes for info in infos) - self._first
        self._n_threads = n_threads
        self.memory = Memory()

    def add_to(self, reads: Reads) -> None:
        """Measure once more."""
        reads.memory.append(self.memory.read_rate(self._n_threads, READS))
        if self._nbytes >= READ_STEP * self._n_threads:
            reads.weights.append(read_rate(self._first, self._nbytes, self._n_threads, READS))


def _profile_test(
    runner: Runner, test: Test, repetitions: int, probe: ReadProbe, reads: Reads
) -> tuple[int, float, list[Kind]]:
    """How many steps, nanoseconds a step, and where they went."""
    engine = runner.engine
    runner.run(test.n_prompt, min(test.n_gen, 1))
    steps_ns: list[int] = []
    ns_by_op: list[np.ndarray] = []
    for _ in range(repetitions):
        probe.add_to(reads)
        engine.team.start_profile(test.n_prompt or test.n_gen)  # a replay a token, at most
        steps = runner.run(test.n_prompt, test.n_gen)
        replays = engine.team.stop_profile()
        steps_ns += steps
        ns_by_op += list(replays.reshape(len(steps), -1, replays.shape[1]).sum(axis=1))
    probe.add_to(reads)
    n_steps = len(steps_ns)
    middle = np.argsort(steps_ns)[n_steps // 4 : n_steps - n_steps // 4]
    step_ns = float(np.mean([steps_ns[i] for i in middle]))
    return n_steps, step_ns, _kinds(engine, np.mean([ns_by_op[i] for i in middle], axis=0), test)


def _kinds(engine: Engine, ns_by_op: np.ndarray, test: Test) -> list[Kind]:
    """Times and costs of one step by label, the longest first."""
    n_tokens = test.n_prompt or 1
    n_chunks = -(-n_tokens // engine.n_batch)
    context = test.n_depth + (test.n_prompt or test.n_gen) / 2  # tokens that attention sees, on average
    kinds: dict[str, Kind] = {}
    for op, ns in zip(engine.plan.ops, ns_by_op.tolist(), strict=True):
        kind = kinds.setdefault(op.label, Kind(op.label))
        kind.n_ops += 1
        kind.ns += ns
        rows = 1 if op.args.get("count") == engine.plan.out_rows else n_tokens
        kind.macs += op.macs * rows
        kind.nbytes += op.nbytes * (n_tokens if op.label == "get_rows" else n_chunks)
        if _reads_context(op):
            kind.macs += n_tokens * context * 2 * op.args["n_head"] * op.args["n_embd_head"]
            kind.nbytes += n_chunks * context * _kv_bytes(engine)
    return sorted(kinds.values(), key=lambda k: -k.ns)


def _reads_context(op: Op) -> bool:
    return op.label == "attention" and "scale" in op.args


def _kv_bytes(engine: Engine) -> float:
    """K and V of one token in one layer."""
    return engine.layout.conv_offset / PAGE_TOKENS / len(engine.hparams.attention_layers)


def table(profile: Profile) -> str:
    """The profile for people, as a Markdown table with a line above and two below."""
    total, step = profile.total, profile.step_ns
    what = "token" if profile.test.n_gen else "prompt"
    threads = f"{profile.setup.n_threads} thread{'s'[: profile.setup.n_threads > 1]}"
    how = f"mean of the middle half of {profile.n_steps}"
    lines = [
        f"{profile.model.type}, {threads}, {profile.test.name}: {_time(step)} a {what}, {how}",
        "",
        "| op             |  ops |      time |   share |     bytes |   GB/s |      MAC |  G MAC/s | of limit |",
        "| -------------- | ---: | --------: | ------: | --------: | -----: | -------: | -------: | -------: |",
    ]
    for kind in (*profile.kinds, total):
        seconds = kind.ns / 1e9 or 1e-9
        limit = kind.share_of_limit(profile.read_bytes_per_s, profile.limits)
        if kind is total:
            limit = profile.share_of_limit
        lines.append(
            f"| {kind.label:<14} | {kind.n_ops:>4} | {_time(kind.ns):>9} | {kind.ns / step:>7.1%} "
            f"| {kind.nbytes / 1e6:>6.1f} MB | {kind.nbytes / seconds / 1e9:>6.1f} "
            f"| {kind.macs / 1e6:>6.0f} M | {kind.macs / seconds / 1e9:>8.1f} | {limit:>8.1%} |"
        )
    limits = profile.limits
    vectors = f" (in vectors {limits.int8_vector_macs_per_s / 1e9:.0f})" if MATRICES else ""
    lines += [
        "",
        f"limits with {threads}: memory {_rates(profile.reads.memory)}, these weights in place "
        f"{_rates(profile.reads.weights)}, int8 {limits.int8_macs_per_s / 1e9:.0f}{vectors} and float32 "
        f"{limits.f32_macs_per_s / 1e9:.0f} G MAC/s",
        f"the ops' own times are {profile.ops_share:.1%} of the step",
    ]
    return "\n".join(lines)


def _rates(samples: list[float]) -> str:
    """The median, and what it lies between."""
    if not samples:
        return "0 GB/s"
    middle, least, most = (value / 1e9 for value in (statistics.median(samples), min(samples), max(samples)))
    return f"{middle:.1f} GB/s ({least:.1f} to {most:.1f})"


def _time(ns: float) -> str:
    return f"{ns / 1e6:.2f} ms" if ns >= 1e6 else f"{ns / 1e3:.1f} us"
