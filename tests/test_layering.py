"""The house is easy to see: imports point from commands down to facts, and a command's --help imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room may import from rooms of a lower level, and from itself.
LEVELS = {
    "lfm2cpp.errors": 0, "lfm2cpp.ggml": 0, "lfm2cpp.signals": 0, "lfm2cpp.threads": 0,
    "lfm2cpp.terminal": 1, "lfm2cpp.output_file": 1, "lfm2cpp.files": 2,
    "lfm2cpp.gguf": 3, "lfm2cpp.arch": 4,
    "lfm2cpp.kernels": 1,
    "lfm2cpp.engine": 5,
    "lfm2cpp.text": 5, "lfm2cpp.sampling": 5, "lfm2cpp.lookup": 5, "lfm2cpp.presets": 6, "lfm2cpp.reference": 5, "lfm2cpp.summary": 6,
    "lfm2cpp.hub": 5, "lfm2cpp.corpus": 5, "lfm2cpp.importance": 6, "lfm2cpp.perplexity": 6,
    "lfm2cpp.generate": 6, "lfm2cpp.many": 7, "lfm2cpp.worker": 7, "lfm2cpp.openai_shapes": 8, "lfm2cpp.batch_file": 9, "lfm2cpp.session": 8, "lfm2cpp.llm": 9,
    "quant": 6, "convert": 7,
    "lfm2cpp.benchmark": 10, "lfm2cpp.parity": 10, "lfm2cpp.demo": 10,
    "lfm2cpp.cli": 11, "lfm2cpp.__main__": 12, "lfm2cpp": 0,
}  # fmt: skip


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] != "lfm2cpp":
        return parts[0]
    return ".".join(parts[:2]) if ".".join(parts[:2]) in LEVELS else "lfm2cpp"


def modules() -> list[Path]:
    return [p for top in ("lfm2cpp", "convert", "quant") for p in (ROOT / top).rglob("*.py")]


def imports_of(path: Path) -> set[str]:
    """Absolute names of what a file imports from this project; TYPE_CHECKING blocks do not count."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            found.add(".".join(base + ([node.module] if node.module else [])))
            found.update(".".join(base + ([node.module] if node.module else []) + [a.name]) for a in node.names)
    return {name for name in found if name.split(".")[0] in ("lfm2cpp", "convert", "quant")}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    here = room_of(module)
    if here == "lfm2cpp":
        return  # the package's own __init__ only offers LLM lazily
    assert here in LEVELS, f"{here} is a new room: give it a level"
    for name in imports_of(path):
        there = room_of(name)
        if there in (here, "lfm2cpp"):
            continue
        commands = here in ("convert", "quant") and path.stem in ("cli", "__main__") and there == "lfm2cpp.cli"
        assert commands or LEVELS[there] < LEVELS[here], f"{module} imports {name}, which is not below it"


def test_no_file_grows_past_the_budget() -> None:
    long = {str(p.relative_to(ROOT)): n for p in modules() if (n := len(p.read_text().splitlines())) > 400}
    assert not long


LIGHT_COMMANDS = [["--help"], ["--version"], ["inspect", "--help"], ["convert", "--help"], ["tokenize", "--help"],
                  ["run", "--help"], ["quantize", "--help"]]  # fmt: skip


@pytest.mark.parametrize("args", LIGHT_COMMANDS, ids=" ".join)
def test_help_does_not_import_numba(args: list[str]) -> None:
    code = (
        "import sys; from lfm2cpp.cli import main\n"
        f"sys.argv = ['lfm2cpp', *{args!r}]\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'numba', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_help_answers_at_once() -> None:
    """0.2 s is the promise; a busy machine gets three tries."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lfm2cpp", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.2, times
