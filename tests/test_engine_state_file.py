"""Saved sequences: what comes back is what was saved, and everything else is refused (case E17)."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_laws import assert_same_bits, audit, fresh, make_model, open_engine, random_ids, run

from lfm2cpp.engine import state_file
from lfm2cpp.engine.engine import Engine
from lfm2cpp.engine.state_file import MAGIC
from lfm2cpp.errors import ContextError, OutputError, StateFileError, UsageError

IDS = random_ids(200)
OTHER = random_ids(200, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with open_engine(folder, "q8_0") as engine:
        yield engine


@pytest.fixture
def saved(engine: Engine, tmp_path: Path) -> Path:
    """A file of 150 tokens: two pages and a rest."""
    with engine.sequence() as sequence:
        engine.evaluate([(sequence, IDS[:150])])
        sequence.save(tmp_path / "state")
    return tmp_path / "state"


def refused(engine: Engine, path: Path, message: str) -> None:
    """A refusal of one line that names the file, and takes no pages."""
    pages = engine.pool.n_used
    with pytest.raises(StateFileError, match=message) as raised:
        engine.load_sequence(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert engine.pool.n_used == pages
    audit(engine, [])


@pytest.mark.parametrize("n", [0, 1, 63, 64, 128])
def test_any_length(engine: Engine, tmp_path: Path, n: int) -> None:
    with engine.sequence() as sequence:
        if n:
            engine.evaluate([(sequence, IDS[:n])])
        sequence.save(tmp_path / "state")
    with engine.load_sequence(tmp_path / "state") as loaded:
        assert loaded.tokens == tuple(IDS[:n])
        assert_same_bits(run(engine, loaded, IDS[n:]), fresh(engine, IDS)[n:])


def test_a_rolled_back_sequence(engine: Engine, tmp_path: Path) -> None:
    with engine.sequence() as sequence:
        engine.evaluate([(sequence, IDS[:150])])
        sequence.truncate(100)
        sequence.save(tmp_path / "state")
    with engine.load_sequence(tmp_path / "state") as loaded:
        assert loaded.tokens == tuple(IDS[:100])
        assert_same_bits(run(engine, loaded, IDS[100:]), fresh(engine, IDS)[100:])


def test_another_process_goes_on(folder: Path, engine: Engine, saved: Path) -> None:
    """Another engine of the same file, with other threads and another context, stands for another process."""
    with open_engine(folder, "q8_0", n_threads=2, n_ctx=300, n_batch=16) as other:
        with other.load_sequence(saved) as loaded:
            assert_same_bits(run(other, loaded, IDS[150:]), fresh(engine, IDS)[150:])


def test_a_loaded_sequence_can_do_everything(engine: Engine, saved: Path, tmp_path: Path) -> None:
    with engine.load_sequence(saved) as loaded, loaded.fork() as fork:
        loaded.truncate(130)
        assert_same_bits(run(engine, loaded, OTHER[:70]), fresh(engine, IDS[:130] + OTHER[:70])[130:])
        assert_same_bits(run(engine, fork, IDS[150:]), fresh(engine, IDS)[150:])
        fork.save(tmp_path / "again")
        assert fork.reuse_prefix(IDS[:70] + OTHER) == 70
        audit(engine, [loaded, fork])
        with engine.load_sequence(tmp_path / "again") as again:
            assert again.tokens == tuple(IDS)


def test_nothing_of_other_sequences_is_written(engine: Engine, tmp_path: Path) -> None:
    """A page that another sequence has filled before is used again: the file holds nothing of it."""
    with engine.sequence() as sequence:
        engine.evaluate([(sequence, IDS)])
    with engine.sequence() as sequence:
        engine.evaluate([(sequence, OTHER[:10])])
        sequence.save(tmp_path / "state")
    assert (tmp_path / "state").stat().st_size < 1000


# Files that belong to something else


def test_another_model(folder: Path, engine: Engine, saved: Path) -> None:
    make_model(folder, "q4_0-mixed")
    with open_engine(folder, "q4_0-mixed") as other:
        refused(other, saved, "another model or quantization")


def nudge(weights: dict[str, np.ndarray]) -> None:
    weights["blk.1.ffn_up.weight"] *= np.float32(1.01)


@pytest.mark.parametrize("changes", [{"edit": nudge}, {"seed": 1}, {"types": "Q4_0"}, {"rope_freq_base": 1e5}])
def test_a_model_that_differs_a_little(tmp_path: Path, saved: Path, changes: dict) -> None:
    make_model(tmp_path, "q8_0", **changes)
    with open_engine(tmp_path, "q8_0") as other:
        refused(other, saved, "another model or quantization")


def test_the_same_model_elsewhere(tmp_path: Path, engine: Engine, saved: Path) -> None:
    make_model(tmp_path, "q8_0")
    with open_engine(tmp_path, "q8_0") as other, other.load_sequence(saved) as loaded:
        assert_same_bits(run(other, loaded, IDS[150:]), fresh(engine, IDS)[150:])


def test_another_kv_type(folder: Path, engine: Engine, saved: Path) -> None:
    with open_engine(folder, "q8_0", kv_type="f32") as other:
        refused(other, saved, "K and V of another type .*f16")


def test_another_page_layout(engine: Engine, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "PAGE_FORMAT", 0)
    refused(engine, saved, "another version or on another kind of CPU")


def test_a_context_that_is_too_small(folder: Path, engine: Engine, saved: Path) -> None:
    with open_engine(folder, "q8_0", n_ctx=150) as other:
        other.load_sequence(saved).close()
    with open_engine(folder, "q8_0", n_ctx=149) as other:
        with pytest.raises(ContextError, match="150 tokens do not fit the context of 149"):
            other.load_sequence(saved)


def test_a_pool_that_is_full(folder: Path, engine: Engine, saved: Path) -> None:
    with open_engine(folder, "q8_0") as other:
        other.pool.max_pages = 1
        with pytest.raises(ContextError, match="pages"):
            other.load_sequence(saved)
        audit(other, [])


# Damage


@pytest.mark.parametrize("n", [0, 1, 7, 8, 11, 12, 40, 300, 1000, -1, -32, -33, -40])
def test_a_file_that_is_cut_off(engine: Engine, saved: Path, n: int) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[:n])
    refused(engine, saved, "not a saved sequence|cut off|damaged")


def test_a_file_with_something_after_its_end(engine: Engine, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"x")
    refused(engine, saved, "damaged")


def test_one_flipped_bit_anywhere(engine: Engine, saved: Path) -> None:
    data = saved.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(420), *range(len(data) - 40, len(data)), *rng.integers(420, len(data), 100)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        saved.write_bytes(damaged)
        with pytest.raises(StateFileError):
            engine.load_sequence(saved)
    audit(engine, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a saved sequence"),
        (b"GGUF" + bytes(100), "not a saved sequence"),
        (MAGIC[:-1] + b"\x02" + bytes(100), "version 2, expected 1"),
        (MAGIC + b"\xff\xff\xff\xff" + bytes(100), "damaged"),
        (MAGIC + b"\x02\0\0\0{}" + bytes(100), "damaged"),
        (MAGIC + b"\x00\x80\0\0" + b"[" * 32768 + bytes(100), "damaged"),
    ],
)
def test_files_that_are_something_else(engine: Engine, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "state").write_bytes(content)
    refused(engine, tmp_path / "state", message)


def rewritten(path: Path, change: Callable[[dict], None], tokens: Callable[[bytes], bytes] = lambda t: t) -> None:
    """The file with another header and other tokens, and the digest that belongs to them."""
    data = path.read_bytes()
    end = 12 + int.from_bytes(data[8:12], "little")
    header = json.loads(data[12:end])
    n = header["n_tokens"]
    change(header)
    text = json.dumps(header).encode()
    body = MAGIC + len(text).to_bytes(4, "little") + text + tokens(data[end : end + 4 * n]) + data[end + 4 * n : -32]
    path.write_bytes(body + state_file.hashlib.blake2b(body, digest_size=32).digest())


@pytest.mark.parametrize(
    "change",
    [
        {"n_tokens": 2**40},
        {"n_tokens": -1},
        {"n_tokens": 150.0},
        {"n_tokens": True},
        {"n_tokens": None},
        {"n_pages": 3},
        {"n_pages": 2**47},
        {"n_pages": "2"},
        {"page_bytes": 0},
        {"page_bytes": 2**47},
        {"page_tokens": 32},
        {"model": 5},
        {"layout": None},
    ],
)
def test_a_header_that_lies(engine: Engine, saved: Path, change: dict) -> None:
    rewritten(saved, lambda header: header.update(change))
    refused(engine, saved, "cannot be continued")


@pytest.mark.parametrize("token", [-1, 320, 2**31 - 1])
def test_tokens_outside_the_vocabulary(engine: Engine, saved: Path, token: int) -> None:
    rewritten(saved, lambda header: None, lambda t: np.int32(token).tobytes() + t[4:])
    refused(engine, saved, "outside the vocabulary")


def test_a_forged_file_cannot_reach_other_sequences(folder: Path, saved: Path) -> None:
    """Pages that claim to be those of IDS, but hold something else, must not be found under the prefix of IDS."""
    data = bytearray(saved.read_bytes())
    data[5000:9000] = bytes(4000)
    saved.write_bytes(data)
    rewritten(saved, lambda header: None)
    with open_engine(folder, "q8_0") as engine, engine.load_sequence(saved) as forged:
        engine.evaluate([(forged, OTHER[:100])])  # the pages that follow must not be found either
        with engine.sequence() as honest:
            assert honest.reuse_prefix(IDS[:150] + OTHER) == 0
            engine.evaluate([(honest, IDS)])
        with engine.sequence() as another:
            assert another.reuse_prefix(IDS[:150]) == 128, "but an honest sequence's can be"


# Files that cannot be read or written


def test_what_is_no_readable_file(engine: Engine, tmp_path: Path) -> None:
    refused(engine, tmp_path / "missing", "no such file")
    refused(engine, tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "fifo")
    refused(engine, tmp_path / "fifo", "not a regular file")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        refused(engine, tmp_path / "socket", "not a regular file")
    with pytest.raises(StateFileError, match="null"):
        engine.load_sequence("state\0")


def test_an_existing_file_is_replaced_only_by_force(engine: Engine, saved: Path) -> None:
    before = saved.read_bytes()
    with engine.sequence() as sequence:
        engine.evaluate([(sequence, OTHER[:100])])
        with pytest.raises(OutputError, match="exists already"):
            sequence.save(saved)
        assert saved.read_bytes() == before
        sequence.save(saved, force=True)
    with engine.load_sequence(saved) as loaded:
        assert loaded.tokens == tuple(OTHER[:100])


def test_the_model_itself_is_never_overwritten(engine: Engine) -> None:
    with engine.sequence() as sequence, pytest.raises(UsageError, match="input itself"):
        sequence.save(engine.path, force=True)


def test_nothing_is_left_of_a_save_that_fails(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine.sequence() as sequence:
        engine.evaluate([(sequence, IDS)])
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OutputError, match="Input/output error"):
            sequence.save(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_the_same_sequence_gives_the_same_bytes(engine: Engine, tmp_path: Path) -> None:
    for name in ("a", "b"):
        with engine.sequence() as sequence:
            run(engine, sequence, IDS, [1] * 70 if name == "a" else [])
            sequence.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
