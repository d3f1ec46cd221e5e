"""The wheel holds our three packages and nothing else at its top level; its data comes along."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that nothing is left behind here."""
    source = tmp_path_factory.mktemp("source") / "tree"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_top_level_names(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"lfm2cpp", "convert", "quant"}


def test_every_module_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    inside = set(wheel.namelist())
    ours = {
        str(p.relative_to(ROOT)) for top in ("lfm2cpp", "convert", "quant") for p in (ROOT / top).rglob("*.py")
    }
    assert not ours - inside


def test_the_demonstration_model_comes_along(wheel: zipfile.ZipFile) -> None:
    names = {Path(n).name for n in wheel.namelist() if n.startswith("lfm2cpp/demo/model/")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names


def test_the_core_needs_no_torch(wheel: zipfile.ZipFile) -> None:
    name = next(n for n in wheel.namelist() if n.endswith("METADATA"))
    required = [line for line in wheel.read(name).decode().splitlines() if line.startswith("Requires-Dist")]
    core = [line for line in required if "extra ==" not in line]
    assert core and not any("torch" in line or "transformers" in line for line in core)
