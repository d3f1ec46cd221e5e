"""A GGUF file with random weights in a true shape, without a checkpoint: for speed, memory and start-up, not for text.

Metadata, tensor names, types and order are those of a real file; the vocabulary is a stand-in of the real size. The
same shape, type and seed give the same bytes.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from lfm2cpp.arch import TensorEntry, iter_tensors, lfm2
from lfm2cpp.errors import UsageError
from lfm2cpp.ggml import QUANTIZATION_VERSION, FileType, GGMLType
from lfm2cpp.gguf import Metadata, TensorToWrite, Value, ValueType, write_gguf
from lfm2cpp.text.vocab import CONTROL, NORMAL, UNUSED, byte_symbols

from .random_blocks import RANDOM_TYPES, random_chunks
from .shapes import Shape

TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_0-pure", "Q4_1", "Q4_1-pure", "IQ4_NL", "IQ4_NL-pure", "Q5_0",
    "Q5_0-pure", "Q5_1", "Q5_1-pure", "Q4_K_M", "Q4_K_M-pure", "Q5_K_M", "Q5_K_M-pure", "Q6_K",
)  # fmt: skip
SPECIALS = (
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>",
    "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
    "<|tool_response_start|>", "<|tool_response_end|>",
)  # fmt: skip
PAD, BOS, EOS = 0, 1, 7
MAX_PIECE = 12  # byte symbols
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_random_model(
    path: str | os.PathLike[str],
    shape: Shape,
    file_type: str,
    *,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the file, atomically. `file_type` is one of TYPES; `progress(n)` hears of every n bytes of weights."""
    recipe_type, types = choose_types(shape, file_type)
    tensors = [
        TensorToWrite(entry.name, entry.shape, types[entry.name], partial(_data, entry, types[entry.name], seed))
        for entry in _entries(shape)
    ]
    write_gguf(path, _metadata(shape, recipe_type, seed), tensors, force=force, progress=progress)


def model_nbytes(shape: Shape, file_type: str) -> int:
    """Bytes of the weights."""
    _, types = choose_types(shape, file_type)
    return sum(TensorToWrite(e.name, e.shape, types[e.name], list).nbytes for e in _entries(shape))


def choose_types(shape: Shape, file_type: str) -> tuple[FileType, dict[str, GGMLType]]:
    """The type of every tensor, as quantizing a model of this shape would choose it. UsageError for an unknown name."""
    from quant.recipe import Subject, find_recipe
    from quant.recipe import choose_types as by_recipe

    known = {name.lower(): name for name in TYPES}.get(file_type.lower())
    if known is None:
        raise UsageError(f"unknown type {file_type!r}; choose one of: {' '.join(TYPES)}")
    recipe = find_recipe(known.removesuffix("-pure"))
    subjects = {e.name: Subject(e.name, e.shape, GGMLType.F32, e) for e in _entries(shape)}
    choices = by_recipe(recipe, subjects, pure=known.endswith("-pure"))
    types = {name: choice.ggml_type for name, choice in choices.items()}
    assert recipe.file_type is not None and set(types.values()) <= set(RANDOM_TYPES)
    return recipe.file_type, types


def _entries(shape: Shape) -> list[TensorEntry]:
    """All tensors in a file's order: those outside the layers first, then by layer and name."""
    entries = [e for e in iter_tensors(lfm2, shape.hparams()) if not e.spec.optional]
    return sorted(entries, key=lambda e: (e.il, e.name))


def _data(entry: TensorEntry, ggml_type: GGMLType, seed: int) -> Iterator[np.ndarray]:
    n_elements = int(np.prod(entry.shape, dtype=object))
    if len(entry.shape) == 1:
        rng = np.random.default_rng([seed, zlib.crc32(entry.name.encode())])
        yield (1 + 0.1 * rng.standard_normal(n_elements)).astype(np.float32)
    elif entry.name.endswith("shortconv.conv.weight"):
        yield from random_chunks(entry.name, ggml_type, n_elements, 0.5, seed)
    else:
        yield from random_chunks(entry.name, ggml_type, n_elements, entry.shape[1] ** -0.5, seed)


def _metadata(shape: Shape, file_type: FileType, seed: int) -> Metadata:
    hp = shape.hparams()
    pieces, types, merges = stand_in_vocabulary(shape.n_vocab, shape.n_pieces, seed)
    arch = lfm2.NAME
    return {
        "general.architecture": Value.string(arch),
        "general.type": Value.string("model"),
        "general.name": Value.string(f"LFM2 {shape.name} random weights"),
        "general.size_label": Value.string(shape.name),
        f"{arch}.block_count": Value.u32(hp.n_layer),
        f"{arch}.context_length": Value.u32(hp.n_ctx_train),
        f"{arch}.embedding_length": Value.u32(hp.n_embd),
        f"{arch}.feed_forward_length": Value.u32(hp.n_ff),
        f"{arch}.attention.head_count": Value.u32(hp.n_head),
        f"{arch}.attention.head_count_kv": Value.array(ValueType.INT32, hp.n_head_kv),
        f"{arch}.rope.freq_base": Value.f32(hp.rope_freq_base),
        f"{arch}.attention.layer_norm_rms_epsilon": Value.f32(hp.norm_rms_eps),
        "general.file_type": Value.u32(file_type),
        f"{arch}.vocab_size": Value.u32(hp.n_vocab),
        f"{arch}.shortconv.l_cache": Value.u32(hp.l_cache),
        "general.quantization_version": Value.u32(QUANTIZATION_VERSION),
        "tokenizer.ggml.model": Value.string("gpt2"),
        "tokenizer.ggml.pre": Value.string("lfm2"),
        "tokenizer.ggml.tokens": Value.strings(pieces),
        "tokenizer.ggml.token_type": Value.array(ValueType.INT32, types),
        "tokenizer.ggml.merges": Value.strings(merges),
        "tokenizer.ggml.bos_token_id": Value.u32(BOS),
        "tokenizer.ggml.eos_token_id": Value.u32(EOS),
        "tokenizer.ggml.padding_token_id": Value.u32(PAD),
        "tokenizer.ggml.add_bos_token": Value.bool_(True),
        "tokenizer.chat_template": Value.string(CHAT_TEMPLATE),
    }


def stand_in_vocabulary(n_vocab: int, n_pieces: int, seed: int) -> tuple[list[str], list[int], list[str]]:
    """(pieces, their types, merges): special tokens, bytes, pieces merged from earlier ones, [PADn] up to n_vocab."""
    symbols = byte_symbols()
    pieces, merges = [*SPECIALS, *symbols], []
    seen, pool = set(pieces), list(symbols)
    rng = random.Random(seed)
    while len(pieces) < n_pieces:
        left, right = (pool[int(rng.random() * len(pool))] for _ in range(2))
        piece = left + right
        if len(piece) <= MAX_PIECE and piece not in seen:
            seen.add(piece)
            pool.append(piece)
            pieces.append(piece)
            merges.append(f"{left} {right}")
    types = [CONTROL] * len(SPECIALS) + [NORMAL] * (n_pieces - len(SPECIALS)) + [UNUSED] * (n_vocab - n_pieces)
    pieces += [f"[PAD{i}]" for i in range(n_pieces, n_vocab)]
    return pieces, types, merges
