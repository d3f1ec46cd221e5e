"""Text <-> token ids, from a GGUF's vocabulary alone.

The merging and the regex are Hugging Face `tokenizers`'; this module rebuilds its BPE from `tokenizer.ggml.*`, checks
the tables first, and decides where special tokens are recognised. No id is built in: ids come from keys and pieces.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from lfm2cpp.errors import ModelFormatError, UsageError
from lfm2cpp.gguf.values import INTEGER_TYPES, Value, ValueType

if TYPE_CHECKING:
    from lfm2cpp.gguf.reader import GGUFFile

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_TYPES = frozenset(range(NORMAL, BYTE + 1))

# The Llama 3 pre-tokenizer, as it stands in LFM2's tokenizer.json.
_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> regex; llama.cpp gives all of these ignore_merges and a BOS.
PRE_TOKENIZERS = {name: _LLAMA3_REGEX for name in ("lfm2", "llama-bpe", "llama3", "llama-v3")}

# Pieces that end a generation. LFM2 chats end in the first; the second ends a document.
EOG_PIECES = ("<|im_end|>", "<|endoftext|>")
# Not special in LFM2.5's tokenizer.json, though files mark them CONTROL: an answer without them has no tool calls.
VISIBLE_PIECES = ("<|tool_call_start|>", "<|tool_call_end|>")

_ALL_BUT_SEPARATORS = bytes(b for b in range(256) if b not in b" \n")

Segment = tuple[str, bool]  # text, and whether it is one special token's piece


def well_formed(text: str) -> str:
    """`text` with lone surrogates (undecodable bytes, broken JSON) replaced by U+FFFD; pairs become characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class Vocab:
    """The vocabulary of one model. Raises ModelFormatError, naming the entry, when a table is wrong."""

    def __init__(self, gguf: GGUFFile) -> None:
        self._path = gguf.path
        self._check_model(gguf)
        pieces = self._strings(gguf, "tokenizer.ggml.tokens")
        self.n_tokens = len(pieces)  # [PADn] rows included
        self._types = self._token_types(gguf)
        with _paused_gc():
            self._pieces = self._decode(pieces, "token")
            self._ids = dict(zip(self._pieces, range(self.n_tokens), strict=True))
            if len(self._ids) != self.n_tokens:
                self._refuse_duplicate()
            special = [m.start() for m in re.finditer(rb"[^\x01]", self._types, re.DOTALL)]  # all but NORMAL
            self._check_byte_tokens(special)
            self._bpe = self._build_bpe(gguf, special)
        self._special_pieces = {self._pieces[i] for i in special if self._is_special(i)}
        self._added_pieces = {
            self._pieces[i] for i in special if self._types[i] == USER_DEFINED and not self._is_special(i)
        }
        self.unused_ids = tuple(i for i in special if self._types[i] == UNUSED)  # never to be sampled
        self.bos_id = self._id_of(gguf, "bos")
        self.eos_id = self._id_of(gguf, "eos")
        self.pad_id = self._id_of(gguf, "padding")
        eot_id = self._id_of(gguf, "eot")
        self.add_bos: bool = gguf.get("tokenizer.ggml.add_bos_token", ValueType.BOOL, True) and self.bos_id is not None
        by_piece = (self._ids[p] for p in EOG_PIECES if p in self._special_pieces)
        self.eog_ids = frozenset([*by_piece, *(i for i in (self.eos_id, eot_id) if i is not None)])
        self._bytes: dict[int, bytes] = {}

    # -- tables ------------------------------------------------------------------------------------------------

    def _check_model(self, gguf: GGUFFile) -> None:
        model = gguf.get("tokenizer.ggml.model", ValueType.STRING)
        if model != "gpt2":
            self._fail(f"tokenizer.ggml.model is {_shown(model)}, expected 'gpt2' (byte-level BPE)")
        pre = gguf.get("tokenizer.ggml.pre", ValueType.STRING)
        if pre not in PRE_TOKENIZERS:
            self._fail(f"tokenizer.ggml.pre is {_shown(pre)}, expected {' or '.join(PRE_TOKENIZERS)}; convert it again")
        self._regex = PRE_TOKENIZERS[pre]

    def _fail(self, message: str) -> NoReturn:
        raise ModelFormatError(f"{self._path}: {message}") from None

    def _array(self, gguf: GGUFFile, key: str) -> Value | None:
        """The array under `key`, or None when it is absent; the type of its items is the caller's to check."""
        gguf.get(key, ValueType.ARRAY, None)
        return gguf.metadata.get(key)

    def _strings(self, gguf: GGUFFile, key: str) -> list[bytes]:
        value = self._array(gguf, key)
        if value is None or value.item_type != ValueType.STRING or not value.value:
            found = "missing" if value is None else f"{value.type_name} of {len(value.value)} items"
            self._fail(f"{key} is {found}, expected a non-empty ARRAY of STRING")
        return value.value

    def _token_types(self, gguf: GGUFFile) -> bytes:
        """One byte a token, which is quicker to search than a list."""
        for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
            value = self._array(gguf, key)
            if value is not None and len(value.value) != self.n_tokens:
                self._fail(f"{key} has {len(value.value)} items, but tokenizer.ggml.tokens has {self.n_tokens}")
        value = self._array(gguf, "tokenizer.ggml.token_type")
        if value is None:
            self._fail("tokenizer.ggml.token_type is missing, so special tokens look like text; convert it again")
        if value.item_type not in INTEGER_TYPES:
            self._fail(f"tokenizer.ggml.token_type is {value.type_name}, expected ARRAY of INT32")
        for i, token_type in enumerate(value.value) if not set(value.value) <= _TYPES else ():
            if token_type not in _TYPES:
                self._fail(f"tokenizer.ggml.token_type of token {i} is {token_type}, expected {NORMAL} to {BYTE}")
        return bytes(value.value)

    def _decode(self, items: list[bytes], what: str) -> list[str]:
        try:
            return list(map(bytes.decode, items))
        except UnicodeDecodeError:
            for i, item in enumerate(items):
                try:
                    item.decode()
                except UnicodeDecodeError:
                    self._fail(f"{what} {i} is not UTF-8: {item[:40]!r}")
            raise

    def _refuse_duplicate(self) -> None:
        for i, piece in enumerate(self._pieces):
            if self._ids[piece] != i:
                self._fail(f"tokens {i} and {self._ids[piece]} are both {_shown(piece)}; pieces must be unique")

    def _check_byte_tokens(self, special: list[int]) -> None:
        for i in special:
            if self._types[i] == BYTE and not re.fullmatch("<0x[0-9A-Fa-f]{2}>", self._pieces[i]):
                self._fail(f"byte token {i} is {_shown(self._pieces[i])}, expected <0x00> to <0xFF>")

    def _id_of(self, gguf: GGUFFile, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = gguf.get(key, INTEGER_TYPES, None)
        if token_id is not None and not 0 <= token_id < self.n_tokens:
            self._fail(f"{key} is {token_id}, but there are {self.n_tokens} tokens")
        return token_id

    def _is_special(self, token_id: int) -> bool:
        """Recognised only on request. Some converters call `<|...|>` tokens USER_DEFINED: those count as well."""
        piece = self._pieces[token_id]
        looks_special = piece.startswith("<|") and piece.endswith("|>")
        return self._types[token_id] == CONTROL or (self._types[token_id] == USER_DEFINED and looks_special)

    def _build_bpe(self, gguf: GGUFFile, special: list[int]) -> Any:
        """A tokenizers.Tokenizer for plain text. Special and unused pieces are not in it: text never becomes one."""
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        merges = self._merges(gguf)
        plain = dict(self._ids)
        for i in special:
            if self._is_special(i) or self._types[i] in (UNUSED, UNKNOWN):
                del plain[self._pieces[i]]
        try:
            bpe = models.BPE(plain, merges, ignore_merges=True)
        except Exception as error:  # tokenizers raises bare Exception
            self._refuse_merge(merges, plain, error)
        tokenizer = Tokenizer(bpe)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(self._regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        return tokenizer

    def _merges(self, gguf: GGUFFile) -> list[tuple[str, str]]:
        merges = self._strings(gguf, "tokenizer.ggml.merges")
        lines = b"\n".join(merges)
        # With all other bytes deleted, one space a merge and none with a newline leave this pattern.
        if lines.translate(None, _ALL_BUT_SEPARATORS) != b" \n" * (len(merges) - 1) + b" ":
            at = next(i for i, merge in enumerate(merges) if merge.count(b" ") != 1 or b"\n" in merge)
            self._fail(f"merge {at} is {merges[at][:80]!r}, expected two pieces with one space between them")
        try:
            halves = iter(lines.decode().replace("\n", " ").split(" "))
        except UnicodeDecodeError:
            self._decode(merges, "merge")
            raise
        return list(zip(halves, halves, strict=True))

    def _refuse_merge(self, merges: list[tuple[str, str]], plain: dict[str, int], error: Exception) -> None:
        for i, (left, right) in enumerate(merges):
            for piece in (left, right, left + right):
                if piece not in plain:
                    self._fail(f"merge {i} of {_shown(left)} and {_shown(right)} needs the text token {_shown(piece)}")
        self._fail(f"tokenizers refuses the vocabulary: {error}")

    # -- text -> ids -------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """Ids of `text`; special pieces in it are plain text unless `parse_special`. One BOS in front on request."""
        segments = self.split_special(text) if parse_special else [(text, False)]
        return self.encode_segments(segments, add_bos=add_bos)

    def encode_segments(self, segments: Iterable[Segment], *, add_bos: bool = False) -> list[int]:
        """Ids of text and special pieces in turn; exactly one BOS in front when `add_bos`, whoever wrote it."""
        ids: list[int] = []
        for text, special in segments:
            ids += (self._ids[text],) if special else self._encode_plain(well_formed(text))
        if add_bos and self.bos_id is not None:
            start = next((i for i, token_id in enumerate(ids) if token_id != self.bos_id), len(ids))
            ids[:start] = [self.bos_id]
        return ids

    def split_special(self, text: str) -> list[Segment]:
        """`text` cut at the special pieces in it, leftmost and longest first."""
        return list(split_at(text, self._special_pieces))

    def _encode_plain(self, text: str) -> list[int]:
        if not self._added_pieces:
            return self._bpe.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for part, added in split_at(text, self._added_pieces):
            ids += (self._ids[part],) if added else self._bpe.encode(part, add_special_tokens=False).ids
        return ids

    @cached_property
    def special_pieces(self) -> tuple[str, ...]:
        """Every piece that only the template or the caller may turn into its token."""
        return tuple(sorted(self._special_pieces))

    # -- ids -> text -------------------------------------------------------------------------------------------

    def token_id(self, piece: str) -> int | None:
        """The id of a piece as the vocabulary spells it."""
        return self._ids.get(piece)

    def piece(self, token_id: int) -> str:
        """The piece as the vocabulary spells it: byte-level for text."""
        return self._pieces[self._checked_id(token_id)]

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        """The UTF-8 bytes a token stands for, perhaps part of a character; special tokens give b"" unless asked for."""
        if not special and self._is_hidden(token_id):
            return b""
        cached = self._bytes.get(token_id)
        if cached is None:
            cached = self._bytes[token_id] = self._spell(self._checked_id(token_id))
        return cached

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i, special=special) for i in ids).decode("utf-8", "replace")

    def is_eog(self, token_id: int) -> bool:
        """Whether the token ends a generation."""
        return token_id in self.eog_ids

    def _checked_id(self, token_id: int) -> int:
        if not 0 <= token_id < self.n_tokens:
            raise UsageError(f"token id {token_id} is outside the vocabulary (0 to {self.n_tokens - 1})")
        return token_id

    def _is_hidden(self, token_id: int) -> bool:
        token_id = self._checked_id(token_id)
        if self._types[token_id] == NORMAL:
            return False
        return self._is_special(token_id) and self._pieces[token_id] not in VISIBLE_PIECES

    def _spell(self, token_id: int) -> bytes:
        piece, token_type = self._pieces[token_id], self._types[token_id]
        if token_type == BYTE:
            return bytes([int(piece[1:-1], 16)])
        if token_type in (NORMAL, UNUSED):
            try:
                return bytes(map(_BYTE_OF_SYMBOL.__getitem__, piece))
            except KeyError:
                pass  # not spelled in byte symbols: the piece stands for itself, as in HF's decoder
        return piece.encode("utf-8")


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte value 0..255."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


_BYTE_OF_SYMBOL = {symbol: b for b, symbol in enumerate(byte_symbols())}


def split_at(text: str, pieces: Iterable[str]) -> Iterator[Segment]:
    """Cut `text` at every occurrence of one of `pieces`, leftmost first, the longest where several begin."""
    present = sorted((p for p in pieces if p in text), key=len, reverse=True)
    if not present:
        if text:
            yield text, False
        return
    for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, present))})", text)):
        if part:
            yield part, i % 2 == 1


def _shown(piece: str) -> str:
    return ascii(piece if len(piece) <= 40 else piece[:40] + "...")


@contextmanager
def _paused_gc() -> Iterator[None]:
    """A hundred thousand tuples that all stay alive would be walked by the collector again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
