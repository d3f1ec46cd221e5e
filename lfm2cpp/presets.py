"""Recommended sampling settings per model: the file's own `general.sampling.*`, else Liquid's published table."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import LFM2Error, ModelFormatError
from .gguf.values import INTEGER_TYPES, ValueType
from .sampling import SamplingParams

if TYPE_CHECKING:
    from .gguf.reader import GGUFFile

_V1 = SamplingParams(temp=0.3, top_k=0, min_p=0.15, repeat_penalty=1.05)
_V25 = SamplingParams(temp=0.1, top_k=50, min_p=0.0, repeat_penalty=1.05)

# Model cards, in order: the first pattern found in the name (lower case, dashes for blanks) decides.
PRESETS: tuple[tuple[str, SamplingParams], ...] = (
    (r"extract", replace(_V1, temp=0.0, min_p=0.0, repeat_penalty=1.0)),
    (r"-vl\b", replace(_V1, temp=0.1)),
    (r"lfm2\.5.*8b-a1b", replace(_V25, temp=0.2, top_k=80)),
    (r"lfm2\.5.*thinking", replace(_V25, temp=0.05)),
    (r"lfm2\.5.*jp-202606", _V25),
    (r"lfm2\.5.*-(base|jp)\b", _V1),
    (r"lfm2\.5", _V25),
    (r"", _V1),
)

# GGUF key -> field of SamplingParams.
_KEYS = {
    "general.sampling.temp": "temp",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repeat_penalty",
    "general.sampling.penalty_last_n": "repeat_last_n",
}


def recommended_sampling(gguf: GGUFFile) -> SamplingParams:
    """The settings this model should be used with when nobody says otherwise.

    Raises ModelFormatError when a `general.sampling.*` key has a value that no sampler could use.
    """
    names = [gguf.get(f"general.{key}", ValueType.STRING, "") for key in ("name", "basename", "finetune")]
    preset = preset_for(" ".join(names))
    found: dict[str, Any] = {}
    for key, field in _KEYS.items():
        value = gguf.get(key, (*INTEGER_TYPES, ValueType.FLOAT32, ValueType.FLOAT64), None)
        if value is not None:
            found[field] = _tidy(value)
            try:
                replace(preset, **{field: found[field]})
            except LFM2Error as error:
                raise ModelFormatError(f"{gguf.path}: GGUF key {key!r}: {error}") from None
    return replace(preset, **found)


def preset_for(name: str) -> SamplingParams:
    """Liquid's recommendation for a model of this name, or for the LFM2 text models when it says nothing."""
    name = re.sub(r"[\s_-]+", "-", name.lower())
    return next(preset for pattern, preset in PRESETS if re.search(pattern, name))


def _tidy(value: float) -> float:
    """0.15 rather than 0.15000000596046448, which is how a float32 of the file reads."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
