"""tokenizer.json -> tokens, token types, merges and the pre-tokenizer's name.

The vocabulary is the one transformers would have: tokenizer.json, plus what tokenizer_config.json and its older
companions add or re-declare, put together by the same library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from lfm2cpp.errors import CheckpointError

from .shown import shown

Note = Callable[[str], None]

PRE = "lfm2"
NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# One pre-tokenizer in the spellings in which it has been published; the tail is common to all.
_TAIL = (
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LFM2_REGEXES = frozenset({
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)" + _TAIL,
    r"(?i:'[sdmt]|'ll|'ve|'re)" + _TAIL,
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])" + _TAIL,
})  # fmt: skip


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, padded to the rows of the embedding, and the BPE merges as `left right`."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    pre: str


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer's JSON files as objects; {} for those that are not there. `directory` is for messages."""

    directory: str
    text: str  # tokenizer.json as it stands
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    added_tokens: dict[str, Any]


def read_vocabulary(files: TokenizerFiles, n_vocab: int, *, force_pre: str | None, note: Note) -> Vocabulary:
    """The vocabulary padded to `n_vocab`. Raises CheckpointError for one that GGUF could not hold faithfully."""
    path = f"{files.directory}/tokenizer.json"
    _check_structure(files.tokenizer, path)
    pre = recognise_pre_tokenizer(files.tokenizer, path, force_pre, note)
    pieces, added = _library_vocabulary(files, path)
    by_id = _by_id(pieces, n_vocab, path)
    tokens, types = [], []
    for i in range(n_vocab):
        piece = by_id.get(i)
        if piece is None:
            tokens.append(f"[PAD{i}]")
            types.append(TokenType.UNUSED)
            continue
        flags = added.get(piece)
        tokens.append(piece if flags is None else _added_text(piece, flags))
        types.append(TokenType.NORMAL if flags is None else _added_type(tokens[-1], flags))
        if types[-1] == TokenType.USER_DEFINED:
            tokens[-1] = tokens[-1].replace("\u2581", " ")  # SentencePiece's space, which llama.cpp takes out
    _check_added(files.tokenizer, pieces, by_id, path, note)
    return Vocabulary(tokens, types, _merges(files.tokenizer["model"], path), pre)


def recognise_pre_tokenizer(tokenizer: Mapping[str, Any], path: str, force_pre: str | None, note: Note) -> str:
    """`lfm2` when the file splits text as LFM2 does, whatever its vocabulary; `force_pre` overrides."""
    problem = _pre_tokenizer_problem(tokenizer)
    if problem is None:
        return PRE
    rules = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")], sort_keys=True)
    digest = hashlib.sha256(rules.encode()).hexdigest()[:16]
    if force_pre is None:
        raise CheckpointError(
            f"{path}: unknown pre-tokenizer {digest}: {problem}; if it splits like LFM2's, use --force-pre {PRE}"
        )
    note(f"{path}: unknown pre-tokenizer {digest} ({problem}) taken for {force_pre}, as asked")
    return force_pre


def _pre_tokenizer_problem(tokenizer: Mapping[str, Any]) -> str | None:
    """What differs from LFM2's rules, or None."""
    if (normalizer := tokenizer.get("normalizer")) not in (None, {"type": "Sequence", "normalizers": []}):
        return f"it has a normalizer ({shown(_type_of(normalizer))})"
    step = tokenizer.get("pre_tokenizer")
    steps = step.get("pretokenizers") if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
    if not isinstance(steps, list) or [_type_of(step) for step in steps] != ["Split", "ByteLevel"]:
        kinds = [_type_of(step) for step in steps] if isinstance(steps, list) else ["?"]
        return f"its steps are {shown(' + '.join(kinds))}, expected Split + ByteLevel"
    split, byte_level = steps
    pattern = split.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(regex, str) or regex not in LFM2_REGEXES:
        return f"its regular expression is {shown(regex, 200)!r}"
    # Keeping the matches as pieces of their own, or removing all but them, is the same for an expression that fits all.
    if (split.get("behavior"), bool(split.get("invert"))) not in (("Isolated", False), ("Removed", True)):
        return "its Split keeps other pieces"
    if byte_level.get("add_prefix_space") or byte_level.get("use_regex", True):
        return "its ByteLevel step adds a space or splits again"
    return None


def _type_of(step: Any) -> str:
    return str(step.get("type")) if isinstance(step, dict) else "none" if step is None else "?"


def _check_structure(tokenizer: Mapping[str, Any], path: str) -> None:
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"{path}: model is {shown(_type_of(model))}, expected a byte-level BPE")
    if not isinstance(model.get("vocab"), dict) or not model["vocab"]:
        raise CheckpointError(f"{path}: model.vocab is missing or empty")
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in model["vocab"].values()):
        raise CheckpointError(f"{path}: model.vocab maps a token to something that is not an id")
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise CheckpointError(f"{path}: model.{key} is {shown(model[key])}, which byte-level BPE does not have")
    added = tokenizer.get("added_tokens", [])
    if not isinstance(added, list) or not all(
        isinstance(t, dict) and isinstance(t.get("content"), str) and t["content"] and type(t.get("id")) is int
        for t in added
    ):
        raise CheckpointError(f"{path}: added_tokens must be a list of objects with content and id")


def _library_vocabulary(files: TokenizerFiles, path: str) -> tuple[dict[str, int], dict[str, Any]]:
    """All pieces with their ids, and the added ones' AddedToken by piece, as transformers puts them together."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(files.text)
        tokenizer.add_tokens(_declared_tokens(files))
        return tokenizer.get_vocab(with_added_tokens=True), {
            t.content: t for t in tokenizer.get_added_tokens_decoder().values()
        }
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exceptions, and TypeErrors for wrong fields
        reason = shown(" ".join(str(error).split()), 200)
        raise CheckpointError(f"{path}: refused by the tokenizers library: {reason}") from None


def _declared_tokens(files: TokenizerFiles) -> list[Any]:
    """The tokens that tokenizer_config.json and its companions declare, in the order in which they are added."""
    from tokenizers import AddedToken

    config = dict(files.config)
    declared: dict[int, Any] = {}
    if "added_tokens_decoder" in config:
        for i, token in _object(config["added_tokens_decoder"], "added_tokens_decoder", files).items():
            declared[int(i)] = _added_token(token, files)
    else:
        special = {"special": True}
        config.update({k: {**v, **special} if isinstance(v, dict) else v for k, v in files.special_tokens_map.items()})
        named = _named_specials(config)
        for piece, i in files.added_tokens.items():
            declared[i] = AddedToken(piece, normalized=piece not in named, special=piece in named)
        for token in files.tokenizer.get("added_tokens", []):
            declared[token["id"]] = _added_token(token, files)
    named = _named_specials(config)
    tokens = []
    for _, token in sorted(declared.items()):
        token.special = token.special or token.content in named
        tokens.append(token)
    known = {t.content for t in tokens} | {t["content"] for t in files.tokenizer.get("added_tokens", [])}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    for value in [*named.values(), *(extra if isinstance(extra, list) else [])]:
        token = _added_token(value, files)
        token.special = token.special or token.content in named
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    return tokens


def _named_specials(config: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token and its like, the model's own `*_token` entries included, by content."""
    extra = config.get("extra_special_tokens")
    more = {k: v for k, v in config.items() if k.endswith("_token") and k not in NAMED_SPECIALS}
    values = [config.get(k) for k in NAMED_SPECIALS] + list(more.values())
    values += list(extra.values()) if isinstance(extra, dict) else []
    named: dict[str, Any] = {}
    for value in values:
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and content:
            named.setdefault(content, value)
    return named


def _added_token(value: Any, files: TokenizerFiles) -> Any:
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=True)
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str) or not content:
        raise CheckpointError(f"{files.directory}: a token is declared as {shown(value)}, expected text or an object")
    return AddedToken(content, **{k: bool(value[k]) for k in FLAGS if k in value})


def _object(value: Any, name: str, files: TokenizerFiles) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(key.isdecimal() for key in value):
        raise CheckpointError(f"{files.directory}/tokenizer_config.json: {name} must be an object with ids as keys")
    return value


def _by_id(pieces: Mapping[str, int], n_vocab: int, path: str) -> dict[int, str]:
    by_id = {i: piece for piece, i in pieces.items()}
    if len(by_id) != len(pieces):
        twice = next((piece, i) for piece, i in pieces.items() if by_id[i] != piece)
        raise CheckpointError(f"{path}: id {twice[1]} belongs to two tokens, {twice[0]!r} and {by_id[twice[1]]!r}")
    last = max(by_id)
    if last >= n_vocab:
        raise CheckpointError(
            f"{path}: token {by_id[last][:80]!r} has id {last}, but the model has only {n_vocab} rows (vocab_size)"
        )
    return by_id


def _check_added(
    tokenizer: Mapping[str, Any], pieces: Mapping[str, int], by_id: Mapping[int, str], path: str, note: Note
) -> None:
    """The library gives an added token the next free id whatever it declares: a hole is told, a clash refused."""
    for token in tokenizer.get("added_tokens", []):
        content, declared = token["content"], token["id"]
        if pieces.get(content) == declared:
            continue
        said = f"{path}: added token {content[:80]!r} declares id {declared}"
        if declared in by_id:
            raise CheckpointError(f"{said}, which belongs to {by_id[declared][:80]!r}")
        note(f"{said}, transformers and we give it {pieces[content]}")


def _added_text(piece: str, flags: Any) -> str:
    """The text of an added token as llama.cpp stores it: what the byte-level decoder makes of it.

    Only a token whose letters all stand for bytes comes out changed, and in ASCII they stand for themselves.
    """
    if flags.normalized or piece.isascii():
        return piece
    table = _byte_of_symbol()
    if any(c not in table for c in piece):
        return piece
    return bytes(table[c] for c in piece).decode("utf-8", errors="replace")


def _byte_of_symbol() -> dict[str, int]:
    """Byte-level BPE writes a byte as a letter: itself when that is printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(hidden)}


def _added_type(text: str, flags: Any) -> TokenType:
    """Control tokens are those declared special, and those that look it: `<|...|>` above all."""
    brackets = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    looks_special = text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(first) and text.endswith(last) for first, last in brackets
    )
    return TokenType.CONTROL if flags.special or looks_special else TokenType.USER_DEFINED


def _merges(model: Mapping[str, Any], path: str) -> list[str]:
    """Merges as `left right`. A space inside a part, possible in the list form, becomes its byte symbol."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: model.merges is missing")
    if all(isinstance(merge, str) for merge in merges):
        return merges
    if all(isinstance(m, list) and len(m) == 2 and all(isinstance(part, str) for part in m) for m in merges):
        return [" ".join(part.replace(" ", "\u0120") for part in merge) for merge in merges]
    raise CheckpointError(f"{path}: model.merges must be a list of 'left right' or of pairs")
