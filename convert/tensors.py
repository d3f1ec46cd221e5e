"""Which tensor of the checkpoint becomes which tensor of the file, and of what type.

Everything the architecture's table asks for must be there in the right shape, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np

from lfm2cpp.arch import TensorEntry, iter_tensors, lfm2
from lfm2cpp.errors import CheckpointError
from lfm2cpp.ggml import TRAITS, GGMLType

from .encode import FLOATS, as_f32, item_size
from .hparams import CheckpointConfig
from .safetensors_file import StoredTensor
from .shown import some

Note = Callable[[str], None]

# Longest first, so that no prefix hides another.
PREFIXES = ("model.language_model.model.", "model.language_model.", "language_model.model.", "lfm.")
# Parts of the vision and audio models around the text model: SigLIP, the projector, the conformer, the audio decoder.
NOT_TEXT = (
    "vision_tower.", "vision_model.", "vision_embedder.", "multi_modal_projector.", "conformer.", "audio_",
    "codebook_", "depth_", "depthformer.",
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One tensor of the file to come, and where its values are."""

    entry: TensorEntry
    source: StoredTensor
    ggml_type: GGMLType

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape


def match_tensors(
    stored: Sequence[StoredTensor], config: CheckpointConfig, note: Note
) -> tuple[lfm2.HParams, list[tuple[TensorEntry, StoredTensor]]]:
    """Pair the checkpoint's tensors with the table's, in the checkpoint's order, and settle the FFN width."""
    by_name = _text_tensors(stored, note)
    hparams = _settle_ffn_width(by_name, config, note)
    entries = {entry.hf_name: entry for entry in iter_tensors(lfm2, hparams)}
    if config.tied:
        _drop_tied_head(by_name, note)
    head = entries["lm_head.weight"]
    missing = [n for n in entries if n not in by_name and not (config.tied and n == head.hf_name)]
    unknown = [n for n in by_name if n not in entries]
    if missing or unknown:
        told = [f"{kind} {some(names)}" for kind, names in (("missing", missing), ("unknown", unknown)) if names]
        raise CheckpointError(f"{_directory(stored)}: tensors do not fit config.json: {'; '.join(told)}")
    _check_shapes([(entries[n], tensor) for n, tensor in by_name.items()])
    if rounded := [t.name for t in by_name.values() if t.dtype == "F64"]:
        note(f"{len(rounded)} tensors are float64 and are rounded to float32: {some(rounded)}")
    return hparams, [(entries[n], tensor) for n, tensor in by_name.items()]


def guess_outtype(stored: Sequence[StoredTensor]) -> str:
    """`auto`: the 16-bit type of the first matrix that has one, F16 when none has."""
    for tensor in stored:
        if len(tensor.shape) > 1 and tensor.dtype in ("BF16", "F16"):
            return tensor.dtype.lower()
    return "f16"


def plan_types(pairs: Sequence[tuple[TensorEntry, StoredTensor]], outtype: str, note: Note) -> list[Planned]:
    """The type and the place of every tensor, as llama.cpp's converter chooses them; for q4_0, as quantizing does."""
    if outtype == "q4_0":
        return _as_quantized(pairs, note)
    wanted = GGMLType[outtype.upper()]
    planned = []
    for entry, source in pairs:
        ggml_type = wanted if entry.quantizable else GGMLType.F32
        if entry.shape[-1] % TRAITS[ggml_type].block_size:
            note(f"{entry.name}: rows of {entry.shape[-1]} are no whole blocks of {ggml_type.name}: stored as F16")
            ggml_type = GGMLType.F16
        planned.append(Planned(entry, source, ggml_type))
    return planned


def _as_quantized(pairs: Sequence[tuple[TensorEntry, StoredTensor]], note: Note) -> list[Planned]:
    """The types and the order that `quantize Q4_0` gives to the F32 file."""
    from quant.recipe import Subject, choose_types, find_recipe, sort_key

    pairs = sorted(pairs, key=lambda pair: sort_key(pair[0].name))
    subjects = {e.name: Subject(e.name, e.shape, GGMLType.F32, e) for e, _ in pairs}
    choices = choose_types(find_recipe("Q4_0"), subjects)
    for name, choice in choices.items():
        if choice.fell_back:
            n = subjects[name].shape[-1]
            note(f"{name}: rows of {n} are no whole blocks of {choice.wanted.name}: stored as {choice.ggml_type.name}")
    return [Planned(entry, source, choices[entry.name].ggml_type) for entry, source in pairs]


def _text_tensors(stored: Sequence[StoredTensor], note: Note) -> dict[str, StoredTensor]:
    """Tensors by their plain name: prefixes of multimodal checkpoints stripped, their other parts left out."""
    by_name: dict[str, StoredTensor] = {}
    skipped = []
    for tensor in stored:
        if tensor.name.removeprefix("model.").startswith(NOT_TEXT):
            skipped.append(tensor.name)
            continue
        if tensor.name.endswith(".rotary_emb.inv_freq"):  # a table that old checkpoints carry along
            continue
        name = _plain_name(tensor.name)
        if name in by_name:
            raise CheckpointError(f"{tensor.path}: {tensor.name!r} and {by_name[name].name!r} are both {name!r}")
        by_name[name] = tensor
    if skipped:
        note(f"{len(skipped)} vision and audio tensors are left out, only the text model is converted: {some(skipped)}")
    return by_name


def _plain_name(name: str) -> str:
    name = name.removeprefix("language_model.") if name.startswith("language_model.lm_head.") else name
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return "model." + name[len(prefix) :]
    return name


def _settle_ffn_width(by_name: dict[str, StoredTensor], config: CheckpointConfig, note: Note) -> lfm2.HParams:
    """config.json spells the width in three ways and some files get it wrong; the tensor cannot."""
    w1 = by_name.get("model.layers.0.feed_forward.w1.weight")
    hparams = config.hparams
    if w1 is None or len(w1.shape) != 2 or w1.shape[0] == hparams.n_ff or not w1.shape[0]:
        return hparams
    note(f"{config.file} means an FFN width of {hparams.n_ff}, the tensors are {w1.shape[0]} wide: the tensors win")
    return replace(hparams, n_ff=w1.shape[0])


def _drop_tied_head(by_name: dict[str, StoredTensor], note: Note) -> None:
    """A tied checkpoint may carry a copy of the embedding as head; a different one contradicts the config."""
    head, embedding = by_name.get("lm_head.weight"), by_name.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    if not _equal(head, embedding):
        raise CheckpointError(
            f"{head.path}: lm_head.weight differs from the embedding though config.json ties them; "
            "set tie_word_embeddings to false if the head is meant"
        )
    note("lm_head.weight is the embedding once more (tied): left out")
    del by_name["lm_head.weight"]


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    if a.shape != b.shape or a.dtype not in FLOATS or b.dtype not in FLOATS:
        return False
    if a.dtype == b.dtype:
        return all(x == y for x, y in zip(a.chunks(), b.chunks(), strict=True))
    size = 1 << 16  # values in a piece, whatever they take
    pieces = zip_longest(a.chunks(size * item_size(a.dtype)), b.chunks(size * item_size(b.dtype)))
    return all(np.array_equal(as_f32(x, a.dtype), as_f32(y, b.dtype), equal_nan=True) for x, y in pieces)


def _check_shapes(pairs: Sequence[tuple[TensorEntry, StoredTensor]]) -> None:
    wrong = []
    for entry, tensor in pairs:
        if tensor.dtype not in FLOATS:
            known = ", ".join(FLOATS)
            raise CheckpointError(f"{tensor.path}: tensor {tensor.name!r} is {tensor.dtype}; only {known} can be read")
        expected = entry.shape
        if entry.spec.name == "shortconv.conv.weight":  # a depthwise Conv1d: one input channel per group
            expected = (expected[0], 1, expected[1])
        if tensor.shape != expected:
            wrong.append(f"{tensor.name} is {list(tensor.shape)}, expected {list(expected)}")
    if wrong:
        raise CheckpointError(f"{_directory([t for _, t in pairs])}: shapes do not fit config.json: {some(wrong)}")


def _directory(stored: Sequence[StoredTensor]) -> str:
    return str(stored[0].path.parent) if stored else "checkpoint"
