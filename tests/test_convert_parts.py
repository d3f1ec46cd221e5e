"""The parts of `convert`, against tables of facts: names, configurations, JSON, vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_variants import SMALL, liquid_tokenizer, update_json
from tiny_model import REGEX, SPECIALS, TinyShape, hf_config, tiny_hf

from convert.checkpoint import read_tokenizer_files
from convert.encode import as_f32, f32_to_bf16
from convert.hparams import read_config
from convert.json_file import parse_json
from convert.model_names import ModelId, parse_model_id, size_label, title
from convert.provenance import read_model_card
from convert.special_tokens import find_special_tokens
from convert.vocab import LFM2_REGEXES, TokenType, read_vocabulary
from lfm2cpp.errors import CheckpointError


def quiet(text: str) -> None:
    raise AssertionError(f"unexpected note: {text}")


# --- names. The expected parts are those that gguf-py's Metadata.get_model_id_components gives.

NAMES: list[tuple[str, int, ModelId]] = [
    ("LiquidAI/LFM2-350M", 354_483_968, ModelId("LFM2-350M", "LiquidAI", "LFM2", size_label="350M")),
    ("LFM2-350M", 4_100_000, ModelId("LFM2-350M", None, "LFM2", finetune="350m")),
    ("LFM2.5-1.2B-Instruct", 1_170_340_608, ModelId("LFM2.5-1.2B-Instruct", None, "LFM2.5", "Instruct", size_label="1.2B")),
    ("LFM2-2.6B-Exp-128k", 2_569_000_000, ModelId("LFM2-2.6B-Exp-128k", None, "LFM2", "Exp-128k", size_label="2.6B")),
    ("tiny-lfm2-hf", 0, ModelId("tiny-lfm2-hf")),
    ("org/model-v1.0", 0, ModelId("model-v1.0", "org", "model", version="v1.0")),
    ("model-v1.0-chat", 0, ModelId("model-v1.0-chat", None, "model-v1.0", "chat")),
    ("bloom-7b1", 0, ModelId("bloom-7b1", None, "bloom", size_label="7.1B")),
    ("mix-8x7B-small-q4_0", 0, ModelId("mix-8x7B-small-q4_0", None, "mix", "small", size_label="8x7B")),
    ("a-small", 0, ModelId("a-small", None, "a", size_label="small")),
    ("1234abcd", 0, ModelId("1234abcd", finetune="1234abcd")),
    ("./x-7B", 0, ModelId("x-7B", None, "x", size_label="7B")),
    ("my model", 0, ModelId("my model")),
    ("", 0, ModelId("")),
]


@pytest.mark.parametrize("name, n_params, expected", NAMES, ids=[n[0] for n in NAMES])
def test_model_ids(name, n_params, expected):
    assert parse_model_id(name, n_params) == expected


@pytest.mark.parametrize("name", [n[0] for n in NAMES])
@pytest.mark.parametrize("n_params", [0, 4_100_000, 354_483_968, 8_340_000_000])
def test_model_ids_as_gguf_py(name, n_params):
    from gguf.metadata import Metadata

    theirs = Metadata.get_model_id_components(name, n_params)
    ours = parse_model_id(name, n_params)
    parts = (ours.full_name, ours.organization, ours.basename, ours.finetune, ours.version, ours.size_label)
    assert parts == tuple(theirs) and title(name) == Metadata.id_to_title(name)


@pytest.mark.parametrize(
    "n, label",
    [(354_483_968, "354M"), (1_170_340_608, "1.2B"), (4_100_096, "4.1M"), (122_368, "122K"), (999, "1.0K"), (2**41, "2.2T")],
)
def test_size_labels(n, label):
    assert size_label(n) == label


# --- config.json


def hparams(changes: dict[str, Any], notes: list[str] | None = None) -> Any:
    shape = TinyShape(n_embd=1024, n_layer=4, attention=(2,), n_head=16, n_head_kv=8, n_ff=4608, n_vocab=65536)
    config = {k: v for k, v in {**hf_config(shape), **changes}.items() if v is not ...}
    return read_config(config, "config.json", quiet if notes is None else notes.append)


SPELLINGS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "LFM2-350M": ({"intermediate_size": ..., "block_ff_dim": 6656, "block_auto_adjust_ff_dim": True}, "n_ff", 4608),
    "LFM2-700M": ({"intermediate_size": 10240, "block_auto_adjust_ff_dim": True}, "n_ff", 6912),
    "LFM2-1.2B": ({"block_ff_dim": 12288, "block_auto_adjust_ff_dim": True}, "n_ff", 8192),
    "LFM2-2.6B": ({"block_ff_dim": 10752, "block_auto_adjust_ff_dim": False}, "n_ff", 10752),
    "block_ff_dim wins": ({"block_ff_dim": 100, "intermediate_size": 7}, "n_ff", 100),
    "adjusts by default": ({"intermediate_size": 6656, "block_auto_adjust_ff_dim": ...}, "n_ff", 4608),
    "multiplier": (
        {"intermediate_size": 6656, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.5}, "n_ff", 6656,
    ),
    "no multiplier, no rounding": (
        {"intermediate_size": 6656, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": None}, "n_ff", 4437,
    ),
    "multiple": ({"intermediate_size": 6656, "block_auto_adjust_ff_dim": True, "block_multiple_of": 100}, "n_ff", 4500),
    "old layers": ({"layer_types": ..., "full_attn_idxs": [0, 3]}, "n_head_kv", (8, 0, 0, 8)),
    "layer_types wins": ({"full_attn_idxs": [0, 3]}, "n_head_kv", (0, 0, 8, 0)),
    "num_heads": ({"num_attention_heads": ..., "num_heads": 8}, "n_head", 8),
    "num_attention_heads wins": ({"num_heads": 8}, "n_head", 16),
    "block_norm_eps": ({"norm_eps": ..., "block_norm_eps": 1e-6}, "norm_rms_eps", 1e-6),
    "norm_eps wins": ({"norm_eps": 1e-5, "block_norm_eps": 1e-6}, "norm_rms_eps", 1e-5),
    "rope_theta": ({"rope_parameters": ..., "rope_theta": 5e6}, "rope_freq_base", 5e6),
    "rope_parameters wins": ({"rope_parameters": {"rope_theta": 1e7}, "rope_theta": 5e6}, "rope_freq_base", 1e7),
    "rope without theta": ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e6}, "rope_freq_base", 5e6),
    "an integer theta": ({"rope_parameters": {"rope_theta": 1000000}}, "rope_freq_base", 1e6),
    "l_cache": ({"conv_L_cache": 7}, "l_cache", 7),
    "nested": ({"vocab_size": ..., "text_config": {"vocab_size": 99}}, "n_vocab", 99),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings(case):
    changes, field, expected = SPELLINGS[case]
    assert getattr(hparams(changes).hparams, field) == expected


@pytest.mark.parametrize(
    "changes, tied",
    [
        ({}, True), ({"tie_word_embeddings": ...}, True), ({"tie_word_embeddings": False}, False),
        ({"tie_embedding": True, "tie_word_embeddings": False}, True), ({"tie_embedding": False}, False),
    ],
)  # fmt: skip
def test_tying(changes, tied):
    assert hparams(changes).tied is tied


@pytest.mark.parametrize(
    "key, field, default",
    [("max_position_embeddings", "n_ctx_train", 128000), ("norm_eps", "norm_rms_eps", 1e-5)],
)
def test_a_default_is_told(key, field, default):
    notes: list[str] = []
    assert getattr(hparams({key: ...}, notes).hparams, field) == default
    assert len(notes) == 1 and key in notes[0] and str(default) in notes[0]


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"])
@pytest.mark.parametrize("value", [..., None, 0, -1, 2**31, 1.5, "8", True, [8], {}])
def test_sizes_must_be_there_and_be_sizes(key, value):
    with pytest.raises(CheckpointError, match=key):
        hparams({key: value})


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), "1e6", [1], True])
@pytest.mark.parametrize("key", ["norm_eps", "rope_theta"])
def test_positive_numbers(key, value):
    with pytest.raises(CheckpointError, match=key):
        hparams({"rope_parameters": ..., key: value})


# --- JSON


@pytest.mark.parametrize(
    "text, place",
    [
        ('{"a": [1, {"b": 1, "c": {"b": 2}, "b": 3}]}', "line 1 column 35"),
        ('{"\\u0061": 1,\n  "a": 2}', "line 2 column 3"),
        ('{"a \\" : b": 1, "x": "a", "x": 1}', "line 1 column 27"),
        ('["NaN", "-Infinity",\n -Infinity]', "line 2 column 2"),
    ],
)
def test_places_of_what_python_would_accept(text, place):
    with pytest.raises(CheckpointError, match=place):
        parse_json(text.encode(), "x.json")


def test_equal_keys_of_different_objects_are_fine():
    assert parse_json(b'{"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]}', "x") == {"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]}


# --- numbers


def test_bf16_rounds_to_nearest_even():
    """Over every exponent and at every halfway point; and NaN stays NaN."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[:65536] = (np.arange(65536, dtype=np.uint32) << 16) | 0x8000  # exactly halfway
    x = bits.view(np.float32)
    rounded = as_f32(memoryview(f32_to_bf16(x).tobytes()), "BF16")
    nan = np.isnan(x)
    assert np.isnan(rounded[nan]).all() and not np.isnan(rounded[~nan]).any()
    below = bits & np.uint32(0xFFFF0000)
    finite = np.isfinite(x) & np.isfinite((below + np.uint32(0x10000)).view(np.float32))
    x, bits, below, rounded = x[finite], bits[finite], below[finite], rounded[finite]
    low, high = (b.view(np.float32).astype(np.float64) for b in (below, below + np.uint32(0x10000)))
    to_low, to_high, even = np.abs(x - low), np.abs(high - x), (bits >> 16) & 1 == 0
    expected = np.where((to_low < to_high) | ((to_low == to_high) & even), low, high)
    assert len(x) > 190_000 and np.array_equal(rounded.astype(np.float64), expected)


# --- the vocabulary


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_hf(tmp_path / "m", **SMALL)


def vocabulary(path: Path, n_vocab: int = 320) -> Any:
    return read_vocabulary(read_tokenizer_files(path), n_vocab, force_pre=None, note=quiet)


def test_tokens_decode_as_the_library_decodes_them(checkpoint):
    from tokenizers import Tokenizer

    liquid_tokenizer(checkpoint)
    found = vocabulary(checkpoint)
    library = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    for i, piece in enumerate(found.tokens):
        if found.types[i] == TokenType.NORMAL:
            assert piece == library.id_to_token(i)
        elif found.types[i] != TokenType.UNUSED:
            assert piece == library.decode([i], skip_special_tokens=False).replace("\u2581", " ")


def test_types(checkpoint):
    liquid_tokenizer(checkpoint)
    found = vocabulary(checkpoint)
    assert found.types[10] == found.types[11] == TokenType.CONTROL  # not declared special, but look it
    added = dict(zip(found.tokens[312:318], found.types[312:318], strict=True))
    assert added == {
        "<|new|>": TokenType.CONTROL, "<tool>": TokenType.CONTROL, "caf\u00e9 \u65e5\u672c": TokenType.USER_DEFINED,
        " x": TokenType.USER_DEFINED, " word": TokenType.USER_DEFINED, "\ufffd\ufffd": TokenType.USER_DEFINED,
    }  # fmt: skip


def test_merges_with_spaces(checkpoint):
    def change(t: dict[str, Any]) -> None:
        t["model"]["vocab"].update({"a b": 312, "a": t["model"]["vocab"]["a"], "a bc": 313})
        t["model"]["merges"].append(["a b", "c"])

    update_json(checkpoint / "tokenizer.json", change)
    assert vocabulary(checkpoint).merges[-1] == "a\u0120b c"


@pytest.mark.parametrize("regex", sorted(LFM2_REGEXES))
def test_spellings_of_the_regex_split_alike(regex):
    from tokenizers import Regex, pre_tokenizers

    texts = [
        "Hello, world! it's I'LL we'Re 12345 \u00c0\u00e9\u00ee\n\n  x\t \r\n'd'D \u017f'\u017f", "\u65e5\u672c\u8a9e 1\u00b2\u0663 \U0001f680",
        "  a   b  ", "'", "''s 'S 'VE", "tab\tnew\u2028line", "",
    ]
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    plain = pre_tokenizers.Split(Regex(REGEX), "isolated")
    for text in texts:
        ours = [piece for piece, _ in split.pre_tokenize_str(text)]
        # The spelling without (?i:) does not fold the long s, as the long s is no letter of English.
        assert ours == [piece for piece, _ in plain.pre_tokenize_str(text)] or "\u017f" in text


def test_ids_come_from_the_name_before_the_number():
    added = [{"id": i, "content": piece} for i, piece in enumerate(SPECIALS)]
    found = find_special_tokens({"added_tokens": added}, {"eos_token": SPECIALS[2]}, {"eos_token_id": 7, "bos_token_id": 1})
    assert list(found.ids.items()) == [("eos", 2), ("bos", 1)]


# --- the model card


@pytest.mark.parametrize(
    "text, expected",
    [
        ("---\na: 1\n---\nb: 2\n", {"a": 1}),
        ("---\nlanguage:\n- no\n---\n", {"language": ["no"]}),
        ("---\n\ta: 1\n", {"a": 1}),
        ("# title\n---\na: 1\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("", {}),
    ],
)
def test_front_matter(text, expected, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert read_model_card(tmp_path / "README.md", quiet) == expected


@pytest.mark.parametrize("text", [b"---\na: [\n---\n", b"---\n!!python/object:os.system x\n---\n", b"---\n\xff\n---\n"])
def test_a_bad_card_is_told_and_ignored(text, tmp_path):
    (tmp_path / "README.md").write_bytes(text)
    notes: list[str] = []
    assert read_model_card(tmp_path / "README.md", notes.append) == {} and len(notes) == 1


def test_no_card(tmp_path):
    assert read_model_card(tmp_path / "README.md", quiet) == {}
