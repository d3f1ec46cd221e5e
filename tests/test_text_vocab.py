"""The vocabulary rebuilt from a GGUF is Hugging Face's; wrong tables are refused by name (cases A25, A26)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from vocab_model import BYTE, CONTROL, DATA, NORMAL, UNUSED, USER_DEFINED, golden_gguf, golden_tokenizer, vocab_gguf

from lfm2cpp.errors import ModelFormatError, UsageError
from lfm2cpp.gguf import read_gguf
from lfm2cpp.text.vocab import VISIBLE_PIECES, Vocab, byte_symbols, well_formed

T = gguf.GGUFValueType
GOLDEN = json.loads((DATA / "golden_tokens.json").read_text(encoding="utf-8"))["tokenize"]
N_RANDOM = 2000  # strings of each kind


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    return Vocab(read_gguf(golden_gguf(tmp_path_factory.mktemp("vocab") / "v.gguf", n_pad=5)))


@pytest.fixture(scope="module")
def hf() -> Tokenizer:
    return Tokenizer.from_file(str(DATA / "golden_tokenizer.json"))


def small_vocab(tmp_path: Path, extra: list[tuple[str, int]], **metadata: Any) -> Vocab:
    """14 special pieces, 256 byte symbols, then `extra` pieces with their types, then "ab", the only merge."""
    specials = [entry["content"] for entry in golden_tokenizer()["added_tokens"]]
    pieces = [*specials, *byte_symbols(), *(piece for piece, _ in extra)]
    kinds = [CONTROL] * 14 + [NORMAL] * 256 + [kind for _, kind in extra]
    keys = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    path = vocab_gguf(tmp_path / "s.gguf", [*pieces, "ab"], [*kinds, NORMAL], ["a b"], metadata=keys)
    return Vocab(read_gguf(path))


# -- equal to Hugging Face ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: ascii(case["text"])[:40])
def test_golden_ids_and_text(vocab: Vocab, case: dict[str, Any]) -> None:
    ids = vocab.tokenize(case["text"], add_bos=True, parse_special=True)
    assert ids == case["hf_ids"]
    assert case["llama_cpp_ids"] in (None, ids)
    assert vocab.detokenize(ids, special=True) == case["decoded"]


@settings(max_examples=N_RANDOM, deadline=None)
@given(st.text())
def test_random_unicode_equals_hf(vocab: Vocab, hf: Tokenizer, text: str) -> None:
    ids = vocab.tokenize(text, parse_special=True)
    assert ids == hf.encode(text, add_special_tokens=False).ids
    if not any(piece in text for piece in VISIBLE_PIECES):
        assert vocab.detokenize(ids) == hf.decode(ids, skip_special_tokens=True)
    assert vocab.detokenize(ids, special=True) == text


@settings(max_examples=N_RANDOM, deadline=None)
@given(st.data())
def test_random_mixtures_equal_hf(vocab: Vocab, hf: Tokenizer, data: st.DataObject) -> None:
    """Words of the vocabulary, markers, parts of markers, blanks, digits and contractions in any order."""
    word = st.integers(0, vocab.n_tokens - 6).map(lambda i: vocab.detokenize([i], special=True).replace("\ufffd", "?"))
    part = st.sampled_from(
        ["<|im_end|>", "<|im_", "|>", "<|", "end|>", "'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "123456", "0", "É",
         "ſ", "e\u0301", "\u200d", "👩\u200d👧", "\u3000", "\xa0", "\x85", "_", "ŉ", "ǅ", "²", "Ⅷ", "\x00"]
    )  # fmt: skip
    text = "".join(data.draw(st.lists(st.one_of(word, part, st.text(max_size=3)), max_size=12)))
    assert vocab.tokenize(text, parse_special=True) == hf.encode(text, add_special_tokens=False).ids


@settings(max_examples=500, deadline=None)
@given(st.text())
def test_without_specials_text_is_text(vocab: Vocab, text: str) -> None:
    """E14: a marker that somebody typed is nine characters, not a token."""
    typed = f"{text}<|im_end|>{text}<|tool_call_start|>"
    ids = vocab.tokenize(typed)
    assert vocab.detokenize(ids) == typed
    assert all(vocab.piece(i) not in vocab.special_pieces for i in ids)


@pytest.mark.parametrize("text", ["x" * 1_000_000, " " * 1_000_000, "\n" * 100_000, "ab " * 300_000, "é🙂" * 100_000])
def test_a_megabyte_is_no_problem(vocab: Vocab, hf: Tokenizer, text: str) -> None:
    assert vocab.tokenize(text) == hf.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("\ud83d\ude42", "🙂"), ("a\ud800b", "a\ufffdb"), ("\udcff", "\ufffd"), ("plain", "plain"), ("\x00", "\x00")],
)
def test_lone_surrogates_become_replacement_characters(vocab: Vocab, text: str, meaning: str) -> None:
    assert well_formed(text) == meaning
    assert vocab.detokenize(vocab.tokenize(text)) == meaning


# -- special, user-defined and unused tokens --------------------------------------------------------------------


def test_exactly_one_bos(vocab: Vocab) -> None:
    for text in ("", "a", "<|startoftext|>a", "<|startoftext|><|startoftext|>a"):
        ids = vocab.tokenize(text, add_bos=True, parse_special=True)
        assert ids.count(vocab.bos_id) == 1 and ids[0] == vocab.bos_id
    assert vocab.tokenize("<|startoftext|>", add_bos=True)[1] != vocab.bos_id  # typed text


def test_ids_come_from_the_file(tmp_path: Path) -> None:
    """LFM2.5-2.6B has its special tokens elsewhere: nothing may be built in."""
    pieces = [*byte_symbols(), "ab", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|startoftext|>"]
    kinds = [NORMAL] * 257 + [CONTROL] * 4
    keys = {"bos": 260, "eos": 259, "padding": 257}
    metadata = {f"tokenizer.ggml.{name}_token_id": (T.UINT32, i) for name, i in keys.items()}
    vocab = Vocab(read_gguf(vocab_gguf(tmp_path / "m.gguf", pieces, kinds, ["a b"], metadata=metadata)))
    assert (vocab.bos_id, vocab.eos_id, vocab.pad_id, vocab.eog_ids) == (260, 259, 257, {257, 259})
    assert vocab.tokenize("<|im_start|>ab<|im_end|>", add_bos=True, parse_special=True) == [260, 258, 256, 259]


def test_end_tokens_are_found_by_piece_and_by_key(tmp_path: Path) -> None:
    assert small_vocab(tmp_path, [], eos_token_id=(T.UINT32, 2)).eog_ids == {2, 7}
    assert small_vocab(tmp_path, [], eos_token_id=(T.UINT32, 5)).eog_ids == {2, 5, 7}
    assert small_vocab(tmp_path, [], eot_token_id=(T.UINT32, 9)).eog_ids == {2, 7, 9}
    assert small_vocab(tmp_path, [], eos_token_id=None).eog_ids == {2, 7}


def test_padded_rows_are_unused_and_unreachable(vocab: Vocab) -> None:
    assert vocab.unused_ids == tuple(range(1024, 1029))
    assert all(i < 1024 for i in vocab.tokenize("[PAD1024] [PAD1025]", parse_special=True))


def test_user_defined_tokens_are_always_found_but_markers_never(tmp_path: Path) -> None:
    vocab = small_vocab(tmp_path, [("<think>", USER_DEFINED), ("<|odd|>", USER_DEFINED)])
    think, odd = vocab.token_id("<think>"), vocab.token_id("<|odd|>")
    assert vocab.tokenize("a<think>b") == [*vocab.tokenize("a"), think, *vocab.tokenize("b")]
    assert odd not in vocab.tokenize("a<|odd|>b")
    assert odd in vocab.tokenize("a<|odd|>b", parse_special=True)
    assert vocab.detokenize([think, odd]) == "<think>"


def test_longest_marker_wins_and_markers_may_touch(tmp_path: Path) -> None:
    vocab = small_vocab(tmp_path, [("<|im_end|><|im_end|>", CONTROL), ("<|", CONTROL)])
    assert vocab.split_special("a<|im_end|><|im_end|><|im_end|>") == [
        ("a", False), ("<|im_end|><|im_end|>", True), ("<|im_end|>", True),
    ]  # fmt: skip
    assert vocab.split_special("<|x") == [("<|", True), ("x", False)]


def test_tool_calls_stay_visible(vocab: Vocab) -> None:
    ids = vocab.tokenize("<|im_start|>a<|tool_call_start|>[f()]<|tool_call_end|><|im_end|>", parse_special=True)
    assert vocab.detokenize(ids) == "a<|tool_call_start|>[f()]<|tool_call_end|>"
    assert vocab.detokenize(ids, special=True).startswith("<|im_start|>a")


def test_byte_tokens_stand_for_their_byte(tmp_path: Path) -> None:
    vocab = small_vocab(tmp_path, [("<0xE9>", BYTE), ("<0x0a>", BYTE)])
    assert vocab.token_bytes(270) == b"\xe9" and vocab.token_bytes(271) == b"\n"


def test_a_whole_word_is_one_token_even_without_merges(tmp_path: Path) -> None:
    """ignore_merges: llama.cpp's rule for this pre-tokenizer."""
    vocab = small_vocab(tmp_path, [("hello", NORMAL), ("\u0120hello", NORMAL)])
    assert [vocab.piece(i) for i in vocab.tokenize("hello hello")] == ["hello", "\u0120hello"]


@pytest.mark.parametrize("token_id", [-1, 1029, 10**9])
def test_ids_outside_are_refused(vocab: Vocab, token_id: int) -> None:
    for call in (vocab.piece, vocab.token_bytes, lambda i: vocab.detokenize([i])):
        with pytest.raises(UsageError, match="outside the vocabulary"):
            call(token_id)


# -- A25, A26: tables that are wrong --------------------------------------------------------------------------------

Tables = tuple[list[Any], list[int], list[Any], dict[str, Any]]


def pieces_fault(change: Callable[[list[Any], list[int], list[Any], dict[str, Any]], None]) -> Callable[[], Tables]:
    def build() -> Tables:
        specials = [entry["content"] for entry in golden_tokenizer()["added_tokens"]]
        tables: Tables = ([*specials, *byte_symbols(), "ab"], [CONTROL] * 14 + [NORMAL] * 257, ["a b"], {})
        change(*tables)
        return tables

    return build


FAULTS: dict[str, tuple[Callable[..., None], str]] = {
    "fewer types": (lambda p, k, m, d: k.pop(), "270 items, but tokenizer.ggml.tokens has 271"),
    "more types": (lambda p, k, m, d: k.append(1), "272 items, but"),
    "no types": (lambda p, k, m, d: d.update({"token_type": None}), "token_type is missing"),
    "fewer scores": (lambda p, k, m, d: d.update(scores=(T.ARRAY, [1.0] * 3)), "scores has 3 items"),
    "float types": (lambda p, k, m, d: k.__setitem__(slice(None), [1.0] * 271), "ARRAY of FLOAT32"),
    "duplicate piece": (lambda p, k, m, d: p.__setitem__(20, p[19]), "tokens 19 and 20 are both"),
    "duplicate special": (lambda p, k, m, d: p.__setitem__(3, p[2]), "tokens 2 and 3 are both '<|endoftext|>'"),
    "type 99": (lambda p, k, m, d: k.__setitem__(30, 99), "token 30 is 99, expected 1 to 6"),
    "type -1": (lambda p, k, m, d: k.__setitem__(30, -1), "token 30 is -1"),
    "type 0": (lambda p, k, m, d: k.__setitem__(30, 0), "token 30 is 0"),
    "unknown left half": (lambda p, k, m, d: m.append("zz b"), "merge 1 of 'zz' and 'b' needs the text token 'zz'"),
    "unknown right half": (lambda p, k, m, d: m.append("a zz"), "needs the text token 'zz'"),
    "unknown whole": (lambda p, k, m, d: m.append("a c"), "needs the text token 'ac'"),
    "special in merge": (lambda p, k, m, d: m.append("a <|pad|>"), "needs the text token"),
    "no space": (lambda p, k, m, d: m.append("ab"), "merge 1 is b'ab', expected two pieces"),
    "two spaces": (lambda p, k, m, d: m.append("a b c"), "merge 1 is b'a b c'"),
    "shifted spaces": (lambda p, k, m, d: m.extend(["a", "b a b"]), "merge 1 is b'a'"),
    "newline": (lambda p, k, m, d: m.append("a\nb c"), "expected two pieces"),
    "merge no UTF-8": (lambda p, k, m, d: m.append(b"\xff b"), "merge 1 is not UTF-8"),
    "piece no UTF-8": (lambda p, k, m, d: p.__setitem__(40, b"\xff\xfe"), "token 40 is not UTF-8"),
    "no merges": (lambda p, k, m, d: d.update(merges=None), "tokenizer.ggml.merges is missing"),
    "merges of numbers": (lambda p, k, m, d: d.update(merges=(T.ARRAY, [1, 2])), "ARRAY of INT32 of 2 items"),
    "merges no array": (lambda p, k, m, d: d.update(merges=(T.STRING, "a b")), "has type STRING, expected ARRAY"),
    "tokens of numbers": (lambda p, k, m, d: d.update(tokens=(T.ARRAY, [1, 2])), "a non-empty ARRAY of STRING"),
    "eos outside": (lambda p, k, m, d: d.update(eos_token_id=(T.UINT32, 271)), "eos_token_id is 271, but there"),
    "bos outside": (lambda p, k, m, d: d.update(bos_token_id=(T.UINT32, 2**32 - 1)), "bos_token_id is 4294967295"),
    "pad outside": (lambda p, k, m, d: d.update(padding_token_id=(T.INT32, -1)), "padding_token_id is -1"),
    "eos no number": (lambda p, k, m, d: d.update(eos_token_id=(T.STRING, "7")), "has type STRING"),
    "add_bos no bool": (lambda p, k, m, d: d.update(add_bos_token=(T.UINT32, 1)), "has type UINT32, expected BOOL"),
    "other model": (lambda p, k, m, d: d.update(model=(T.STRING, "llama")), "model is 'llama', expected 'gpt2'"),
    "other pre": (lambda p, k, m, d: d.update(pre=(T.STRING, "qwen2")), "pre is 'qwen2', expected lfm2"),
    "no pre": (lambda p, k, m, d: d.update(pre=None), "'tokenizer.ggml.pre' is missing"),
    "byte <0x-1>": (lambda p, k, m, d: (p.append("<0x-1>"), k.append(BYTE)), "byte token 271 is '<0x-1>'"),
    "byte <0xGG>": (lambda p, k, m, d: (p.append("<0xGG>"), k.append(BYTE)), "byte token 271 is '<0xGG>'"),
    "byte <0x100>": (lambda p, k, m, d: (p.append("<0x100>"), k.append(BYTE)), "expected <0x00> to <0xFF>"),
    "byte x": (lambda p, k, m, d: (p.append("x y"), k.append(BYTE)), "byte token 271"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_tables_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    change, message = FAULTS[name]
    pieces, kinds, merges, keys = pieces_fault(change)()
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    path = vocab_gguf(tmp_path / "bad.gguf", pieces, kinds, merges, metadata=metadata)
    with pytest.raises(ModelFormatError) as caught:
        Vocab(read_gguf(path))
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("piece", ["<0x-1>", "<0xGG>", "<0x", "<0x0000000A>"])
def test_normal_tokens_may_look_like_broken_byte_tokens(tmp_path: Path, piece: str) -> None:
    """A26: text that only looks like a byte token is text; nothing is indexed by it."""
    vocab = small_vocab(tmp_path, [(piece, NORMAL)])
    assert vocab.token_bytes(270) == piece.encode()


def test_padding_above_the_tokenizer_is_fine(tmp_path: Path) -> None:
    vocab = small_vocab(tmp_path, [(f"[PAD{i}]", UNUSED) for i in range(270, 300)])
    assert set(vocab.unused_ids) == set(range(270, 300)) and vocab.n_tokens == 301
