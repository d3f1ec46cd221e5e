"""Models of the hub, against a hub on this machine: which file, the cache, and every way to fail (H5, H6, B18)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bigram_model import bigram_gguf
from hub_server import Hub, serve

from lfm2cpp.errors import LFM2Error, UsageError
from lfm2cpp.hub import choose, download, parse_hub_id

ROOT = Path(__file__).parents[1]
REPO = "Tiny/LFM2-Hello-GGUF"


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("user/repo", ("user/repo", None)),
        ("user/repo.v2-x:Q4_0", ("user/repo.v2-x", "Q4_0")),
        ("repo", None),
        ("a/b/c", None),
        ("a/b:", None),
        ("./a", None),
        ("a b/c", None),
        ("", None),
    ],
)
def test_hub_ids(name: str, parsed: Any) -> None:
    assert parse_hub_id(name) == parsed


FILES = ["README.md", "m-F16.gguf", "m-Q4_0.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-m-F16.gguf"]
SHARDS = ["big-Q8_0-00002-of-00002.gguf", "big-Q8_0-00001-of-00002.gguf"]


@pytest.mark.parametrize(
    ("files", "filename", "quant", "chosen"),
    [
        (FILES, None, None, "m-Q4_0.gguf"),
        (FILES, None, "q8_0", "m-Q8_0.gguf"),
        (FILES, None, "Q4_K_M", "m-Q4_K_M.gguf"),
        (FILES, "*F16*", None, "m-F16.gguf"),
        (FILES, "m-Q8_0.gguf", None, "m-Q8_0.gguf"),
        (["sub/x-Q8_0.gguf"], "x-*.gguf", None, "sub/x-Q8_0.gguf"),
        (["a.gguf", "b.gguf"], None, None, "a.gguf"),
        (SHARDS, None, "Q8_0", SHARDS[1]),
    ],
)
def test_which_file(files: list[str], filename: str | None, quant: str | None, chosen: str) -> None:
    assert choose("u/r", files, filename, quant) == chosen


@pytest.mark.parametrize(
    ("files", "filename", "quant", "message"),
    [
        (FILES, "*.gguf", None, "4 files match '*.gguf'; there are: m-F16.gguf, m-Q4_0.gguf"),
        (FILES, None, "Q5_0", "no file matches 'Q5_0'; there are: m-F16.gguf"),
        (FILES, "../*", None, "no file matches"),
        (["README.md"], None, None, "no GGUF file at all"),
        (["x-Q4_0.gguf", "y-Q4_0.gguf"], None, None, "2 files match"),
    ],
)
def test_no_one_file(files: list[str], filename: str | None, quant: str | None, message: str) -> None:
    with pytest.raises(LFM2Error) as caught:
        choose("u/r", files, filename, quant)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("repo", ["", "x", "../../etc", "a/b/c", "https://x/y", "a b/c"])
def test_names_that_are_no_repository(repo: str) -> None:
    with pytest.raises(UsageError, match="is no hub id"):
        download(repo)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    directory = tmp_path / "repo"
    directory.mkdir()
    data = bigram_gguf(tmp_path / "hello.gguf", ["H", "i", "<|im_end|>"]).read_bytes()
    for name in ("hello-Q4_0.gguf", "hello-Q8_0.gguf"):
        (directory / name).write_bytes(data)
    (directory / "README.md").write_text("# x")
    with serve(REPO, directory) as hub:
        yield hub


class Outside:
    """Runs code in a process whose hub is ours and whose cache is empty."""

    def __init__(self, url: str, home: Path) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        self.env = {
            **env, "HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_secret",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1", "NO_PROXY": "*",
        }  # fmt: skip

    def __call__(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command], env={**self.env, **env}, capture_output=True, text=True, timeout=60, check=False
        )

    def lfm2cpp(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self("-m", "lfm2cpp", *arguments, **env)


@pytest.fixture
def outside(hub: Hub, tmp_path: Path) -> Outside:
    return Outside(hub.url, tmp_path / "home")


def test_a_model_is_downloaded_once_and_runs(hub: Hub, outside: Outside) -> None:
    first = outside.lfm2cpp("run", "-hf", f"{REPO}:q8_0", "-p", "x")
    assert (first.returncode, first.stdout) == (0, "Hi\n"), first.stderr
    assert hub.fetched == ["hello-Q8_0.gguf"]
    hub.requests = 0
    for arguments, env in ((["--offline"], {}), ([], {"HF_HUB_OFFLINE": "1"})):
        again = outside.lfm2cpp("run", "-hf", f"{REPO}:Q8_0", "-p", "x", *arguments, **env)
        assert (again.returncode, again.stdout) == (0, "Hi\n"), again.stderr
    assert hub.requests == 0


def test_from_pretrained_and_hub_names(hub: Hub, outside: Outside) -> None:
    code = f"""
from lfm2cpp import LLM
with LLM.from_pretrained({REPO!r}, "*Q8_0.gguf", n_ctx=256) as llm:
    print(llm.chat("x").text, llm.n_ctx(), llm.path.name)
with LLM({REPO + ":Q4_0"!r}) as llm:
    print(llm.chat("x").text, llm.path.name)
try:
    LLM.from_pretrained({REPO!r}, "*.gguf")
except Exception as error:
    print(error)
"""
    result = outside("-c", code)
    assert result.stdout.splitlines() == [
        "Hi 256 hello-Q8_0.gguf",
        "Hi hello-Q4_0.gguf",
        f"{REPO}: 2 files match '*.gguf'; there are: hello-Q4_0.gguf, hello-Q8_0.gguf",
    ], result.stderr


@pytest.mark.parametrize(
    ("repo", "status", "message"),
    [
        ("Nobody/Nothing", None, "no such model (404)"),
        (REPO, 401, "the token was not accepted (401)"),
        (REPO, 403, "access is forbidden (403)"),
        (REPO, 429, "too many requests (429)"),
        (REPO, 500, "answered 500; try again later"),
    ],
)
def test_failures_are_one_line_with_a_remedy(
    hub: Hub, outside: Outside, repo: str, status: int | None, message: str
) -> None:
    hub.trouble = status
    result = outside.lfm2cpp("run", "-hf", repo, "-p", "x")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.stderr and "hf_secret" not in result.stderr


def test_no_hub_and_no_cache(tmp_path: Path) -> None:
    outside = Outside("http://127.0.0.1:9", tmp_path)
    for arguments, message in (([], "connection to 127.0.0.1:9 failed"), (["--offline"], "not complete in the local")):
        started = time.monotonic()
        result = outside.lfm2cpp("run", "-hf", REPO, "-p", "x", *arguments)
        assert result.returncode == 1 and result.stdout == "" and message in result.stderr
        assert time.monotonic() - started < 10


def test_a_missing_file_of_a_local_name_is_not_looked_for_on_the_hub(hub: Hub, outside: Outside) -> None:
    code = "from lfm2cpp import LLM\ntry: LLM('models/m.gguf')\nexcept Exception as error: print(error)"
    result = outside("-c", code)
    assert "No such file" in result.stdout and hub.requests == 0
