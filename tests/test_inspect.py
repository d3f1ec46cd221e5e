"""`lfm2cpp inspect`: what it tells about good, odd and broken files, for people and as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_builder import STRING, RawGGUF, RawTensor, run_cli, string
from tiny_model import CHAT_TEMPLATE, tiny_gguf

from lfm2cpp.summary import summarize

T = gguf.GGUFValueType
SHAPE: dict[str, Any] = {"n_layer": 3, "attention": (1,), "n_embd": 256, "n_ff": 512, "n_vocab": 320}


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *args: run_cli(monkeypatch, capsys, "inspect", *args)


def inspect_json(cli: Any, path: Path) -> dict[str, Any]:
    code, out, err = cli("--json", path)
    assert (code, err) == (0, "")
    return json.loads(out)


def test_people_get_eighty_columns(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    long = {"general.description": (T.STRING, "word " * 100), "general.list": (T.ARRAY, list(range(64)))}
    tiny_gguf("m.gguf", types={"token_embd": "Q6_K", ".": "Q4_0"}, metadata=long, **SHAPE)
    code, out, err = cli("m.gguf")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) < 80
    for expected in (
        "\n  architecture    lfm2: 3 layers, 1 of attention (1)\n",
        "\n  KV per token    f32 1.0 kB, f16 512 B, q8_0 272 B\n",
        "\n  conv state      4.1 kB per sequence\n",
        "\n  lfm2.block_count = 3\n",
        "\n  lfm2.attention.head_count_kv = 3 x INT32: 0 2 0\n",
        "\n  general.list = 64 x INT32: 0 1 2 3",
        "\n  blk.1.attn_k.weight              Q4_0      18.4 kB  128 x 256\n",
        "\n  token_embd.weight                Q6_K      67.2 kB  320 x 256\n",
        "\n  | {{ bos_token }}",
        "\nRuns: yes\n",
    ):
        assert expected in out


def test_json_has_everything(cli: Any, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", types={"token_embd": "Q6_K", ".": "Q4_0"}, **SHAPE)
    s = inspect_json(cli, path)
    assert s["file"] == {
        "path": str(path), "shards": 1, "nbytes": path.stat().st_size, "version": 3, "alignment": 32,
        "data_offset": gguf.GGUFReader(path).data_offset, "file_type": "F32",
    }  # fmt: skip
    assert s["refused"] is None and s["chat_refused"] is None and s["warnings"] == [] and s["non_finite"] is None
    assert s["metadata"]["lfm2.block_count"] == {"type": "UINT32", "value": 3}
    tokens = s["metadata"]["tokenizer.ggml.tokens"]
    assert (tokens["type"], tokens["length"], tokens["first"][1]) == ("ARRAY of STRING", 320, "<|startoftext|>")
    assert s["metadata"]["lfm2.attention.head_count_kv"] == {"type": "ARRAY of INT32", "length": 3, "value": [0, 2, 0]}
    assert s["model"]["architecture"] == "lfm2" and s["model"]["n_head_kv"] == [0, 2, 0]
    assert s["template"]["text"] == CHAT_TEMPLATE and len(s["template"]["sha256"]) == 64
    reader = gguf.GGUFReader(path)
    assert s["parameters"] == sum(int(t.n_elements) for t in reader.tensors)
    data_bytes = sum(int(t.n_bytes) for t in reader.tensors)
    assert s["bits_per_weight"] == pytest.approx(8 * data_bytes / s["parameters"])
    assert sum(t["nbytes"] for t in s["types"].values()) == data_bytes
    assert [(t["name"], t["offset"]) for t in s["tensors"]] == [(t.name, int(t.data_offset)) for t in reader.tensors]


def test_state_is_summed_over_the_layers(cli: Any, tmp_path: Path) -> None:
    """Tools that look at head_count_kv[0] alone say 0 bytes."""
    path = tiny_gguf(tmp_path / "m.gguf", n_layer=5, attention=(1, 2, 4), n_embd=256, n_ff=256, n_head_kv=1, l_cache=4)
    state = inspect_json(cli, path)["state"]
    assert state["attention_layers"] == [1, 2, 4] and state["conv_layers"] == [0, 3]
    assert state["kv_bytes_per_token"] == {"f32": 3 * 2 * 64 * 4, "f16": 3 * 2 * 64 * 2, "q8_0": 3 * 2 * 68}
    assert state["conv_state_bytes"] == 2 * 3 * 256 * 4


def test_a_refused_file_is_readable(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    raw = RawGGUF()
    raw.replace("general.architecture", STRING, string("llama"))
    path.write_bytes(raw.encode())
    code, out, err = cli(path)
    assert (code, err) == (0, "")
    assert "Runs: no: the architecture 'llama' is not supported; supported: lfm2" in " ".join(out.split())
    s = inspect_json(cli, path)
    assert s["refused"] == "the architecture 'llama' is not supported; supported: lfm2" and s["model"] is None


def test_a_bad_vocabulary_is_told_and_the_model_still_shown(cli: Any, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.pre": (T.STRING, "mystery")}, **SHAPE)
    s = inspect_json(cli, path)
    assert "tokenizer.ggml.pre is 'mystery'" in s["refused"] and s["model"]["n_layer"] == 3


def test_a_bad_template_is_told(cli: Any, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", metadata={"tokenizer.chat_template": (T.STRING, "{% for %}")}, **SHAPE)
    s = inspect_json(cli, path)
    assert s["refused"] is None and s["chat_refused"].startswith("the chat template is no Jinja: line 1")
    code, out, _ = cli(path)
    assert code == 0 and "\nRuns: yes\nChat: no: the chat template is no Jinja" in out


def test_warnings_are_shown(cli: Any, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", metadata={"lfm2.feed_forward_length": (T.UINT32, 768)}, **SHAPE)
    with path.open("ab") as f:
        f.write(b"garbage")
    out = " ".join(cli(path)[1].split())
    assert "Warning: 7 unused bytes after the end of the data" in out
    assert "Warning: lfm2.feed_forward_length is 768, but the tensors are 512 wide: using 512" in out


def test_template_alone(cli: Any, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", **SHAPE)
    assert cli("--template", path) == (0, CHAT_TEMPLATE, "") or cli("--template", path)[1].rstrip("\n") == CHAT_TEMPLATE
    path = tiny_gguf(tmp_path / "none.gguf", metadata={"tokenizer.chat_template": None}, **SHAPE)
    code, out, err = cli("--template", path)
    assert (code, out) == (1, "") and "none.gguf: holds no chat template" in err
    assert "Chat template" not in cli(path)[1]


def test_nothing_from_the_file_reaches_the_terminal_raw(cli: Any, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\r\u202e\x9b31m"
    raw = RawGGUF(tensors=[RawTensor("t\x1b[2J", [8])])
    raw.kv += [
        ("general.name\x1b", STRING, string(evil)),
        ("tokenizer.chat_template", STRING, string(evil + "\n" + evil)),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw.encode())
    code, out, _ = cli(path)
    assert code == 0
    assert all(c.isprintable() or c == "\n" for c in out)


def test_json_survives_nan_and_strange_file_types(cli: Any, tmp_path: Path) -> None:
    import struct

    raw = RawGGUF()
    raw.kv += [("x", 6, struct.pack("<f", float("nan"))), ("general.file_type", STRING, string("\x1b"))]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw.encode())
    code, out, _ = cli("--json", path)
    s = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert code == 0 and s["metadata"]["x"]["value"] == "nan" and s["file"]["file_type"] is None
    assert cli(path)[0] == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_stdout_encoding(encoding: str, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", metadata={"general.name": (T.STRING, "\u96ea \u00e9")}, **SHAPE)
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run([sys.executable, "-m", "lfm2cpp", "inspect", path], capture_output=True, env=env, check=True)
    assert b"general.name = " in run.stdout and run.stderr == b""
    if encoding == "ascii":
        assert b"general.name = \\u96ea \\xe9" in run.stdout


def test_vocabulary_without_a_model(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    path.write_bytes(RawGGUF(tensors=[]).header())
    code, out, _ = cli(path)
    assert code == 0 and "Tensors" not in out and "Runs: no: GGUF key 'lfm2.block_count' is missing" in out


def test_shards_are_counted(cli: Any, tmp_path: Path) -> None:
    from test_gguf_shards import write_shards

    code, out, _ = cli(write_shards(tmp_path)[0])
    assert code == 0 and ", 3 shards, GGUF version 3" in out


def test_usage(cli: Any, tmp_path: Path) -> None:
    assert cli()[0] == 2
    assert cli("--no-such-flag")[0] == 2
    assert cli(tmp_path / "missing.gguf")[0] == 1


def test_inspect_does_not_import_numba(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", **SHAPE)
    code = (
        "import sys, lfm2cpp.cli.inspect; from lfm2cpp.gguf import read_gguf; from lfm2cpp.summary import summarize\n"
        "summarize(read_gguf(sys.argv[1]), check_tensors=True); sys.exit('numba' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, cwd=Path(__file__).parent.parent)


def test_summary_needs_no_command_line(tmp_path: Path) -> None:
    from lfm2cpp.gguf import read_gguf

    with read_gguf(tiny_gguf(tmp_path / "m.gguf", **SHAPE)) as g:
        assert summarize(g)["refused"] is None
