"""Models of the hub, from a server on this machine: what is fetched, and what a user is told when it is not. B18, H6."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from convert_changes import config
from convert_variants import SMALL, split_into_shards
from gguf_builder import run_cli
from hub_server import REVISION, Hub, serve
from tiny_model import tiny_hf

from lfm2cpp.errors import CheckpointError
from lfm2cpp.gguf import read_gguf

ROOT = Path(__file__).parents[1]
HUB_ID = "LiquidAI/LFM2-Tiny"
TOKEN = "hf_verysecrettokenverysecrettoken"
NEEDED = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_hf(tmp_path_factory.mktemp("hub") / "tiny", **SMALL)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("pytorch_model.bin", "model.fp16.safetensors", "onnx_model.onnx", "LICENSE"):
        (path / name).write_bytes(b"not needed")
    return path


@pytest.fixture
def hub(directory: Path) -> Iterator[Hub]:
    with serve(HUB_ID, directory) as hub:
        yield hub


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def convert(hub: Hub, tmp_path: Path) -> Run:
    """`lfm2cpp convert` in a process of its own, because huggingface_hub reads its settings once."""
    (tmp_path / "out").mkdir()

    def run(*args: str, **settings: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        env.update(
            HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_TOKEN=TOKEN, HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1", NO_PROXY="*", HF_HUB_DISABLE_XET="1",
            PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        )  # fmt: skip
        env.update(settings)
        command = [sys.executable, "-m", "lfm2cpp", "convert", *args]
        result = subprocess.run(command, env=env, cwd=tmp_path / "out", capture_output=True, text=True, timeout=60)
        assert TOKEN not in result.stdout + result.stderr and "Traceback" not in result.stderr
        if result.returncode:
            assert not list((tmp_path / "out").iterdir()), result.stderr
            assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
        return result

    return run


def test_only_what_is_needed_is_fetched(hub, convert, tmp_path):
    result = convert(HUB_ID, "--outtype", "f16")
    assert result.returncode == 0, result.stderr
    assert sorted(hub.fetched) == sorted(NEEDED | {"model.safetensors"})
    assert hub.tokens == {f"Bearer {TOKEN}"}
    file = tmp_path / "out" / "LiquidAI-LFM2-Tiny-f16.gguf"
    assert result.stdout == f"{file.name}\n"
    with read_gguf(file) as gguf:
        assert gguf.metadata["general.name"].value == HUB_ID
        assert gguf.metadata["general.license"].value == "mit"


def test_the_cache_serves_without_network(hub, convert, tmp_path):  # H6
    assert convert(HUB_ID).returncode == 0
    requests = hub.requests
    for args, settings in ((["--offline"], {}), ([], {"HF_HUB_OFFLINE": "1"})):
        assert convert(HUB_ID, "--force", *args, **settings).returncode == 0
    assert hub.requests == requests
    snapshot = tmp_path / f"home/hub/models--LiquidAI--LFM2-Tiny/snapshots/{REVISION}"
    (tmp_path / "out" / "LiquidAI-LFM2-Tiny-bf16.gguf").unlink()
    result = convert(str(snapshot), "--outfile", "m.gguf")  # its files are links into the blobs
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("settings", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["flag", "environment"])
def test_offline_without_cache(hub, convert, settings):  # H6
    result = convert(HUB_ID, *([] if settings else ["--offline"]), **settings)
    assert result.returncode == 1 and "not complete in the local cache, and the network is off" in result.stderr
    assert hub.requests == 0


def test_model_name_wins_over_the_hub_id(convert, tmp_path):
    assert convert(HUB_ID, "--model-name", "Mine", "--outfile", "x-{FTYPE}.gguf").returncode == 0
    with read_gguf(tmp_path / "out" / "x-BF16.gguf") as gguf:
        assert gguf.metadata["general.name"].value == "Mine"


def test_shards(directory, tmp_path, hub, convert):
    sharded = tiny_hf(tmp_path / "sharded", **SMALL)
    split_into_shards(sharded, 2)
    hub.files = {path.name: path.read_bytes() for path in sharded.iterdir()}
    hub.files["model-00003-of-00002.safetensors"] = b"not in the index"
    assert convert(HUB_ID).returncode == 0
    weights = sorted(name for name in hub.fetched if name.endswith(".safetensors"))
    assert weights == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_vocabulary_costs_no_weights(hub, convert):
    assert convert(HUB_ID, "--vocab-only").returncode == 0
    assert set(hub.fetched) == NEEDED


def test_wrong_architecture_costs_no_weights(directory, tmp_path, hub, convert):
    other = tiny_hf(tmp_path / "other", **SMALL)
    config(architectures=["LlamaForCausalLM"])(other)
    hub.files["config.json"] = (other / "config.json").read_bytes()
    result = convert(HUB_ID)
    assert result.returncode == 1 and "LlamaForCausalLM; supported is" in result.stderr
    assert "model.safetensors" not in hub.fetched


def test_existing_output_costs_no_download(hub, convert, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"old")
    result = convert(HUB_ID, "--outfile", str(tmp_path / "m.gguf"))
    assert result.returncode == 1 and "exists already; use --force" in result.stderr
    assert hub.requests == 0 and (tmp_path / "m.gguf").read_bytes() == b"old"


STATUSES = {
    401: ({}, r"the token was not accepted \(401\); log in with 'hf auth login' or set HF_TOKEN anew"),
    403: ({}, r"access is forbidden \(403\)"),
    404: ({"X-Error-Code": "RepoNotFound"}, r"no such model \(404\) at http://127.* or it is private"),
    429: ({}, r"too many requests \(429\); wait some minutes"),
    503: ({}, r"127\.0\.0\.1:\d+ answered 503; try again later"),
}


@pytest.mark.parametrize("status", STATUSES)
def test_refusals(status, hub, convert):
    hub.trouble, (hub.headers, message) = status, STATUSES[status]
    result = convert(HUB_ID)
    assert result.returncode == 1 and re.search(message, result.stderr), result.stderr


def test_gated(hub, convert):
    hub.trouble, hub.headers = 403, {"X-Error-Code": "GatedRepo"}
    result = convert(HUB_ID)
    assert result.returncode == 1
    assert re.search(rf"gated \(403\): accept the licence at {hub.url}/{HUB_ID}, then log in", result.stderr), result.stderr


def test_gated_weights(hub, convert):
    """The small files of a gated model may be public."""
    hub.trouble, hub.headers = 403, {"X-Error-Code": "GatedRepo"}
    hub.trouble_at = f"/{HUB_ID}/resolve/{REVISION}/model.safetensors"
    result = convert(HUB_ID)
    assert result.returncode == 1 and "gated (403)" in result.stderr, result.stderr


def test_without_token(hub, convert):
    hub.trouble = 401
    result = convert(HUB_ID, HF_TOKEN="", HF_ENDPOINT=hub.url.replace("//", "//user:secret@"))
    assert "secret" not in result.stderr
    assert result.returncode == 1 and re.search(r"no such model \(401\).*or it is private", result.stderr), result.stderr


def test_no_answer(hub, convert):
    hub.trouble = "hang"
    started = time.monotonic()
    result = convert(HUB_ID)
    assert result.returncode == 1 and re.search(r"did not answer in time", result.stderr), result.stderr
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "endpoint, message",
    [
        ("http://127.0.0.1:9", r"the connection to 127\.0\.0\.1:9 failed"),
        ("http://user:secret@127.0.0.1:9", r"the connection to 127\.0\.0\.1:9 failed"),
        ("http://no.such.host.invalid", r"no\.such\.host\.invalid (cannot be resolved|failed)"),
    ],
)
def test_no_connection(endpoint, message, convert):
    result = convert(HUB_ID, HF_ENDPOINT=endpoint)
    assert result.returncode == 1 and re.search(message, result.stderr), result.stderr
    assert "secret@" not in result.stderr


@pytest.mark.parametrize("remote", [[], ["--remote"]], ids=["plain", "remote"])
@pytest.mark.parametrize("name", ["no-such-dir", "a/b/c", "./x", "../a", "/a/b", "a/.b", "a b/c", ""])
def test_what_is_no_hub_id_asks_nobody(name, remote, monkeypatch, capsys):
    monkeypatch.setattr("convert.hub.fetch_checkpoint", lambda *args, **kwargs: pytest.fail("asked the hub"))
    code, _, stderr = run_cli(monkeypatch, capsys, "convert", *remote, "--", name)
    assert code in (1, 2) and stderr.startswith("error: ") and stderr.count("\n") == 1


def test_remote_prefers_the_hub_to_a_directory(monkeypatch, capsys, tmp_path):
    asked = []

    def fetch(hub_id, *args, **kwargs):
        asked.append(hub_id)
        raise CheckpointError("enough")

    monkeypatch.setattr("convert.hub.fetch_checkpoint", fetch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert run_cli(monkeypatch, capsys, "convert", "org/name")[0] == 1 and not asked
    assert run_cli(monkeypatch, capsys, "convert", "--remote", "org/name")[0] == 1 and asked == ["org/name"]
