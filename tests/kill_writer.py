"""Run by test_files_signals.py as a process of its own: start writers, interrupt them, look at what is left.

    python kill_writer.py DIRECTORY ROUNDS SIGNAL[,SIGNAL]   ->  one JSON object on stdout

Each writer is a fork, which costs a millisecond where a new interpreter costs a quarter of a second.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import click

from lfm2cpp.cli.group import invoke
from lfm2cpp.ggml import GGMLType
from lfm2cpp.gguf import TensorToWrite, Value, read_gguf, write_gguf
from lfm2cpp.signals import SIGNALS

N_TENSORS, N_BYTES = 6, 1 << 18


@click.command()
@click.pass_context
def save(context: click.Context) -> None:
    """Replace the target by a file of N_TENSORS tensors, a little slowly."""
    target, ready = context.obj

    def chunks(i: int) -> list[bytes]:
        if i == 0:
            os.write(ready, b"!")
        time.sleep(0.002)
        return [bytes([i + 1]) * N_BYTES]

    tensors = [TensorToWrite(f"t{i}", (N_BYTES // 4,), GGMLType.F32, lambda i=i: chunks(i)) for i in range(N_TENSORS)]
    write_gguf(target, {"n": Value.u32(1)}, tensors, force=True)


def writer(target: Path, ready: int) -> None:
    sys.argv = ["save"]
    save.context_settings = {"obj": (target, ready)}
    sys.stderr = open(os.devnull, "w")
    code = 99
    try:
        try:
            invoke(save, "save")
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # as of here the interpreter would be shutting down
    except SystemExit as left:
        from lfm2cpp.files import _remove_leftovers

        _remove_leftovers()  # what atexit does in a process that is no fork
        code = left.code or 0
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def run_round(target: Path, signals: list[int], rng: random.Random) -> int:
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        writer(target, tell)
    os.close(tell)
    os.read(ready, 1)
    os.close(ready)
    time.sleep(rng.uniform(0, 0.025))
    for number in signals:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            break
        time.sleep(rng.uniform(0, 0.001))
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def state_of(target: Path) -> str:
    if target.read_bytes() == b"old":
        return "old"
    with read_gguf(target) as g:  # raises for anything that is not complete
        if all(set(g.data(f"t{i}").tolist()) == {i + 1} for i in range(N_TENSORS)):
            return "new"
    return "damaged"


def main() -> None:
    directory, rounds = Path(sys.argv[1]), int(sys.argv[2])
    signals = [int(signal.Signals[name]) for name in sys.argv[3].split(",")]
    rng = random.Random(7)
    target = directory / "m.gguf"
    outcomes: Counter[str] = Counter()
    partials = 0
    for _ in range(rounds):
        target.write_bytes(b"old")
        code = run_round(target, signals, rng)
        left = [p for p in directory.iterdir() if p != target]
        partials = max(partials, len(left))
        outcomes[f"{code} {state_of(target)}"] += 1
    json.dump({"outcomes": outcomes, "partials": partials}, sys.stdout)


if __name__ == "__main__":
    main()
