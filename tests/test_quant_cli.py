"""The command as a user runs it: arguments, messages, exit codes, interruption, memory."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from quant_model import hard_model, sha256

from lfm2cpp.errors import UsageError
from lfm2cpp.ggml import GGMLType
from lfm2cpp.gguf import TensorToWrite, Value, read_gguf, write_gguf
from quant.cli import parse_arguments
from quant.quantize import check_threads, quantize_file
from quant.recipe import RECIPES

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "lfm2cpp", "quantize"]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *(str(a) for a in arguments)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=100, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return hard_model(tmp_path_factory.mktemp("source") / "in.gguf", "narrow")


@pytest.mark.parametrize(("arguments", "expected"), [
    ("in.gguf out.gguf Q4_0 3", ("in.gguf", "out.gguf", "Q4_0", 3)),
    ("in.gguf out.gguf q8_0", ("in.gguf", "out.gguf", "Q8_0", None)),
    ("a/in.gguf q6_k 1", ("a/in.gguf", "a/ggml-model-Q6_K.gguf", "Q6_K", 1)),
    ("in.gguf Bf16", ("in.gguf", "ggml-model-BF16.gguf", "BF16", None)),
    ("in.gguf out.gguf 2 2", ("in.gguf", "out.gguf", "Q4_0", 2)),
    ("in.gguf 7", ("in.gguf", "ggml-model-Q8_0.gguf", "Q8_0", None)),
    ("in.gguf out.gguf COPY", ("in.gguf", "out.gguf", "COPY", None)),
])  # fmt: skip
def test_arguments_as_llama_quantize_reads_them(arguments, expected):
    src, dst, recipe, n_threads = parse_arguments(tuple(arguments.split()))
    assert (str(src), str(dst), recipe.name) == expected[:3]
    assert n_threads == (expected[3] or check_threads(None))


@pytest.mark.parametrize("arguments", [  # D1
    "", "in.gguf", "in.gguf out.gguf", "in.gguf Q9", "in.gguf out.gguf Q9", "in.gguf Q4_0 Q4_0", "in.gguf Q4_0 2 3",
    "in.gguf out.gguf Q4_0 2 3", "in.gguf Q4_0 two", "in.gguf Q4_0 2.5", "in.gguf Q4_0 --purr", "in.gguf Q4_0 -x",
])  # fmt: skip
def test_misuse_tells_the_types(arguments):
    with pytest.raises(UsageError, match=" ".join(RECIPES)) as caught:
        parse_arguments(tuple(arguments.split()))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("n_threads", ["0", "-1", "1000000", "9" * 18])
def test_threads_out_of_range(n_threads):
    with pytest.raises(UsageError, match="expected 1 to 512"):
        parse_arguments(("in.gguf", "Q4_0", n_threads))


def test_quantize(source, tmp_path):
    target = tmp_path / "out.gguf"
    done = run(source, target, "Q4_0", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and f"({target.stat().st_size} bytes" in done.stdout
    assert "100 %" in done.stderr
    assert "note: token_embd.weight: its rows of 96 are not whole blocks of Q6_K; stored as Q8_0\n" in done.stderr  # D3
    assert "note: 1 of " in done.stderr
    quantize_file(source, tmp_path / "same.gguf", "Q4_0")
    assert sha256(target) == sha256(tmp_path / "same.gguf")


@pytest.mark.parametrize(("arguments", "exit_code", "says"), [
    ("{in} {out} Q9", 2, "Q4_0 Q4_1"),
    ("{in} Q8_0 0", 2, "expected 1 to 512"),
    ("{in} Q8_0 -1", 2, "expected 1 to 512"),
    ("{in} {out} Q8_0 --quiet", 2, "no such option: --quiet"),
    ("{in} {out} Q6_K --pure", 1, "without --pure it becomes Q8_0"),  # D3
    ("{in} {in} Q8_0 --force", 2, "is the input itself"),  # C2
    ("{in} {taken} Q8_0", 1, "use --force"),  # C3
    ("{in} {dir}/none/out.gguf Q8_0", 1, "does not exist"),  # C1
    ("{in} - Q8_0", 2, "cannot be written to a pipe"),  # C16
    ("{in} {dir} Q8_0", 1, "is a directory"),
    ("{dir}/none.gguf {out} Q8_0", 1, "none.gguf: cannot be opened"),
    ("{taken} {out} Q8_0", 1, "taken.gguf: "),
])  # fmt: skip
def test_refusals(arguments, exit_code, says, source, tmp_path):
    taken = tmp_path / "taken.gguf"
    taken.write_bytes(b"precious, and no GGUF file")
    places = {"in": source, "out": tmp_path / "out.gguf", "taken": taken, "dir": tmp_path}
    before = sha256(source)
    done = run(*(part.format(**places) for part in arguments.split()))
    assert done.returncode == exit_code, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"] and taken.read_bytes().startswith(b"precious")
    assert sha256(source) == before


def test_dry_run(source, tmp_path):
    done = run("--dry-run", source, tmp_path / "out.gguf", "q4_0")
    assert done.returncode == 0 and not any(tmp_path.iterdir())
    plan = quantize_file(source, tmp_path / "out.gguf", "Q4_0")
    lines = done.stdout.splitlines()
    assert len(lines) == len(plan.tensors) + 1
    assert f"({(tmp_path / 'out.gguf').stat().st_size} bytes" in lines[-1]
    assert any(line.startswith("blk.0.ffn_down.weight") and "F32 -> Q4_0" in line for line in lines)


def test_help_and_dry_run_do_not_import_numba(source):
    code = (
        "import sys\nfrom lfm2cpp.cli import main\ntry:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert not {'numba', 'llvmlite'} & set(sys.modules)\n"
    )
    for arguments in (["--help"], ["--dry-run", str(source), "Q4_0"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "quantize", *arguments], env=ENV, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "NTHREADS" in run("--help").stdout


def test_python_dash_m_quant(source, tmp_path):
    command = [sys.executable, "-m", "quant", str(source), str(tmp_path / "o.gguf"), "F16"]
    assert subprocess.run(command, env=ENV, capture_output=True).returncode == 0
    assert (tmp_path / "o.gguf").exists()


def large_model(path: Path, n_layer: int = 8) -> Path:
    """A valid F32 model of about 27 MB a layer, all of whose matrices are zeros but for their first rows."""
    n_embd, n_ff, n_vocab = 1024, 1024, 64
    metadata = {
        "general.architecture": Value.string("lfm2"), "lfm2.block_count": Value.u32(n_layer),
        "lfm2.context_length": Value.u32(512), "lfm2.embedding_length": Value.u32(n_embd),
        "lfm2.feed_forward_length": Value.u32(n_ff), "lfm2.attention.head_count": Value.u32(16),
    }  # fmt: skip
    small = path.with_suffix(".small")
    with read_gguf(hard_model(small, "plain")) as gguf:
        metadata = {**gguf.metadata, **metadata}
    small.unlink()
    kv = metadata["lfm2.attention.head_count_kv"]
    metadata["lfm2.attention.head_count_kv"] = type(kv)(kv.type, [0] * (n_layer - 1) + [8], kv.item_type)
    from lfm2cpp.arch import iter_tensors, lfm2

    hp = lfm2.HParams(
        n_vocab=n_vocab, n_ctx_train=512, n_embd=n_embd, n_layer=n_layer, n_ff=n_ff, n_head=16,
        n_head_kv=(0,) * (n_layer - 1) + (8,), l_cache=3, norm_rms_eps=1e-5, rope_freq_base=1e6,
    )  # fmt: skip
    row = np.linspace(-1, 1, 2**20, dtype=np.float32)

    def chunks(n: int):
        for start in range(0, n, row.size):
            yield row[: min(row.size, n - start)]

    entries = [e for e in iter_tensors(lfm2, hp) if not e.spec.optional]
    tensors = [
        TensorToWrite(e.name, e.shape, GGMLType.F32, partial(chunks, math.prod(e.shape))) for e in entries
    ]
    write_gguf(path, metadata, tensors)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return large_model(tmp_path_factory.mktemp("large") / "large.gguf")


def peak_memory(*arguments: object) -> int:
    """ru_maxrss in bytes of one run of the command, which must succeed."""
    silent = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    pid = os.posix_spawn(sys.executable, [*COMMAND, *(str(a) for a in arguments)], ENV, file_actions=silent)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_maxrss * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes on Linux")
def test_memory_does_not_grow_with_the_file(large, source, tmp_path):
    """Beside the process itself, a few slabs of 4 MB a thread; the source has 180 MB."""
    quantize_file(source, tmp_path / "o.gguf", "Q8_0")  # the kernel is in the cache now
    base = peak_memory(source, tmp_path / "o.gguf", "Q8_0", 2, "--force")
    assert large.stat().st_size > 150e6
    assert peak_memory(large, tmp_path / "o.gguf", "Q8_0", 2, "--force") - base < 80e6


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_nothing(number, exit_code, large, tmp_path):
    """C8, C9. The signal comes once the partial file is there; what stood at the target stays."""
    target = tmp_path / "out.gguf"
    target.write_bytes(b"precious")
    command = [*COMMAND, str(large), str(target), "Q6_K", "1", "--force"]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.partial")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    sent = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code, stderr
    assert time.monotonic() - sent < 10
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"] and target.read_bytes() == b"precious"
