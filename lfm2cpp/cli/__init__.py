"""The `lfm2cpp` command: a click group that imports a command's module only when that command runs."""

from __future__ import annotations

from .group import main as main
