"""`lfm2cpp bench`: tokens per second in llama-bench's terms, many sequences, profiles, models without a checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2cpp.benchmark.ranges import parse_range
from lfm2cpp.errors import UsageError
from lfm2cpp.terminal import Progress, note

from .loading import is_typed

if TYPE_CHECKING:
    from lfm2cpp.benchmark.measure import Result, Setup, Test

MAX_THREADS = 512
MAX_BATCH = 1 << 16
UNSTEADY = 0.1  # of the average: a standard deviation above it is pointed out


class Numbers(click.ParamType):
    """`1,2`, `64-512*2`, `128-512+128`"""

    name = "N,.."

    def __init__(self, low: int = 0, high: int = 1 << 30) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            numbers = parse_range(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        for number in numbers:
            if not self.low <= number <= self.high:
                self.fail(f"{number} is outside {self.low} to {self.high}", param, ctx)
        return numbers


class Pair(click.ParamType):
    """`512,128`"""

    name = "PP,TG"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        try:
            pp, tg = parse_range(value)
        except ValueError:
            self.fail(f"{value!r} is no pair of numbers like 512,128", param, ctx)
        if pp < 1 or tg < 1:
            self.fail(f"{value!r}: both numbers must be 1 or more", param, ctx)
        return pp, tg


@dataclass(frozen=True)
class Sweep:
    """What to measure: every combination of these."""

    models: list[Path]
    n_prompt: list[int]
    n_gen: list[int]
    pairs: list[tuple[int, int]]
    depths: list[int]
    threads: list[int]
    batches: list[int]
    kv_types: list[str]
    repetitions: int

    def setups(self) -> Iterator[Setup]:
        from lfm2cpp.benchmark.measure import Setup

        for path, n_batch, kv_type, n_threads in product(self.models, self.batches, self.kv_types, self.threads):
            yield Setup(path, n_threads, n_batch, kv_type)

    def tests(self, *, with_pairs: bool = True) -> list[Test]:
        """For every depth the pp tests, the tg tests and the pairs, as llama-bench orders them. UsageError for none."""
        from lfm2cpp.benchmark.measure import Test

        tests = []
        for depth in self.depths:
            tests += [Test(pp, 0, depth) for pp in self.n_prompt if pp]
            tests += [Test(0, tg, depth) for tg in self.n_gen if tg]
            tests += [Test(pp, tg, depth) for pp, tg in self.pairs if with_pairs]
        if not tests:
            raise UsageError("nothing to measure: -p and -n are both 0; give one of them, or -pg")
        return tests


def _flat(values: tuple[list[int], ...], default: list[int]) -> list[int]:
    """All numbers of an option that may be repeated."""
    return [number for numbers in values for number in numbers] or default


@click.command()
@click.option("-m", "--model", "models", multiple=True, metavar="FILE[,FILE]", envvar=["LFM2_MODEL", "LLAMA_ARG_MODEL"],
              help="GGUF files. With --random: the file to write.")
@click.option("-p", "--n-prompt", "-npp", type=Numbers(), multiple=True,
              help="Tokens of a prompt test.  [default: 512]")
@click.option("-n", "--n-gen", "-ntg", type=Numbers(), multiple=True,
              help="Tokens of a generation test.  [default: 128]")
@click.option("-pg", "pairs", type=Pair(), multiple=True, help="A prompt, then generation, as one test.")
@click.option("-d", "--n-depth", type=Numbers(), multiple=True, help="Tokens of context before a test.  [default: 0]")
@click.option("-t", "--threads", type=Numbers(1, MAX_THREADS), multiple=True, help="Threads.  [default: one a core]")
@click.option("-b", "--batch-size", "-ub", "--ubatch-size", type=Numbers(1, MAX_BATCH), multiple=True,
              help="Tokens of a prompt that are evaluated at once.  [default: 512]")
@click.option("--kv-type", "-ctk", "--cache-type-k", multiple=True, metavar="TYPE,..",
              help="How K and V are kept.  [default: f16]")
@click.option("-r", "--repetitions", type=click.IntRange(1, 10_000), default=5, show_default=True,
              help="Samples of a test.")
@click.option("--no-warmup", is_flag=True, help="Begin with the samples at once.")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), default="md", show_default=True,
              help="Format of the report on standard output.")
@click.option("--batched", is_flag=True, help="Sequences that decode together: llama-batched-bench's table.")
@click.option("-npl", "--parallel", type=Numbers(1, 4096), multiple=True,
              help="With --batched: how many sequences.  [default: 1,2,4,8]")
@click.option("-pps", "--prompt-shared", is_flag=True, help="With --batched: one prompt for all sequences.")
@click.option("--profile", is_flag=True, help="Time, bytes and multiply-adds of every kind of op, and % of the limit.")
@click.option("--random", nargs=2, multiple=True, metavar="SHAPE TYPE",
              help="Write a model of random weights and measure it: 350M Q4_0, or 350M,n_layer=4 BF16.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of --random's weights.")
@click.option("--force", is_flag=True, help="Let --random write over a file that is there.")  # fmt: skip
def bench(
    models: tuple[str, ...], n_prompt: tuple, n_gen: tuple, pairs: tuple, n_depth: tuple, threads: tuple,
    batch_size: tuple, kv_type: tuple[str, ...], repetitions: int, no_warmup: bool, output: str, batched: bool,
    parallel: tuple, prompt_shared: bool, profile: bool, random: tuple[tuple[str, str], ...], seed: int, force: bool,
) -> None:  # fmt: skip
    """Measure tokens per second: average and standard deviation over -r samples, after a warm-up.

    Numbers may be lists and ranges: 1,2,4 or 64-512*2 or 128-512+128. Tokenization, sampling and compilation are not
    part of a sample. SHAPE is one of 230M 350M 700M 1.2B 2.6B, perhaps with changes such as n_vocab=128000; TYPE is one
    of F32 F16 BF16 Q8_0 Q6_K Q4_0 Q4_1 IQ4_NL Q5_0 Q5_1 Q4_K_M Q5_K_M, the last seven also with -pure behind. With -p 0
    -n 0 the file is written and nothing measured.
    """
    from lfm2cpp.threads import default_threads

    _check_modes(batched, profile, bool(random))
    if batched and output not in ("md", "jsonl"):
        raise UsageError("--batched reports as md or jsonl")
    if profile and output not in ("md", "json", "jsonl"):
        raise UsageError("--profile reports as md, json or jsonl")
    if random and not is_typed("models"):
        models = ()  # a model that the environment names is no place to write to
    paths = [path for name in models for path in _split_paths(name)]
    if random:
        paths = write_random_models(random, paths, seed, force)
    if not paths:
        raise UsageError("give a model: -m FILE, or --random SHAPE TYPE")
    kv_types = [item for value in kv_type for item in value.split(",")] or ["f16"]
    sweep = Sweep(
        paths, _flat(n_prompt, [512]), _flat(n_gen, [128]), list(pairs), _flat(n_depth, [0]),
        _flat(threads, [default_threads()]), _flat(batch_size, [512]), kv_types, repetitions,
    )  # fmt: skip
    if random and not any((*sweep.n_prompt, *sweep.n_gen, *sweep.pairs)):
        return
    if batched:
        lines = batched_lines(sweep, _flat(parallel, [1, 2, 4, 8]), prompt_shared, output)
    elif profile:
        lines = profile_lines(sweep, output)
    else:
        lines = speed_lines(sweep, output, warmup=not no_warmup)
    for line in lines:
        click.echo(line)


def _check_modes(batched: bool, profile: bool, random: bool) -> None:
    """UsageError for options that another one makes no use of."""
    if batched and profile:
        raise UsageError("give --batched or --profile, not both")
    for option, name, mode, is_on in (
        ("parallel", "-npl", "--batched", batched), ("prompt_shared", "-pps", "--batched", batched),
        ("seed", "--seed", "--random", random), ("force", "--force", "--random", random),
    ):  # fmt: skip
        if is_typed(option) and not is_on:
            raise UsageError(f"{name} needs {mode}")
    if is_typed("pairs") and (batched or profile):
        raise UsageError("-pg is measured without --batched and --profile")


def _split_paths(text: str) -> list[Path]:
    """Files separated by commas, unless there is one that is called so."""
    return [Path(text)] if Path(text).exists() else [Path(part) for part in text.split(",") if part]


def write_random_models(
    wanted: tuple[tuple[str, str], ...], paths: list[Path], seed: int, force: bool
) -> list[Path]:
    """Write the models, each to its path or to LFM2-SHAPE-random-TYPE.gguf in the current folder; returns the paths."""
    from lfm2cpp.benchmark.random_model import model_nbytes, write_random_model
    from lfm2cpp.benchmark.shapes import find_shape

    if paths and len(paths) != len(wanted):
        raise UsageError(f"{len(wanted)} --random and {len(paths)} files in -m: give as many, or no -m")
    shapes = [find_shape(shape) for shape, _ in wanted]
    sizes = [model_nbytes(shape, file_type) for shape, (_, file_type) in zip(shapes, wanted, strict=True)]
    types = [file_type for _, file_type in wanted]
    names = [Path(f"LFM2-{shape.name}-random-{kind}.gguf") for shape, kind in zip(shapes, types, strict=True)]
    for shape, size, path, (_, file_type) in zip(shapes, sizes, paths or names, wanted, strict=True):
        with Progress(f"writing {path.name}", total=size) as bar:
            write_random_model(path, shape, file_type, seed=seed, force=force, progress=bar.update)
        note(f"wrote {path}")
    return paths or names


class CompileClock:
    """Notes on stderr how long compiling kernels took: it happens once a machine and is part of no sample."""

    def __init__(self) -> None:
        self._began = self.seconds = 0.0
        self.n_kernels = 0

    def __call__(self, kernel: str, done: int, total: int) -> None:
        if done == 0:
            self._began = time.perf_counter()
        if done < total:
            click.echo(f"compiling {done + 1}/{total}: {kernel.removeprefix('lfm2cpp.kernels.')}", err=True)
            return
        self.seconds += time.perf_counter() - self._began
        self.n_kernels += total
        note(f"compiled {total} kernels in {time.perf_counter() - self._began:.1f} s, apart from the samples")


def speed_lines(sweep: Sweep, output: str, *, warmup: bool) -> Iterator[str]:
    """The report of pp, tg and pp+tg tests."""
    from lfm2cpp.benchmark.measure import average, deviation, run_tests
    from lfm2cpp.benchmark.report import DEFAULT_N_BATCH, render

    tests, clock = sweep.tests(), CompileClock()

    def results() -> Iterator[Result]:
        for setup in sweep.setups():
            for result in run_tests(setup, tests, sweep.repetitions, warmup=warmup, progress=clock):
                yield result
                spread = deviation(result.samples_ts) / average(result.samples_ts)
                if spread > UNSTEADY:
                    note(f"{result.test.name} varies by {spread:.0%}: the machine is busy, or slows down to keep cool")

    shown = ("n_batch",) if sweep.batches != [DEFAULT_N_BATCH] else ()
    shown += ("type_k", "type_v") if sweep.kv_types != ["f16"] else ()
    return render(results(), output, shown=shown)


def batched_lines(sweep: Sweep, parallel: list[int], shared: bool, output: str) -> Iterator[str]:
    """The report of sequences that decode together."""
    from lfm2cpp.benchmark.batched import BatchedTest, header, row, run_batched

    if any(sweep.depths):
        raise UsageError("--batched knows no depth; use -p for the context of every sequence")
    tests = [
        BatchedTest(pp, tg, pl, shared) for pp, tg, pl in product(sweep.n_prompt, sweep.n_gen, parallel) if pp + tg
    ]
    if not tests:
        raise UsageError("nothing to measure: -p and -n are both 0; give one of them")
    clock = CompileClock()
    for setup in sweep.setups():
        if output == "md":
            yield from (f"{setup.path}, {setup.n_threads} threads, n_batch {setup.n_batch}, {setup.kv_type}", "")
            yield from header()
        for result in run_batched(setup, tests, sweep.repetitions, progress=clock):
            yield row(result) if output == "md" else json.dumps(result.to_json())
        if output == "md":
            yield ""


def profile_lines(sweep: Sweep, output: str) -> Iterable[str]:
    """The report of where time goes."""
    from lfm2cpp.benchmark.profile import run_profiles, table
    from lfm2cpp.benchmark.report import json_list

    tests, clock = sweep.tests(with_pairs=False), CompileClock()
    profiles = (
        profile for setup in sweep.setups() for profile in run_profiles(setup, tests, sweep.repetitions, progress=clock)
    )
    if output == "json":
        return json_list(profile.to_json() for profile in profiles)
    if output == "jsonl":
        return (json.dumps(profile.to_json()) for profile in profiles)
    return (table(profile) + "\n" for profile in profiles)
