"""`lfm2cpp convert` and the console script `convert-hf-to-gguf`: options, messages, nothing else."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import click

from lfm2cpp.cli.group import invoke
from lfm2cpp.errors import CheckpointError, UsageError
from lfm2cpp.terminal import format_size, note

from .hf_to_gguf import OUTTYPES, Converted, ConvertOptions, check_options, convert_hf_to_gguf
from .vocab import PRE


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--outfile", type=click.Path(path_type=Path), help="File or directory to write to; {ftype} is replaced.  "
              "[default: a telling name in MODEL's directory]")
@click.option("--outtype", type=click.Choice(OUTTYPES), default="auto", show_default=True,
              help="Type of the matrices; auto keeps the checkpoint's 16-bit type.")
@click.option("--vocab-only", is_flag=True, help="Write the vocabulary and the metadata, no tensors.")
@click.option("--dry-run", is_flag=True, help="Tell what would be written; write nothing.")
@click.option("--model-name", help="general.name, instead of what the model card or the directory says.")
@click.option("--metadata", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="JSON file with general.* keys that override those found.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--verbose", is_flag=True, help="List the metadata and every tensor.")
@click.option("--offline", is_flag=True, help="Use only what is in the local hub cache.")
@click.option("--remote", is_flag=True, help="MODEL is a hub id even if a directory has that name.")
@click.option("--allow-f16-overflow", is_flag=True, help="Store values beyond float16's range as infinity.")
@click.option("--force-pre", type=click.Choice([PRE]), help="Take an unknown pre-tokenizer for this one.")
def convert(model: str, verbose: bool, offline: bool, remote: bool, **options: object) -> None:
    """Convert MODEL, a checkpoint directory or a hub id such as LiquidAI/LFM2-350M, to GGUF.

    The file is the one that llama.cpp's converter makes, byte for byte; q4_0 gives what quantizing the f32 file gives.
    The path of the file is printed on stdout.
    """
    started = time.monotonic()
    settings = ConvertOptions(**options)  # type: ignore[arg-type]
    hub_id = _hub_id(model, remote)
    directory = Path(model)
    check_options(settings)
    if hub_id is not None:
        from .hub import fetch_checkpoint

        directory = fetch_checkpoint(hub_id, note, offline=offline, weights=not settings.vocab_only)
    result = convert_hf_to_gguf(directory, settings, note, hub_id=hub_id)
    if verbose:
        _list(result)
    verb = "would write" if settings.dry_run else "wrote"
    seconds = "" if settings.dry_run else f" in {time.monotonic() - started:.1f} s"
    click.echo(f"{verb} {format_size(result.nbytes)}: {_types(result)}{seconds}", err=True)
    click.echo(result.path)


def _hub_id(model: str, remote: bool) -> str | None:
    """MODEL as a hub id, if it is one and no directory."""
    from .hub import is_hub_id

    if not model:
        raise UsageError("MODEL is empty; give a directory or a hub id")
    if Path(model).exists() and not remote:
        return None
    if is_hub_id(model):
        return model
    if remote:
        raise CheckpointError(f"{model}: is not a hub id, expected ORGANISATION/NAME such as LiquidAI/LFM2-350M")
    return None


def _types(result: Converted) -> str:
    counts = Counter(tensor.ggml_type.name for tensor in result.tensors)
    types = ", ".join(f"{n} {name}" for name, n in counts.items())
    return f"{len(result.tensors)} tensors ({types})" if counts else "vocabulary and metadata only"


def _list(result: Converted) -> None:
    for key, value in result.metadata.items():
        shown = f"{len(value.value)} items" if isinstance(value.value, list) and len(value.value) > 64 else value.value
        click.echo(f"{key} = {value.type_name} {shown!r}", err=True)
    for tensor in result.tensors:
        shape = " x ".join(map(str, tensor.shape))
        click.echo(f"{tensor.name:<36} {tensor.source.dtype:>4} -> {tensor.ggml_type.name:<4} {shape}", err=True)


def main() -> None:
    invoke(convert, "convert-hf-to-gguf")
