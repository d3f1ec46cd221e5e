"""Sound GGUF files that are no runnable LFM2 model, and odd ones that are: cases A19 to A24 and A27."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_builder import run_cli
from tiny_model import tiny_gguf

from lfm2cpp.arch.validate import load_hparams, validate_model
from lfm2cpp.errors import ModelFormatError
from lfm2cpp.ggml import TRAITS, GGMLType
from lfm2cpp.gguf import TensorToWrite, Value, read_gguf, write_gguf
from lfm2cpp.gguf.check import FLOATS, find_non_finite

T = gguf.GGUFValueType
SHAPE: dict[str, Any] = {"n_layer": 3, "attention": (1,), "n_embd": 64, "n_ff": 128, "n_vocab": 300}
Tensors = dict[str, tuple[tuple[int, ...], GGMLType, bytes]]


def model(path: Path, metadata: Mapping[str, Any] | None = None, **options: Any) -> Path:
    return tiny_gguf(path / "m.gguf", metadata=metadata, **{**SHAPE, **options})


def edited(
    path: Path, edit: Callable[[Tensors], object], metadata: dict[str, Value | None] | None = None, **options: Any
) -> Path:
    """A model whose tensor table went through `edit`, and its metadata through `metadata` (None removes)."""
    source = model(path, **options)
    with read_gguf(source) as g:
        tensors: Tensors = {n: (i.shape, i.ggml_type, g.data(n).tobytes()) for n, i in g.tensors.items()}
        merged = {k: v for k, v in {**g.metadata, **(metadata or {})}.items() if v is not None}
    edit(tensors)
    rows = [TensorToWrite(n, shape, t, lambda d=data: [d]) for n, (shape, t, data) in tensors.items()]
    write_gguf(path / "edited.gguf", merged, rows)
    return path / "edited.gguf"


def refusal(path: Path) -> str:
    with read_gguf(path) as g, pytest.raises(ModelFormatError) as refused:
        validate_model(g)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    return message.removeprefix(f"{path}: ")


def test_a_good_model(tmp_path: Path) -> None:
    with read_gguf(model(tmp_path)) as g:
        facts = validate_model(g)
        assert facts.warnings == []
        assert list(facts.tensors) and set(facts.tensors) == set(g.tensors)
    hp = facts.hparams
    assert (hp.n_layer, hp.n_embd, hp.n_ff, hp.n_vocab, hp.l_cache) == (3, 64, 128, 300, 3)
    assert (hp.n_head, hp.n_head_kv, hp.attention_layers) == (4, (0, 2, 0), (1,))
    assert hp.rope_freq_base == 1e6 and hp.norm_rms_eps == pytest.approx(1e-5)


@pytest.mark.parametrize(
    "shape",
    [
        {"attention": (0, 1, 2)},
        {"attention": (0,), "n_head": 8, "n_head_kv": 8},
        {"l_cache": 2}, {"l_cache": 7}, {"n_ff": 96}, {"tied": False},
        {"n_head": 2, "n_head_kv": 1}, {"n_layer": 1, "attention": (0,)},
    ],
)  # fmt: skip
def test_good_shapes(shape: dict[str, Any], tmp_path: Path) -> None:
    with read_gguf(model(tmp_path, **shape)) as g:
        assert validate_model(g).warnings == []


# --- A19: architecture


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "GGUF key 'general.architecture' is missing; supported: lfm2"),
        (Value.string("llama"), "the architecture 'llama' is not supported; supported: lfm2"),
        (Value.string("lfm2moe"), "the architecture 'lfm2moe' is not supported; supported: lfm2"),
        (Value.string("\x1b]0;x"), "the architecture '\\x1b]0;x' is not supported"),
        (Value.strings(["lfm2"]), "has type ARRAY of STRING, expected STRING; supported: lfm2"),
        (Value.u32(2), "has type UINT32, expected STRING; supported: lfm2"),
    ],
)
def test_a19_architecture(value: Value | None, message: str, tmp_path: Path) -> None:
    assert message in refusal(edited(tmp_path, lambda t: None, {"general.architecture": value}))


# --- A20: hyper-parameters

INTEGERS = {
    "block_count": "1 to 512",
    "context_length": "1 to 1073741824",
    "embedding_length": "1 to 1048576",
    "feed_forward_length": "1 to 16777216",
    "attention.head_count": "1 to 65536",
    "shortconv.l_cache": "2 to 64",
}
FLOAT_KEYS = {"rope.freq_base": "0.001 to 1e+15", "attention.layer_norm_rms_epsilon": "1e-20 to 1"}


@pytest.mark.parametrize("key", [*INTEGERS, *FLOAT_KEYS, "attention.head_count_kv"])
def test_a20_missing(key: str, tmp_path: Path) -> None:
    assert f"GGUF key 'lfm2.{key}' is missing" in refusal(model(tmp_path, {f"lfm2.{key}": None}))


@pytest.mark.parametrize("value", [0, 2**31, 2**32 - 1])
@pytest.mark.parametrize("key", INTEGERS)
def test_a20_out_of_range(key: str, value: int, tmp_path: Path) -> None:
    message = refusal(model(tmp_path, {f"lfm2.{key}": (T.UINT32, value)}))
    assert message == f"lfm2.{key} is {value}, expected {INTEGERS[key]}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("key", FLOAT_KEYS)
def test_a20_floats_out_of_range(key: str, value: float, tmp_path: Path) -> None:
    message = refusal(model(tmp_path, {f"lfm2.{key}": (T.FLOAT32, value)}))
    assert message == f"lfm2.{key} is {value}, expected {FLOAT_KEYS[key]}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", (T.INT32, 3)), ("block_count", (T.FLOAT32, 3.0)), ("block_count", (T.STRING, "3")),
        ("block_count", (T.ARRAY, [3])), ("embedding_length", (T.UINT64, 64)), ("shortconv.l_cache", (T.BOOL, True)),
        ("rope.freq_base", (T.UINT32, 10000)), ("attention.layer_norm_rms_epsilon", (T.FLOAT64, 1e-5)),
    ],
)  # fmt: skip
def test_a20_wrong_type(key: str, value: Any, tmp_path: Path) -> None:
    message = refusal(model(tmp_path, {f"lfm2.{key}": value}))
    assert f"'lfm2.{key}' has type {value[0].name}" in message and "expected" in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.head_count", 3, "lfm2.attention.head_count is 3, which does not divide lfm2.embedding_length 64"),
        ("attention.head_count", 64, "into heads of an even width"),
        (
            "embedding_length",
            128,
            "of a shape that contradicts the metadata: token_embd.weight (300, 64) instead of (300, 128)",
        ),
        ("shortconv.l_cache", 4, "blk.0.shortconv.conv.weight (64, 3) instead of (64, 4)"),
        ("attention.head_count", 2, "blk.1.attn_k.weight (32, 64) instead of (64, 64)"),
    ],
)
def test_a20_contradicting_the_tensors(key: str, value: int, message: str, tmp_path: Path) -> None:
    assert message in refusal(model(tmp_path, {f"lfm2.{key}": (T.UINT32, value)}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", (T.BOOL, False)), ("attention.sliding_window", (T.UINT32, 256)),
        ("pooling_type", (T.UINT32, 2)), ("attention.key_length", (T.UINT32, 128)),
        ("rope.dimension_count", (T.UINT32, 8)),
        ("expert_count", (T.UINT32, 32)),
        ("rope.scaling.type", (T.STRING, "yarn")), ("rope.scaling.factor", (T.FLOAT32, 4.0)),
    ],
)  # fmt: skip
def test_variants_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    message = refusal(model(tmp_path, {f"lfm2.{key}": value}))
    assert message.startswith(f"lfm2.{key} = ") and message.endswith("is a variant of the model that is not supported")


def test_neutral_variants_load(tmp_path: Path) -> None:
    neutral = {
        "attention.causal": (T.BOOL, True), "attention.sliding_window": (T.UINT32, 0), "pooling_type": (T.UINT32, 0),
        "attention.key_length": (T.UINT32, 16), "rope.dimension_count": (T.UINT32, 16),
        "rope.scaling.type": (T.STRING, "none"),
    }  # fmt: skip
    with read_gguf(model(tmp_path, {f"lfm2.{key}": value for key, value in neutral.items()})) as g:
        assert validate_model(g).warnings == []


# --- A21: layer kinds

KV = "lfm2.attention.head_count_kv"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Value.u32(2), f"{KV} has type UINT32; expected an array of INT32, one for each of the 3 layers"),
        (Value.array(4, [0, 2]), f"{KV} has 2 entries; expected an array"),
        (Value.array(5, [0, 2, 0, 0]), f"{KV} has 4 entries"),
        (Value.array(5, []), f"{KV} has 0 entries"),
        (Value.array(6, [0.0, 2.0, 0.0]), f"{KV} has type ARRAY of FLOAT32"),
        (Value.array(5, [0, -2, 0]), f"{KV} is -2 for layer 1, expected 0 to 65536"),
        (Value.array(4, [0, 2**31, 0]), f"{KV} is 2147483648 for layer 1"),
        (Value.array(5, [0, 3, 0]), f"{KV} is 3 for layer 1, which does not divide lfm2.attention.head_count 4"),
        (Value.array(5, [0, 8, 0]), f"{KV} is 8 for layer 1, which does not divide"),
        (Value.array(5, [0, 0, 0]), f"{KV} is 0 for every layer, expected at least one attention layer"),
        (Value.array(5, [2, 2, 0]), f"layer 0 is an attention layer by {KV}, but its tensors are shortconv."),
        (Value.array(5, [2, 0, 0]), f"layer 0 is an attention layer by {KV}, but its tensors are shortconv."),
        (Value.array(5, [0, 1, 0]), "blk.1.attn_k.weight (32, 64) instead of (16, 64)"),
    ],
)
def test_a21_head_count_kv(value: Value, message: str, tmp_path: Path) -> None:
    assert message in refusal(edited(tmp_path, lambda t: None, {KV: value}))


def test_a21_attention_tensors_in_a_conv_layer(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda t: None, {KV: Value.array(5, [0, 0, 2])}, attention=(1, 2))
    assert f"layer 1 is a convolution layer by {KV}, but its tensors are attn_q.weight" in refusal(path)


# --- A22: the tensor table


def test_a22_missing_tensor(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda t: t.pop("blk.1.attn_q_norm.weight"))
    assert refusal(path) == "1 tensor missing: blk.1.attn_q_norm.weight; the file is incomplete, get it again"


def test_a22_many_missing_tensors(tmp_path: Path) -> None:
    def drop_norms(t: Tensors) -> None:
        for name in [n for n in t if n.endswith("_norm.weight") and n.startswith("blk.")]:
            del t[name]

    message = refusal(edited(tmp_path, drop_norms))
    assert message.startswith("8 tensors missing: blk.0.attn_norm.weight, blk.0.ffn_norm.weight, ")
    assert " and 3 more; " in message and message.count("norm.weight") == 5


def test_a22_no_embedding(tmp_path: Path) -> None:
    assert (
        refusal(edited(tmp_path, lambda t: t.pop("token_embd.weight")))
        == "has no tensor token_embd.weight; get the complete model"
    )


def test_a22_no_tensors_at_all(tmp_path: Path) -> None:
    assert "a vocabulary without a model" in refusal(edited(tmp_path, dict.clear))


def test_a22_embedding_of_one_dimension(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda t: t.update({"token_embd.weight": ((64,), GGMLType.F32, bytes(256))}))
    assert refusal(path) == "tensor token_embd.weight has the shape (64,), expected (n_vocab, n_embd)"


def test_a22_wrong_shapes(tmp_path: Path) -> None:
    def transpose(t: Tensors) -> None:
        for il in range(3):
            for name in ("ffn_gate", "ffn_down"):
                shape, ggml_type, data = t[f"blk.{il}.{name}.weight"]
                t[f"blk.{il}.{name}.weight"] = ((*shape[::-1],), ggml_type, data)

    # The FFN width is that of ffn_gate: 64 now, and everything else contradicts it.
    message = refusal(edited(tmp_path, transpose))
    assert message.startswith(
        "9 tensors of a shape that contradicts the metadata: blk.0.ffn_gate.weight (64, 128) instead of (64, 64)"
    )
    assert message.endswith(" and 4 more")


def test_a22_extra_tensors_are_a_warning(tmp_path: Path) -> None:
    def add(t: Tensors) -> None:
        t["dense_2.weight"] = ((4,), GGMLType.F32, bytes(16))
        t["blk.7.attn_norm.weight"] = ((4,), GGMLType.F32, bytes(16))

    with read_gguf(edited(tmp_path, add)) as g:
        facts = validate_model(g)
    assert facts.warnings == ["2 tensors not part of the model, ignored: 'dense_2.weight', 'blk.7.attn_norm.weight'"]
    assert "dense_2.weight" not in facts.tensors


def test_tensor_types_without_a_kernel(tmp_path: Path) -> None:
    def store(t: Tensors) -> None:
        t["blk.0.ffn_up.weight"] = ((128, 64), GGMLType.MXFP4, bytes(128 * 2 * 17))
        t["blk.0.ffn_norm.weight"] = ((64,), GGMLType.F16, bytes(128))

    message = refusal(edited(tmp_path, store))
    assert message.startswith(
        "2 tensors of a type that cannot be run yet: blk.0.ffn_norm.weight F16 (must be F32), blk.0.ffn_up.weight MXFP4"
    )


# --- vocabulary rows


def test_vocabulary_larger_than_the_embedding(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda t: t.update({"token_embd.weight": ((299, 64), GGMLType.F32, bytes(299 * 256))}))
    assert refusal(path) == "tokenizer.ggml.tokens has 300 tokens, but token_embd.weight only 299 rows"


def test_padded_vocabulary_is_fine_and_vocab_size_is_not_trusted(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda t: t.update({"token_embd.weight": ((320, 64), GGMLType.F32, bytes(320 * 256))}))
    with read_gguf(path) as g:
        facts = validate_model(g)
    assert facts.hparams.n_vocab == 320
    assert facts.warnings == ["lfm2.vocab_size is 300, but token_embd.weight has 320 rows: using 320"]


# --- A23: the FFN width of files in circulation


def test_a23_the_tensors_decide_the_ffn_width(tmp_path: Path) -> None:
    with read_gguf(model(tmp_path, {"lfm2.feed_forward_length": (T.UINT32, 192)})) as g:
        facts = validate_model(g)
    assert facts.hparams.n_ff == 128
    assert facts.warnings == ["lfm2.feed_forward_length is 192, but the tensors are 128 wide: using 128"]


# --- A24: the final norm's names

NORM = "token_embd_norm.weight"


def test_a24_output_norm(tmp_path: Path) -> None:
    with read_gguf(model(tmp_path, norm_name="output_norm")) as g:
        facts = validate_model(g)
    assert facts.tensors[NORM].name == "output_norm.weight" and facts.warnings == []


def test_a24_both_equal(tmp_path: Path) -> None:
    with read_gguf(edited(tmp_path, lambda t: t.update({"output_norm.weight": t[NORM]}))) as g:
        facts = validate_model(g)
    assert facts.tensors[NORM].name == NORM and facts.warnings == []


@pytest.mark.parametrize("data", [bytes(256), bytes(128)])
def test_a24_both_differing(data: bytes, tmp_path: Path) -> None:
    path = edited(tmp_path, lambda t: t.update({"output_norm.weight": ((len(data) // 4,), GGMLType.F32, data)}))
    assert refusal(path) == f"tensors {NORM} and output_norm.weight are two names of one thing, but differ"


def test_a24_none(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda t: t.pop(NORM))
    assert refusal(path).startswith(f"1 tensor missing: {NORM} or output_norm.weight; ")


# --- A27: NaN and Inf


def floats_of(ggml_type: GGMLType) -> list[tuple[int, str, int]]:
    return [(at, dtype, exponent) for at, (dtype, exponent) in FLOATS[ggml_type]]


@pytest.mark.parametrize("ggml_type", FLOATS, ids=lambda t: t.name)
def test_a27_non_finite_values_are_found(ggml_type: GGMLType, tmp_path: Path) -> None:
    traits = TRAITS[ggml_type]
    n_per_row, n_rows = 2 * traits.block_size, 50
    clean = np.zeros((n_rows, 2, traits.type_size), np.uint8)
    for at, dtype, exponent in floats_of(ggml_type):
        data = clean.copy()
        width = np.dtype(dtype).itemsize
        data[17, 1, at : at + width] = np.array([exponent], dtype).view(np.uint8)
        data[30, 0, at : at + width] = 0xFF
        for content, expected in ((clean, []), (data, ["tensor t holds 2 NaN or Inf, the first in row 17"])):
            rows = [TensorToWrite("t", (n_rows, n_per_row), ggml_type, lambda c=content: [c.tobytes()])]
            write_gguf(tmp_path / "t.gguf", {}, rows, force=True)
            with read_gguf(tmp_path / "t.gguf") as g:
                assert [str(found) for found in find_non_finite(g)] == expected


def test_a27_every_finite_half_passes(tmp_path: Path) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    rows = [TensorToWrite("t", (len(finite),), GGMLType.F16, lambda: [finite])]
    write_gguf(tmp_path / "t.gguf", {}, rows)
    with read_gguf(tmp_path / "t.gguf") as g:
        assert list(find_non_finite(g)) == []


def test_a27_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def damage(t: Tensors) -> None:
        shape, ggml_type, data = t["blk.1.ffn_up.weight"]
        t["blk.1.ffn_up.weight"] = (shape, ggml_type, data[:1024] + np.float32("nan").tobytes() + data[1028:])

    path = edited(tmp_path, damage)
    assert run_cli(monkeypatch, capsys, "inspect", path)[0] == 0
    code, out, err = run_cli(monkeypatch, capsys, "inspect", "--check-tensors", path)
    assert code == 1
    assert "Damaged: tensor blk.1.ffn_up.weight holds 1 NaN or Inf, the first in row 4" in out
    assert "error: " in err and "row 4" in err
    good = tmp_path / "m.gguf"
    code, out, err = run_cli(monkeypatch, capsys, "inspect", "--check-tensors", good)
    assert code == 0 and "Tensors: no NaN, no Inf" in out


def test_load_hparams_alone_gives_its_warnings(tmp_path: Path) -> None:
    with read_gguf(model(tmp_path, {"lfm2.feed_forward_length": (T.UINT32, 192)})) as g:
        arch, hparams, warnings = load_hparams(g)
    assert arch.NAME == "lfm2" and hparams.n_ff == 128 and len(warnings) == 1
