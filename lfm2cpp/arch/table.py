"""What a tensor table is made of, for every architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KeySpec:
    """One hyper-parameter in the file: `ARCH.key`, its exact value type, and the closed range it must lie in."""

    field: str  # of the architecture's HParams
    key: str
    type: str  # name of a ValueType; ARRAY means one INT32 per layer
    low: float
    high: float


@dataclass(frozen=True)
class TensorSpec:
    """One row of an architecture's tensor table.

    `name` is the GGUF name without its `blk.N.` prefix, `hf_name` the checkpoint's without `model.layers.N.`;
    `shape(hparams, il)` is in NumPy order (rows first, the contiguous dimension last).
    """

    name: str
    hf_name: str
    shape: Callable[[Any, int], tuple[int, ...]]
    quantizable: bool = True  # a matrix that llama-quantize may store in a block type
    optional: bool = False
    aliases: tuple[str, ...] = ()  # other names under which files carry it


@dataclass(frozen=True)
class TensorEntry:
    """A TensorSpec at its place in one model: full names and concrete shape. `il` is -1 outside the layers."""

    spec: TensorSpec
    il: int
    name: str
    hf_name: str
    shape: tuple[int, ...]

    @property
    def quantizable(self) -> bool:
        return self.spec.quantizable and len(self.shape) > 1


def iter_tensors(arch: Any, hparams: Any) -> Iterator[TensorEntry]:
    """Every tensor of a model of architecture module `arch`, optional ones included, globals first."""
    for spec in arch.GLOBAL_TENSORS:
        yield TensorEntry(spec, -1, spec.name, spec.hf_name, spec.shape(hparams, -1))
    for il in range(hparams.n_layer):
        for spec in arch.layer_tensors(hparams, il):
            yield TensorEntry(
                spec, il, f"blk.{il}.{spec.name}", f"model.layers.{il}.{spec.hf_name}", spec.shape(hparams, il)
            )
