"""config.json, in any of its spellings -> hyper-parameters.

Sizes that the checkpoint cannot do without must be there: the defaults of transformers' Lfm2Config match no model
that was ever published. The FFN width is written in three ways, so what the tensors say wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lfm2cpp.arch import lfm2
from lfm2cpp.errors import CheckpointError

from .shown import shown, some

SUPPORTED = ("Lfm2ForCausalLM", "LFM2ForCausalLM")
MAX_LAYERS = 1024
# The defaults of Lfm2Config that transformers and llama.cpp both apply; taking one is worth a word.
DEFAULTS = {"max_position_embeddings": 128000, "norm_eps": 1e-5, "rope_theta": 1e6}

Note = Callable[[str], None]


@dataclass(frozen=True)
class CheckpointConfig:
    """What config.json says about the model, before the tensors have been asked."""

    hparams: lfm2.HParams  # n_ff as the config gives it
    tied: bool
    head_dim: int | None  # None when the config does not name it
    file: str


def check_architecture(config: Mapping[str, Any], file: str) -> None:
    """Refuse anything that is not one dense LFM2 text model."""
    found = config.get("architectures")
    if isinstance(found, list) and len(found) == 1 and found[0] in SUPPORTED:
        return
    names = some(found) if isinstance(found, list) and found else shown(found or "none")
    raise CheckpointError(f"{file}: architectures is {names}; supported is exactly one of: {', '.join(SUPPORTED)}")


def read_config(config: Mapping[str, Any], file: str, note: Note) -> CheckpointConfig:
    """The hyper-parameters in `config`. Raises CheckpointError naming the key, its value and what was expected."""
    check_architecture(config, file)
    for nested in ("text_config", "lfm"):
        if isinstance(config.get(nested), dict):
            config = {**config, **config[nested]}
    get = _Getter(config, file, note)
    _refuse_unsupported(get)
    n_layer = get.size("num_hidden_layers", most=MAX_LAYERS)
    n_embd = get.size("hidden_size")
    n_head = get.size("num_attention_heads", "num_heads")
    n_kv = get.size("num_key_value_heads")
    if n_embd % n_head or n_head % n_kv or (n_embd // n_head) % 2:
        raise CheckpointError(
            f"{file}: hidden_size {n_embd}, num_attention_heads {n_head} and num_key_value_heads {n_kv} do not fit: "
            "the first must be an even multiple of the second, and that a multiple of the third"
        )
    kinds = _layer_kinds(get, n_layer)
    head_dim = get.optional("head_dim")
    if head_dim not in (None, n_embd // n_head):
        raise CheckpointError(f"{file}: head_dim is {head_dim!r}, expected hidden_size / heads = {n_embd // n_head}")
    hparams = lfm2.HParams(
        n_vocab=get.size("vocab_size"),
        n_ctx_train=get.size("max_position_embeddings", default=True),
        n_embd=n_embd, n_layer=n_layer, n_ff=ffn_width(get), n_head=n_head,
        n_head_kv=tuple(n_kv if kind == "full_attention" else 0 for kind in kinds),
        l_cache=get.size("conv_L_cache", fallback=3),
        norm_rms_eps=get.positive("norm_eps", "block_norm_eps"),
        rope_freq_base=_rope_theta(get),
    )  # fmt: skip
    return CheckpointConfig(hparams, _tied(get), head_dim, file)


class _Getter:
    """Typed access to config keys by any of their spellings; null counts as absent."""

    def __init__(self, config: Mapping[str, Any], file: str, note: Note) -> None:
        self.config = config
        self.file = file
        self.note = note

    def optional(self, *keys: str) -> Any:
        """The value of the first of `keys` that is there, or None."""
        return next((self.config[key] for key in keys if self.config.get(key) is not None), None)

    def size(self, *keys: str, most: int = 2**31 - 1, default: bool = False, fallback: int | None = None) -> int:
        value = self._value(keys, default, fallback)
        if type(value) is not int or not 1 <= value <= most:
            raise self.wrong(keys[0], value, f"an integer in 1..{most}")
        return value

    def positive(self, *keys: str) -> float:
        value = self._value(keys, True, None)
        if type(value) not in (int, float) or not 0 < value < 3e38 or not math.isfinite(value):
            raise self.wrong(keys[0], value, "a positive number")
        return float(value)

    def flag(self, key: str, fallback: bool) -> bool:
        value = self.optional(key)
        if value is None:
            return fallback
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def _value(self, keys: tuple[str, ...], default: bool, fallback: Any) -> Any:
        value = self.optional(*keys)
        if value is not None:
            return value
        if fallback is not None:
            return fallback
        if not default:
            raise CheckpointError(f"{self.file}: has no {' or '.join(keys)}; is it the config of the model itself?")
        self.note(f"{self.file} has no {' or '.join(keys)}: taking LFM2's default {DEFAULTS[keys[0]]}")
        return DEFAULTS[keys[0]]

    def wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {key} is {shown(value)}, expected {expected}")


def _refuse_unsupported(get: _Getter) -> None:
    """Settings that change the computation in ways that no LFM2 model has."""
    if get.optional("quantization_config"):
        raise CheckpointError(f"{get.file}: the checkpoint is quantized (quantization_config); get the original")
    if get.flag("conv_bias", False):
        raise get.wrong("conv_bias", True, "false: LFM2 models have no biases")
    if not get.flag("is_causal", True):
        raise get.wrong("is_causal", False, "true: bidirectional models are not supported")
    if not get.flag("block_use_swiglu", True):
        raise get.wrong("block_use_swiglu", False, "true")


def _layer_kinds(get: _Getter, n_layer: int) -> list[str]:
    kinds = get.optional("layer_types")
    if kinds is None:
        return _kinds_of_indices(get, n_layer)
    if not isinstance(kinds, list) or len(kinds) != n_layer:
        n = len(kinds) if isinstance(kinds, list) else "no list"
        raise CheckpointError(f"{get.file}: layer_types has {n} entries, num_hidden_layers is {n_layer}")
    if unknown := sorted({str(kind) for kind in kinds if kind not in ("conv", "full_attention")}):
        raise CheckpointError(
            f"{get.file}: layer_types has unknown kinds {some(unknown)}; known are conv and full_attention"
        )
    return kinds


def _kinds_of_indices(get: _Getter, n_layer: int) -> list[str]:
    """The old spelling. With neither, transformers would make every layer attention: surely not what was meant."""
    indices = get.optional("full_attn_idxs")
    if indices is None:
        raise CheckpointError(f"{get.file}: has neither layer_types nor full_attn_idxs, so the layer kinds are unknown")
    if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < n_layer for i in indices):
        raise get.wrong("full_attn_idxs", indices, f"a list of layer numbers below {n_layer}")
    return ["full_attention" if il in indices else "conv" for il in range(n_layer)]


def ffn_width(get: _Getter) -> int:
    """The FFN width that the config means: `block_ff_dim` before `intermediate_size`, adjusted when it says so."""
    width = get.size("block_ff_dim", "intermediate_size")
    multiple = get.size("block_multiple_of", fallback=256)
    multiplier = get.config.get("block_ffn_dim_multiplier", 1.0)
    if multiplier is not None and (type(multiplier) not in (int, float) or not 0 < multiplier < 1e6):
        raise get.wrong("block_ffn_dim_multiplier", multiplier, "a positive number or null")
    if not get.flag("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    if multiplier is not None:
        width = int(multiplier * width)
        width = multiple * ((width + multiple - 1) // multiple)
    return max(width, 1)


def _rope_theta(get: _Getter) -> float:
    rope = get.optional("rope_parameters", "rope_scaling")
    if rope is None:
        return get.positive("rope_theta")
    if not isinstance(rope, dict):
        raise get.wrong("rope_parameters", rope, "an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", None):
        raise get.wrong("rope_type", kind, "default: scaled RoPE is not supported")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise get.wrong("partial_rotary_factor", rope["partial_rotary_factor"], "1")
    if rope.get("rope_theta") is None:
        return get.positive("rope_theta")
    return _Getter(rope, get.file, get.note).positive("rope_theta")


def _tied(get: _Getter) -> bool:
    key = "tie_embedding" if get.optional("tie_embedding") is not None else "tie_word_embeddings"
    return get.flag(key, True)
