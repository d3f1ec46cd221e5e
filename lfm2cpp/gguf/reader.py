"""Strict GGUF reading: open, map, validate, and join the shards of a split model.

Works for any architecture; what an LFM2 file must hold is checked by lfm2cpp/arch/validate.py.
"""

from __future__ import annotations

import io
import mmap
import os
import re
import stat
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.errors import ModelFormatError

from .header import Header, TensorInfo, parse_header, quoted
from .values import Metadata, ValueType

REQUIRED = object()
READ_CHUNK = 64 << 20
SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_SHARDS = 1024

U8 = NDArray[np.uint8]


class GGUFFile:
    """A validated GGUF file (or all shards of one), mapped read-only.

    Arrays handed out are views into the map; they stay valid after `close`, which only lets the map go once
    nothing looks into it any more.
    """

    def __init__(self, paths: list[Path], headers: list[Header], maps: list[mmap.mmap], *, mapped: bool) -> None:
        first = headers[0]
        self.path = paths[0]
        self.paths = tuple(paths)
        self.version = first.version
        self.alignment = first.alignment
        self.data_offset = first.data_offset
        self.metadata: Metadata = first.metadata
        self.tensors: dict[str, TensorInfo] = {}
        self.warnings: list[str] = []
        self.nbytes = sum(len(m) for m in maps)
        self._maps, self._mapped = maps, mapped
        self._buffers: list[U8] = [np.frombuffer(m, dtype=np.uint8) for m in maps]
        for i, header in enumerate(headers):
            self.warnings += header.warnings
            for info in header.tensors.values():
                if info.name in self.tensors:
                    raise ModelFormatError(
                        f"{paths[i]}: tensor {quoted(info.name)} is also in {paths[self.tensors[info.name].file].name}"
                    )
                self.tensors[info.name] = info if i == 0 else replace(info, file=i)

    def data(self, name: str) -> U8:
        """The bytes of a tensor: uint8 (nbytes,), read-only, not copied."""
        info = self.tensors[name]
        return self._buffer(info.file)[info.offset : info.offset + info.nbytes]

    def locate(self, name: str) -> int:
        """The memory address of a tensor's first byte; valid until `close`."""
        info = self.tensors[name]
        return self._buffer(info.file).ctypes.data + info.offset

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Let the system take back the memory of a tensor's pages; they are read again from the file when touched.

        `start` and `stop` are byte positions in the tensor.
        """
        info = self.tensors[name]
        if not (self._mapped and hasattr(mmap, "MADV_DONTNEED")):
            return
        first = (info.offset + start) // mmap.PAGESIZE * mmap.PAGESIZE
        end = info.offset + (info.nbytes if stop is None else stop)
        self._maps[info.file].madvise(mmap.MADV_DONTNEED, first, end - first)

    @property
    def address(self) -> int:
        """The memory address of the first file's first byte; valid until `close`."""
        return self._buffer(0).ctypes.data

    def _buffer(self, file: int) -> U8:
        if not self._buffers:
            raise ValueError(f"{self.path} is closed")
        return self._buffers[file]

    def get(self, key: str, types: ValueType | tuple[ValueType, ...], default: Any = REQUIRED) -> Any:
        """The Python value of a metadata key; its type must be one of `types`, nothing is cast.

        Raises ModelFormatError when it has another type, or when it is missing and there is no default.
        """
        value = self.metadata.get(key)
        if value is None:
            if default is REQUIRED:
                raise ModelFormatError(f"{self.path}: GGUF key {quoted(key)} is missing")
            return default
        types = (types,) if isinstance(types, ValueType) else types
        if value.type not in types:
            expected = " or ".join(t.name for t in types)
            raise ModelFormatError(
                f"{self.path}: GGUF key {quoted(key)} has type {value.type_name}, expected {expected}"
            )
        return value.value

    def close(self) -> None:
        """Let go of the maps. Calling it twice is fine."""
        self._buffers, self._maps, self._mapped = [], [], False

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_gguf(path: str | os.PathLike[str], *, use_mmap: bool = True) -> GGUFFile:
    """Open and validate a GGUF file; of a split model, all shards (`path` is the first).

    Without `use_mmap` the file is read into memory, which is slower but immune to the file changing underneath.
    Raises ModelFormatError for a file that breaks a rule or cannot be opened.
    """
    path = Path(path)
    header, memory = read_one(path, use_mmap=use_mmap)
    paths = _shard_paths(path, header)
    headers, maps = [header], [memory]
    for i, shard in enumerate(paths[1:], start=1):
        if not shard.exists():
            raise ModelFormatError(f"{shard}: shard {i + 1} of {len(paths)} is missing; put it beside {path.name}")
        header, memory = read_one(shard, use_mmap=use_mmap)
        _check_shard(shard, header, i, len(paths))
        headers.append(header)
        maps.append(memory)
    _check_split_total(path, headers)
    return GGUFFile(paths, headers, maps, mapped=use_mmap)


def read_one(path: Path, *, use_mmap: bool = True, label: str | None = None) -> tuple[Header, mmap.mmap]:
    """Header and bytes of a single file, which may be one shard of many; `label` names it in errors."""
    label = label or str(path)
    fd = _open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size < 24:
            parse_header(os.read(fd, size), label)  # explains what is wrong with it
        memory = _map(fd, size) if use_mmap else _read_all(fd, size)
    except ValueError:  # mmap compares with the size once more
        raise ModelFormatError(f"{label}: became shorter while it was read") from None
    except OSError as error:
        raise ModelFormatError(f"{label}: its {size} bytes cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)
    return parse_header(memory, label), memory


def _open_regular(path: Path) -> int:
    """A descriptor of a regular file; never blocks on a FIFO or device."""
    if "\0" in str(path):
        raise ModelFormatError(f"{quoted(str(path))}: a path cannot hold a zero byte")
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        _explain_open_error(path, error)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        _refuse_kind(path, mode)
    return fd


def _explain_open_error(path: Path, error: OSError) -> NoReturn:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        _refuse_kind(path, mode)
    raise ModelFormatError(f"{path}: cannot be opened: {error.strerror}") from None


def _refuse_kind(path: Path, mode: int) -> NoReturn:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    kind = kinds.get(stat.S_IFMT(mode), "not a regular file")
    hint = "; convert a checkpoint directory first: lfm2cpp convert" if stat.S_ISDIR(mode) else ""
    raise ModelFormatError(f"{path}: is {kind}, expected a GGUF file{hint}")


def _map(fd: int, size: int) -> mmap.mmap:
    """The file's bytes, mapped. Linux reads what is not in memory yet into pages of 2 MB, if the file system can."""
    memory = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _read_all(fd: int, size: int) -> mmap.mmap:
    """The file's bytes in anonymous memory, which is page-aligned like a mapped file. ValueError when it has fewer."""
    memory = mmap.mmap(-1, size)
    view = memoryview(memory)
    file = io.FileIO(fd, closefd=False)
    done = 0
    while done < size:
        n = file.readinto(view[done : done + READ_CHUNK])
        if not n:
            raise ValueError(f"{done} of {size} bytes")
        done += n
    return memory


def _split_number(path: Path, header: Header, key: str) -> int | None:
    value = header.metadata.get(key)
    if value is None:
        return None
    if value.type not in (ValueType.UINT16, ValueType.UINT32, ValueType.INT32):
        raise ModelFormatError(f"{path}: GGUF key '{key}' has type {value.type_name}, expected UINT16")
    return value.value


def _shard_paths(path: Path, header: Header) -> list[Path]:
    """All files of the model whose first file is `path`."""
    count = _split_number(path, header, "split.count")
    if count is None or count == 1:
        return [path]
    if not 1 <= count <= MAX_SHARDS:
        raise ModelFormatError(f"{path}: split.count is {count}, expected 1 to {MAX_SHARDS}")
    match = SHARD_NAME.fullmatch(path.name)
    if match is None:
        raise ModelFormatError(
            f"{path}: is one of {count} shards, but is not named like one; expected NAME-00001-of-{count:05d}.gguf"
        )
    paths = [path.with_name(f"{match['prefix']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    if int(match["count"]) != count:
        raise ModelFormatError(
            f"{path}: is named as one of {int(match['count'])} shards, but its split.count is {count}"
        )
    no = _split_number(path, header, "split.no")
    if no != 0 or path != paths[0]:
        raise ModelFormatError(f"{path}: is not the first shard; give {paths[0]}")
    return paths


def _check_shard(path: Path, header: Header, i: int, count: int) -> None:
    no, found = _split_number(path, header, "split.no"), _split_number(path, header, "split.count")
    if found != count:
        raise ModelFormatError(f"{path}: its split.count is {found}, but the first shard's is {count}")
    if no != i:
        raise ModelFormatError(f"{path}: its split.no is {no}, but shard {i + 1} must have {i}")


def _check_split_total(path: Path, headers: list[Header]) -> None:
    total = _split_number(path, headers[0], "split.tensors.count")
    found = sum(len(header.tensors) for header in headers)
    if len(headers) > 1 and total is not None and total != found:
        raise ModelFormatError(f"{path}: split.tensors.count is {total}, but its {len(headers)} shards hold {found}")
