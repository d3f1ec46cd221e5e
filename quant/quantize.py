"""GGUF -> GGUF: every tensor in the type that its recipe gives it.

Slabs of rows are read from the mapped source, encoded by a pool of threads and written in order, so that reading,
encoding and writing overlap and memory stays at a few slabs a thread.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lfm2cpp.arch import iter_tensors
from lfm2cpp.arch.validate import check_tensors, load_hparams
from lfm2cpp.errors import ModelFormatError, UsageError
from lfm2cpp.files import check_destination
from lfm2cpp.ggml import QUANTIZATION_VERSION, TRAITS, FileType, GGMLType, row_nbytes, tensor_nbytes
from lfm2cpp.gguf import GGUFFile, Metadata, TensorToWrite, Value, gguf_size, read_gguf, write_gguf
from lfm2cpp.gguf.check import non_finite_blocks
from lfm2cpp.gguf.imatrix import F32, ImportanceMatrix, read_imatrix

from .encode import (
    ENCODABLE,
    FLOAT_TYPES,
    U8,
    WEIGHTED_KERNELS,
    EncodingError,
    decode_rows,
    encode_into,
    kernel_name,
    load_kernels,
    row_slabs,
)
from .imatrix import check_importances, imatrix_metadata
from .recipe import OUTPUT, TOKEN_EMBD, Choice, Recipe, Subject, choose_types, file_shape, find_recipe, sort_key

MAX_THREADS = 512
UNWEIGHTED = (TOKEN_EMBD, OUTPUT)  # matrices of which llama-imatrix collects nothing
SLABS_AHEAD = 2  # per thread: encoded or being encoded while earlier ones are written


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file to come. `shape` is the file's; the rows are all dimensions but the last."""

    name: str
    shape: tuple[int, ...]
    source: GGMLType
    choice: Choice

    @property
    def target(self) -> GGMLType:
        return self.choice.ggml_type

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.target, self.shape)


@dataclass(frozen=True)
class Plan:
    """What quantizing a file will do, tensor by tensor in the order of the new file, and how large that becomes."""

    recipe: Recipe
    tensors: list[PlannedTensor]
    metadata: Metadata
    nbytes: int
    source_nbytes: int
    warnings: list[str]
    imatrix: ImportanceMatrix | None = None

    def importance(self, tensor: PlannedTensor) -> F32 | None:
        """Of the tensor's columns, where they are known."""
        return self.imatrix.columns.get(tensor.name) if self.imatrix else None

    @property
    def fallbacks(self) -> list[PlannedTensor]:
        return [t for t in self.tensors if t.choice.fell_back]

    @property
    def data_nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.data_nbytes / max(1, sum(t.n_elements for t in self.tensors))


def quantize_file(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    ftype: str | FileType,
    *,
    imatrix: str | os.PathLike[str] | None = None,
    n_threads: int | None = None,
    pure: bool = False,
    allow_requantize: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Callable[[int], None] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> Plan:
    """Write the model `src` to `dst` as file type `ftype`, byte for byte as llama-quantize would.

    `imatrix` names a file of importances by which errors are weighed. With `dry_run` only headers and importances are
    read, and nothing is written. `on_plan` hears of the plan before the work, `progress(n)` of every n bytes of tensor
    data written. `n_threads` encode; one more writes.
    Raises UsageError, ModelFormatError, EncodingError or OutputError; whatever stood at `dst` is then untouched.
    """
    recipe = find_recipe(ftype.name if isinstance(ftype, FileType) else ftype)
    n_threads = check_threads(n_threads)
    with read_gguf(src) as gguf:
        importances = read_imatrix(imatrix) if imatrix is not None else None
        plan = make_plan(gguf, recipe, pure=pure, allow_requantize=allow_requantize, imatrix=importances)
        inputs = [*gguf.paths, Path(imatrix)] if imatrix is not None else gguf.paths
        if not dry_run:
            check_destination(dst, size=plan.nbytes, force=force, inputs=inputs)
        if on_plan is not None:
            on_plan(plan)
        if not dry_run:
            load_kernels(kernel_name(t.target, plan.importance(t)) for t in plan.tensors if t.target != t.source)
            _write(gguf, plan, dst, n_threads, force, progress, inputs)
    return plan


def check_threads(n_threads: int | None) -> int:
    """The number itself, or as many as this process may use; UsageError out of range."""
    if n_threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= n_threads <= MAX_THREADS:
        raise UsageError(f"{n_threads} threads: expected 1 to {MAX_THREADS}")
    return n_threads


# --- the plan


def make_plan(
    gguf: GGUFFile,
    recipe: Recipe,
    *,
    pure: bool = False,
    allow_requantize: bool = False,
    imatrix: ImportanceMatrix | None = None,
) -> Plan:
    """Decide everything that can be decided from the header; raises for what can not be done."""
    arch, hparams, warnings = load_hparams(gguf)
    check_tensors(gguf, arch, hparams, warnings)
    entries = {entry.name: entry for entry in iter_tensors(arch, hparams)}
    subjects = {
        name: Subject(name, gguf.tensors[name].shape, gguf.tensors[name].ggml_type, entries.get(name))
        for name in sorted(gguf.tensors, key=sort_key)
    }
    tensors = [
        PlannedTensor(name, file_shape(subjects[name].shape), subjects[name].ggml_type, choice)
        for name, choice in choose_types(recipe, subjects, pure=pure, weighted=imatrix is not None).items()
    ]
    _check_sources(gguf, tensors, allow_requantize)
    metadata = _metadata(gguf, recipe)
    warnings = gguf.warnings + warnings
    if imatrix is not None:
        check_importances(imatrix, {t.name: t.shape[-1] for t in tensors})
        warnings += _missing_importances(imatrix, tensors)
        for key, value in imatrix_metadata(imatrix).items():
            metadata.pop(key, None)
            metadata[key] = value
    size = gguf_size(metadata, [TensorToWrite(t.name, t.shape, t.target, tuple) for t in tensors])
    plan = Plan(recipe, tensors, metadata, size, gguf.nbytes, warnings, imatrix)
    if pure and plan.fallbacks:
        t = plan.fallbacks[0]
        raise ModelFormatError(
            f"{gguf.path}: --pure wants {t.choice.wanted.name} everywhere, but the rows of {t.name} have {t.shape[-1]} "
            f"elements, not a multiple of {TRAITS[t.choice.wanted].block_size}; without --pure it becomes "
            f"{t.target.name}"
        )
    return plan


def _check_sources(gguf: GGUFFile, tensors: list[PlannedTensor], allow_requantize: bool) -> None:
    for t in tensors:
        if t.source == t.target or t.source in FLOAT_TYPES:
            continue
        if t.source not in ENCODABLE:
            known = " ".join(x.name for x in ENCODABLE)
            raise ModelFormatError(
                f"{gguf.path}: {t.name} is {t.source.name}, which cannot be unpacked; known are {known}"
            )
        if not allow_requantize:
            raise ModelFormatError(
                f"{gguf.path}: {t.name} is {t.source.name} already, and quantizing it again loses quality; start from "
                "a BF16, F16 or F32 file, or use --allow-requantize"
            )


def _missing_importances(imatrix: ImportanceMatrix, tensors: list[PlannedTensor]) -> list[str]:
    """What to say of matrices that are quantized without importances, but for those that llama-imatrix leaves out."""
    searched = [t.name for t in tensors if t.target != t.source and t.target in WEIGHTED_KERNELS]
    missing = [name for name in searched if name not in imatrix.columns and name not in UNWEIGHTED]
    if not missing:
        return []
    return [
        f"{imatrix.path}: has no importances for {len(missing)} matrices, the first being {missing[0]}; "
        "they are quantized without"
    ]


def _metadata(gguf: GGUFFile, recipe: Recipe) -> Metadata:
    """The source's keys in their order, without those of a split; what a quantizer sets goes to the end."""
    metadata = dict(gguf.metadata)
    for key in ("split.no", "split.count", "split.tensors.count", "general.quantization_version"):
        metadata.pop(key, None)
    file_type = metadata.pop("general.file_type", None)
    metadata["general.quantization_version"] = Value.u32(QUANTIZATION_VERSION)
    if recipe.file_type is not None:
        file_type = Value.u32(recipe.file_type)
    if file_type is not None:
        metadata["general.file_type"] = file_type
    return metadata


# --- the work


@dataclass(frozen=True)
class _Slab:
    """Rows [start, stop) of a tensor, whose rows have `n_per_row` elements."""

    tensor: PlannedTensor
    start: int
    stop: int

    @property
    def n_per_row(self) -> int:
        return self.tensor.shape[-1]


def _slabs(tensor: PlannedTensor) -> list[_Slab]:
    n_per_row = tensor.shape[-1]
    return [_Slab(tensor, *rows) for rows in row_slabs(tensor.n_elements // n_per_row, n_per_row)]


def _write(
    gguf: GGUFFile,
    plan: Plan,
    dst: str | os.PathLike[str],
    n_threads: int,
    force: bool,
    progress: Any,
    inputs: Sequence[Path],
) -> None:
    slabs = {t.name: _slabs(t) for t in plan.tensors}
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="quantize")
    try:
        work = (pool.submit(_stored, gguf, slab, plan.importance(t)) for t in plan.tensors for slab in slabs[t.name])
        results = _in_order(work, SLABS_AHEAD * n_threads)
        tensors = [
            TensorToWrite(t.name, t.shape, t.target, partial(islice, results, len(slabs[t.name])))
            for t in plan.tensors
        ]
        write_gguf(dst, plan.metadata, tensors, force=force, progress=progress, inputs=inputs)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(work: Iterator[Future[U8]], n_ahead: int) -> Iterator[U8]:
    """Results in the order of `work`, which is started `n_ahead` places early."""
    pending: deque[Future[U8]] = deque()
    for future in work:
        pending.append(future)
        if len(pending) > n_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _stored(gguf: GGUFFile, slab: _Slab, importance: F32 | None) -> U8:
    """The slab's bytes in its new type."""
    t = slab.tensor
    size = row_nbytes(t.source, slab.n_per_row)
    data = gguf.data(t.name)[slab.start * size : slab.stop * size]
    if t.target == t.source:
        bad = non_finite_blocks(data.reshape(-1, TRAITS[t.source].type_size), t.source)
        if len(bad):
            row = slab.start + int(bad[0]) * TRAITS[t.source].block_size // slab.n_per_row
            raise EncodingError(f"{t.name}, row {row}, holds NaN or infinity; the source model is damaged")
        out = data.copy()
    else:
        out = np.empty((slab.stop - slab.start, row_nbytes(t.target, slab.n_per_row)), np.uint8)
        encode_into(decode_rows(data, t.source, slab.n_per_row), t.target, out, t.name, slab.start, importance)
    gguf.release(t.name, slab.start * size, slab.stop * size)
    return out


def default_output(src: Path, recipe: Recipe) -> Path:
    """llama-quantize's name for an output that was not named; of an alias it takes what that stands for."""
    return src.with_name(f"ggml-model-{recipe.name}.gguf")
