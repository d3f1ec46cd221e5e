"""Checkpoints that cannot be converted: one line, exit code 1, and nothing left behind. Rows B1 to B16."""

from __future__ import annotations

import json
import os
import re
import struct

import pytest
from convert_changes import (
    NORM,
    W1,
    Change,
    adapter,
    config,
    empty,
    header,
    index,
    link_outside,
    only_pickle,
    remove,
    shards,
    tensor_set,
    tensors,
    text,
    tokenizer,
)
from convert_fixtures import checkpoint, convert, model  # noqa: F401
from convert_variants import split_into_shards, update_json

DEEP = "[" * 100_000 + "]" * 100_000
BAD: dict[str, tuple[Change, str]] = {
    "B1-empty": (empty, r"no config\.json; a checkpoint needs .*tokenizer\.json.*model\.safetensors"),
    "B1-only-config": (remove("model.safetensors", "tokenizer.json"), r"no weights; a checkpoint needs"),
    "B1-no-tokenizer": (remove("tokenizer.json"), r"no tokenizer\.json; a checkpoint needs"),
    "B2-pickle": (only_pickle, r"only pickle files \(pytorch_model\.bin\), which are never opened.*safetensors"),
    "B4-not-json": (text("config.json", '{"a": 1,\n "b": }'), r"config\.json: invalid JSON at line 2 column 7"),
    "B4-nan": (text("config.json", '{"s": "NaN",\n "norm_eps": NaN}'), r"NaN is not a JSON number at line 2 column 14"),
    "B4-duplicate": (text("config.json", '{"a": {"b": 1},\n"b": 1, "b": 2}'), r"duplicate key 'b' at line 2 column 9"),
    "B4-huge": (text("config.json", b'{"a": "' + b"x" * (17 << 20) + b'"}'), r"config\.json: \d+ bytes of JSON, more than"),
    "B4-deep": (text("config.json", DEEP), r"nested too deeply at line 1 column"),
    "B4-utf16": (text("config.json", '{"a": 1}'.encode("utf-16")), r"not UTF-8 at line 1 column 1"),
    "B4-latin1": (text("config.json", '{\n"a": "\xe9"}'.encode("latin-1")), r"not UTF-8 at line 2 column 7"),
    "B4-digits": (text("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), r"config\.json: invalid JSON"),
    "B4-list": (text("config.json", "[1]"), r"holds a JSON list, expected an object"),
    "B5-moe": (config(architectures=["Lfm2MoeForCausalLM"]), r"Lfm2MoeForCausalLM; supported is .*Lfm2ForCausalLM"),
    "B5-vl": (config(architectures=["Lfm2VlForConditionalGeneration"]), r"Lfm2Vl.*; supported is"),
    "B5-llama": (config(architectures=["LlamaForCausalLM"]), r"LlamaForCausalLM; supported is"),
    "B5-two": (config(architectures=["Lfm2ForCausalLM", "Lfm2Model"]), r"Lfm2ForCausalLM, Lfm2Model; supported is exactly"),
    "B5-missing": (config(architectures=None), r"architectures is none; supported is"),
    "B6-length": (config(layer_types=["conv"]), r"layer_types has 1 entries, num_hidden_layers is 3"),
    "B6-unknown": (config(layer_types=["conv", "sliding_attention", "conv"]), r"unknown kinds sliding_attention; known are"),
    "B6-neither": (config(layer_types=None), r"neither layer_types nor full_attn_idxs"),
    "B6-index": (config(layer_types=None, full_attn_idxs=[7]), r"full_attn_idxs is \[7\], expected"),
    "B7-multiple": (config(block_multiple_of=0), r"block_multiple_of is 0, expected an integer in 1\.\."),
    "B7-multiplier": (config(block_ffn_dim_multiplier=-1), r"block_ffn_dim_multiplier is -1, expected"),
    "B8-missing-shard": (shards(remove("model-00002-of-00002.safetensors")), r"shards .* missing: model-00002-of-00002"),
    "B8-traversal": (index(lambda m: m.update(x="../../etc/passwd.safetensors")), r"'\.\./\.\./etc/passwd.* not in the directory"),
    "B8-absolute": (index(lambda m: m.update(x="/etc/passwd.safetensors")), r"'/etc/passwd.* not in the directory"),
    "B8-backslash": (index(lambda m: m.update(x="..\\x.safetensors")), r"not in the directory"),
    "B8-other-file": (index(lambda m: m.update(x="/etc/passwd")), r"not \.safetensors"),
    "B8-link": (shards(link_outside), r"is a link to .*elsewhere.*, outside of the checkpoint"),
    "B8-wrong-map": (index(lambda m: m.update({W1: next(f for f in m.values() if f != m[W1])})), r"not in the shards it names"),
    "B8-unlisted": (index(lambda m: m.pop(W1)), rf"not listed: {W1}"),
    "B8-listed": (index(lambda m: m.update(ghost=m[W1])), r"not in the shards it names: ghost"),
    "B8-no-map": (shards(text("model.safetensors.index.json", "{}")), r"weight_map must map"),
    "B8-series": (
        lambda p: (split_into_shards(p, 3, with_index=False), (p / "model-00002-of-00003.safetensors").unlink()) and None,
        r"shards are missing: model-00002-of-00003",
    ),
    "B9-empty": (text("model.safetensors", b""), r"not a safetensors file: only 0 bytes"),
    "B9-lfs": (text("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid"), r"git-LFS pointer; run 'git lfs pull'"),
    "B9-html": (text("model.safetensors", b"<!doctype html><html>"), r"not a safetensors file"),
    "B9-truncated": (
        lambda p: os.truncate(p / "model.safetensors", (p / "model.safetensors").stat().st_size - 7),
        r"truncated: 7 bytes are missing; download it again",
    ),
    "B9-trailing": (
        lambda p: os.truncate(p / "model.safetensors", (p / "model.safetensors").stat().st_size + 9),
        r"9 bytes after the last tensor",
    ),
    "B9-overlap": (header(lambda h: h[NORM].update(data_offsets=h[W1]["data_offsets"])), r"takes \d+ bytes, its data_offsets"),
    "B9-same-place": (
        header(lambda h: h["model.layers.0.ffn_norm.weight"].update(data_offsets=h[NORM]["data_offsets"])), r"overlaps",
    ),
    "B9-hole": (header(lambda h: h.pop(NORM) and None), r"leaves a hole"),
    "B9-overflow": (header(lambda h: h[NORM].update(shape=[2**62, 8])), r"takes \d+ bytes"),
    "B9-too-large": (header(lambda h: h[NORM].update(shape=[2**63])), r"is not a list of sizes"),
    "B9-negative": (header(lambda h: h[NORM].update(shape=[-64])), r"is not a list of sizes"),
    "B9-bool": (header(lambda h: h[NORM].update(shape=[True])), r"is not a list of sizes"),
    "B9-dtype": (header(lambda h: h[NORM].update(dtype="F4")), r"unknown dtype 'F4'"),
    "B9-key": (header(lambda h: h[NORM].update(more=1)), r"exactly dtype, shape and data_offsets"),
    "B9-metadata": (header(lambda h: h.update(__metadata__={"a": 1})), r"__metadata__ must map strings"),
    "B9-duplicate": (
        header(lambda h: (json.dumps(h)[:-1] + f', "{NORM}": {json.dumps(h[NORM])}}}').encode()), r"duplicate key",
    ),
    "B9-length": (
        lambda p: (p / "model.safetensors").write_bytes(struct.pack("<Q", 101 << 20) + b"{" + bytes(9)) and None,
        r"header of 105906176 bytes, more than",
    ),
    "B9-beyond": (
        lambda p: (p / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 20) + b"{}") and None, r"truncated: a header of",
    ),
    "B10-missing": (tensors(lambda t: t.pop(NORM)), rf"missing {NORM}$"),
    "B10-unknown": (tensor_set("model.surprise.weight", "BF16", [2], b"\0\0"), r"unknown model\.surprise\.weight$"),
    "B10-bias": (tensor_set("model.layers.0.conv.in_proj.bias", "BF16", [2], b"\0\0"), r"unknown model\.layers\.0\.conv"),
    "B10-many": (tensors(lambda t: [t.pop(n) for n in list(t)[:9]]), r"missing .* and 4 more"),
    "B10-shape": (tensor_set(NORM, "BF16", [65], b"\0\0"), rf"{NORM} is \[65\], expected \[64\]"),
    "B10-conv": (tensor_set("model.layers.0.conv.conv.weight", "BF16", [64, 3], b"\0\0"), r"\[64, 3\], expected \[64, 1, 3\]"),
    "B10-zero": (tensor_set(W1, "BF16", [0, 64], b"\0\0"), r"\[0, 64\], expected"),
    "B10-i8": (tensor_set(NORM, "I8", [64], b"\0"), r"is I8; only BF16, F16, F32, F64"),
    "B10-fp8": (tensor_set(W1, "F8_E4M3", [96, 64], b"\0"), r"is F8_E4M3; only"),
    "B10-quantized": (config(quantization_config={"quant_method": "gptq"}), r"is quantized"),
    "B11-different": (tensor_set("lm_head.weight", "BF16", [320, 64], b"\0\0"), r"lm_head\.weight differs from the embedding"),
    "B11-untied": (config(tie_word_embeddings=False), r"missing lm_head\.weight$"),
    "B13-corrupt": (text("tokenizer.json", '{"model": '), r"tokenizer\.json: invalid JSON"),
    "B13-model": (tokenizer(lambda t: t["model"].update(type="Unigram")), r"model is Unigram, expected a byte-level BPE"),
    "B13-merges": (tokenizer(lambda t: t["model"]["merges"].append(["zq", "qz"])), r"refused by the tokenizers library"),
    "B13-too-many": (
        tokenizer(lambda t: t["model"]["vocab"].update({f"z{i}z": i for i in range(312, 340)})),
        r"token 'z339z' has id 339, but the model has only 320 rows",
    ),
    "B13-rows": (config(vocab_size=330), r"model\.embed_tokens\.weight is \[320, 64\], expected \[330, 64\]"),
    "B13-twice": (tokenizer(lambda t: t["model"]["vocab"].update(zz=5)), r"id 5 belongs to two tokens"),
    "B13-clash": (
        tokenizer(lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 5, "content": "<|x|>"})),
        r"'<\|x\|>' declares id 5, which belongs to '<\|fim_suf\|>'",
    ),
    "B13-id": (tokenizer(lambda t: t["model"]["vocab"].update(zz=-1)), r"something that is not an id"),
    "B13-eos": (config(eos_token_id=10**6, bos_token_id=1) , r"eos_token_id"),
    "B15-regex": (
        tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+")),
        r"unknown pre-tokenizer [0-9a-f]{16}: .*use --force-pre lfm2",
    ),
    "B15-normalizer": (tokenizer(lambda t: t.update(normalizer={"type": "NFC"})), r"pre-tokenizer .*has a normalizer \(NFC\)"),
    "B15-steps": (tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0)), r"expected Split \+ ByteLevel"),
    "B16-adapter": (adapter, r"is a LoRA adapter, not a model; merge it"),
    "rope": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), r"rope_type is yarn, expected default"),
    "heads": (config(num_attention_heads=5), r"do not fit"),
    "hidden": (config(hidden_size=None), r"has no hidden_size"),
    "hidden-text": (config(hidden_size="64"), r"hidden_size is 64, expected an integer"),
    "bias": (config(conv_bias=True), r"conv_bias is True, expected false"),
    "head_dim": (config(head_dim=32), r"head_dim is 32, expected hidden_size / heads = 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused(case, checkpoint, convert):
    change, message = BAD[case]
    if case == "B13-eos":  # the name in tokenizer_config.json would win
        update_json(checkpoint / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    change(checkpoint)
    before = sorted((p.name, p.stat().st_size) for p in checkpoint.iterdir())
    code, _, stderr = convert(checkpoint)
    assert code == 1
    assert re.search(message, stderr.rstrip())
    assert sorted((p.name, p.stat().st_size) for p in checkpoint.iterdir()) == before
