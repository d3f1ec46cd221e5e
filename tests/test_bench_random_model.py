"""Files of random weights: the true shapes, every type, the same bytes again, and logits that make sense."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from lfm2cpp.arch.validate import WEIGHT_TYPES, validate_model
from lfm2cpp.benchmark.random_blocks import RANDOM_TYPES, random_chunks
from lfm2cpp.benchmark.random_model import TYPES, choose_types, model_nbytes, stand_in_vocabulary, write_random_model
from lfm2cpp.benchmark.shapes import SHAPES, find_shape
from lfm2cpp.cli.bench import bench
from lfm2cpp.engine.engine import Engine
from lfm2cpp.errors import OutputError, UsageError
from lfm2cpp.ggml import TRAITS, GGMLType
from lfm2cpp.gguf import read_gguf
from lfm2cpp.gguf.check import find_non_finite
from lfm2cpp.text.vocab import Vocab

TINY = "350M,n_embd=256,n_layer=3,attention=1,n_ff=512,n_vocab=1024"

# Bytes of all tensors: the files that llama.cpp's tools make of these shapes, measured, less their headers.
TRUE_SIZES = {
    ("350M", "BF16"): 709_098_496,
    ("350M", "Q8_0"): 376_830_976,
    ("350M", "Q4_0"): 216_923_136,
    ("350M", "Q4_0-pure"): 199_621_632,
    ("1.2B", "F16"): 2_340_940_800,
    ("1.2B", "Q8_0"): 1_243_868_160,
    ("1.2B", "Q4_0"): 693_365_760,
}
MAX_STD_ERROR = 0.5  # of a weight's standard deviation, as a share: floats have one exponent to choose from
MAX_MEAN = 0.02  # of a weight, in standard deviations


@pytest.mark.parametrize(("shape", "file_type"), TRUE_SIZES)
def test_true_sizes(shape: str, file_type: str) -> None:
    assert model_nbytes(SHAPES[shape], file_type) == TRUE_SIZES[shape, file_type]


def test_known_shapes() -> None:
    """The tables of the models' own configurations."""
    found = {name: (s.n_embd, s.n_layer, len(s.attention), s.n_ff, s.n_head, s.n_head_kv) for name, s in SHAPES.items()}
    assert found == {
        "230M": (1024, 14, 6, 2560, 16, 8),
        "350M": (1024, 16, 6, 4608, 16, 8),
        "700M": (1536, 16, 6, 6912, 24, 8),
        "1.2B": (2048, 16, 6, 8192, 32, 8),
        "2.6B": (2048, 30, 8, 10752, 32, 8),
    }  # fmt: skip
    assert find_shape("2.6b") is SHAPES["2.6B"]


def test_free_shapes_follow_their_numbers() -> None:
    shape = find_shape("1.2B, n_embd=512, n_layer=6, n_vocab=128000")
    assert (shape.n_head, shape.n_head_kv, shape.attention, shape.n_pieces) == (8, 8, (2, 5), 125781)
    assert find_shape("350M,n_embd=128").n_head_kv == 2
    assert find_shape("350M,n_layer=2,attention=").attention == ()


@pytest.mark.parametrize("text", [
    "3B", "", "350M,n_embd", "350M,n_embd=x", "350M,colour=1", "350M,attention=1+x", "350M,attention=16",
    "350M,n_ff=100", "350M,n_head=7", "350M,n_head_kv=3", "350M,n_layer=0", "350M,n_layer=600", "350M,n_vocab=100",
    "350M,l_cache=1",
    "350M,n_vocab=9999999", "350M,n_embd=-32",
])  # fmt: skip
def test_impossible_shapes(text: str) -> None:
    with pytest.raises(UsageError, match="shape"):
        find_shape(text)


@pytest.mark.parametrize("ggml_type", RANDOM_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("std", [0.5, 1024**-0.5])
def test_blocks_have_the_spread_asked_for(ggml_type: GGMLType, std: float) -> None:
    n = 1 << 16
    data = np.concatenate(list(random_chunks("w", ggml_type, n, std, seed=3)))
    assert data.nbytes == n // TRAITS[ggml_type].block_size * TRAITS[ggml_type].type_size
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(ggml_type)).astype(np.float64).ravel()
    assert values.size == n and np.isfinite(values).all()
    assert abs(values.std() / std - 1) < MAX_STD_ERROR
    assert abs(values.mean() / std) < MAX_MEAN


def test_every_type_that_runs_can_be_made() -> None:
    assert set(RANDOM_TYPES) == set(WEIGHT_TYPES)


@pytest.mark.parametrize("file_type", TYPES)
def test_the_engine_runs_it(tmp_path: Path, file_type: str) -> None:
    """Finite logits of a sane size, for the head's own type too."""
    path = tmp_path / "m.gguf"
    write_random_model(path, find_shape(TINY), file_type)
    with read_gguf(path) as file:
        assert list(find_non_finite(file)) == []
        assert not file.warnings and not validate_model(file).warnings
        vocab = Vocab(file)
        assert vocab.detokenize(vocab.tokenize("Hello, W\u00f6rld 123")) == "Hello, W\u00f6rld 123"
        head = file.tensors["token_embd.weight"].ggml_type
    base = file_type.removesuffix("-pure").removesuffix("_M")
    assert head.name == ("Q6_K" if file_type in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q4_K_M", "Q5_K_M") else base)
    with Engine(path, n_ctx=64, n_threads=1) as engine:
        (logits,) = engine.evaluate([(engine.sequence(), list(range(40)))], logits="all")
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10


def test_the_same_again_and_another_seed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        write_random_model(path, find_shape(TINY), "Q8_0", seed=seed)
    a, b, c = (path.read_bytes() for path in paths)
    assert a == b and a != c


def test_tensors_differ_from_each_other(tmp_path: Path) -> None:
    write_random_model(tmp_path / "m", find_shape(TINY), "F16")
    with read_gguf(tmp_path / "m") as file:
        gate, up = (file.data(f"blk.0.ffn_{name}.weight") for name in ("gate", "up"))
        assert not np.array_equal(gate, up)
        rows = file.data("token_embd.weight").reshape(1024, -1)
        assert len(np.unique(rows, axis=0)) == 1024


def test_real_file_s_keys(tmp_path: Path) -> None:
    """What a converted model carries beyond the hyper-parameters, and PAD rows that are never sampled."""
    write_random_model(tmp_path / "m", find_shape("350M,n_layer=1,attention=,n_embd=64,n_head_kv=1,n_ff=64"), "Q4_0")
    with read_gguf(tmp_path / "m") as file:
        for key in ("general.architecture", "general.type", "general.name", "general.file_type",
                    "tokenizer.chat_template", "general.quantization_version", "lfm2.vocab_size",
                    "tokenizer.ggml.pre"):  # fmt: skip
            assert key in file.metadata
        vocab = Vocab(file)
    assert vocab.unused_ids == tuple(range(64400, 65536))
    assert vocab.piece(64400) == "[PAD64400]" and vocab.bos_id == 1 and 7 in vocab.eog_ids


def test_vocabulary_is_whole() -> None:
    pieces, types, merges = stand_in_vocabulary(2000, 1900, seed=5)
    assert len(pieces) == len(types) == len(set(pieces)) == 2000
    assert len(merges) == 1900 - 270 and types.count(5) == 100 and types.count(3) == 14
    known = set(pieces)
    assert all({*merge.split(" "), merge.replace(" ", "")} <= known for merge in merges)


def test_unknown_type_and_existing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Q9"):
        choose_types(SHAPES["350M"], "Q9")
    (tmp_path / "m").write_bytes(b"precious")
    with pytest.raises(OutputError, match="force"):
        write_random_model(tmp_path / "m", find_shape(TINY), "Q4_0")
    assert (tmp_path / "m").read_bytes() == b"precious"


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write only, write and measure, refuse; the default name tells shape and type."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    done = runner.invoke(bench, ["--random", TINY, "Q8_0", "-p", "0", "-n", "0"])
    assert done.exit_code == 0 and done.stdout == ""
    (made,) = tmp_path.glob("LFM2-*.gguf")
    assert re.fullmatch(r"LFM2-350M-[\w+-]+-random-Q8_0\.gguf", made.name)
    done = runner.invoke(bench, ["--random", TINY, "q8_0", "-m", "x.gguf", "-p", "4", "-n", "0", "-r", "1"])
    assert done.exit_code == 0 and "| lfm2 ?B Q8_0 " in done.stdout
    assert (tmp_path / "x.gguf").read_bytes() == made.read_bytes()
    for args, code in ((["--random", TINY, "Q8_0", "-m", "x.gguf"], 1), (["--random", "9B", "Q8_0"], 2),
                       (["--random", TINY, "Q9"], 2), (["--random", TINY, "F16", "-m", "a,b"], 2),
                       (["--random", TINY, "F16", "-m", "no/dir.gguf"], 1)):  # fmt: skip
        failed = runner.invoke(bench, args)
        assert getattr(failed.exception, "exit_code", None) == code, (args, failed.exception)
