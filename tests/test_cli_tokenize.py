"""`lfm2cpp tokenize`: ids and pieces from a file's vocabulary alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_process import Cli, modules_imported
from vocab_model import golden_gguf


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capfd)


@pytest.fixture(scope="module")
def vocab_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_gguf(tmp_path_factory.mktemp("vocab") / "vocab.gguf")


def test_tokenize_shows_ids_and_pieces(cli: Cli, vocab_only: Path) -> None:
    result = cli("tokenize", "-m", vocab_only, "Hé\n")
    lines = [line.split(" -> ") for line in result.out.splitlines()]
    assert lines[0] == ["     1", "'<|startoftext|>'"] and lines[-1][1] == r"'\n'"
    assert [line[1] for line in lines[1:-1]] == ["'H'", r"b'\xc3'", r"b'\xa9'"] or "'é'" in [line[1] for line in lines]


@pytest.mark.parametrize(
    ("arguments", "stdin", "ids"),
    [
        (["hi", "--ids"], b"", [1, 85, 86]),
        (["hi", "--ids", "--no-bos"], b"", [85, 86]),
        (["--ids", "--no-bos"], b"hi", [85, 86]),
        (["-", "--ids", "--no-bos"], b"hi", [85, 86]),
        (["--stdin", "--ids", "--no-bos"], b"hi", [85, 86]),
        (["-p", "hi", "--ids", "--no-bos"], b"", [85, 86]),
        (["", "--ids"], b"", [1]),
        (["--ids"], b"", [1]),
        (["<|im_end|>", "--ids", "--parse-special"], b"", [1, 7]),
        (["<|startoftext|>hi", "--ids", "--parse-special"], b"", [1, 85, 86]),
    ],
)
def test_tokenize_ids(cli: Cli, vocab_only: Path, arguments: list[str], stdin: bytes, ids: list[int]) -> None:
    result = cli("tokenize", "-m", vocab_only, *arguments, stdin=stdin)
    assert result.code == 0 and json.loads(result.out) == ids


def test_tokenize_json_and_files(cli: Cli, vocab_only: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("hi\n")
    result = json.loads(cli("tokenize", "-m", vocab_only, "-f", tmp_path / "t.txt", "--json", "--no-bos").out)
    assert result["n_tokens"] == len(result["ids"]) == 3 and "".join(result["pieces"]) == "hi\n"
    assert cli("tokenize", "-m", vocab_only, "hi", "--show-count").out.endswith("Total number of tokens: 3\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a", "-p", "b"], 2, "give one text"),
        (["-f", "/nowhere"], 1, "is missing"),
        (["a", "b"], 2, "Got unexpected extra argument"),
        (["a", "-m", "/nowhere.gguf"], 1, "No such file"),
    ],
)
def test_tokenize_refuses(cli: Cli, vocab_only: Path, arguments: list[str], code: int, message: str) -> None:
    result = cli("tokenize", "-m", vocab_only, *arguments)
    assert result.code == code and message in result.err


def test_tokenize_needs_no_engine(vocab_only: Path) -> None:
    names = "numba llvmlite jinja2 huggingface_hub"
    lines, heavy = modules_imported(names, "tokenize", "-m", vocab_only, "hi", "--ids")
    assert (lines, heavy) == (["[1, 85, 86]"], [])
