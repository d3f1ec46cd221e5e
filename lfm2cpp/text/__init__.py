"""Text on its way to the engine and back: vocabulary, chat template, incremental decoding. Knows no arrays."""

from __future__ import annotations
