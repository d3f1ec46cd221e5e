"""What drafts from the text bring: the engine says texts that are known, with drafts and without, in turn.

    python bench/draft_speed.py -m LFM2-350M-random-Q4_0.gguf [-m ...] [-t 2] [--texts 8] [--tokens 400]

What a model of random weights says repeats nothing, so the answers are given, and only their speed is measured: what
was drafted right is right for the text. Three kinds, each with a prompt before it: a file of this repository as one of
its commits left it, after the same file as it was before; the second half of a file, after the first; the second half
of a chapter of Python's manual (pydoc_data/topics.py), after the first. Tokens are those of 32,000 that were made from
Python's library, about as long as LFM2's. Prints a Markdown table: medians over the texts, from the smallest to the
largest.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from lfm2cpp.engine.engine import Engine  # noqa: E402
from lfm2cpp.generate import Ahead, Step, drive  # noqa: E402
from lfm2cpp.lookup import DRAFT_MAX, PromptLookup  # noqa: E402

LONGEST = 3000  # tokens of a prompt
Pair = tuple[list[int], list[int]]  # prompt, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, action="append", required=True)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=8, help="of each kind")
    parser.add_argument("--tokens", type=int, default=400, help="of each answer, at most")
    args = parser.parse_args()
    encode = made_up_tokenizer()
    print("| model | text | tokens/s without | with | ratio | from | to | drafted | of them right |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for path in args.model:
        with Engine(path, n_threads=args.threads, n_ctx=LONGEST + args.tokens) as engine:
            for kind, texts in (("a file, changed", changed()), ("a file, continued", continued()),
                                ("a manual, continued", manual())):  # fmt: skip
                pairs = take(((encode(a), encode(b)) for a, b in texts), args.texts)
                print(f"| {path.stem} | {kind} | {row(engine, pairs, args.tokens)} |", flush=True)


def made_up_tokenizer() -> Callable[[str], list[int]]:
    """Text -> ids below 32,000, of pieces that are frequent in Python's library."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train([str(p) for p in library], trainers.BpeTrainer(vocab_size=32000, show_progress=False))
    return lambda text: tokenizer.encode(text).ids


def git(*command: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, errors="replace")
    return done.stdout


def changed() -> Iterator[tuple[str, str]]:
    """A file before and after a commit that has added 2 to 40 lines to it, one of each commit."""
    for commit in git("log", "--format=%h", "--no-merges").split():
        for line in git("show", "--numstat", "--format=", commit).splitlines():
            added, _, name = line.split("\t")
            if name.endswith(".py") and added.isdigit() and 2 <= int(added) <= 40:
                yield git("show", f"{commit}~:{name}"), git("show", f"{commit}:{name}")
                break


def continued() -> Iterator[tuple[str, str]]:
    for name in random.Random(0).sample(files := git("ls-files", "lfm2cpp/*.py").split(), len(files)):
        yield halves((ROOT / name).read_text())


def manual() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in random.Random(0).sample(sorted(topics), len(topics)):
        yield halves(topics[name])


def halves(text: str) -> tuple[str, str]:
    return text[: len(text) // 2], text[len(text) // 2 :]


def take(pairs: Iterator[Pair], n: int) -> list[Pair]:
    """The first n that are neither short nor long."""
    found: list[Pair] = []
    for prompt, answer in pairs:
        if 400 <= len(prompt) <= LONGEST and len(answer) >= 200:
            found.append((prompt, answer))
        if len(found) == n:
            break
    return found


def row(engine: Engine, pairs: list[Pair], n_tokens: int) -> str:
    without, speeds, ratios, drafted, right = [], [], [], 0, 0
    for prompt, answer in pairs:
        plain, _ = say(engine, prompt, answer[:n_tokens], 0)
        speed, ahead = say(engine, prompt, answer[:n_tokens], DRAFT_MAX)
        without.append(plain)
        speeds.append(speed)
        ratios.append(speed / plain)
        drafted, right = drafted + ahead.n_drafted, right + ahead.n_accepted
    share = f"{right / drafted:.0%}" if drafted else "-"
    return (
        f"{statistics.median(without):.1f} | {statistics.median(speeds):.1f} | {statistics.median(ratios):.2f}x | "
        f"{min(ratios):.2f}x | {max(ratios):.2f}x | {drafted} | {share}"
    )


def say(engine: Engine, prompt: list[int], answer: list[int], draft_max: int) -> tuple[float, Ahead]:
    """Tokens a second of an answer that is given."""
    with engine.sequence() as sequence:
        engine.evaluate([(sequence, prompt)], logits="none")
        ahead = Ahead(sequence, PromptLookup(draft_max))
        ahead.lookup.extend(prompt)

        def evaluate(step: Step) -> np.ndarray:
            return engine.evaluate([(sequence, step[0])], logits=step[1])[0]

        began = time.perf_counter()
        for i, token_id in enumerate(answer[:-1]):
            drive(ahead.logits_after(token_id, len(answer) - i - 2), evaluate)
        return (len(answer) - 1) / (time.perf_counter() - began), ahead


if __name__ == "__main__":
    main()
