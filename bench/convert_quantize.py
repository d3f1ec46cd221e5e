"""Time and memory of converting and quantizing beside llama.cpp's tools, whole processes in turn.

    python bench/convert_quantize.py 350M [--llama-quantize BUILD/bin/llama-quantize]
        [--llama-convert LLAMA.CPP/convert_hf_to_gguf.py --llama-python PYTHON] [--types Q4_0,Q8_0] [--rounds 3]

Checkpoints have random weights and a made-up vocabulary of the real size and are made once, below --dir. The numbers go
to bench/results.json and into bench/results.md. Outputs of both sides are compared byte for byte on the way.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from bench_convert import SHAPES, make_checkpoint  # noqa: E402
from peer import OURS, ROOT, whole_process  # noqa: E402
from report import HERE, load_results, save_part, write_report  # noqa: E402

# llama.cpp's converter knows tokenizers by a hash of what they make of a text, and refuses a made-up vocabulary.
LLAMA_CONVERT = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "lfm2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def compare(step: str, ours: list[str], theirs: list[str], outputs: tuple[Path, Path], rounds: int) -> dict[str, Any]:
    """Run both in turn; `outputs` are what ours and theirs write."""
    runs: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for i in range(rounds):
        turns = [("ours", ours, outputs[0]), ("theirs", theirs, outputs[1])]
        for side, command, output in turns if i % 2 == 0 else reversed(turns):
            output.unlink(missing_ok=True)
            runs[side].append(whole_process(command))
    row = {
        "step": step,
        "ours_seconds": statistics.median(seconds for seconds, _ in runs["ours"]),
        "theirs_seconds": statistics.median(seconds for seconds, _ in runs["theirs"]),
        "ratio": statistics.median(b[0] / a[0] for a, b in zip(runs["ours"], runs["theirs"], strict=True)),
        "ours_megabytes": max(peak for _, peak in runs["ours"]),
        "theirs_megabytes": max(peak for _, peak in runs["theirs"]),
        "identical": filecmp.cmp(*outputs, shallow=False),
    }
    print(", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def steps(args: argparse.Namespace, shape: str) -> Iterator[dict[str, Any]]:
    """Convert to BF16, then quantize what came out."""
    checkpoint, source = args.dir / f"{shape}-hf", args.dir / f"{shape}-bf16.gguf"
    if not (checkpoint / "tokenizer_config.json").exists():
        make_checkpoint(checkpoint, SHAPES[shape])
    outputs = (args.dir / "ours.gguf", args.dir / "theirs.gguf")
    if args.llama_convert:
        tail = ["--outtype", "bf16", "--outfile"]
        yield compare(
            f"{shape}: convert to BF16",
            [*OURS, "convert", str(checkpoint), "--force", *tail, str(outputs[0])],
            [args.llama_python, "-c", LLAMA_CONVERT, str(args.llama_convert), str(checkpoint), *tail, str(outputs[1])],
            outputs, args.rounds,
        )  # fmt: skip
    whole_process([*OURS, "convert", str(checkpoint), "--force", "--outtype", "bf16", "--outfile", str(source)])
    for name in args.types.split(",") if args.llama_quantize else ():
        yield compare(
            f"{shape}: quantize to {name}",
            [*OURS, "quantize", "--force", str(source), str(outputs[0]), name, str(args.threads)],
            [str(args.llama_quantize), str(source), str(outputs[1]), name, str(args.threads)], outputs, args.rounds,
        )  # fmt: skip
    for path in (*outputs, source):
        path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--llama-convert", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that can run it")
    parser.add_argument("--types", default="Q4_0,Q8_0,Q4_K_M,Q6_K")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dir", type=Path, default=ROOT / "bench-data")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json, results.md and the pictures")
    args = parser.parse_args()
    if not args.llama_quantize and not args.llama_convert:
        parser.error("give --llama-quantize, --llama-convert or both")
    rows = [row for shape in args.shapes for row in steps(args, shape)]
    save_part(args.out, load_results(args.out), "files", rows, rounds=args.rounds)
    write_report(args.out)


if __name__ == "__main__":
    main()
