"""Run by test_gguf_fuzz.py as a process of its own, whose memory is limited: mutated GGUF headers against the reader.

    python fuzz_gguf.py BASE.gguf COUNT SEED DIRECTORY   ->  one JSON object on stdout

Half of the mutations know where the fields are and put unpleasant numbers there, the others know nothing.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
import time
from pathlib import Path

from gguf_builder import RawGGUF

from lfm2cpp.arch.validate import validate_model
from lfm2cpp.errors import LFM2Error
from lfm2cpp.gguf import GGUFFile, read_gguf
from lfm2cpp.gguf.check import find_non_finite
from lfm2cpp.gguf.header import parse_header

MEMORY = 100 << 20
NUMBERS = [
    *range(14), 24, 31, 32, 33, 63, 64, 65, 255, 256, 257, 65535, 65536, 65537, 2**20, 2**24, 2**30, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**53, 2**61, 2**62, 2**62 + 1, 2**63 - 64, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1,
]  # fmt: skip
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def fields(data: bytes) -> list[tuple[int, int]]:
    """(place, width) of every number in the header of a good file."""
    places = [(4, 4), (8, 8), (16, 8)]
    n_tensors, n_kv = struct.unpack_from("<QQ", data, 8)
    at = 24

    def number(width: int) -> int:
        nonlocal at
        places.append((at, width))
        at += width
        return int.from_bytes(data[at - width : at], "little")

    def string() -> None:
        nonlocal at
        n = number(8)
        at += n

    def value(kind: int) -> None:
        if kind == 8:
            string()
        elif kind == 9:
            item, n = number(4), number(8)
            for _ in range(n):
                value(item)
        else:
            number(WIDTHS[kind])

    for _ in range(n_kv):
        string()
        value(number(4))
    for _ in range(n_tensors):
        string()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return places


class Mutator:
    def __init__(self, base: bytes, rng: random.Random) -> None:
        self.base = base
        self.rng = rng
        self.fields = fields(base)
        self.end = self.fields[-1][0] + 8

    def mutate(self) -> bytes:
        rng, data = self.rng, bytearray(self.base)
        if rng.random() < 0.03:
            return b"GGUF" + struct.pack("<I", 3) + rng.randbytes(rng.randrange(200))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
            rng.choice(self.STEPS)(self, data)
        return bytes(data)

    def set_field(self, data: bytearray) -> None:
        at, width = self.rng.choice(self.fields)
        number = (
            self.rng.choice(NUMBERS)
            if self.rng.random() < 0.8
            else self.rng.choice((len(data), self.end, at)) + self.rng.randrange(-9, 9)
        )
        data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")

    def set_early_field(self, data: bytearray) -> None:
        """The numbers of a few entries, not of thousands of vocabulary pieces."""
        at, width = self.rng.choice(self.fields[:120] + self.fields[-160:])
        data[at : at + width] = (self.rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")

    def flip_bits(self, data: bytearray) -> None:
        for _ in range(self.rng.choice((1, 1, 2, 8))):
            data[self.rng.randrange(min(self.end, len(data) - 1))] ^= 1 << self.rng.randrange(8)

    def cut(self, data: bytearray) -> None:
        del data[self.rng.randrange(4, len(data) if self.rng.random() < 0.3 else self.end) :]
        data.extend(bytes(8) if len(data) < 8 else b"")

    def remove(self, data: bytearray) -> None:
        at = self.rng.randrange(4, self.end)
        del data[at : at + self.rng.choice((1, 4, 8, 20, 100))]

    def repeat(self, data: bytearray) -> None:
        at, n = self.rng.randrange(4, self.end), self.rng.choice((1, 4, 8, 20, 100, 1000))
        data[at:at] = data[at : at + n]

    def insert(self, data: bytearray) -> None:
        at = self.rng.randrange(4, self.end)
        data[at:at] = self.rng.randbytes(self.rng.choice((1, 4, 8, 33)))

    STEPS = (set_field, set_early_field, set_early_field, set_early_field, flip_bits, cut, remove, repeat, insert)


def read(data: bytes, path: Path | None, use_mmap: bool) -> None:
    """Everything that is done with a file before a kernel sees it."""
    if path is not None:
        path.write_bytes(data)
        gguf = read_gguf(path, use_mmap=use_mmap)
    else:
        gguf = GGUFFile([Path("m.gguf")], [parse_header(data, "m.gguf")], [data], mapped=False)  # type: ignore[list-item]
    with gguf:
        list(find_non_finite(gguf))
        validate_model(gguf)


def main() -> None:
    base, count, seed, directory = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    rng = random.Random(seed)
    mutators = [Mutator(base.read_bytes(), rng), Mutator(RawGGUF().encode(), rng)]
    read(mutators[0].base, None, True)  # so that every import is done before memory is limited
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    result = {"refused": 0, "accepted": 0, "slowest": 0.0, "messages": 0}
    messages: set[str] = set()
    for i in range(count):
        data = mutators[i % 3 == 0].mutate()
        path = directory / "m.gguf" if i % 20 == 0 else None
        start = time.process_time()
        try:
            read(data, path, use_mmap=i % 40 == 0)
            result["accepted"] += 1
        except LFM2Error as error:
            result["refused"] += 1
            text = str(error)
            assert text.isprintable() and len(text) < 1000, text
            messages.add("".join(c for c in text if c.isalpha())[:60])
        except BaseException as error:
            (directory / "crash.gguf").write_bytes(data)
            raise AssertionError(f"case {i}: {error!r}") from error
        result["slowest"] = max(result["slowest"], time.process_time() - start)
    result["messages"] = len(messages)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
