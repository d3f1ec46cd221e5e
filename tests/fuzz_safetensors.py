"""Run by test_convert_fuzz.py as a process of its own, whose memory is limited: mutated safetensors headers.

    python fuzz_safetensors.py CHECKPOINT COUNT SEED   ->  one JSON object on stdout

A third of the mutations know what the header means and put unpleasant values there, a third edit its text, and a
third its bytes.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from convert.checkpoint import open_checkpoint
from convert.hparams import read_config
from convert.tensors import match_tensors
from lfm2cpp.errors import LFM2Error

MEMORY = 100 << 20
VALUES: list[Any] = [
    0, 1, -1, 2, 63, 64, 65, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, 1.0, 1e308, 64.5,
    True, False, None, "", "64", "BF16", [], [64], [0], [1, 64], [2**32, 2**32], [64, -1], [[64]], {}, {"dtype": "F32"},
    "F64", "I8", "F4", "F8_E4M3", "C64", "\u001b[31m", "\ud800",
]  # fmt: skip
WORDS = [
    '"', "\\", "{", "}", "[", "]", ",", ":", "NaN", "-Infinity", "1e999", "\\u0000", "\\ud800", " ", "\n", "/*", "'",
    '{"a":1}', "[" * 3000, '{"a":' * 3000, "9" * 5000, '"__metadata__":{"a":1},', "\x00", "\ufeff", "-", "0x40", "1" * 18,
]  # fmt: skip


class Mutator:
    def __init__(self, raw: bytes, rng: random.Random) -> None:
        self.start = 8 + int.from_bytes(raw[:8], "little")
        self.header, self.data, self.rng = raw[8 : self.start], raw[self.start :], rng

    def mutate(self) -> bytes:
        for _ in range(self.rng.choice((1, 1, 1, 2, 4))):
            header = self.rng.choice((self.meaning, self.text, self.bytes))()
        data = self.data
        if self.rng.random() < 0.1:
            data = data[: self.rng.randrange(len(data))] if self.rng.random() < 0.5 else data + bytes(self.rng.randrange(1, 99))
        length = len(header)
        if self.rng.random() < 0.1:
            length = self.rng.choice((0, 1, length - 1, length + 1, len(data), 2**24, 2**27, 2**31, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + header + data

    def meaning(self) -> bytes:
        content = json.loads(self.header)
        name = self.rng.choice(list(content))
        entry = content[name]
        action = self.rng.randrange(6)
        if action == 0:
            content[name] = self.rng.choice(VALUES)
        elif action == 1:
            del content[name]
        elif action == 2:
            content[self.rng.choice(("x", "", "a" * 5000, "\u001b]0;", "__metadata__", name + " "))] = entry
        else:
            key = self.rng.choice(("dtype", "shape", "data_offsets"))
            if action == 3 or not isinstance(entry.get(key), list):
                entry[key] = self.rng.choice(VALUES)
            elif action == 4:
                entry[key][self.rng.randrange(len(entry[key]))] = self.rng.choice(VALUES)
            else:
                entry[key] = content[self.rng.choice(list(content))].get(key)
        return json.dumps(content).encode("utf-8", "surrogatepass")

    def text(self) -> bytes:
        at = self.rng.randrange(len(self.header))
        word = self.rng.choice(WORDS).encode()
        return self.header[:at] + word + self.header[at + self.rng.choice((0, 0, 1, len(word))) :]

    def bytes(self) -> bytes:
        header = bytearray(self.header)
        for _ in range(self.rng.choice((1, 1, 3, 10))):
            at = self.rng.randrange(len(header))
            action = self.rng.randrange(4)
            if action == 0:
                header[at] ^= 1 << self.rng.randrange(8)
            elif action == 1:
                del header[at : at + self.rng.choice((1, 5, 50))]
                header += b"" if header else b"{"
            elif action == 2:
                header[at:at] = self.rng.randbytes(self.rng.choice((1, 4, 30)))
            else:
                header[at:at] = header[at : at + self.rng.choice((1, 20, 300))]
        return bytes(header)


def check(directory: Path) -> None:
    """All that is done with a checkpoint before tensors are read."""
    notes: list[str] = []
    checkpoint = open_checkpoint(directory, notes.append)
    match_tensors(checkpoint.tensors, read_config(checkpoint.config, "config.json", notes.append), notes.append)
    with safe_open(directory / "model.safetensors", framework="numpy") as file:  # whatever passes here passes there
        assert set(file.keys()) == {tensor.name for tensor in checkpoint.tensors}


def main() -> None:
    directory, count, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    file = directory / "model.safetensors"
    mutator = Mutator(file.read_bytes(), rng)
    check(directory)  # so that every import is done before memory is limited
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    result = {"refused": 0, "accepted": 0, "slowest": 0.0, "messages": 0}
    messages: set[str] = set()
    for i in range(count):
        data = mutator.mutate()
        file.write_bytes(data)
        start = time.process_time()
        try:
            check(directory)
            result["accepted"] += 1
        except LFM2Error as error:
            result["refused"] += 1
            text = str(error)
            assert text.isprintable() and len(text) < 2000, text
            messages.add("".join(c for c in text.split(": ", 1)[-1] if c.isalpha())[:40])
        except (Exception, SafetensorError) as error:
            (directory.parent / "crash.safetensors").write_bytes(data)
            raise AssertionError(f"case {i}: {error!r}") from error
        result["slowest"] = max(result["slowest"], time.process_time() - start)
    result["messages"] = len(messages)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
