"""Time and memory of `convert` on checkpoints in LFM2's true shapes, beside a plain copy and, if given, llama.cpp.

    python bench/bench_convert.py 350M [--llama-cpp "PYTHON .../convert_hf_to_gguf.py"] [--outtype bf16] [--runs 3]

The checkpoint has random weights and a made-up vocabulary of the real size; it is made once, below --dir. Every run is
a process of its own; peak memory is the kernel's figure for it. The copy is synced to the disk, as our output is.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
from tiny_model import SPECIALS, TinyShape, byte_symbols, hf_config, tokenizer_json  # noqa: E402

from lfm2cpp.arch import iter_tensors, lfm2  # noqa: E402

ATTENTION = (2, 5, 8, 10, 12, 14)
SHAPES = {
    "350M": TinyShape(1024, 16, ATTENTION, 16, 8, 4608, 65536, 1136, n_ctx_train=128000),
    "1.2B": TinyShape(2048, 16, ATTENTION, 32, 8, 8192, 65536, 1136, n_ctx_train=128000),
}


def make_checkpoint(directory: Path, shape: TinyShape) -> None:
    """BF16 weights without meaning, and a tokenizer with as many pieces and merges as LFM2's."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    entries = [e for e in iter_tensors(lfm2, shape.hparams()) if not e.spec.optional]
    header, end = {}, 0
    for e in entries:
        hf_shape = (e.shape[0], 1, e.shape[1]) if e.name.endswith("shortconv.conv.weight") else e.shape
        nbytes = 2 * int(np.prod(e.shape))
        header[e.hf_name] = {"dtype": "BF16", "shape": hf_shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for e in entries:
            x = rng.standard_normal(int(np.prod(e.shape)), dtype=np.float32) * np.float32(0.02)
            out.write((x.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    (directory / "config.json").write_text(json.dumps(hf_config(shape)))
    (directory / "tokenizer.json").write_text(json.dumps(_tokenizer(shape)))
    names = {"bos_token": SPECIALS[1], "eos_token": SPECIALS[7], "pad_token": SPECIALS[0]}
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _tokenizer(shape: TinyShape) -> dict:
    pieces = [*SPECIALS, *byte_symbols()]
    rng, pool, merges, seen = random.Random(0), byte_symbols(), [], set(pieces)
    while len(pieces) < shape.n_vocab - shape.n_pad:
        pair = [rng.choice(pool), rng.choice(pool)]
        piece = "".join(pair)
        if len(piece) <= 12 and piece not in seen:
            seen.add(piece)
            pool.append(piece)
            pieces.append(piece)
            merges.append(pair)
    result = tokenizer_json(TinyShape())
    result["model"].update(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    return result


# A small process in between: a child's peak starts at that of the process it was forked from.
MEASURE = """
import resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(code, time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MB of a process."""
    out = subprocess.run([sys.executable, "-c", MEASURE, *command], check=True, capture_output=True, text=True).stdout
    code, seconds, peak = out.split()
    if code != "0":
        raise SystemExit(f"failed ({code}): {shlex.join(command)}")
    return float(seconds), int(peak) / (1024 if sys.platform != "darwin" else 1 << 20)


COPY = """
import os, sys
with open(sys.argv[1], "rb", buffering=0) as src, open(sys.argv[2], "wb", buffering=0) as dst:
    buffer = memoryview(bytearray(1 << 20))
    while n := src.readinto(buffer):
        dst.write(buffer[:n])
    os.fsync(dst.fileno())
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--outtype", default="bf16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "lfm2cpp-bench")
    parser.add_argument("--llama-cpp", help="command of llama.cpp's converter")
    args = parser.parse_args()
    source, target = args.dir / f"{args.shape}-hf", args.dir / "out.gguf"
    if not (source / "tokenizer_config.json").exists():
        make_checkpoint(source, SHAPES[args.shape])
    tail = ["--outtype", args.outtype, "--outfile", str(target)]
    commands = {
        "copy": [sys.executable, "-c", COPY, str(source / "model.safetensors"), str(target)],
        "ours": [sys.executable, "-m", "convert", str(source), "--force", *tail],
    }
    if args.llama_cpp:
        commands["llama.cpp"] = [*shlex.split(args.llama_cpp), str(source), *tail]
    for i in range(args.runs):  # in turn, so that a busy moment hits all of them
        for name, command in commands.items():
            target.unlink(missing_ok=True)
            seconds, peak = run(command)
            print(f"run {i + 1}  {name:<10} {seconds:6.2f} s  {peak:6.0f} MB peak", flush=True)
    target.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
