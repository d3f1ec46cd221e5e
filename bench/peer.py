"""Both sides of a comparison as processes: lfm2cpp's commands, llama.cpp's tools, and their results as numbers."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = [sys.executable, "-m", "lfm2cpp"]

# A small process in between: a child's peak memory starts at that of the process it was forked from.
MEASURE = """
import resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(code, time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@dataclass(frozen=True)
class Case:
    """What one process measures on each side: pp and tg tests at one depth."""

    model: Path
    n_threads: int
    n_prompt: tuple[int, ...] = ()
    n_gen: tuple[int, ...] = ()
    depth: int = 0

    def arguments(self, repetitions: int) -> list[str]:
        """The same for both programs."""
        return [
            "-m", str(self.model), "-p", _list(self.n_prompt), "-n", _list(self.n_gen), "-d", str(self.depth),
            "-t", str(self.n_threads), "-r", str(repetitions), "-o", "json",
        ]  # fmt: skip


@dataclass(frozen=True)
class BatchedCase:
    """Sequences that decode together."""

    model: Path
    n_threads: int
    n_prompt: int
    n_gen: int
    n_parallel: tuple[int, ...]


def _list(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers)) or "0"


def output_of(command: list[str]) -> str:
    """What a command writes to both streams. SystemExit tells why it failed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise SystemExit(f"{shlex.join(command)}\ndied of {name}; was it built for this machine?")
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\nfailed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return done.stdout if done.stdout.strip() else done.stderr


def speeds(program: list[str], case: Case, repetitions: int) -> dict[str, float]:
    """Average tokens a second by test (pp512, tg128, ... without the depth); `program` is llama-bench or our bench."""
    entries = json.loads(output_of([*program, *case.arguments(repetitions)]))
    return {f"pp{e['n_prompt']}" if e["n_prompt"] else f"tg{e['n_gen']}": e["avg_ts"] for e in entries}


def batched_speeds(program: list[str], case: BatchedCase) -> dict[str, float]:
    """Tokens a second of all sequences together, by their number; `program` is llama-batched-bench or our bench."""
    n_kv = max(case.n_parallel) * (case.n_prompt + case.n_gen)
    if program[: len(OURS)] == OURS:
        tail = ["-o", "jsonl", "-r", "1"]
    else:
        tail = ["--output-format", "jsonl", "-c", str(n_kv + 64 * max(case.n_parallel))]
    command = [
        *program, "-m", str(case.model), "-npp", str(case.n_prompt), "-ntg", str(case.n_gen),
        "-npl", _list(case.n_parallel), "-t", str(case.n_threads), *tail,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [json.loads(line) for line in (done.stdout + "\n" + done.stderr).splitlines() if line.startswith('{"n_')]
    if done.returncode or not lines:
        raise SystemExit(f"{shlex.join(command)}\nfailed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return {str(line["pl"]): line["speed_tg"] for line in lines}


def whole_process(command: list[str]) -> tuple[float, float]:
    """Seconds and peak megabytes of a process that must succeed."""
    measured = [sys.executable, "-c", MEASURE, *command]
    out = subprocess.run(measured, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    code, seconds, peak = out.split()
    if code != "0":
        raise SystemExit(f"{shlex.join(command)}\nfailed ({code})")
    return float(seconds), int(peak) * (1 if sys.platform == "darwin" else 1024) / 1e6
