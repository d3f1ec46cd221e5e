"""Seeded tiny LFM2 models of any shape for tests: as a GGUF of any mixture of types, and as a checkpoint directory.

    from tiny_model import tiny_gguf, tiny_hf
    path = tiny_gguf(tmp_path / "m.gguf", n_layer=3, attention=(0,), types="Q8_0", seed=1)
    path = tiny_gguf(tmp_path / "m.gguf", types={r"token_embd": "Q6_K", r"ffn_down": "Q4_1", r".": "Q4_0"})
    hf = tiny_hf(tmp_path / "hf", n_layer=3, attention=(0,), seed=1)        # the same weights

Every float weight is exactly representable in BF16, so the F32 and BF16 GGUF and the BF16 checkpoint of one
shape and seed are one model. Files are written by the `gguf` package, not by ours: an independent writer.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from lfm2cpp.arch import iter_tensors, lfm2
from lfm2cpp.ggml import IQ4_NL_VALUES, FileType, GGMLType, block_iq4_nl, block_q4_K, block_q5_K, block_q6_K

F32 = NDArray[np.float32]
Weights = dict[str, F32]  # by GGUF name
Types = str | Mapping[str, str]

SPECIALS = (
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>",
    "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
    "<|tool_response_start|>", "<|tool_response_end|>",
)  # fmt: skip
BOS, EOS, PAD = 1, 7, 0
MIN_VOCAB = len(SPECIALS) + 256
REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NORMAL, CONTROL, UNUSED = 1, 3, 5  # tokenizer.ggml.token_type


@dataclass(frozen=True)
class TinyShape:
    """Everything that decides the weights of a tiny model. `attention` lists the attention layers."""

    n_embd: int = 256
    n_layer: int = 4
    attention: tuple[int, ...] = (2,)
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 512
    n_vocab: int = 320  # rows of token_embd, [PADn] rows included
    n_pad: int = 8  # rows past the tokenizer's real size
    l_cache: int = 3
    n_ctx_train: int = 4096
    rope_freq_base: float = 1e6
    norm_rms_eps: float = 1e-5
    tied: bool = True
    seed: int = 0

    def hparams(self) -> lfm2.HParams:
        kv = tuple(self.n_head_kv if il in self.attention else 0 for il in range(self.n_layer))
        return lfm2.HParams(
            n_vocab=self.n_vocab, n_ctx_train=self.n_ctx_train, n_embd=self.n_embd, n_layer=self.n_layer,
            n_ff=self.n_ff, n_head=self.n_head, n_head_kv=kv, l_cache=self.l_cache,
            norm_rms_eps=self.norm_rms_eps, rope_freq_base=self.rope_freq_base,
        )  # fmt: skip


def tiny_gguf(
    path: Path | str,
    *,
    types: Types = "F32",
    norm_name: str = "token_embd_norm",
    edit: Callable[[Weights], None] | None = None,
    metadata: Mapping[str, tuple[gguf.GGUFValueType, Any] | None] | None = None,
    **shape: Any,
) -> Path:
    """Write a tiny model to `path` and return it.

    `types` stores the matrices: one of F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 IQ4_NL Q4_K Q5_K Q6_K, or {regex:
    type}, first match wins and no match is F32. Norms and convolution taps stay F32. `norm_name` is the final norm's tensor ("output_norm" in files
    of other writers). `edit` changes a copy of the float weights before they are stored (a fault, or a state worth
    testing). `metadata` overrides or adds keys, and None removes one. `shape` are the fields of TinyShape.
    """
    path, tiny = Path(path), TinyShape(**shape)
    weights = tiny_weights(tiny) if edit is None else {name: w.copy() for name, w in tiny_weights(tiny).items()}
    if edit is not None:
        edit(weights)
    writer = gguf.GGUFWriter(path, arch=lfm2.NAME)  # writes general.architecture itself
    for key, entry in {**_model_metadata(tiny, path.stem, types), **_vocab_metadata(tiny), **(metadata or {})}.items():
        if entry is not None:
            writer.add_key_value(key, entry[1], entry[0])
    quantizable = {e.name: e.quantizable for e in iter_tensors(lfm2, tiny.hparams())}
    for name, w in weights.items():
        ggml_type = _type_of(name, types) if quantizable.get(name, False) else GGMLType.F32
        data = w if ggml_type == GGMLType.F32 else encode(w, ggml_type)
        stored = name.replace("token_embd_norm", norm_name)
        writer.add_tensor(stored, data, raw_dtype=gguf.GGMLQuantizationType(ggml_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_hf(
    path: Path | str,
    *,
    dtype: str = "BF16",
    edit: Callable[[Weights], None] | None = None,
    config: Mapping[str, Any] | None = None,
    **shape: Any,
) -> Path:
    """Write the checkpoint directory of a tiny model (no torch needed) and return it.

    config.json, model.safetensors in `dtype` (BF16, F16 or F32), tokenizer.json, tokenizer_config.json,
    generation_config.json and chat_template.jinja. `edit` works on the weights by GGUF name, as in tiny_gguf;
    `config` overrides keys of config.json, and None removes one. `shape` are the fields of TinyShape.
    """
    path, tiny = Path(path), TinyShape(**shape)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: w.copy() for name, w in tiny_weights(tiny).items()}
    if edit is not None:
        edit(weights)
    tensors: dict[str, tuple[tuple[int, ...], bytes]] = {}
    for entry in iter_tensors(lfm2, tiny.hparams()):
        if entry.name in weights:
            w = weights[entry.name]
            hf_shape = (w.shape[0], 1, w.shape[1]) if entry.name.endswith("shortconv.conv.weight") else w.shape
            data = encode(w, GGMLType[dtype]) if dtype != "F32" else w
            tensors[entry.hf_name] = (hf_shape, data.tobytes())
    write_safetensors(path / "model.safetensors", dtype, tensors)
    merged = {k: v for k, v in {**hf_config(tiny, dtype), **(config or {})}.items() if v is not None}
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    names = {"bos_token": SPECIALS[BOS], "eos_token": SPECIALS[EOS], "pad_token": SPECIALS[PAD]}
    _write_json(path / "config.json", merged)
    _write_json(path / "generation_config.json", {**ids, "_from_model_config": True})
    _write_json(path / "tokenizer_config.json", {**names, "tokenizer_class": "PreTrainedTokenizerFast"})
    _write_json(path / "tokenizer.json", tokenizer_json(tiny))
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return path


def write_safetensors(path: Path, dtype: str, tensors: Mapping[str, tuple[tuple[int, ...], bytes]]) -> None:
    """A safetensors file of tensors of one dtype; by hand, because the library's NumPy mode knows no BF16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.writelines(data for _, data in tensors.values())


@lru_cache(maxsize=8)
def tiny_weights(tiny: TinyShape) -> Weights:
    """The float weights by GGUF name, BF16-exact; a tensor depends on its own name, its shape and the seed only.

    Matrices are N(0, 1/n_in), so that activations stay near 1 in any depth; norms are near 1, embeddings near 0.1.
    The result is shared between calls: copy before changing it.
    """
    weights: Weights = {}
    for entry in iter_tensors(lfm2, tiny.hparams()):
        if entry.spec.optional and tiny.tied:
            continue
        rng = np.random.default_rng([tiny.seed, zlib.crc32(entry.name.encode())])
        w = rng.standard_normal(entry.shape, dtype=np.float32)
        if entry.name.startswith(("token_embd.", "output.")):
            w *= 0.1
        elif len(entry.shape) == 1:
            w = 1 + np.float32(0.1) * w
        else:
            w *= np.float32(entry.shape[1] ** -0.5)
        weights[entry.name] = to_bf16(w)
        weights[entry.name].flags.writeable = False
    return weights


def to_bf16(x: F32) -> F32:
    """x rounded to the nearest BF16 (ties to even), still stored as float32."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def encode(w: F32, ggml_type: GGMLType) -> NDArray[np.uint8]:
    """w (rows, n) -> the bytes of its rows (rows, nbytes) in `ggml_type`."""
    if ggml_type in ENCODERS:
        return ENCODERS[ggml_type](w)
    data = gguf.quants.quantize(w, gguf.GGMLQuantizationType(ggml_type))
    return np.ascontiguousarray(data).view(np.uint8)


def encode_iq4_nl(w: F32) -> NDArray[np.uint8]:
    """A plain, valid IQ4_NL encoding: the largest of 32 becomes the lowest value, the others the nearest."""
    x, values = w.reshape(-1, 32), np.array(IQ4_NL_VALUES, np.float32)
    blocks = np.zeros(len(x), block_iq4_nl)
    blocks["d"] = np.take_along_axis(x, np.abs(x).argmax(-1)[:, None], -1)[:, 0] / values[0]
    d = blocks["d"].astype(np.float32)
    scaled = x / np.where(d != 0, d, 1)[:, None]
    q = np.abs(scaled[..., None] - values).argmin(-1).astype(np.uint8)
    blocks["qs"] = q[:, :16] | q[:, 16:] << 4
    return blocks.view(np.uint8).reshape(len(w), -1)


def encode_q4_K(w: F32) -> NDArray[np.uint8]:
    """A plain, valid Q4_K encoding: each 32 elements from their smallest, or 0, to their largest."""
    q, header = encode_sub_blocks(w, 15)
    blocks = np.zeros(len(q), block_q4_K)
    for name, value in header.items():
        blocks[name] = value
    blocks["qs"] = nibbles_of_64(q)
    return blocks.view(np.uint8).reshape(len(w), -1)


def encode_q5_K(w: F32) -> NDArray[np.uint8]:
    """The same in 5 bits."""
    q, header = encode_sub_blocks(w, 31)
    blocks = np.zeros(len(q), block_q5_K)
    for name, value in header.items():
        blocks[name] = value
    blocks["qh"] = ((q >> 4) << np.arange(8, dtype=np.uint8)[:, None]).sum(1)
    blocks["qs"] = nibbles_of_64(q & 15)
    return blocks.view(np.uint8).reshape(len(w), -1)


def encode_sub_blocks(w: F32, n_max: int) -> tuple[NDArray[np.uint8], dict[str, NDArray]]:
    """Levels (super-blocks, 8, 32) up to n_max, and the fields that a block begins with."""
    x = w.reshape(-1, 8, 32)
    lowest = np.maximum(0, -x.min(-1))
    scale = (x.max(-1) + lowest) / n_max
    d, dmin = ((v.max(-1) / 63).astype(np.float16) for v in (scale, lowest))
    scales, minima = (
        np.clip(np.rint(v / np.where(unit > 0, unit, 1)[:, None].astype(np.float32)), 0, 63).astype(np.uint8)
        for v, unit in ((scale, d), (lowest, dmin))
    )
    step, shift = scales * d[:, None].astype(np.float32), minima * dmin[:, None].astype(np.float32)
    q = np.rint((x + shift[..., None]) / np.where(step > 0, step, 1)[..., None])
    low = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    first, second = scales[:, :4] | scales[:, 4:] >> 4 << 6, minima[:, :4] | minima[:, 4:] >> 4 << 6
    packed = np.concatenate([first, second, low], axis=1)
    return np.clip(q, 0, n_max).astype(np.uint8), {"d": d, "dmin": dmin, "scales": packed}


def nibbles_of_64(q: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Levels (super-blocks, 8, 32) of 4 bits -> 128 bytes: two sub-blocks share 32."""
    pairs = q.reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)


def encode_q6_K(w: F32) -> NDArray[np.uint8]:
    """A plain, valid Q6_K encoding: the largest value of 16 sets their scale. Not the search of llama.cpp."""
    x = w.reshape(-1, 16, 16)  # (super-blocks, sub-blocks, elements)
    largest = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0] / -32
    d = (np.abs(largest).max(-1) / 127).astype(np.float16)
    step = np.where(d > 0, d.astype(np.float32), 1)[:, None]
    scales = np.clip(np.rint(largest / step), -128, 127)
    unit = np.where(scales == 0, 1, scales * step)[..., None]
    q = np.clip(np.rint(x / unit) + 32, 0, 63).astype(np.uint8)
    # 256 elements are two halves of four quarters of 32; quarters 0|2 and 1|3 share a byte of low bits.
    q = q.reshape(-1, 2, 4, 32)
    blocks = np.zeros(len(x), block_q6_K)
    blocks["ql"] = ((q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4).reshape(-1, 128)
    high = q >> 4
    blocks["qh"] = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    blocks["scales"], blocks["d"] = scales, d
    return blocks.view(np.uint8).reshape(len(w), -1)


ENCODERS = {  # of what gguf does not encode
    GGMLType.IQ4_NL: encode_iq4_nl, GGMLType.Q4_K: encode_q4_K, GGMLType.Q5_K: encode_q5_K, GGMLType.Q6_K: encode_q6_K,
}  # fmt: skip


def tiny_tokens(tiny: TinyShape) -> tuple[list[str], list[tuple[str, str]]]:
    """The real pieces (specials, 256 byte symbols, merged pairs) and the merges that make the last of them."""
    if tiny.n_vocab <= MIN_VOCAB + tiny.n_pad:  # at least one merge: a GGUF array cannot be empty
        raise ValueError(f"n_vocab is {tiny.n_vocab}, must be more than {MIN_VOCAB} + n_pad {tiny.n_pad}")
    tokens = [*SPECIALS, *byte_symbols()]
    merges = list(_merges(tiny.n_vocab - tiny.n_pad - MIN_VOCAB))
    return tokens + [left + right for left, right in merges], merges


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte value 0..255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + hidden.index(b)) for b in range(256)]


def _merges(n: int) -> Iterator[tuple[str, str]]:
    """n merges: those of a few words from left to right, then letter pairs (\u0120 is the space of byte-level BPE)."""
    words = ["\u0120the", "\u0120and", "hello", "\u0120world", "ing", "\u0120plus", "\u0120name", "12", "\u0120is"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    seen: set[str] = set()
    for word in [*words, *(a + b for a in letters for b in letters), *("\u0120" + a for a in letters)]:
        for end in range(1, len(word)):
            if len(seen) < n and word[: end + 1] not in seen:
                seen.add(word[: end + 1])
                yield word[:end], word[end]


def tokenizer_json(tiny: TinyShape) -> dict[str, Any]:
    """tokenizer.json as a dict: byte-level BPE with LFM2's pre-tokenizer, specials at 0..13, BOS in front."""
    tokens, merges = tiny_tokens(tiny)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = SPECIALS[BOS]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": REGEX}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": piece, **flags} for i, piece in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [BOS], "tokens": [bos]}},
        },
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {piece: i for i, piece in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }  # fmt: skip


def hf_config(tiny: TinyShape, dtype: str = "BF16") -> dict[str, Any]:
    """config.json as a dict, in the spelling of transformers 5; the FFN width is written as it is."""
    kinds = ["full_attention" if il in tiny.attention else "conv" for il in range(tiny.n_layer)]
    return {
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "dtype": _CONFIG_DTYPE[dtype],
        "hidden_size": tiny.n_embd, "num_hidden_layers": tiny.n_layer, "layer_types": kinds,
        "num_attention_heads": tiny.n_head, "num_key_value_heads": tiny.n_head_kv,
        "intermediate_size": tiny.n_ff, "block_auto_adjust_ff_dim": False, "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256, "conv_L_cache": tiny.l_cache, "conv_bias": False, "norm_eps": tiny.norm_rms_eps,
        "rope_parameters": {"rope_theta": tiny.rope_freq_base, "rope_type": "default"},
        "max_position_embeddings": tiny.n_ctx_train, "vocab_size": tiny.n_vocab, "tie_word_embeddings": tiny.tied,
        "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "initializer_range": 0.02, "use_cache": True,
    }  # fmt: skip


_CONFIG_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def _model_metadata(tiny: TinyShape, name: str, types: Types) -> dict[str, tuple[gguf.GGUFValueType, Any]]:
    T, hp = gguf.GGUFValueType, tiny.hparams()
    ftype = FileType.F32
    if isinstance(types, str):
        ftype = FileType[types + "_S" if types in ("Q4_K", "Q5_K") else types]  # there is no file type of that name
    return {
        "general.type": (T.STRING, "model"),
        "general.name": (T.STRING, name),
        "lfm2.block_count": (T.UINT32, hp.n_layer),
        "lfm2.context_length": (T.UINT32, hp.n_ctx_train),
        "lfm2.embedding_length": (T.UINT32, hp.n_embd),
        "lfm2.feed_forward_length": (T.UINT32, hp.n_ff),
        "lfm2.attention.head_count": (T.UINT32, hp.n_head),
        "lfm2.attention.head_count_kv": (T.ARRAY, list(hp.n_head_kv)),
        "lfm2.rope.freq_base": (T.FLOAT32, hp.rope_freq_base),
        "lfm2.attention.layer_norm_rms_epsilon": (T.FLOAT32, hp.norm_rms_eps),
        "general.file_type": (T.UINT32, int(ftype)),
        "lfm2.vocab_size": (T.UINT32, hp.n_vocab),
        "lfm2.shortconv.l_cache": (T.UINT32, hp.l_cache),
        "general.quantization_version": (T.UINT32, 2),
    }


def _vocab_metadata(tiny: TinyShape) -> dict[str, tuple[gguf.GGUFValueType, Any]]:
    T = gguf.GGUFValueType
    tokens, merges = tiny_tokens(tiny)
    n_pad = tiny.n_vocab - len(tokens)
    kinds = [CONTROL] * len(SPECIALS) + [NORMAL] * (len(tokens) - len(SPECIALS)) + [UNUSED] * n_pad
    return {
        "tokenizer.ggml.model": (T.STRING, "gpt2"),
        "tokenizer.ggml.pre": (T.STRING, "lfm2"),
        "tokenizer.ggml.tokens": (T.ARRAY, tokens + [f"[PAD{i}]" for i in range(len(tokens), tiny.n_vocab)]),
        "tokenizer.ggml.token_type": (T.ARRAY, kinds),
        "tokenizer.ggml.merges": (T.ARRAY, [f"{left} {right}" for left, right in merges]),
        "tokenizer.ggml.bos_token_id": (T.UINT32, BOS),
        "tokenizer.ggml.eos_token_id": (T.UINT32, EOS),
        "tokenizer.ggml.padding_token_id": (T.UINT32, PAD),
        "tokenizer.ggml.add_bos_token": (T.BOOL, True),
        "tokenizer.chat_template": (T.STRING, CHAT_TEMPLATE),
    }


def _type_of(name: str, types: Types) -> GGMLType:
    if isinstance(types, str):
        return GGMLType[types]
    return GGMLType[next((t for pattern, t in types.items() if re.search(pattern, name)), "F32")]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
