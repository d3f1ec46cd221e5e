"""The recipe: checkpoint -> configuration, tensors, vocabulary, metadata -> GGUF file.

The bytes are those of llama.cpp's convert_hf_to_gguf.py for every checkpoint that both convert; `q4_0`, which it does
not offer, gives the file that converting to f32 and quantizing to Q4_0 gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lfm2cpp.arch import lfm2
from lfm2cpp.errors import CheckpointError, UsageError
from lfm2cpp.files import check_destination
from lfm2cpp.gguf import Metadata, TensorToWrite, gguf_size, write_gguf
from lfm2cpp.terminal import Progress

from .checkpoint import Checkpoint, open_checkpoint, read_tokenizer_files
from .encode import MAX_F16, NATIVE, ValueReport, encode_tensor
from .hparams import CheckpointConfig, read_config
from .json_file import read_object
from .metadata import FILE_TYPES, build_metadata
from .model_names import file_stem, size_label
from .provenance import Facts, apply_override, gather_facts, general_metadata
from .special_tokens import special_metadata, template_metadata
from .tensors import Planned, guess_outtype, match_tensors, plan_types
from .vocab import PRE, read_vocabulary

Note = Callable[[str], None]
OUTTYPES = (*FILE_TYPES, "auto")


@dataclass(frozen=True)
class ConvertOptions:
    """What the command line can say; the defaults are its defaults."""

    outtype: str = "auto"
    outfile: Path | None = None  # a directory gets a file with a telling name; {ftype} is replaced
    vocab_only: bool = False
    dry_run: bool = False
    model_name: str | None = None
    metadata: Path | None = None
    force: bool = False
    allow_f16_overflow: bool = False
    force_pre: str | None = None
    n_threads: int | None = None  # of the block types' encoders


@dataclass(frozen=True)
class Converted:
    """What was written, or would have been."""

    path: Path
    nbytes: int
    outtype: str
    metadata: Metadata
    tensors: list[Planned]


def convert_hf_to_gguf(
    directory: Path | str, options: ConvertOptions, note: Note = lambda text: None, *, hub_id: str | None = None
) -> Converted:
    """Convert a checkpoint directory. `hub_id` is its name if it came from the hub.

    Raises an LFM2Error for a checkpoint that cannot be converted and for an output that cannot be written; nothing is
    left behind then. `note` hears what a user should know but need not act on.
    """
    check_options(options)
    checkpoint = open_checkpoint(Path(directory), note, weights_optional=options.vocab_only)
    config = read_config(checkpoint.config, checkpoint.config_file, note)
    outtype = guess_outtype(checkpoint.tensors) if options.outtype == "auto" else options.outtype
    planned, hparams = _plan_tensors(checkpoint, config, outtype, options, note)
    facts = _facts(checkpoint, planned, options, note, hub_id)
    metadata = _metadata(checkpoint, replace(config, hparams=hparams), outtype, facts, options, note)
    report = ValueReport()
    writes = _writes(planned, report, options)
    result = Converted(
        path=_output_path(checkpoint, facts, outtype, options, hub_id), nbytes=gguf_size(metadata, writes),
        outtype=outtype, metadata=metadata, tensors=planned,
    )  # fmt: skip
    if not options.dry_run:
        _write(result, writes, checkpoint, options)
        if report.nonfinite:
            note(f"{report.nonfinite} values are NaN or infinite, the first in {report.nonfinite_tensor}")
    return result


def check_options(options: ConvertOptions) -> None:
    """What can be told to be wrong before anything has been read, or downloaded."""
    if options.outtype not in OUTTYPES:
        raise UsageError(f"outtype {options.outtype!r}; choose one of: {', '.join(OUTTYPES)}")
    if options.force_pre not in (None, PRE):
        raise UsageError(f"--force-pre {options.force_pre!r}; the only pre-tokenizer of these models is {PRE}")
    target = options.outfile
    if target is not None and not (options.dry_run or target.is_dir() or "{" in target.name):
        check_destination(target, force=options.force)


def _plan_tensors(
    checkpoint: Checkpoint, config: CheckpointConfig, outtype: str, options: ConvertOptions, note: Note
) -> tuple[list[Planned], lfm2.HParams]:
    if not checkpoint.tensors:  # a vocabulary may be had without weights
        return [], config.hparams
    hparams, pairs = match_tensors(checkpoint.tensors, config, note)
    return ([] if options.vocab_only else plan_types(pairs, outtype, note)), hparams


def _facts(
    checkpoint: Checkpoint, planned: Sequence[Planned], options: ConvertOptions, note: Note, hub_id: str | None
) -> Facts:
    """The `general.*` facts, with the name and the size that are to be used when no source tells them."""
    n_params = sum(math.prod(tensor.shape) for tensor in planned)
    facts = gather_facts(
        checkpoint.card, checkpoint.config, checkpoint.name, checkpoint.generation_config, n_params
    )
    if hub_id is not None:
        facts["name"] = hub_id
    if options.metadata is not None:
        apply_override(facts, read_object(options.metadata), options.metadata, note)
    if options.model_name is not None:
        facts["name"] = options.model_name
    if facts["name"] is None:
        facts["name"] = checkpoint.name
    if facts["size_label"] is None and n_params:
        facts["size_label"] = size_label(n_params)
    return facts


def _metadata(
    checkpoint: Checkpoint, config: CheckpointConfig, outtype: str, facts: Facts, options: ConvertOptions, note: Note
) -> Metadata:
    files = read_tokenizer_files(checkpoint.directory)
    vocabulary = read_vocabulary(files, config.hparams.n_vocab, force_pre=options.force_pre, note=note)
    special = special_metadata(files.tokenizer, files.config, checkpoint.config, config.hparams.n_vocab)
    special.update(template_metadata(checkpoint.directory, files.config, note))
    return build_metadata(general_metadata(facts), config.hparams, config.head_dim, outtype, vocabulary, special)


def _writes(planned: Sequence[Planned], report: ValueReport, options: ConvertOptions) -> list[TensorToWrite]:
    """What the writer asks for, tensor by tensor, and after the last one the verdict on all values."""

    def chunks(index: int) -> Iterator[Any]:
        tensor = planned[index]
        encode_rows = None if tensor.ggml_type in NATIVE else _row_encoder(options)
        yield from encode_tensor(tensor.source, tensor.ggml_type, report, encode_rows)
        if index == len(planned) - 1 and not options.allow_f16_overflow:
            _refuse_overflow(report)

    return [TensorToWrite(t.name, t.shape, t.ggml_type, partial(chunks, i)) for i, t in enumerate(planned)]


def _row_encoder(options: ConvertOptions) -> Callable[..., Any]:
    """quant's encoder of the block types, imported when there are any: its kernels are compiled code."""
    from quant.encode import encode_rows
    from quant.quantize import check_threads

    return partial(encode_rows, n_threads=check_threads(options.n_threads))


def _refuse_overflow(report: ValueReport) -> None:
    if report.overflow:
        raise CheckpointError(
            f"{report.overflow} values are beyond float16's {MAX_F16:.0f} (up to {report.largest:.4g}, the first in "
            f"{report.overflow_tensor}); use --outtype bf16, or --allow-f16-overflow to store infinity"
        )


def _output_path(
    checkpoint: Checkpoint, facts: Facts, outtype: str, options: ConvertOptions, hub_id: str | None
) -> Path:
    """As llama.cpp: --outfile, with {ftype} replaced; else a telling name, in the directory or for a hub model here."""
    target = options.outfile
    if target is None and hub_id is not None:
        target = Path(hub_id.replace("/", "-") + ("-vocab.gguf" if options.vocab_only else "-{ftype}.gguf"))
    elif target is None:
        target = checkpoint.directory
    if target.is_dir():
        ending, size = ("vocab", None) if options.vocab_only else (outtype.upper(), facts["size_label"])
        parts = [facts[key] for key in ("name", "basename")] + [size] + [facts[key] for key in ("finetune", "version")]
        name, basename, size, finetune, version = (None if part is None else str(part) for part in parts)
        return target / (file_stem(name, basename, size, finetune, version, ending) + ".gguf")
    return target.with_name(fill_template(target.name, outtype))


def fill_template(name: str, outtype: str) -> str:
    """`m-{ftype}.gguf` -> `m-bf16.gguf`; {FTYPE} gives capitals."""
    for field in ("ftype", "outtype", ""):
        name = name.replace(f"{{{field}}}", outtype.lower())
        name = name.replace(f"{{{field.upper()}}}", outtype.upper()) if field else name
    return name


def _write(
    result: Converted, writes: list[TensorToWrite], checkpoint: Checkpoint, options: ConvertOptions
) -> None:
    inputs = sorted({tensor.path for tensor in checkpoint.tensors})
    check_destination(result.path, size=result.nbytes, force=options.force, inputs=inputs)
    if block_types := {tensor.ggml_type for tensor in writes} - set(NATIVE):
        from quant.encode import kernel_name, load_kernels

        load_kernels(kernel_name(t) for t in block_types)
    total = sum(tensor.nbytes for tensor in writes)
    with Progress(f"writing {result.path.name}", total=total, unit="B") as bar:
        write_gguf(result.path, result.metadata, writes, force=options.force, progress=bar.update, inputs=inputs)
