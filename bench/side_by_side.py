"""lfm2cpp beside llama.cpp on this machine: whole processes in turn (A B, B A, ...), medians of the rounds' ratios.

    python bench/side_by_side.py --llama-bench BUILD/bin/llama-bench \\
        [--batched-bench BUILD/bin/llama-batched-bench] [--completion BUILD/bin/llama-completion] \\
        [--part decode,prefill,...] [--rounds 5] [-r 2] [-t 2] [--models DIR] [--note "about the build"]
    python bench/side_by_side.py --llama-bench ... --part custom --shape 700M Q8_0 -p 333 -n 32 -d 0,100

Files of random weights in the true shapes are made below --models when they are not there. Every part rewrites its own
numbers in bench/results.json; bench/results.md and the pictures are made from that file (see report.py). Run it on a
quiet machine: the load average is written down with the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from peer import OURS, ROOT, BatchedCase, Case, batched_speeds, output_of, speeds, whole_process  # noqa: E402
from report import HERE, load_results, save_part, write_report  # noqa: E402

from lfm2cpp.benchmark.random_model import write_random_model  # noqa: E402
from lfm2cpp.benchmark.ranges import parse_range  # noqa: E402
from lfm2cpp.benchmark.shapes import find_shape  # noqa: E402
from lfm2cpp.gguf import read_gguf  # noqa: E402
from lfm2cpp.text.vocab import Vocab  # noqa: E402
from lfm2cpp.threads import default_threads  # noqa: E402

PARTS = ("decode", "prefill", "depth", "batched", "profile", "generate", "process", "load")  # and custom
N_CTX = 4096  # of the whole-process runs
PROMPT_TOKENS = 4000
SETTLING_SECONDS = 5


class Comparison:
    """The two programs, how often they take turns, and where the numbers go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.llama_bench = [str(args.llama_bench)]
        self.results = load_results(args.out)
        args.models.mkdir(parents=True, exist_ok=True)

    def model(self, shape: str, file_type: str) -> Path:
        """A file of random weights, made when it is not there, in pages as if it had just been read."""
        known = find_shape(shape)  # whose name has no commas: llama-bench takes them for the next file
        path = self.args.models / f"LFM2-{known.name}-random-{file_type}.gguf"
        if not path.exists():
            print(f"making {path}", flush=True)
            write_random_model(path, known, file_type)
        read_anew(path)
        return path

    def save(self, part: str, rows: list[dict[str, Any]]) -> None:
        """Keep a part's rows, with what they were measured on."""
        self.results["opponent"] = self.opponent()
        save_part(self.args.out, self.results, part, rows, rounds=self.args.rounds)

    def opponent(self) -> dict[str, str]:
        tiny = self.model("350M,n_layer=2,attention=1,n_embd=64,n_head_kv=1,n_ff=64,n_vocab=512", "F32")
        command = [*self.llama_bench, "-m", str(tiny), "-p", "1", "-n", "0", "-r", "1", "-o", "json"]
        entry = json.loads(output_of(command))[0]
        return {"name": "llama.cpp", "commit": entry["build_commit"], "note": self.args.note}

    def in_turn(self, ours: Callable[[], dict[str, float]], theirs: Callable[[], dict[str, float]]) -> dict[str, Any]:
        """Alternate, the order changing every round; returns medians by test and the rounds themselves."""
        rounds: list[tuple[dict[str, float], dict[str, float]]] = []
        for i in range(self.args.rounds):
            if i % 2:
                b, a = theirs(), ours()
            else:
                a, b = ours(), theirs()
            rounds.append((a, b))
        return {test: summary([a[test] for a, _ in rounds], [b[test] for _, b in rounds]) for test in rounds[0][0]}

    def compare(self, cases: list[Case]) -> list[dict[str, Any]]:
        rows = []
        for case in cases:
            found = self.in_turn(
                lambda case=case: speeds([*OURS, "bench"], case, self.args.repetitions),
                lambda case=case: speeds(self.llama_bench, case, self.args.repetitions),
            )
            for test, numbers in found.items():
                row = {"model": name_of(case.model), "threads": case.n_threads, "test": test, "depth": case.depth}
                rows.append({**row, **numbers})
                show(rows[-1])
        return rows


def read_anew(path: Path) -> None:
    """Have the system forget the file and read it again.

    Linux reads it into pages of 2 MB, but takes them apart with time, and decode is up to an eighth slower from small
    ones. Then wait: a virtual machine gives freed memory back to its host some two seconds later, and everything in it
    stands still for as much as a tenth of a second.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        output_of([*OURS, "bench", "-m", str(path), "-p", "1", "-n", "0", "-r", "1"])
        time.sleep(SETTLING_SECONDS)


def summary(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Medians of both sides and of the rounds' ratios, and the smallest and largest ratio."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def show(row: dict[str, Any]) -> None:
    low, high = row["ratio_range"]
    depth = f" @ d{row['depth']}" if row.get("depth") else ""
    print(
        f"{row['model']:<16} t{row['threads']} {row['test'] + depth:<16} {row['ours']:9.2f} {row['theirs']:9.2f}"
        f"   {row['ratio']:.2f} ({low:.2f} to {high:.2f})",
        flush=True,
    )


def name_of(path: Path) -> str:
    return path.stem.removeprefix("LFM2-").replace("-random-", " ")


# --- the parts


def decode(c: Comparison) -> Iterator[dict[str, Any]]:
    models = [("350M", "Q4_0"), ("350M", "Q4_0-pure"), ("350M", "Q8_0"), ("350M", "Q4_K_M"), ("350M", "Q5_K_M"),
              ("350M", "BF16"), ("350M", "F16"), ("1.2B", "Q4_0"), ("1.2B", "Q8_0")]  # fmt: skip
    t = c.args.threads
    yield from c.compare([Case(c.model(*m), t, n_gen=(128,)) for m in models])
    if t > 1:
        yield from c.compare([Case(c.model(*m), 1, n_gen=(64,)) for m in models if m[1] in ("Q4_0", "Q8_0")])
    yield from c.compare([Case(c.model(*m), t, n_gen=(64,)) for m in (("700M", "Q4_0"), ("2.6B", "Q4_0"))])


def prefill(c: Comparison) -> Iterator[dict[str, Any]]:
    models = [("350M", "Q4_0"), ("350M", "Q8_0"), ("350M", "Q4_K_M"), ("350M", "Q5_K_M"), ("350M", "BF16"),
              ("350M", "F16"), ("1.2B", "Q4_0"), ("1.2B", "Q8_0")]  # fmt: skip
    t = c.args.threads
    yield from c.compare([Case(c.model(*m), t, n_prompt=(512,)) for m in models])
    yield from c.compare([Case(c.model("350M", "Q4_0"), t, n_prompt=(16, 64, 333, 2048))])
    if t > 1:
        yield from c.compare([Case(c.model("350M", kind), 1, n_prompt=(512,)) for kind in ("Q4_0", "Q8_0")])
    yield from c.compare([Case(c.model(*m), t, n_prompt=(512,)) for m in (("700M", "Q4_0"), ("2.6B", "Q4_0"))])


def custom(c: Comparison) -> Iterator[dict[str, Any]]:
    """What --shape, -p, -n and -d ask for."""
    args = c.args
    for shape, file_type in args.shape:
        path = c.model(shape, file_type)
        yield from c.compare([Case(path, args.threads, tuple(args.prompt), tuple(args.gen), d) for d in args.depth])


def depth(c: Comparison) -> Iterator[dict[str, Any]]:
    model, t = c.model("350M", "Q4_0-pure"), c.args.threads
    yield from c.compare([Case(model, t, (512,), (32,), d) for d in (0, 1024, 4096, 8192, 16384)])


def batched(c: Comparison) -> Iterator[dict[str, Any]]:
    if c.args.batched_bench is None:
        raise SystemExit("part batched needs --batched-bench")
    case = BatchedCase(c.model("350M", "Q4_0"), c.args.threads, 64, 64, (1, 2, 4, 8, 16))
    found = c.in_turn(
        lambda: batched_speeds([*OURS, "bench", "--batched"], case),
        lambda: batched_speeds([str(c.args.batched_bench)], case),
    )
    for n_parallel, numbers in found.items():
        test = f"{n_parallel} sequence" + "s" * (n_parallel != "1")
        row = {"model": name_of(case.model), "threads": case.n_threads, "test": test, **numbers}
        show(row)
        yield row


def profile(c: Comparison) -> Iterator[dict[str, Any]]:
    """Ours alone: how near each step comes to what the machine can do."""
    for shape, kind in (("350M", "Q4_0"), ("350M", "Q4_0-pure"), ("350M", "Q8_0"), ("350M", "BF16"), ("1.2B", "Q4_0"),
                        ("1.2B", "Q8_0")):  # fmt: skip
        path = c.model(shape, kind)
        command = [*OURS, "bench", "--profile", "-m", str(path), "-p", "512", "-n", "64", "-t", str(c.args.threads),
                   "-r", str(max(2, c.args.repetitions)), "-o", "json"]  # fmt: skip
        for entry in json.loads(output_of(command)):
            print(f"{name_of(path):<16} {entry['test']:<8} {entry['share_of_limit']:.1%} of the limit, ops "
                  f"{entry['ops_share']:.1%} of the step", flush=True)  # fmt: skip
            yield {"model": name_of(path), **entry}


def generate(c: Comparison) -> Iterator[dict[str, Any]]:
    """Ours alone: what `run` reaches, sampling and text included, of what `bench` shows."""
    for shape in ("350M", "350M,n_vocab=128000"):
        path, t = c.model(shape, "Q4_0"), str(c.args.threads)
        run = [*OURS, "run", "-m", str(path), "-t", t, "--prompt-ids", ",".join(map(str, range(300, 316))), "-n", "128",
               "--ignore-eos", "--draft-max", "0", "--json"]  # fmt: skip
        case = Case(path, c.args.threads, n_gen=(128,), depth=16)
        found = c.in_turn(
            lambda run=run: {"tg128": json.loads(output_of(run))["timings"]["predicted_per_second"]},
            lambda case=case: speeds([*OURS, "bench"], case, 1),
        )
        row = {"model": name_of(path), "threads": c.args.threads, "test": "run, beside bench", **found["tg128"]}
        show(row)
        yield row


def process(c: Comparison) -> Iterator[dict[str, Any]]:
    """Whole processes: start to first token, and peak memory with a full context."""
    if c.args.completion is None:
        raise SystemExit("part process needs --completion")
    path, threads = c.model("350M", "Q4_0"), str(c.args.threads)
    text = c.args.models / "prompt.txt"
    text.write_text(long_prompt(path, PROMPT_TOKENS))
    for test, prompt in (("first token", ["-p", "Hello"]), (f"{PROMPT_TOKENS} tokens", ["-f", str(text)])):
        common = ["-m", str(path), "-c", str(N_CTX), "-t", threads, "-n", "1", *prompt]
        ours = [*OURS, "run", "--raw", *common]
        theirs = [str(c.args.completion), "-no-cnv", *common]
        runs = [(whole_process(ours), whole_process(theirs)) for _ in range(c.args.rounds)]
        row = {
            "model": name_of(path),
            "threads": c.args.threads,
            "test": test,
            "file_megabytes": path.stat().st_size / 1e6,
            "ours_seconds": statistics.median(a[0] for a, _ in runs),
            "theirs_seconds": statistics.median(b[0] for _, b in runs),
            "ours_megabytes": max(a[1] for a, _ in runs),
            "theirs_megabytes": max(b[1] for _, b in runs),
        }
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        yield row


def long_prompt(path: Path, n_tokens: int) -> str:
    """Words that make about n_tokens tokens of this model's vocabulary, never more."""
    rng = random.Random(0)
    with read_gguf(path) as gguf:
        vocab = Vocab(gguf)
    words: list[str] = []
    count = 1  # the BOS
    while True:
        word = " " + "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 7)))
        count += len(vocab.tokenize(word))
        if count > n_tokens:
            return "".join(words)
        words.append(word)


def load(c: Comparison) -> Iterator[dict[str, Any]]:
    """Decode while another process keeps every core busy: spinning must give way."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(1)
        for row in c.compare([Case(c.model("350M", "Q4_0"), c.args.threads, n_gen=(32,))]):
            yield {**row, "test": f"{row['test']}, every core busy"}
    finally:
        for process_ in busy:
            process_.kill()
            process_.wait()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--batched-bench", type=Path)
    parser.add_argument("--completion", type=Path)
    parser.add_argument("--part", default=",".join(PARTS), help="comma-separated; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-r", "--repetitions", type=int, default=2, help="samples of a test in one process")
    parser.add_argument("-t", "--threads", type=int, default=default_threads())
    parser.add_argument("--models", type=Path, default=ROOT / "bench-data")
    parser.add_argument("--shape", nargs=2, action="append", default=[], help="part custom: as bench --random")
    parser.add_argument("-p", "--prompt", type=parse_range, default=[], help="part custom: as in bench")
    parser.add_argument("-n", "--gen", type=parse_range, default=[], help="part custom: as in bench")
    parser.add_argument("-d", "--depth", type=parse_range, default=[0], help="part custom: as in bench")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json, results.md and the pictures")
    parser.add_argument("--note", default="", help="said about the opponent's build in the report")
    args = parser.parse_args()
    for part in args.part.split(","):
        if part not in (*PARTS, "custom"):
            parser.error(f"unknown part {part!r}; choose from {', '.join(PARTS)} and custom")
        if part == "custom" and not (args.shape and (args.prompt or args.gen)):
            parser.error("part custom needs --shape, and -p or -n")
    return args


def main() -> None:
    args = parse_arguments()
    comparison = Comparison(args)
    print(f"load average {os.getloadavg()[0]:.2f}; {args.rounds} rounds of {args.repetitions} samples", flush=True)
    for part in args.part.split(","):
        print(f"\n{part}", flush=True)
        comparison.save(part, list(globals()[part](comparison)))
        write_report(args.out)


if __name__ == "__main__":
    main()
