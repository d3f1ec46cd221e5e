"""One module per architecture: hyper-parameters, metadata keys, tensor table.

A new architecture is a module here, and what knows LFM2 by its layers elsewhere:

    engine/         model.py (the recording), plan.py (its ops), load.py (tensors by name), memory.py (what a sequence
                    keeps)
    reference.py    the model in float64, and parity/, which compares the intermediates by name
    benchmark/      shapes.py, random_model.py, kernel_names.py (which kernels a model needs)
    convert/        hparams.py, metadata.py, tensors.py
    tests/          tiny_model.py

validate.py's checks of shapes are the table's; its words on layers are LFM2's.
"""

from __future__ import annotations

from types import ModuleType

from . import lfm2
from .table import TensorEntry, TensorSpec, iter_tensors

ARCHITECTURES: dict[str, ModuleType] = {lfm2.NAME: lfm2}

__all__ = ["ARCHITECTURES", "TensorEntry", "TensorSpec", "iter_tensors", "lfm2"]
