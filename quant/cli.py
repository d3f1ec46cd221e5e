"""The `quantize` command: llama-quantize's arguments, in its order."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import click

from lfm2cpp.errors import UsageError
from lfm2cpp.terminal import Progress, format_size, note

from .quantize import Plan, check_threads, default_output, quantize_file
from .recipe import RECIPES, Recipe, find_recipe

TYPES = "\n".join(f"  {recipe.name:6} {recipe.summary}" for recipe in RECIPES.values())


# Unknown options reach parse_arguments, which takes -1 for a bad number of threads.
@click.command(
    epilog=f"\b\nTypes:\n{TYPES}",
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]},
)
@click.argument("arguments", nargs=-1, metavar="IN.gguf [OUT.gguf] TYPE [NTHREADS]")
@click.option(
    "--imatrix", metavar="FILE", type=click.Path(), help="Weigh errors by an importance matrix (lfm2cpp imatrix)."
)
@click.option("--pure", is_flag=True, help="The base type for every matrix; refused where rows do not fit it.")
@click.option("--dry-run", is_flag=True, help="Show what would become of each tensor; write nothing.")
@click.option("--allow-requantize", is_flag=True, help="Accept a source that is quantized already; loses quality.")
@click.option("--force", is_flag=True, help="Replace OUT.gguf if it exists.")
def quantize(arguments: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Store a model in fewer bits: the same file as llama-quantize.

    Without OUT.gguf the result is ggml-model-TYPE.gguf beside IN.gguf. NTHREADS is by default every CPU.
    """
    src, dst, recipe, n_threads = parse_arguments(arguments)
    started = time.monotonic()
    if dry_run:
        plan = quantize_file(src, dst, recipe.name, n_threads=n_threads, dry_run=True, **options)
        _note_plan(plan)
        click.echo(_table(plan))
        return
    with ExitStack() as stack:
        bar: list[Progress] = []

        def announce(plan: Plan) -> None:
            _note_plan(plan)
            bar.append(stack.enter_context(Progress("quantizing", total=plan.data_nbytes)))

        plan = quantize_file(
            src, dst, recipe.name, n_threads=n_threads, on_plan=announce, progress=lambda n: bar[0].update(n), **options
        )
    click.echo(f"{click.format_filename(dst)}: {_summary(plan)}, {time.monotonic() - started:.1f} s")


def parse_arguments(arguments: tuple[str, ...]) -> tuple[Path, Path, Recipe, int]:
    """(IN, OUT, type, threads). As in llama-quantize, a second argument that names a type is the type.

    Raises UsageError, which tells the order of the arguments and the types.
    """
    rest = list(arguments)
    for text in rest:
        if text.startswith("-") and not re.fullmatch(r"-\d*", text):
            _misused(f"no such option: {text} (write a file of that name as ./{text})")
    if len(rest) < 2:
        _misused("TYPE is missing" if rest else "IN.gguf and TYPE are missing")
    if not Path(rest[0]).name:
        _misused(f"{rest[0]!r} is no file name")
    src = Path(rest.pop(0))
    dst = None if _is_type(rest[0]) else Path(rest.pop(0))
    if not rest:
        _misused(f"{arguments[1]!r} is not a type, or TYPE is missing behind it")
    recipe = find_recipe(rest.pop(0))
    if len(rest) > 1:
        _misused(f"too many arguments: {' '.join(rest[1:])}")
    if rest and not re.fullmatch(r"-?\d{1,18}", rest[0], re.ASCII):
        _misused(f"NTHREADS is {rest[0]!r}, expected a number")
    n_threads = check_threads(int(rest[0]) if rest else None)
    return src, dst or default_output(src, recipe), recipe, n_threads


def _misused(problem: str) -> NoReturn:
    raise UsageError(f"{problem}; expected IN.gguf [OUT.gguf] TYPE [NTHREADS], TYPE being one of: {' '.join(RECIPES)}")


def _is_type(text: str) -> bool:
    try:
        find_recipe(text)
    except UsageError:
        return False
    return True


def _note_plan(plan: Plan) -> None:
    for warning in plan.warnings:
        note(warning)
    for t in plan.fallbacks:
        wanted = t.choice.wanted.name
        note(f"{t.name}: its rows of {t.shape[-1]} are not whole blocks of {wanted}; stored as {t.target.name}")
    if plan.fallbacks:
        note(f"{len(plan.fallbacks)} of {len(plan.tensors)} tensors needed a fallback type")


def _summary(plan: Plan) -> str:
    return (
        f"{plan.recipe.name}, {format_size(plan.source_nbytes)} -> {format_size(plan.nbytes)} "
        f"({plan.nbytes} bytes, {plan.bits_per_weight:.2f} bits a weight)"
    )


def _table(plan: Plan) -> str:
    width = max(len(t.name) for t in plan.tensors)
    lines = []
    for t in plan.tensors:
        shape, size = "x".join(map(str, t.shape)), format_size(t.nbytes)
        lines.append(f"{t.name:{width}}  {shape:>13}  {t.source.name:>5} -> {t.target.name:5}  {size:>9}")
    return "\n".join([*lines, _summary(plan)])


def main() -> None:
    """The command on its own: python -m quant"""
    from lfm2cpp.cli.group import invoke

    invoke(quantize, "quantize")
