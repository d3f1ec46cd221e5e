"""Is this GGUF file a model that can be run? Hyper-parameters and tensors, checked before a kernel sees an address.

The reader has made sure that the file is sound; here it is compared with what its architecture's tables ask for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from lfm2cpp.errors import ModelFormatError
from lfm2cpp.ggml import GGMLType
from lfm2cpp.gguf.header import TensorInfo, quoted
from lfm2cpp.gguf.reader import GGUFFile
from lfm2cpp.gguf.values import Value, ValueType

from . import ARCHITECTURES
from .table import KeySpec, TensorEntry, iter_tensors

# The weight types that have kernels; norms and convolution taps are F32 always.
WEIGHT_TYPES = frozenset({
    GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q4_K,
    GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.IQ4_NL,
})  # fmt: skip
MAX_LISTED = 5


@dataclass(frozen=True)
class ModelFacts:
    """A file that passed every check: its architecture module, hyper-parameters, tensors by canonical name."""

    arch: ModuleType
    hparams: Any
    tensors: dict[str, TensorInfo]
    warnings: list[str]


def validate_model(gguf: GGUFFile) -> ModelFacts:
    """Every check the runtime needs. Raises ModelFormatError with the first thing that is wrong."""
    arch, hparams, warnings = load_hparams(gguf)
    tensors = check_tensors(gguf, arch, hparams, warnings)
    check_types(gguf, arch, hparams, tensors)
    return ModelFacts(arch, hparams, tensors, warnings)


def load_hparams(gguf: GGUFFile) -> tuple[ModuleType, Any, list[str]]:
    """The architecture module, its HParams, and warnings about what was repaired.

    Raises ModelFormatError naming the key, the value found and the range or type expected.
    """
    arch = _architecture(gguf)
    values: dict[str, Any] = {}
    for spec in arch.KEYS:
        values[spec.field] = _read_key(gguf, arch, spec, values)
    warnings: list[str] = []
    values["n_vocab"] = _vocab_rows(gguf, arch, warnings)
    values["n_ff"] = _true_n_ff(gguf, arch, values["n_ff"], warnings)
    _check_heads(gguf, arch, values)
    hparams = arch.HParams(**values)
    for key, is_neutral in arch.NEUTRAL_KEYS.items():
        value = gguf.metadata.get(f"{arch.NAME}.{key}")
        if value is not None and not is_neutral(hparams, value.value):
            _fail(gguf, f"{arch.NAME}.{key} = {_shown(value)} is a variant of the model that is not supported")
    return arch, hparams, warnings


def check_tensors(
    gguf: GGUFFile, arch: ModuleType, hparams: Any, warnings: list[str] | None = None
) -> dict[str, TensorInfo]:
    """Tensors by their canonical names, aliases resolved; optional ones only when present.

    Raises ModelFormatError listing what is missing or of the wrong shape. What is left over goes to `warnings`.
    """
    _check_layer_kinds(gguf, arch, hparams)
    tensors: dict[str, TensorInfo] = {}
    used: set[str] = set()
    missing: list[str] = []
    for entry in iter_tensors(arch, hparams):
        names = [name for name in _names(entry) if name in gguf.tensors]
        used.update(names)
        if names:
            _check_same(gguf, names)
            tensors[entry.name] = gguf.tensors[names[0]]
        elif not entry.spec.optional:
            missing.append(" or ".join(_names(entry)))
    if missing:
        _fail(gguf, f"{_count(missing, 'tensor')} missing: {_listed(missing)}; the file is incomplete, get it again")
    wrong = [
        f"{entry.name} {tensors[entry.name].shape} instead of {entry.shape}"
        for entry in iter_tensors(arch, hparams)
        if entry.name in tensors and tensors[entry.name].shape != entry.shape
    ]
    if wrong:
        _fail(gguf, f"{_count(wrong, 'tensor')} of a shape that contradicts the metadata: {_listed(wrong)}")
    extra = [quoted(name) for name in gguf.tensors if name not in used]
    if extra and warnings is not None:
        warnings.append(f"{_count(extra, 'tensor')} not part of the model, ignored: {_listed(extra)}")
    return tensors


def check_types(gguf: GGUFFile, arch: ModuleType, hparams: Any, tensors: dict[str, TensorInfo]) -> None:
    """Refuse tensors stored in a type that the runtime has no kernel for."""
    wrong = []
    for entry in iter_tensors(arch, hparams):
        info = tensors.get(entry.name)
        allowed = WEIGHT_TYPES if entry.quantizable else {GGMLType.F32}
        if info is not None and info.ggml_type not in allowed:
            wrong.append(f"{entry.name} {info.ggml_type.name}" + ("" if entry.quantizable else " (must be F32)"))
    if wrong:
        known = " ".join(t.name for t in sorted(WEIGHT_TYPES))
        _fail(
            gguf,
            f"{_count(wrong, 'tensor')} of a type that cannot be run yet: {_listed(wrong)}; weights may be {known}",
        )


def _architecture(gguf: GGUFFile) -> ModuleType:
    supported = f"supported: {', '.join(ARCHITECTURES)}"
    value = gguf.metadata.get("general.architecture")
    if value is None:
        _fail(gguf, f"GGUF key 'general.architecture' is missing; {supported}")
    if value.type != ValueType.STRING:
        _fail(gguf, f"GGUF key 'general.architecture' has type {value.type_name}, expected STRING; {supported}")
    if value.value not in ARCHITECTURES:
        _fail(gguf, f"the architecture {quoted(value.value)} is not supported; {supported}")
    return ARCHITECTURES[value.value]


def _read_key(gguf: GGUFFile, arch: ModuleType, spec: KeySpec, values: dict[str, Any]) -> Any:
    key = f"{arch.NAME}.{spec.key}"
    if spec.type == "ARRAY":
        return _read_layer_array(gguf, key, spec, values["n_layer"])
    value = gguf.get(key, ValueType[spec.type])
    if not (math.isfinite(value) and spec.low <= value <= spec.high):
        _fail(gguf, f"{key} is {value}, expected {_range(spec)}")
    return value


def _read_layer_array(gguf: GGUFFile, key: str, spec: KeySpec, n_layer: int) -> tuple[int, ...]:
    expected = f"expected an array of INT32, one for each of the {n_layer} layers, 0 for a convolution layer"
    value = gguf.metadata.get(key)
    if value is None:
        _fail(gguf, f"GGUF key '{key}' is missing; {expected}")
    if value.item_type not in (ValueType.INT32, ValueType.UINT32):
        _fail(gguf, f"{key} has type {value.type_name}; {expected}")
    if len(value.value) != n_layer:
        _fail(gguf, f"{key} has {len(value.value)} entries; {expected}")
    for il, n in enumerate(value.value):
        if not spec.low <= n <= spec.high:
            _fail(gguf, f"{key} is {n} for layer {il}, expected {_range(spec)}")
    return tuple(value.value)


def _check_heads(gguf: GGUFFile, arch: ModuleType, values: dict[str, Any]) -> None:
    n_embd, n_head, n_head_kv = values["n_embd"], values["n_head"], values["n_head_kv"]
    if n_embd % n_head or n_embd // n_head % 2:
        _fail(
            gguf,
            f"{arch.NAME}.attention.head_count is {n_head}, which does not divide "
            f"{arch.NAME}.embedding_length {n_embd} into heads of an even width",
        )
    for il, n in enumerate(n_head_kv):
        if n and n_head % n:
            _fail(
                gguf,
                f"{arch.NAME}.attention.head_count_kv is {n} for layer {il}, which does not divide "
                f"{arch.NAME}.attention.head_count {n_head}",
            )
    if not any(n_head_kv):
        _fail(gguf, f"{arch.NAME}.attention.head_count_kv is 0 for every layer, expected at least one attention layer")


def _vocab_rows(gguf: GGUFFile, arch: ModuleType, warnings: list[str]) -> int:
    """The number of logits: the embedding's rows. The tokenizer may know fewer tokens, never more."""
    info = gguf.tensors.get("token_embd.weight")
    if info is None:
        what = (
            "holds no tensors: a vocabulary without a model" if not gguf.tensors else "has no tensor token_embd.weight"
        )
        _fail(gguf, f"{what}; get the complete model")
    if len(info.shape) != 2:
        _fail(gguf, f"tensor token_embd.weight has the shape {info.shape}, expected (n_vocab, n_embd)")
    n_vocab = info.shape[0]
    pieces = gguf.metadata.get("tokenizer.ggml.tokens")
    if pieces is not None and pieces.item_type == ValueType.STRING and len(pieces.value) > n_vocab:
        _fail(gguf, f"tokenizer.ggml.tokens has {len(pieces.value)} tokens, but token_embd.weight only {n_vocab} rows")
    declared = gguf.metadata.get(f"{arch.NAME}.vocab_size")
    if declared is not None and declared.value != n_vocab:
        warnings.append(
            f"{arch.NAME}.vocab_size is {_shown(declared)}, but token_embd.weight has {n_vocab} rows: using {n_vocab}"
        )
    return n_vocab


def _true_n_ff(gguf: GGUFFile, arch: ModuleType, declared: int, warnings: list[str]) -> int:
    """The FFN width by the tensors. Files in circulation carry the width from before its rounding (12288 for 8192)."""
    info = gguf.tensors.get("blk.0.ffn_gate.weight")
    if info is None or len(info.shape) != 2 or info.shape[0] == declared:
        return declared
    n_ff = info.shape[0]
    warnings.append(f"{arch.NAME}.feed_forward_length is {declared}, but the tensors are {n_ff} wide: using {n_ff}")
    return n_ff


def _check_layer_kinds(gguf: GGUFFile, arch: ModuleType, hparams: Any) -> None:
    """Name the contradiction when a layer holds the tensors of the other kind and none of its own."""
    by_layer: dict[str, list[str]] = {}
    for name in gguf.tensors:
        if name.startswith("blk.") and name.count(".") >= 2:
            _, il, rest = name.split(".", 2)
            by_layer.setdefault(il, []).append(rest)
    for il in range(hparams.n_layer):
        is_conv = hparams.is_conv(il)
        names = by_layer.get(str(il), [])
        conv = [n for n in names if n.startswith("shortconv.")]
        attention = [n for n in names if n.startswith(("attn_q", "attn_k", "attn_v", "attn_output"))]
        own, other = (conv, attention) if is_conv else (attention, conv)
        if other and not own:
            kind = "a convolution" if is_conv else "an attention"
            _fail(
                gguf,
                f"layer {il} is {kind} layer by {arch.NAME}.attention.head_count_kv, "
                f"but its tensors are {_listed(other)}",
            )


def _range(spec: KeySpec) -> str:
    low, high = (f"{n:g}" if isinstance(n, float) else str(n) for n in (spec.low, spec.high))
    return f"{low} to {high}"


def _names(entry: TensorEntry) -> list[str]:
    return [entry.name, *entry.spec.aliases]


def _check_same(gguf: GGUFFile, names: list[str]) -> None:
    """One tensor under two names is fine as long as it is one tensor."""
    first = gguf.tensors[names[0]]
    for name in names[1:]:
        info = gguf.tensors[name]
        same = (info.shape, info.ggml_type) == (first.shape, first.ggml_type)
        if not same or not np.array_equal(gguf.data(name), gguf.data(names[0])):
            _fail(gguf, f"tensors {names[0]} and {name} are two names of one thing, but differ")


def _count(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}{'s' if len(items) > 1 else ''}"


def _listed(items: list[str]) -> str:
    rest = len(items) - MAX_LISTED
    return ", ".join(items[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _shown(value: Value) -> str:
    return quoted(value.value) if isinstance(value.value, str) else quoted(repr(value.value)).strip("'\"")


def _fail(gguf: GGUFFile, message: str) -> NoReturn:
    raise ModelFormatError(f"{gguf.path}: {message}")
