"""`lfm2cpp parity`: inputs that cannot be compared, and the command itself."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
from parity_checks import SHAPE, check, reference_runner, swap_b_and_c
from tiny_model import tiny_gguf, tiny_hf

from lfm2cpp.errors import CheckpointError, LFM2Error, UsageError

torch = pytest.importorskip("torch", reason="needs the parity extra: pip install 'lfm2cpp[parity]'")
torch.set_num_threads(1)  # on tiny matrices the threads of torch wait for each other longer than they compute


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("hf"), **SHAPE)


# --- Inputs that cannot be compared --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        (dict(n_layer=5), "n_layer is 4 in the checkpoint, 5"),
        (dict(attention=(1,)), "n_head_kv"),
        (dict(n_ff=256), "n_ff"),
        (dict(l_cache=4), "l_cache"),
        (dict(n_vocab=300), "n_vocab"),
        (dict(rope_freq_base=1e4), "rope_freq_base"),
        (dict(norm_rms_eps=1e-6), "norm_rms_eps"),
    ],
    ids=str,
)
def test_models_of_different_shapes_are_refused(shape, named, checkpoint, tmp_path):
    gguf = tiny_gguf(tmp_path / "m.gguf", **{**SHAPE, **shape})
    with pytest.raises(CheckpointError, match=named):
        check(checkpoint, gguf, reference_runner)


def test_different_vocabularies_are_refused_with_the_first_difference(tmp_path):
    hf = tiny_hf(tmp_path / "hf", **SHAPE)
    tokenizer = json.loads((hf / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    pieces = list(vocab)
    vocab[pieces[30]], vocab[pieces[31]] = 31, 30
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="token 30 is"):
        check(hf, tiny_gguf(tmp_path / "m.gguf", **SHAPE), reference_runner)


def test_a_checkpoint_that_cannot_be_loaded_is_refused(tmp_path, checkpoint):
    gguf = tiny_gguf(tmp_path / "m.gguf", **SHAPE)
    with pytest.raises(CheckpointError, match="not a directory"):
        check(tmp_path / "none", gguf)
    with pytest.raises(CheckpointError, match="config.json"):
        check(tmp_path, gguf)
    other = tiny_hf(tmp_path / "llama", config={"model_type": "llama"})
    with pytest.raises(CheckpointError, match="model_type is 'llama'"):
        check(other, gguf)
    incomplete = tiny_hf(tmp_path / "hf", **{**SHAPE, "n_layer": 3})
    config = json.loads((checkpoint / "config.json").read_text())
    (incomplete / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing.*model\.layers\.3"):
        check(incomplete, gguf)
    for missing in (tmp_path / "none", tmp_path / "none.gguf"):
        with pytest.raises(LFM2Error, match="none"):
            check(missing if missing.suffix == "" else checkpoint, missing if missing.suffix else None)


def test_ids_outside_the_vocabulary_are_a_usage_error(checkpoint, tmp_path):
    gguf = tiny_gguf(tmp_path / "m.gguf", **SHAPE)
    for ids in ([320], [-1], []):
        with pytest.raises(UsageError, match="0 to 319"):
            check(checkpoint, gguf, reference_runner, ids=ids)


# --- The command ---------------------------------------------------------------------------------------------------


def lfm2cpp(*arguments):
    command = [sys.executable, "-m", "lfm2cpp", "parity", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_command_passes_with_a_table_and_with_json(checkpoint, tmp_path):
    gguf = tiny_gguf(tmp_path / "m.gguf", **SHAPE)
    done = lfm2cpp(checkpoint, "-m", gguf, "--ids", "1,40,41,42", "--decode", "2")
    assert done.returncode == 0, done.stderr
    assert "greedy continuation: 2 of 2 tokens equal" in done.stdout and "parity: ok (float32)" in done.stdout
    done = lfm2cpp(checkpoint, "-m", gguf, "--prompt", "hello world", "--decode", "0", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"] and report["failure"] is None
    assert {line["phase"] for line in report["lines"]} == {"weights", "prefill"}
    assert all(len(line["checksum"]) == 8 for line in report["lines"])


def test_command_exits_3_and_names_the_layer(checkpoint, tmp_path):
    gguf = tiny_gguf(tmp_path / "m.gguf", edit=partial(swap_b_and_c, "blk.1.shortconv.in_proj.weight"), **SHAPE)
    done = lfm2cpp(checkpoint, "-m", gguf, "--ids", "1,40,41,42")
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: layer 1 (conv): conv_in-1 diverges in prefill")
    assert "FAILED" in done.stdout


def test_command_without_torch_says_how_to_install_it(checkpoint):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lfm2cpp.cli import main; sys.argv = ['lfm2cpp', 'parity', sys.argv[1]]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert 'pip install "lfm2cpp[parity]"' in done.stderr.splitlines()[-1]


def test_an_old_transformers_is_refused(checkpoint, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(UsageError, match=r"transformers is 4\.57\.1.*pip install"):
        check(checkpoint)


@pytest.mark.parametrize(
    "arguments", [["--ids", "1,x"], ["--ids", "1", "--prompt", "a"], ["--decode", "-1"], []], ids=str
)
def test_bad_arguments_exit_2(arguments, checkpoint):
    done = lfm2cpp(*([checkpoint] if arguments else []), *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
