"""Random Lfm2ForCausalLM models of any small shape, made and saved by transformers: an oracle with nothing of ours.

    from hf_model import hf_model                       # needs torch: pytest.importorskip("torch") first
    hf = hf_model(tmp_path / "hf", hidden_size=128, conv_L_cache=4, layer_types=["conv", "full_attention"])
    hf.logits([1, 2, 3])                                # (3, n_vocab) float32
    convert hf.path with lfm2cpp.convert, run, compare

As a script it makes the stored results that tests without torch compare with:

    python tests/hf_model.py                            # rewrites tests/data/hf_golden.npz
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_model import TinyShape, tiny_hf, tokenizer_json

F32 = NDArray[np.float32]

GOLDEN = Path(__file__).parent / "data" / "hf_golden.npz"
# The shape, prompt and continuation behind GOLDEN; changing any of them means running this file again.
GOLDEN_SHAPE = dict(n_embd=128, n_layer=5, attention=(1, 3), n_head=4, n_head_kv=2, n_ff=256, n_vocab=288, seed=7)
GOLDEN_TOKENS = [1, 279, 272, 14, 200, 61, 61, 284, 3, 150, 99, 280, 33, 254, 17, 275, 70, 128, 6, 7]
GOLDEN_DECODE = 12

DEFAULTS: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "block_auto_adjust_ff_dim": False,
    "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"],
    "num_hidden_layers": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class HFModel:
    """A checkpoint directory and the model loaded from it, float32, eager."""

    path: Path
    model: Any

    def logits(self, tokens: Sequence[int]) -> F32:
        """(n_tokens, n_vocab), no cache"""
        return self._run(tokens).logits[0].numpy()

    def hidden_states(self, tokens: Sequence[int]) -> list[F32]:
        """The embedding, then each layer's output; the last one is after the final norm. (n_tokens, n_embd) each"""
        return [h[0].numpy() for h in self._run(tokens, output_hidden_states=True).hidden_states]

    def greedy(self, tokens: Sequence[int], n: int) -> list[int]:
        """The n most likely next tokens, with the cache; end-of-generation tokens do not end it."""
        import torch

        found: list[int] = []
        with torch.no_grad():
            out = self.model(torch.tensor([list(tokens)]), use_cache=True)
            for _ in range(n):
                found.append(int(out.logits[0, -1].argmax()))
                name = "cache" if "cache" in out else "past_key_values"  # the name since transformers 5.24, and before
                out = self.model(torch.tensor([found[-1:]]), use_cache=True, **{name: out[name]})
        return found

    def _run(self, tokens: Sequence[int], **options: Any) -> Any:
        import torch

        with torch.no_grad():
            return self.model(torch.tensor([list(tokens)]), use_cache=False, **options)


def hf_model(path: Path | str, *, seed: int = 0, dtype: str = "bfloat16", **config: Any) -> HFModel:
    """Make, save and load a model of this Lfm2Config (DEFAULTS fill in what is not given) with weights in `dtype`.

    The weights are N(0, 1/n_in) and norms near 1, not transformers' 0.02, which would hide most of the arithmetic
    behind the residual. A byte-level tokenizer.json lies beside it, so the directory converts.
    """
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    merged = {**DEFAULTS, **config}
    merged["num_hidden_layers"] = len(merged["layer_types"])
    model = Lfm2ForCausalLM(Lfm2Config(**merged))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.1 * noise)
            else:
                is_embedding = "embed_tokens" in name or "lm_head" in name
                parameter.copy_(noise * (0.1 if is_embedding else parameter[0].numel() ** -0.5))
    model.to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer = tokenizer_json(TinyShape(n_vocab=merged["vocab_size"]))
    (Path(path) / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return load_hf(path)


def load_hf(path: Path | str) -> HFModel:
    import torch
    from transformers import Lfm2ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # on tiny matrices the threads of torch wait for each other longer than they compute
    model = Lfm2ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return HFModel(Path(path), model.eval())


def make_golden(path: Path) -> None:
    """Run transformers on the tiny model of GOLDEN_SHAPE and store what it says."""
    import tempfile

    import transformers

    with tempfile.TemporaryDirectory() as folder:
        hf = load_hf(tiny_hf(folder, **GOLDEN_SHAPE))
        np.savez_compressed(
            path,
            transformers=transformers.__version__,
            logits=hf.logits(GOLDEN_TOKENS),
            hidden=np.stack(hf.hidden_states(GOLDEN_TOKENS)),
            greedy=hf.greedy(GOLDEN_TOKENS, GOLDEN_DECODE),
        )


if __name__ == "__main__":
    make_golden(GOLDEN)
