"""One module per architecture: hyper-parameters, metadata keys, tensor table. A new architecture is a new module."""

from __future__ import annotations

from types import ModuleType

from . import lfm2
from .table import TensorEntry, TensorSpec, iter_tensors

ARCHITECTURES: dict[str, ModuleType] = {lfm2.NAME: lfm2}

__all__ = ["ARCHITECTURES", "TensorEntry", "TensorSpec", "iter_tensors", "lfm2"]
