"""The fixtures of the tests of `convert`: a small checkpoint, a copy of it to spoil, and the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from convert_variants import SMALL
from gguf_builder import run_cli
from tiny_model import tiny_hf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf(tmp_path_factory.mktemp("source") / "tiny", **SMALL)


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "tiny"))


@pytest.fixture
def convert(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Run `lfm2cpp convert CHECKPOINT --outfile out/m.gguf ARGS`; the output folder is watched for leftovers."""
    out = tmp_path / "out"
    out.mkdir()

    def run(source: Path, *args: str) -> tuple[int, str, str]:
        code, stdout, stderr = run_cli(monkeypatch, capsys, "convert", source, "--outfile", out / "m.gguf", *args)
        if code:
            assert not list(out.iterdir())
            assert stdout == "" and "Traceback" not in stderr
            errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and stderr.endswith(errors[0] + "\n")
        else:
            assert [p.name for p in out.iterdir()] == ["m.gguf"] and stdout == f"{out / 'm.gguf'}\n"
        return code, stdout, stderr

    return run
