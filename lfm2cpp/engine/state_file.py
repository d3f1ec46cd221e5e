"""A sequence in a file: its tokens and its full pages, for the model, KV type and page layout that they were made with.

    magic               8 bytes, the version in the last
    length of header    uint32, little-endian
    header              JSON: what the file belongs to, and how much follows
    tokens              int32 each
    pages               page_bytes each: K, V and the convolution snapshot of 64 tokens
    digest              blake2b of everything before it

The tokens after the last full page are evaluated again, which gives the same bits; so nothing of a page that other
sequences used before is written out. Nothing in a file is trusted: a digest that fits says that it is not damaged, not
who made it, so loaded pages are never shared with sequences that were not loaded from the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np

from lfm2cpp.errors import ContextError, StateFileError
from lfm2cpp.files import atomic_output
from lfm2cpp.gguf.reader import GGUFFile
from lfm2cpp.kernels.widths import PAGE_TOKENS

from .memory import PAGE_FORMAT, PageLayout
from .sequence import Sequence
from .state import SequenceState

if TYPE_CHECKING:
    from .engine import Engine

MAGIC = b"LFM2SEQ\x01"
DIGEST_BYTES = 32
MAX_HEADER = 1 << 16
SAMPLES, SAMPLE_BYTES = 16, 256  # of each tensor, for the model's digest


def model_digest(gguf: GGUFFile) -> str:
    """What tells this model from others: its metadata, its tensor table, and a sample of every tensor's bytes."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for key, value in gguf.metadata.items():
        digest.update(f"{key}={value!r}\n".encode("utf-8", "surrogateescape"))
    for name, info in gguf.tensors.items():
        digest.update(f"{name} {info.ggml_type.name} {info.shape}\n".encode("utf-8", "surrogateescape"))
        data = gguf.data(name)
        step = max(SAMPLE_BYTES, len(data) // SAMPLES)
        for start in range(0, len(data), step):
            digest.update(data[start : start + SAMPLE_BYTES])
        digest.update(data[-SAMPLE_BYTES:])
    return digest.hexdigest()


def _belongs_to(engine: Engine) -> dict[str, Any]:
    """The header fields that must be the same on saving and on loading, each with what to say when they are not."""
    return {
        "model": engine.model_digest,
        "kv_type": engine.kv_type,
        "layout": _layout_digest(engine.layout),
        "page_tokens": PAGE_TOKENS,
        "page_bytes": engine.layout.page_bytes,
    }


ADVICE = {
    "model": "it was saved with another model or quantization",
    "kv_type": "it was saved with K and V of another type",
    "layout": "it was saved by another version or on another kind of CPU",
    "page_tokens": "it was saved by another version",
    "page_bytes": "it was saved by another version or on another kind of CPU",
}


def _layout_digest(layout: PageLayout) -> str:
    fields = [PAGE_FORMAT, layout.conv_offset, layout.page_bytes]
    for il, kv in layout.kv.items():
        fields += [il, kv.n_head_kv, kv.n_embd_head, kv.k_offset, kv.v_offset]
    for il, conv in layout.conv.items():
        fields += [il, conv.l_cache, conv.snapshot_offset]
    return hashlib.blake2b(repr(fields).encode(), digest_size=16).hexdigest()


class _Hashed:
    """A file whose bytes are hashed as they are written or read."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.hash = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def write(self, data: Any) -> None:
        self.hash.update(data)
        self._file.write(data)

    def read_into(self, data: memoryview) -> bool:
        """Fill `data`; False at the end of the file."""
        done = 0
        while done < len(data):
            n = self._file.readinto(data[done:])
            if not n:
                return False
            done += n
        self.hash.update(data)
        return True

    def read(self, n: int) -> bytes | None:
        data = bytearray(n)
        return bytes(data) if self.read_into(memoryview(data)) else None


def save_sequence(sequence: Sequence, path: Path, *, force: bool = False) -> None:
    """Write a sequence to `path`, whole or not at all. Raises OutputError, UsageError."""
    state, engine = sequence.state, sequence.engine
    n_full = state.n_past // PAGE_TOKENS
    header = json.dumps({**_belongs_to(engine), "n_tokens": len(state.tokens), "n_pages": n_full}).encode()
    tokens = np.asarray(state.tokens, "<i4").tobytes()
    prefix = MAGIC + len(header).to_bytes(4, "little") + header + tokens
    size = len(prefix) + n_full * engine.layout.page_bytes + DIGEST_BYTES
    with atomic_output(path, size=size, force=force, inputs=[engine.path]) as out:
        hashed = _Hashed(out)
        hashed.write(prefix)
        for page in state.pages[:n_full]:
            hashed.write(engine.pool.view(page))
        out.write(hashed.hash.digest())


def load_sequence(engine: Engine, path: Path) -> Sequence:
    """The sequence that save_sequence wrote. Raises StateFileError, or ContextError when it does not fit."""
    with _open(path) as file:
        hashed = _Hashed(file)
        header = _read_header(path, hashed, os.fstat(file.fileno()).st_size)
        _check_origin(engine, path, header)
        tokens = _read_tokens(engine, path, hashed, header)
        sequence = Sequence(engine)
        try:
            _read_pages(sequence.state, path, hashed, header["n_pages"])
            if file.read(DIGEST_BYTES + 1) != hashed.hash.digest():
                _refuse(path, "its checksum is wrong: it is damaged")
            _settle_loaded(sequence.state, tokens, hashed.hash.digest())
        except BaseException:
            sequence.close()
            raise
    return sequence


def _open(path: Path) -> BinaryIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would block
            _refuse(path, "it is not a regular file")
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise StateFileError(f"{path}: no such file; save a sequence there first") from None
    except (OSError, ValueError) as error:
        raise StateFileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _read_header(path: Path, file: _Hashed, file_size: int) -> dict[str, Any]:
    start = file.read(len(MAGIC) + 4)
    if start is None or not start.startswith(MAGIC[:-1]):
        _refuse(path, "it is not a saved sequence")
    if start[: len(MAGIC)] != MAGIC:
        _refuse(path, f"its format is version {start[len(MAGIC) - 1]}, expected {MAGIC[-1]}; evaluate the text again")
    length = int.from_bytes(start[len(MAGIC) :], "little")
    text = file.read(length) if length <= MAX_HEADER else None
    try:
        header = json.loads(text or b"")
        n_tokens, n_full, page_bytes = (header[name] for name in ("n_tokens", "n_pages", "page_bytes"))
        sound = all(type(n) is int and 0 <= n < 2**48 for n in (n_tokens, n_full, page_bytes))
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        _refuse(path, "its header cannot be read: it is damaged")
    if n_tokens < n_full * PAGE_TOKENS:
        _refuse(path, f"its header speaks of {n_tokens} tokens and {n_full} pages: it is damaged")
    expected = len(MAGIC) + 4 + length + 4 * n_tokens + n_full * page_bytes + DIGEST_BYTES
    if file_size != expected:
        what = "cut off" if file_size < expected else "damaged"
        _refuse(path, f"it has {file_size} bytes, expected {expected}: it is {what}")
    return header


def _check_origin(engine: Engine, path: Path, header: dict[str, Any]) -> None:
    for name, value in _belongs_to(engine).items():
        if header.get(name) != value:
            _refuse(path, ADVICE[name] + (f" ({header.get(name)!r:.20}, not {value!r})" if name == "kv_type" else ""))
    if header["n_tokens"] > engine.n_ctx:
        raise ContextError(
            f"{path}: {header['n_tokens']} tokens do not fit the context of {engine.n_ctx}; raise --ctx-size"
        )


def _read_tokens(engine: Engine, path: Path, file: _Hashed, header: dict[str, Any]) -> list[int]:
    data = file.read(4 * header["n_tokens"])
    if data is None:
        _refuse(path, "it is cut off")
    tokens = np.frombuffer(data, "<i4")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < engine.n_vocab:
        _refuse(path, "it holds token ids outside the vocabulary: it is damaged")
    return tokens.tolist()


def _read_pages(state: SequenceState, path: Path, file: _Hashed, n: int) -> None:
    """Pages are read where they are to be; the state does not count them until the digest is found to be right."""
    state.reserve(n * PAGE_TOKENS)
    for page in state.pages:
        if not file.read_into(memoryview(state.pool.view(page))):
            _refuse(path, "it is cut off")


def _settle_loaded(state: SequenceState, tokens: list[int], digest: bytes) -> None:
    state.root = digest
    state.settled = False
    state.tokens, state.n_past = tokens, len(state.pages) * PAGE_TOKENS
    state.settle()


def _refuse(path: Path, reason: str) -> NoReturn:
    raise StateFileError(f"{path}: cannot be continued: {reason}")
