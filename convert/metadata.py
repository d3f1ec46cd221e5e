"""Every metadata key of the file, in llama.cpp's order."""

from __future__ import annotations

from lfm2cpp.arch import lfm2
from lfm2cpp.ggml import QUANTIZATION_VERSION, FileType
from lfm2cpp.gguf import Metadata, Value, ValueType

from .vocab import Vocabulary

FILE_TYPES = {
    "f32": FileType.F32, "f16": FileType.F16, "bf16": FileType.BF16, "q8_0": FileType.Q8_0, "q4_0": FileType.Q4_0,
}  # fmt: skip


def build_metadata(
    general: Metadata,
    hparams: lfm2.HParams,
    head_dim: int | None,
    outtype: str,
    vocabulary: Vocabulary,
    special: Metadata,
) -> Metadata:
    """All keys. `general` are those after general.type, `special` those after the merges; `head_dim` if it is told."""
    metadata = {"general.architecture": Value.string(lfm2.NAME), "general.type": Value.string("model"), **general}
    metadata.update(_model_metadata(hparams, head_dim, FILE_TYPES[outtype]))
    metadata["general.quantization_version"] = Value.u32(QUANTIZATION_VERSION)
    metadata.update(_vocabulary_metadata(vocabulary))
    metadata.update(special)
    if outtype == "q4_0":
        # llama-quantize takes these two out and writes them anew, behind everything else.
        for key in ("general.quantization_version", "general.file_type"):
            metadata[key] = metadata.pop(key)
    return metadata


def _model_metadata(hp: lfm2.HParams, head_dim: int | None, file_type: FileType) -> Metadata:
    metadata = {
        "block_count": Value.u32(hp.n_layer),
        "context_length": Value.u32(hp.n_ctx_train),
        "embedding_length": Value.u32(hp.n_embd),
        "feed_forward_length": Value.u32(hp.n_ff),
        "attention.head_count": Value.u32(hp.n_head),
        "attention.head_count_kv": Value.array(ValueType.INT32, hp.n_head_kv),
        "rope.freq_base": Value.f32(hp.rope_freq_base),
        "attention.layer_norm_rms_epsilon": Value.f32(hp.norm_rms_eps),
    }
    if head_dim is not None:
        metadata["attention.key_length"] = metadata["attention.value_length"] = Value.u32(head_dim)
    result = {f"{lfm2.NAME}.{key}": value for key, value in metadata.items()}
    result["general.file_type"] = Value.u32(file_type)
    result[f"{lfm2.NAME}.vocab_size"] = Value.u32(hp.n_vocab)
    result[f"{lfm2.NAME}.shortconv.l_cache"] = Value.u32(hp.l_cache)
    return result


def _vocabulary_metadata(vocabulary: Vocabulary) -> Metadata:
    metadata = {
        "tokenizer.ggml.model": Value.string("gpt2"),
        "tokenizer.ggml.pre": Value.string(vocabulary.pre),
        "tokenizer.ggml.tokens": Value.strings(vocabulary.tokens),
        "tokenizer.ggml.token_type": Value.array(ValueType.INT32, vocabulary.types),
    }
    if vocabulary.merges:
        metadata["tokenizer.ggml.merges"] = Value.strings(vocabulary.merges)
    return metadata
