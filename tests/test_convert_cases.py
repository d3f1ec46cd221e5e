"""Checkpoints that are odd but can be converted, and what comes of it: the other halves of rows B3 to B17."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_changes import NORM, Change, config, shards, tensor_set, tensors, tokenizer
from convert_fixtures import checkpoint, convert, model  # noqa: F401
from convert_variants import SMALL, update_json
from gguf_builder import run_cli
from tiny_model import SPECIALS, tiny_hf, write_safetensors

from lfm2cpp.gguf import read_gguf


def both_kinds(path: Path) -> None:
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04")


def with_bom(path: Path) -> None:
    (path / "config.json").write_bytes(b"\xef\xbb\xbf" + (path / "config.json").read_bytes())


def head_copy(entries: dict[str, list[Any]]) -> None:
    entries["lm_head.weight"] = list(entries["model.embed_tokens.weight"])


def head_copy_f32(entries: dict[str, list[Any]]) -> None:
    _, shape, data = entries["model.embed_tokens.weight"]
    wide = (np.frombuffer(data, "<u2").astype("<u4") << 16).tobytes()
    entries["lm_head.weight"] = ["F32", shape, wide]


def norm_in_f64(entries: dict[str, list[Any]]) -> None:
    _, shape, data = entries[NORM]
    x = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype("<f8")
    entries[NORM] = ["F64", shape, x.tobytes()]


def prefixed(prefix: str, *more: str) -> Change:
    """The text model inside a multimodal checkpoint, with other parts beside it."""

    def change(entries: dict[str, list[Any]]) -> None:
        old = dict(entries)
        entries.clear()
        entries.update({prefix + name.removeprefix("model."): entry for name, entry in old.items()})
        entries.update({name: ["BF16", [1], b"\0\0"] for name in more})

    return tensors(change)


GOOD: dict[str, tuple[Change, str]] = {
    "B3": (both_kinds, r"pickle files beside the safetensors; they are not opened"),
    "B4-bom": (with_bom, ""),
    "B6-old": (config(layer_types=None, full_attn_idxs=[1]), ""),
    "B7-wrong": (config(intermediate_size=1234), r"FFN width of 1234, the tensors are 96 wide: the tensors win"),
    "B7-adjusted": (config(intermediate_size=144, block_auto_adjust_ff_dim=True, block_multiple_of=32), ""),
    "B7-null": (
        config(intermediate_size=144, block_auto_adjust_ff_dim=True, block_ffn_dim_multiplier=None), "",
    ),
    "B8-extra-shard": (
        shards(lambda p: shutil.copy(p / "model-00001-of-00002.safetensors", p / "model-00003-of-00002.safetensors") and None),
        r"not in model\.safetensors\.index\.json and not used: model-00003",
    ),
    "B10-f64": (tensors(norm_in_f64), r"1 tensors are float64 and are rounded to float32: " + NORM),
    "B11-equal": (tensors(head_copy), r"lm_head\.weight is the embedding once more"),
    "B11-equal-f32": (tensors(head_copy_f32), r"lm_head\.weight is the embedding once more"),
    "B14-null": (lambda p: update_json(p / "tokenizer_config.json", lambda c: c.update(extra=None)), ""),
    "prefix-vl": (prefixed("model.language_model.", "model.vision_tower.x", "model.multi_modal_projector.y"), r"2 vision and audio"),
    "prefix-old-vl": (prefixed("language_model.model.", "vision_tower.x"), r"1 vision and audio"),
    "prefix-audio": (prefixed("lfm.", "conformer.x", "depthformer.y", "audio_embedding.z"), r"3 vision and audio"),
    "inv-freq": (tensor_set("model.layers.1.self_attn.rotary_emb.inv_freq", "F32", [8], b"\0" * 4), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_converted_to_the_same_tensors(case, checkpoint, convert, model, monkeypatch, capsys, tmp_path):
    change, message = GOOD[case]
    change(checkpoint)
    code, stdout, stderr = convert(checkpoint)
    assert code == 0, stderr
    notes = [line for line in stderr.splitlines() if line.startswith("note: ")]
    assert re.search(message, stderr) and bool(notes) == bool(message)
    run_cli(monkeypatch, capsys, "convert", model, "--outfile", tmp_path / "plain.gguf")
    with read_gguf(stdout.strip()) as ours, read_gguf(tmp_path / "plain.gguf") as plain:
        assert {n: (t.shape, t.ggml_type) for n, t in ours.tensors.items()} == {
            n: (t.shape, t.ggml_type) for n, t in plain.tensors.items()
        }
        assert all(bytes(ours.data(name)) == bytes(plain.data(name)) for name in plain.tensors)
        assert ours.metadata == plain.metadata


def test_overflow_of_float16(tmp_path, convert):  # B12
    def edit(weights):
        weights["blk.0.ffn_up.weight"][0, :3] = [7e4, -1e38, np.inf]
        weights["blk.0.ffn_up.weight"][0, 3] = 65504

    path = tiny_hf(tmp_path / "loud", dtype="F32", edit=edit, **SMALL)
    code, _, stderr = convert(path, "--outtype", "f16")
    assert code == 1 and "2 values are beyond float16's 65504 (up to 1e+38" in stderr
    assert "--outtype bf16" in stderr and "--allow-f16-overflow" in stderr
    code, stdout, stderr = convert(path, "--outtype", "f16", "--allow-f16-overflow")
    assert code == 0 and "1 values are NaN or infinite" in stderr
    with read_gguf(stdout.strip()) as gguf:
        row = gguf.data("blk.0.ffn_up.weight").view(np.float16)[:4]
        assert row.tolist() == [np.inf, -np.inf, np.inf, 65504]
    code, _, stderr = convert(path, "--outtype", "bf16", "--force")
    assert code == 0


@pytest.mark.parametrize("outtype", ["q8_0", "q4_0"])
def test_block_types_refuse_nan(outtype, tmp_path, convert):  # B12, D4
    def edit(weights):
        weights["blk.0.ffn_up.weight"][5, 3] = np.nan

    code, _, stderr = convert(tiny_hf(tmp_path / "nan", edit=edit, **SMALL), "--outtype", outtype)
    assert code == 1 and re.search(r"feed_forward\.w3\.weight, row 5, holds nan", stderr)


def test_subnormals_and_infinity_pass_through(tmp_path, convert):  # B12
    values = np.array([1e-40, -1e-40, np.inf, -np.inf, 0.0, -0.0, 9.2e-41, 3.3e38], np.float32)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)

    def edit(weights):
        weights["blk.0.ffn_up.weight"][0, :8] = values

    code, stdout, _ = convert(tiny_hf(tmp_path / "m", edit=edit, **SMALL), "--outtype", "f32")
    assert code == 0
    with read_gguf(stdout.strip()) as gguf:
        assert gguf.data("blk.0.ffn_up.weight")[:32].tobytes() == values.tobytes()


JINJA, IN_CONFIG = "{{ 'beside' }}", "{{ 'in the config' }}"
TEMPLATES: dict[str, tuple[Any, str | None, str | None, str]] = {
    # tokenizer_config's, the file's, what is stored, the note
    "file": (None, JINJA, JINJA, ""),
    "config": (IN_CONFIG, None, IN_CONFIG, ""),
    "both": (IN_CONFIG, JINJA, IN_CONFIG, r"is used, which differs from the one in a file"),
    "same": (JINJA, JINJA, JINJA, ""),
    "list": ([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}], None, "D", ""),
    "neither": (None, None, None, ""),
    "number": (7, None, None, r"chat_template is int, expected text or a list: ignored"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_template(case, checkpoint, convert):  # B14
    in_config, beside, stored, message = TEMPLATES[case]
    if in_config is not None:
        update_json(checkpoint / "tokenizer_config.json", lambda c: c.update(chat_template=in_config))
    (checkpoint / "chat_template.jinja").unlink()
    if beside is not None:
        (checkpoint / "chat_template.jinja").write_text(beside)
    code, stdout, stderr = convert(checkpoint, "--vocab-only")
    assert code == 0 and re.search(message, stderr) and ("note: " in stderr) == bool(message)
    with read_gguf(stdout.strip()) as gguf:
        found = gguf.metadata.get("tokenizer.chat_template")
        assert (found and found.value) == stored
        if case == "list":
            assert gguf.metadata["tokenizer.chat_template.tool_use"].value == "T"
            assert gguf.metadata["tokenizer.chat_templates"].value == [b"tool_use"]


def test_too_long_a_template(checkpoint, convert):
    (checkpoint / "chat_template.jinja").write_text("x" * (2 << 20))
    assert convert(checkpoint)[0] == 1


def test_forced_pre_tokenizer(checkpoint, convert):  # B15
    tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"))(checkpoint)
    code, stdout, stderr = convert(checkpoint, "--force-pre", "lfm2")
    assert code == 0 and re.search(r"note: .*unknown pre-tokenizer .* taken for lfm2", stderr)
    with read_gguf(stdout.strip()) as gguf:
        assert gguf.metadata["tokenizer.ggml.pre"].value == "lfm2"


def test_padding(checkpoint, convert):  # B13: 8 rows have no token
    code, stdout, _ = convert(checkpoint)
    assert code == 0
    with read_gguf(stdout.strip()) as gguf:
        tokens, types = (gguf.metadata[f"tokenizer.ggml.{key}"].value for key in ("tokens", "token_type"))
    assert tokens[312:] == [f"[PAD{i}]".encode() for i in range(312, 320)] and types[312:] == [5] * 8
    assert tokens[:14] == [piece.encode() for piece in SPECIALS] and types[:14] == [3] * 14
    assert set(types[14:312]) == {1}


def test_added_token_behind_a_hole(checkpoint, convert):  # B13: the library closes the hole, so do we
    new = {"id": 315, "content": "<|x|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
           "special": True}  # fmt: skip
    update_json(checkpoint / "tokenizer.json", lambda t: t["added_tokens"].append(new))
    code, stdout, stderr = convert(checkpoint)
    assert code == 0 and "declares id 315, transformers and we give it 312" in stderr
    with read_gguf(stdout.strip()) as gguf:
        assert gguf.metadata["tokenizer.ggml.tokens"].value[312:316] == [b"<|x|>", b"[PAD313]", b"[PAD314]", b"[PAD315]"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_model_directory(checkpoint, convert):  # B17
    checkpoint.chmod(0o555)
    try:
        assert convert(checkpoint)[0] == 0
    finally:
        checkpoint.chmod(0o755)


def test_nothing_is_written_into_the_model_directory(checkpoint, convert):  # B17, as root too
    before = sorted(checkpoint.rglob("*"))
    assert convert(checkpoint)[0] == 0
    assert sorted(checkpoint.rglob("*")) == before


def test_hub_cache_snapshot(model, tmp_path, convert):  # B8: links into blobs are how the hub cache looks
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / ("0123456789abcdef" * 3)[:40]
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, repo / "blobs" / f"{i:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:064x}")
    assert convert(snapshot)[0] == 0
    (tmp_path / "out" / "m.gguf").unlink()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "README.md", "generation_config.json"):
        (snapshot / name).unlink(missing_ok=True)
        (snapshot / name).symlink_to(model / name)
        code, _, stderr = convert(snapshot)
        if name == "generation_config.json":  # nobody needs it
            assert code == 0 and re.search(r"note: .* outside of the checkpoint.*: ignored", stderr)
        else:
            assert code == 1 and "outside of the checkpoint" in stderr
        (snapshot / name).unlink()
        shutil.copy(model / name, snapshot / name) if (model / name).exists() else None


def test_fifo_does_not_block(checkpoint, convert):
    (checkpoint / "model.safetensors").unlink()
    os.mkfifo(checkpoint / "model.safetensors")
    assert convert(checkpoint)[0] == 1


def test_a_file_instead_of_a_directory(checkpoint, convert, tmp_path):
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    code, _, stderr = convert(gguf)
    assert code == 1 and "is a GGUF file already" in stderr
    code, _, stderr = convert(checkpoint / "model.safetensors")
    assert code == 1 and "is not a directory; give the directory" in stderr


def test_shard_is_cut_while_being_read(checkpoint, convert, monkeypatch):
    """Checked once, a file may still change: a short read is an error, not a short tensor."""
    from convert import checkpoint as module

    def read_then_cut(path: Path) -> Any:
        header = original(path)
        os.truncate(path, path.stat().st_size - 5)
        return header

    original = module.read_header
    monkeypatch.setattr(module, "read_header", read_then_cut)
    code, _, stderr = convert(checkpoint)
    assert code == 1 and "changed while being read" in stderr


def test_safetensors_written_by_the_helper_is_good(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", "F32", {"a": ((2,), b"\0" * 8)})
    from convert.safetensors_file import read_header

    assert read_header(tmp_path / "m.safetensors")["a"].nbytes == 8
