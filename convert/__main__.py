"""python -m convert, the same as `lfm2cpp convert`."""

from __future__ import annotations

from .cli import main

main()
