"""What a file that is not GGUF really is, told in one line with the next step."""

from __future__ import annotations

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
OLD_GGML_MAGICS = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"GGML": "GGML", b"ggjt": "GGJT", b"ggml": "GGML"}


def describe_magic(start: bytes, size: int) -> str:
    """A message for a file of `size` bytes that begins with `start` (up to 1 KiB) and not with GGUF's magic."""
    if size == 0:
        return "not a GGUF file: it is empty; download it again"
    if size < 4:
        return f"not a GGUF file: truncated header, only {size} bytes; download it again"
    known = _known_type(start)
    if known:
        return f"not a GGUF file but {known}"
    shown = start[:4].decode("ascii", "replace").replace("\ufffd", "?")
    shown = "".join(c if c.isprintable() else "?" for c in shown)
    return f"not a GGUF file: it starts with '{shown}' ({start[:4].hex(' ')}) instead of 'GGUF'"


def _known_type(start: bytes) -> str | None:
    text = start.lstrip().lower()
    if start.startswith(LFS_POINTER):
        return "a git-LFS pointer: run 'git lfs pull' in its repository to get the real file"
    if start[:4] in OLD_GGML_MAGICS:
        name = OLD_GGML_MAGICS[start[:4]]
        return f"{_magic(start)}, the {name} format from before GGUF; get the model as GGUF"
    if start[:4] == b"FUGG":
        return f"{_magic(start)}, a byte-swapped GGUF magic; only little-endian files can be read"
    if start[8:9] == b"{" and 0 < int.from_bytes(start[:8], "little") < 1 << 40:
        return "a safetensors file; convert its directory first: lfm2cpp convert DIRECTORY"
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive (a PyTorch checkpoint?); pickle files are never opened, get safetensors or GGUF"
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return "a Python pickle (a PyTorch checkpoint?); pickle files are never opened, get safetensors or GGUF"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page: the download went wrong; use the direct link to the file"
    if text.startswith((b"{", b"[")):
        return "JSON text"
    return None


def _magic(start: bytes) -> str:
    return f"one with the magic '{start[:4].decode('ascii')}'"
