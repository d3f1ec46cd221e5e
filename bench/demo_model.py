"""The demonstration model: its shape, and how it is written as a Hugging Face checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, Lfm2Config, Lfm2ForCausalLM

from bench.demo_tokenizer import BOS, CHAT_TEMPLATE, IM_END, PAD, SPECIAL_TOKENS

TOKENIZER_SIZE = 1500
# Larger than the tokenizer, as in LFM2: the rows in between are padding and never sampled.
VOCAB_SIZE = 1536
N_CTX_TRAIN = 2048
LAYER_TYPES = ("conv", "full_attention", "conv", "full_attention", "conv", "full_attention")


def build_model(seed: int) -> Lfm2ForCausalLM:
    """The untrained model in float32: width 256, FFN width 512 (written as 768, as LFM2 does)."""
    torch.manual_seed(seed)
    config = Lfm2Config(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=768,
        block_auto_adjust_ff_dim=True, block_multiple_of=256, block_ffn_dim_multiplier=1.0,
        num_hidden_layers=len(LAYER_TYPES), layer_types=list(LAYER_TYPES),
        full_attn_idxs=[i for i, kind in enumerate(LAYER_TYPES) if kind == "full_attention"],
        num_attention_heads=4, num_key_value_heads=2, conv_L_cache=3, conv_bias=False,
        norm_eps=1e-5, max_position_embeddings=N_CTX_TRAIN, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        bos_token_id=BOS, eos_token_id=IM_END, pad_token_id=PAD,
    )  # fmt: skip
    return Lfm2ForCausalLM(config)


def save_checkpoint(model: Lfm2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write BF16 weights, the configuration, the tokenizer and the template; replaces folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rounded = build_model(0).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    # Its answers are right or wrong: always the most likely token.
    rounded.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=IM_END, pad_token_id=PAD, do_sample=True, top_k=1,
        temperature=1.0, repetition_penalty=1.0,
    )  # fmt: skip
    rounded.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written readable by its owner only
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {
                "content": text, "lstrip": False, "normalized": False, "rstrip": False,
                "single_word": False, "special": True,
            }
            for token_id, text in enumerate(SPECIAL_TOKENS)
        },
        "bos_token": SPECIAL_TOKENS[BOS],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL_TOKENS[IM_END],
        "model_max_length": N_CTX_TRAIN,
        "pad_token": SPECIAL_TOKENS[PAD],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def load_checkpoint(folder: Path) -> tuple[Lfm2ForCausalLM, Tokenizer]:
    """The saved BF16 weights, run in float32 with eager attention."""
    model = Lfm2ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
