"""The command itself: where the file goes, what is printed, what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from convert_variants import SMALL
from gguf_builder import run_cli
from tiny_model import TinyShape, hf_config, tiny_hf, tokenizer_json

from convert.hf_to_gguf import fill_template
from lfm2cpp.arch import iter_tensors, lfm2
from lfm2cpp.gguf import read_gguf

ROOT = Path(__file__).parents[1]
MAX_PEAK_MB = 160  # Python, NumPy, the tokenizers library and some buffers take about 80


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_hf(tmp_path / "LFM2-Small", **SMALL)


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *args: run_cli(monkeypatch, capsys, "convert", *args)


def listing(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_default_name_is_in_the_model_directory(checkpoint, run):
    code, stdout, stderr = run(checkpoint)
    assert (code, stdout) == (0, f"{checkpoint / 'LFM2-Small-BF16.gguf'}\n")
    assert stderr.splitlines()[-1].startswith("wrote 253.4 kB: 29 tensors (18 BF16, 11 F32) in ")


def test_template_in_the_name(checkpoint, run, tmp_path):
    assert run(checkpoint, "--outfile", tmp_path / "a-{ftype}-{FTYPE}.gguf", "--outtype", "f16")[0] == 0
    assert (tmp_path / "a-f16-F16.gguf").exists()


@pytest.mark.parametrize(
    "template, name",
    [("{ftype}", "q8_0"), ("{OUTTYPE}.{outtype}", "Q8_0.q8_0"), ("{}", "q8_0"), ("{ftype.__class__}", "{ftype.__class__}")],
)
def test_templates_are_no_format_strings(template, name):
    assert fill_template(template, "q8_0") == name


def test_dry_run_writes_nothing_and_tells_the_size(checkpoint, run, tmp_path):
    before = listing(tmp_path)
    code, stdout, stderr = run(checkpoint, "--dry-run", "--outfile", tmp_path / "m.gguf")
    assert code == 0 and stdout == f"{tmp_path / 'm.gguf'}\n" and stderr.startswith("would write")
    assert listing(tmp_path) == before
    code, stdout, told = run(checkpoint, "--outfile", tmp_path / "m.gguf")
    assert told.splitlines()[-1].split(" in ")[0].replace("wrote", "would write") == stderr.strip()


def test_dry_run_of_a_block_type_loads_no_kernels(checkpoint, tmp_path):
    code = (
        "import sys; from pathlib import Path; from convert.hf_to_gguf import *\n"
        "result = convert_hf_to_gguf(sys.argv[1], ConvertOptions(outtype=sys.argv[2], dry_run=True))\n"
        "result = convert_hf_to_gguf(sys.argv[1], ConvertOptions(outtype='bf16', outfile=Path(sys.argv[3])))\n"
        "loaded = {'numba', 'llvmlite', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    for outtype in ("q4_0", "q8_0"):
        out = tmp_path / f"{outtype}.gguf"
        subprocess.run([sys.executable, "-c", code, checkpoint, outtype, out], check=True, cwd=ROOT, capture_output=True)
        assert out.exists()


def test_vocab_only_needs_no_weights(checkpoint, run, tmp_path):
    with_weights = tmp_path / "with.gguf"
    assert run(checkpoint, "--vocab-only", "--outtype", "bf16", "--outfile", with_weights)[0] == 0
    (checkpoint / "model.safetensors").unlink()
    assert run(checkpoint, "--vocab-only", "--outtype", "bf16", "--outfile", tmp_path / "without.gguf")[0] == 0
    assert with_weights.read_bytes() == (tmp_path / "without.gguf").read_bytes()
    with read_gguf(with_weights) as gguf:
        assert not gguf.tensors and gguf.metadata["tokenizer.ggml.tokens"].value


def test_verbose_lists_everything(checkpoint, run):
    _, _, stderr = run(checkpoint, "--verbose", "--dry-run")
    assert "lfm2.attention.head_count_kv = ARRAY of INT32 [0, 2, 0]" in stderr
    assert "blk.0.shortconv.conv.weight          BF16 -> F32  64 x 3" in stderr


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--outfile", "-"], 2, "'-' is not supported"),
        (["--outfile", "no/such/dir/m.gguf"], 1, "does not exist; create it first"),
        (["--outfile", "LFM2-Small/model.safetensors"], 1, "exists already; use --force"),
        (["--outfile", "LFM2-Small/model.safetensors", "--force"], 2, "is the input itself"),
        (["--outfile", "linked.safetensors", "--force"], 2, "is the input itself"),
        (["--outtype", "q2_k"], 2, "q2_k"),
        (["--metadata", "no-such-file"], 2, "no-such-file"),
        (["--metadata", "LFM2-Small"], 2, "directory"),
        (["--metadata", "list.json"], 1, "expected an object"),
        (["--force-pre", "llama3"], 2, "llama3"),
        (["more"], 2, "unexpected extra argument"),
    ],
)
def test_refused(args, code, message, checkpoint, run, tmp_path, monkeypatch):  # C1, C2, C3, C16
    monkeypatch.chdir(tmp_path)
    os.link(checkpoint / "model.safetensors", tmp_path / "linked.safetensors")
    (tmp_path / "list.json").write_text("[]")
    before = listing(tmp_path)
    found, stdout, stderr = run("LFM2-Small", *args)
    assert found == code and message in stderr and stdout == ""
    assert listing(tmp_path) == before


def test_devnull(checkpoint, run):  # C16
    assert run(checkpoint, "--outfile", "/dev/null")[0] == 0


def test_name_of_a_dot(checkpoint, run, monkeypatch, tmp_path):
    monkeypatch.chdir(checkpoint)
    assert run(".", "--outfile", tmp_path / "m.gguf")[0] == 0
    with read_gguf(tmp_path / "m.gguf") as gguf:
        assert gguf.metadata["general.name"].value == "LFM2 Small"


@pytest.mark.parametrize("name", ["with space", "caf\u00e9-\u65e5\u672c", "-leading"])
def test_awkward_paths(name, run, tmp_path, monkeypatch):  # A31
    monkeypatch.chdir(tmp_path)
    tiny_hf(tmp_path / name, **SMALL)
    assert run("--outfile", f"{name}.gguf", "--", name)[0] == 0
    assert (tmp_path / f"{name}.gguf").exists()


def test_unknown_override_is_told(checkpoint, run, tmp_path):
    (tmp_path / "o.json").write_text(json.dumps({"general.license": "mit", "lfm2.block_count": 7, "general.author": "Me"}))
    code, stdout, stderr = run(checkpoint, "--metadata", tmp_path / "o.json", "--dry-run", "--verbose")
    assert code == 0 and stderr.count("is not one that --metadata can set") == 2
    assert "general.author = STRING 'Me'" in stderr and "lfm2.block_count = UINT32 3" in stderr


@pytest.mark.parametrize("value", ["hot", float("inf"), 1e40, [1], {"a": 1}])
def test_impossible_sampling(value, checkpoint, run, tmp_path):
    (tmp_path / "o.json").write_text(json.dumps({"general.sampling.temp": value}))
    code, _, stderr = run(checkpoint, "--metadata", tmp_path / "o.json", "--dry-run")
    assert code == 1 and stderr.count("\n") == 1


def test_memory_does_not_grow_with_the_model(tmp_path):
    """A 300 MB checkpoint of zeros: an implementation that mapped or held tensors would show them."""
    shape = TinyShape(n_embd=2048, n_layer=4, attention=(1,), n_head=32, n_head_kv=8, n_ff=8192, n_vocab=4096, n_pad=100)
    source = tmp_path / "zeros"
    source.mkdir()
    header, end = {}, 0
    for entry in iter_tensors(lfm2, shape.hparams()):
        if not entry.spec.optional:
            dims = list(entry.shape) if not entry.name.endswith("shortconv.conv.weight") else [entry.shape[0], 1, 3]
            nbytes = 2 * entry.shape[0] * (entry.shape[1] if len(entry.shape) > 1 else 1)
            header[entry.hf_name] = {"dtype": "BF16", "shape": dims, "data_offsets": [end, end + nbytes]}
            end += nbytes
    assert end > 300_000_000
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # a hole: takes no room
    (source / "config.json").write_text(json.dumps(hf_config(shape)))
    (source / "tokenizer.json").write_text(json.dumps(tokenizer_json(TinyShape())))
    (source / "tokenizer_config.json").write_text("{}")
    code = (
        "import resource, sys; sys.argv[0] = 'convert'\n"
        "from convert.cli import convert; convert.main(standalone_mode=False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    # A process in between, because a child's peak begins with that of the process it was forked from.
    between = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    command = [sys.executable, "-c", between, sys.executable, "-c", code, source, "--outfile", os.devnull]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    peak = int(out.splitlines()[-1]) / (1024 if sys.platform != "darwin" else 1 << 20)
    assert 20 < peak < MAX_PEAK_MB


def test_help_names_every_option(run):
    _, stdout, _ = run("--help")
    for option in (
        "outfile", "outtype", "vocab-only", "dry-run", "model-name", "metadata", "force", "verbose", "offline", "remote",
        "allow-f16-overflow", "force-pre",
    ):  # fmt: skip
        assert f"--{option}" in stdout
