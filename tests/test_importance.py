"""Measuring importances: the sums are those of the intermediates' squares, whatever the weights, and disturb nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from cli_process import Cli
from tiny_model import BOS, tiny_gguf

from lfm2cpp.corpus import text_chunks
from lfm2cpp.engine.engine import Engine
from lfm2cpp.errors import LFM2Error, ModelFormatError
from lfm2cpp.gguf import read_gguf
from lfm2cpp.gguf.imatrix import read_imatrix, write_imatrix
from lfm2cpp.importance import measure_importances
from lfm2cpp.parity.intermediates import LINEAR

TOKENS = [int(i) for i in np.random.default_rng(5).integers(14, 300, 150)]
TYPES = {"F32": "F32", "BF16": "BF16", "Q4_0": {"token_embd": "Q6_K", ".": "Q4_0"}}
MOST = 2e-6  # relative, of a sum of some hundred squares in float32


CHUNKS = text_chunks(TOKENS, 64, bos=BOS)


def measure(path: Path, chunks: list[list[int]], progress=None, n_batch=64, n_threads=2) -> dict[str, np.ndarray]:
    with Engine(path, n_ctx=64, n_batch=n_batch, n_threads=n_threads, sum_squares=True) as engine:
        return measure_importances(engine, chunks, progress)


def squares_of_inputs(path: Path, chunks: list[list[int]]) -> dict[str, np.ndarray]:
    """In float64, from every intermediate."""
    found: dict[str, np.ndarray] = {}
    with Engine(path, n_ctx=64, n_batch=64, n_threads=1, trace=True) as engine:
        for chunk in chunks:
            engine.evaluate([(engine.sequence(), chunk)], logits="all")
            for il in range(engine.hparams.n_layer):
                for product, (source, matrix) in LINEAR.items():
                    if f"{product}-{il}" in engine.trace:
                        x = engine.trace[f"{source}-{il}"].astype(np.float64)
                        name = f"blk.{il}.{matrix}"
                        found[name] = found.get(name, 0) + (x**2).sum(axis=0)
    return found


@pytest.mark.parametrize("types", TYPES)
def test_sums_are_those_of_the_intermediates(types, tmp_path):
    """Of two chunks; widths that fill no vector, in the F32 model."""
    shape = {"n_embd": 72, "n_ff": 90} if types == "F32" else {}
    path = tiny_gguf(tmp_path / "m.gguf", types=TYPES[types], n_layer=3, attention=(1,), **shape)
    expected, found = squares_of_inputs(path, CHUNKS), measure(path, CHUNKS)
    assert set(found) == set(expected)
    assert all(name.startswith("blk.") for name in found)  # nothing of the head, as in llama-imatrix
    for name, sums in found.items():
        np.testing.assert_allclose(sums, expected[name], rtol=MOST, err_msg=name)


def test_steps_and_threads_make_no_difference(tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf", types="Q8_0", n_layer=2, attention=(0,))
    expected = measure(path, CHUNKS)
    for n_batch, n_threads in ((24, 1), (64, 3)):
        for name, sums in measure(path, CHUNKS, n_batch=n_batch, n_threads=n_threads).items():
            np.testing.assert_array_equal(sums, expected[name], err_msg=name)


def test_chunks_are_read_from_the_beginning_each(tmp_path):
    path, heard = tiny_gguf(tmp_path / "m.gguf", n_layer=2, attention=(0,)), []
    both = measure(path, CHUNKS, heard.append)
    first, second = measure(path, CHUNKS[:1]), measure(path, CHUNKS[1:])
    assert heard == [64, 64]
    for name, sums in both.items():
        np.testing.assert_array_equal(sums, first[name] + second[name])


@pytest.mark.parametrize("types", ["Q8_0", "BF16", "F32"])
def test_logits_stay_the_same(types, tmp_path):
    path, logits = tiny_gguf(tmp_path / "m.gguf", types=types), []
    for sum_squares in (False, True):
        with Engine(path, n_ctx=256, n_threads=2, sum_squares=sum_squares) as engine:
            sequence = engine.sequence()
            logits += [engine.evaluate([(sequence, TOKENS)])[0], engine.evaluate([(sequence, [20])])[0]]
            assert bool(engine.take_squares()) == sum_squares
            assert not any(sums.any() for sums in engine.take_squares().values())
    np.testing.assert_array_equal(logits[0], logits[2])
    np.testing.assert_array_equal(logits[1], logits[3])


def test_a_model_that_overflows_is_refused(tmp_path):
    def break_it(weights):
        weights["blk.1.ffn_norm.weight"][:] = 1e30

    with pytest.raises(ModelFormatError, match="inputs of blk.1.ffn_gate.weight are not finite"):
        measure(tiny_gguf(tmp_path / "m.gguf", edit=break_it), CHUNKS)


def test_chunks_of_a_text():
    """Whole ones, each with a BOS in place of its first token, as many as are asked for."""
    assert CHUNKS == [[BOS, *TOKENS[at + 1 : at + 64]] for at in (0, 64)]
    assert text_chunks(TOKENS, 64, bos=None, n_chunks=1) == [TOKENS[:64]]
    assert text_chunks(TOKENS, 75, bos=None) == [TOKENS[:75], TOKENS[75:]]
    with pytest.raises(LFM2Error, match="has 63 tokens, expected a chunk of 64"):
        text_chunks(TOKENS[:63], 64, bos=BOS)


@pytest.fixture
def cli(monkeypatch, capfd) -> Cli:
    return Cli(monkeypatch, capfd)


def test_command(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, text = tiny_gguf(tmp_path / "m.gguf", n_layer=2, attention=(0,)), "Words, and more words. " * 40
    Path("text.txt").write_text(text)
    done = cli("imatrix", "-m", path, "-f", "text.txt", "-c", 32, "--chunks", 3)
    assert done.code == 0 and done.out.startswith("imatrix.gguf: 12 matrices, 3 chunks of 32 tokens"), done.err
    found = read_imatrix("imatrix.gguf")
    assert (found.dataset, found.n_chunks, len(found.columns)) == (b"text.txt", 3, 12)
    done = cli("imatrix", "-m", path, "-f", "text.txt", "-c", 32)
    assert done.code == 1 and "exists already; use --force" in done.err
    done = cli("imatrix", "-m", path, "-f", "text.txt", "-c", 32, "--force", "-t", 1)
    assert done.code == 0 and read_imatrix("imatrix.gguf").n_chunks > 3
    done = cli("quantize", "--imatrix", "imatrix.gguf", path, "q.gguf", "Q4_0")
    assert done.code == 0, done.err
    with read_gguf("q.gguf") as gguf:
        assert gguf.metadata["quantize.imatrix.dataset"].value == "text.txt"


def test_a_text_of_any_name(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"w\xff.txt")
    Path(name).write_text("Words, and more words. " * 40)
    done = cli("imatrix", "-m", tiny_gguf(tmp_path / "m.gguf"), "-f", name, "-c", 32)
    assert done.code == 0 and read_imatrix("imatrix.gguf").dataset == b"w\xff.txt"


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["-f", "missing.txt"], 1, "--file missing.txt is missing"),
    (["-f", "short.txt"], 1, "expected a chunk of 512"),
    (["-f", "short.txt", "-o", "short.txt", "--force"], 2, "short.txt: is the input itself"),
    (["-f", "short.txt", "-o", "m.gguf", "--force"], 2, "m.gguf: is the input itself"),
    (["-f", "short.txt", "-o", "no/imatrix.gguf"], 1, "no"),
    (["-f", "short.txt", "--chunks", "0"], 2, "--chunks is 0"),
    (["-f", "short.txt", "-c", "8"], 2, "8 is not in the range"),
    (["-f", "short.txt", "-t", "0"], 2, "--threads is 0"),
    ([], 2, "--file"),
])  # fmt: skip
def test_command_refuses(arguments, code, message, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_gguf(tmp_path / "m.gguf")
    Path("short.txt").write_text("A few words.")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = cli("imatrix", "-m", "m.gguf", *arguments)
    assert done.code == code and message in done.err, done.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


GOLDENS = os.environ.get("LFM2CPP_GOLDENS")


@pytest.mark.skipif(not GOLDENS, reason="LFM2CPP_GOLDENS does not name the folder of the golden checkpoints")
@pytest.mark.parametrize("model", ["tiny", "edge"])
def test_same_file_as_llama_imatrix(model, tmp_path):
    """Of the same sums."""
    golden = Path(GOLDENS, f"{model}.imatrix.gguf")
    with read_gguf(golden) as gguf:
        sums = {name[:-8]: gguf.data(name).view(np.float32) for name in gguf.tensors if name.endswith(".in_sum2")}
        write_imatrix(tmp_path / "i.gguf", sums, dataset="calib.txt", n_chunks=97, chunk_size=128)
    assert (tmp_path / "i.gguf").read_bytes() == golden.read_bytes()
