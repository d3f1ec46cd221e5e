"""Shared by the tests of atomic output: a directory with one old file, and system calls that fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2cpp.files import atomic_output


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A directory that holds one old file, `old.bin`."""
    (tmp_path / "old.bin").write_bytes(b"old")
    return tmp_path


def assert_untouched(room: Path) -> None:
    assert [p.name for p in room.iterdir()] == ["old.bin"]
    assert (room / "old.bin").read_bytes() == b"old"


def write(path: Path | str, data: bytes = b"new", **options: object) -> None:
    with atomic_output(path, **options) as out:  # type: ignore[arg-type]
        out.write(data)


def raiser(number: int) -> Callable[..., None]:
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
