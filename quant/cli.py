"""The `quantize` command: llama-quantize's arguments, in its order."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from lfm2cpp.errors import UsageError
from lfm2cpp.terminal import Progress, format_size, note

from .quantize import Plan, check_threads, default_output, quantize_file
from .recipe import RECIPES, Recipe, find_recipe


def _type_list() -> str:
    return "\n".join(f"  {r.name:5} {r.summary}" for r in RECIPES.values())


@click.command(epilog="\b\nTypes:\n" + _type_list(), options_metavar="[OPTIONS]")
@click.argument("arguments", nargs=-1, metavar="IN.gguf [OUT.gguf] TYPE [NTHREADS]")
@click.option("--pure", is_flag=True, help="The same type for every matrix: no better head, no fallback.")
@click.option("--dry-run", is_flag=True, help="Show what would become of each tensor; write nothing.")
@click.option("--allow-requantize", is_flag=True, help="Accept a source that is quantized already; loses quality.")
@click.option("--force", is_flag=True, help="Replace OUT.gguf if it exists.")
def quantize(arguments: tuple[str, ...], pure: bool, dry_run: bool, allow_requantize: bool, force: bool) -> None:
    """Store a model in fewer bits: the same bytes as llama-quantize.

    Without OUT.gguf the result is ggml-model-TYPE.gguf beside IN.gguf. NTHREADS is by default every CPU.
    """
    src, dst, recipe, n_threads = parse_arguments(arguments)
    started = time.monotonic()
    with _Reporter() as reporter:
        plan = quantize_file(
            src, dst, recipe.name, n_threads=n_threads, pure=pure, allow_requantize=allow_requantize, force=force,
            dry_run=dry_run, on_plan=reporter.announce if not dry_run else None, progress=reporter.update,
        )  # fmt: skip
    if dry_run:
        click.echo(_table(plan))
        _note_plan(plan)
    else:
        click.echo(f"{dst}: {_summary(plan)}, {time.monotonic() - started:.1f} s")


def parse_arguments(arguments: tuple[str, ...]) -> tuple[Path, Path, Recipe, int]:
    """(IN, OUT, type, threads). As in llama-quantize, a second argument that names a type is the type."""
    usage = "expected IN.gguf [OUT.gguf] TYPE [NTHREADS]"
    types = f"TYPE is one of: {' '.join(RECIPES)}"
    if len(arguments) < 2:
        raise UsageError(f"{'TYPE is' if arguments else 'IN.gguf and TYPE are'} missing; {usage}; {types}")
    src, rest = Path(arguments[0]), list(arguments[1:])
    dst = None if _is_type(rest[0]) else Path(rest.pop(0))
    if not rest:
        raise UsageError(f"{arguments[1]!r} is not a type, or TYPE is missing; {usage}; {types}")
    recipe = find_recipe(rest.pop(0))
    if len(rest) > 1:
        raise UsageError(f"too many arguments: {' '.join(rest[1:])!r}; {usage}; {types}")
    if rest and not rest[0].lstrip("-").isdecimal():
        raise UsageError(f"NTHREADS is {rest[0]!r}, expected a number; {usage}; {types}")
    n_threads = check_threads(int(rest[0]) if rest else None)
    return src, dst or default_output(src, recipe), recipe, n_threads


def _is_type(text: str) -> bool:
    try:
        find_recipe(text)
    except UsageError:
        return False
    return True


class _Reporter:
    """Progress on stderr from the moment the plan is known."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def announce(self, plan: Plan) -> None:
        _note_plan(plan)
        self._progress = Progress("quantizing", total=plan.data_nbytes)
        self._progress.__enter__()

    def update(self, n: int) -> None:
        if self._progress is not None:
            self._progress.update(n)

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress is not None:
            self._progress.__exit__(*sys.exc_info())


def _note_plan(plan: Plan) -> None:
    for warning in plan.warnings:
        note(warning)
    for t in plan.fallbacks:
        note(f"{t.name}: its rows of {t.shape[-1]} are not whole blocks of {t.choice.wanted.name}; stored as {t.target.name}")
    if plan.fallbacks:
        note(f"{len(plan.fallbacks)} of {len(plan.tensors)} tensors needed a fallback type")


def _summary(plan: Plan) -> str:
    return (
        f"{plan.recipe.name}, {format_size(plan.source_nbytes)} -> {format_size(plan.nbytes)} "
        f"({plan.nbytes} bytes, {plan.bits_per_weight:.2f} bits a weight)"
    )


def _table(plan: Plan) -> str:
    width = max(len(t.name) for t in plan.tensors)
    lines = [
        f"{t.name:{width}}  {'x'.join(map(str, t.shape)):>13}  {t.source.name:>5} -> {t.target.name:5}  {format_size(t.nbytes):>9}"
        for t in plan.tensors
    ]
    return "\n".join([*lines, _summary(plan)])


def main() -> None:
    """The command on its own: python -m quant"""
    from lfm2cpp.cli.group import invoke

    invoke(quantize, "quantize")
