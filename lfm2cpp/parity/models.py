"""Are the checkpoint and the GGUF one model? Hyper-parameters, vocabulary, and every weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lfm2cpp import reference
from lfm2cpp.arch import iter_tensors, lfm2
from lfm2cpp.arch.lfm2 import HParams
from lfm2cpp.errors import CheckpointError
from lfm2cpp.ggml import GGMLType
from lfm2cpp.gguf.reader import GGUFFile

from .limits import WEIGHT
from .measure import checksum, max_abs
from .report import Line

# A context length is a promise about training, not part of the computation; files differ in it.
NOT_COMPUTED = ("n_ctx_train",)
# A row whose RMS is below this share of the tensor's cannot be held by a block type, and does not matter.
QUIET_ROW = 1e-2


class Weights(Protocol):
    """The checkpoint's weights by their Hugging Face names."""

    def has_tensor(self, hf_name: str) -> bool: ...
    def tensor(self, hf_name: str) -> NDArray[np.float32]: ...


def check_same_shape(hf: HParams, gguf: HParams) -> None:
    """Raises CheckpointError with the first hyper-parameter that differs."""
    for field in fields(HParams):
        theirs, ours = getattr(hf, field.name), getattr(gguf, field.name)
        if isinstance(theirs, float):
            theirs, ours = float(np.float32(theirs)), float(np.float32(ours))
        if theirs != ours and field.name not in NOT_COMPUTED:
            raise CheckpointError(
                f"checkpoint and GGUF are different models: "
                f"{field.name} is {theirs} in the checkpoint, {ours} in the GGUF"
            )


def check_same_vocabulary(path: Path, gguf: GGUFFile) -> None:
    """Raises CheckpointError with the first piece that differs; without tokenizer.json there is nothing to compare."""
    pieces = _hf_pieces(path / "tokenizer.json")
    value = gguf.metadata.get("tokenizer.ggml.tokens")
    if not pieces or value is None:
        return
    for i, piece in sorted(pieces.items()):
        ours = value.value[i].decode("utf-8", "replace") if i < len(value.value) else None
        if ours != piece:
            found = "missing" if ours is None else ascii(ours)
            raise CheckpointError(
                f"checkpoint and GGUF have different vocabularies: token {i} is {ascii(piece)} in tokenizer.json, "
                f"{found} in the GGUF"
            )


def _hf_pieces(path: Path) -> dict[int, str]:
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        vocab = {int(i): piece for piece, i in tokenizer["model"]["vocab"].items()}
        return vocab | {int(t["id"]): t["content"] for t in tokenizer.get("added_tokens", [])}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a tokenizer.json with a vocabulary: {error}") from None


def compare_weights(hf: Weights, model: reference.Model, types: Mapping[str, GGMLType]) -> list[Line]:
    """Every tensor of the GGUF against the checkpoint's, judged by its worst row."""
    lines = []
    for entry in iter_tensors(lfm2, model.hparams):
        if entry.name not in types:
            continue
        hf_name = entry.hf_name if hf.has_tensor(entry.hf_name) else "model.embed_tokens.weight"
        if hf_name != entry.hf_name and not entry.spec.optional:
            raise CheckpointError(f"the checkpoint has no tensor {entry.hf_name}")
        theirs = hf.tensor(hf_name).reshape(entry.shape)
        ours, limit = model.weights[entry.name].astype(np.float32), WEIGHT[types[entry.name]]
        worst, row = _worst_row(np.atleast_2d(ours), np.atleast_2d(theirs))
        il = entry.il if entry.il >= 0 or entry.name.startswith("token_embd.") else model.hparams.n_layer
        at = row if worst > limit else None
        sums = (checksum(ours), checksum(theirs))
        lines.append(Line("weights", il, entry.name, max_abs(ours, theirs), worst, limit, at, *sums))
    return sorted(lines, key=lambda line: line.il)


def _worst_row(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> tuple[float, int]:
    """The largest relative error of a row, and which row that is."""
    with np.errstate(all="ignore"):
        error = np.sqrt(np.mean(np.square(ours - theirs), axis=1, dtype=np.float64))
        size = np.sqrt(np.mean(np.square(theirs), axis=1, dtype=np.float64))
    size = np.maximum(size, QUIET_ROW * np.sqrt(np.mean(size**2)))
    relative = np.where(error == 0, 0.0, error / np.where(size > 0, size, 1))
    relative = np.where(np.isfinite(relative), relative, np.inf)
    row = int(relative.argmax())
    return float(relative[row]), row
