"""Hugging Face's side: transformers in float32, eager, with every intermediate caught on the way.

The only module that imports torch. Modules are watched with hooks; what has no module of its own (the rotation, the
convolution) is watched by wrapping the function that modeling_lfm2 calls. Nothing is computed again on our side,
except B * X where an older transformers convolves it in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.arch.lfm2 import HParams
from lfm2cpp.errors import CheckpointError, UsageError

from .runners import Trace

INSTALL = 'pip install "lfm2cpp[parity]"'
CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before
MIN_TRANSFORMERS = 5  # before, a second prefill ignored the state of the convolution (transformers#42017)


class HFRunner:
    """Lfm2ForCausalLM of a checkpoint directory.

    Raises UsageError when torch or transformers cannot be used, CheckpointError when the directory cannot.
    """

    label = "transformers"

    def __init__(self, path: Path) -> None:
        torch, transformers = require_torch()
        _check_directory(path)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._torch = torch
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.model = _load(path, torch, transformers)
        self._modeling = __import__(type(self.model).__module__, fromlist=["_"])
        self.hparams = _hparams(self.model)
        self._trace: Trace = {}
        self._il = -1
        self._n_tokens = 0
        self._watch_modules()
        self.reset()

    def reset(self) -> None:
        self._cache: dict[str, Any] = {}

    def evaluate(self, tokens: Sequence[int]) -> Trace:
        """Append tokens to the cached sequence; every intermediate of these tokens, (n_tokens, width) float32."""
        self._trace, self._n_tokens = {}, len(tokens)
        ids = self._torch.tensor([list(tokens)])
        with self._torch.no_grad(), self._watched_functions():
            out = self.model(input_ids=ids, use_cache=True, **self._cache)
        name = next(name for name in CACHE_NAMES if name in out)
        self._cache = {name: out[name]}
        self._keep("result_output", out.logits)
        return self._trace

    def tensor(self, hf_name: str) -> NDArray[np.float32]:
        """One weight as loaded: float32."""
        return self.model.get_parameter(hf_name).detach().numpy()

    def has_tensor(self, hf_name: str) -> bool:
        return any(name == hf_name for name, _ in self.model.named_parameters())

    def _keep(self, name: str, x: Any) -> None:
        """x: (1, n_tokens, ...) -> trace[name]: (n_tokens, width)"""
        self._trace[name] = x.detach().reshape(x.shape[1], -1).numpy().copy()

    def _watch_modules(self) -> None:
        base = self.model.model
        self._watch_output(base.embed_tokens, "inp_embd")
        self._watch_output(base.embedding_norm, "result_norm")
        for il, layer in enumerate(base.layers):
            layer.register_forward_pre_hook(self._entering(il))
            self._watch_output(layer.operator_norm, f"attn_norm-{il}")
            self._watch_input(layer.ffn_norm, f"ffn_inp-{il}")
            self._watch_output(layer.ffn_norm, f"ffn_norm-{il}")
            self._watch_output(layer.feed_forward.w1, f"ffn_gate-{il}")
            self._watch_output(layer.feed_forward.w3, f"ffn_up-{il}")
            self._watch_input(layer.feed_forward.w2, f"ffn_swiglu-{il}")
            self._watch_output(layer.feed_forward.w2, f"ffn_out-{il}")
            self._watch_output(layer, f"l_out-{il}")
            if self.hparams.is_conv(il):
                self._watch_conv(layer.conv, il)
            else:
                self._watch_attention(layer.self_attn, il)

    def _watch_conv(self, conv: Any, il: int) -> None:
        self._watch_output(conv.in_proj, f"conv_in-{il}")
        self._watch_input(conv.out_proj, f"conv_out_gated-{il}")
        self._watch_output(conv.out_proj, f"conv_out-{il}")

        def keep_bx(module: Any, args: Any, output: Any) -> None:
            b, _, x = output.chunk(3, dim=-1)
            self._keep(f"bx-{il}", b * x)  # replaced by the convolution's own argument where that is visible

        conv.in_proj.register_forward_hook(keep_bx)

    def _watch_attention(self, attention: Any, il: int) -> None:
        for name in ("q", "k", "v"):
            self._watch_output(getattr(attention, f"{name}_proj"), f"{name}-{il}")
        self._watch_output(attention.q_layernorm, f"q_norm-{il}")
        self._watch_output(attention.k_layernorm, f"k_norm-{il}")
        self._watch_input(attention.out_proj, f"attn-{il}")
        self._watch_output(attention.out_proj, f"attn_out-{il}")

    def _watch_output(self, module: Any, name: str) -> None:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._keep(name, output[0] if isinstance(output, tuple) else output)

        module.register_forward_hook(hook)

    def _watch_input(self, module: Any, name: str) -> None:
        module.register_forward_pre_hook(lambda module, args: self._keep(name, args[0]))

    def _entering(self, il: int) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            self._il = il

        return hook

    @contextmanager
    def _watched_functions(self) -> Iterator[None]:
        """The functions of modeling_lfm2 that are watched, wrapped while the model runs."""
        wrappers = {
            "apply_rotary_pos_emb": self._wrap_rope,
            "causal_conv1d_fn": self._wrap_conv,
            "causal_conv1d_update": self._wrap_conv,
        }
        originals = {name: getattr(self._modeling, name, None) for name in wrappers}
        originals = {name: function for name, function in originals.items() if callable(function)}
        try:
            for name, function in originals.items():
                setattr(self._modeling, name, wrappers[name](function))
            yield
        finally:
            for name, function in originals.items():
                setattr(self._modeling, name, function)

    def _wrap_rope(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def rope(*args: Any, **kwargs: Any) -> Any:
            q, k = function(*args, **kwargs)  # (1, n_head, n_tokens, n_embd_head)
            self._keep(f"q_rope-{self._il}", q.transpose(1, 2))
            self._keep(f"k_rope-{self._il}", k.transpose(1, 2))
            return q, k

        return rope

    def _wrap_conv(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def conv(bx: Any, *args: Any, **kwargs: Any) -> Any:
            # (1, n_embd, columns): what is kept of earlier tokens may stand before the columns of these tokens
            self._keep(f"bx-{self._il}", bx[..., -self._n_tokens :].transpose(1, 2))
            out = function(bx, *args, **kwargs)
            self._keep(f"conv-{self._il}", out[..., -self._n_tokens :].transpose(1, 2))
            return out

        return conv


def require_torch() -> tuple[Any, Any]:
    """The modules torch and transformers. Raises UsageError when one is missing or too old."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UsageError(f"parity needs torch and transformers ({error}); install them with: {INSTALL}") from None
    found = transformers.__version__
    if int(found.split(".")[0]) < MIN_TRANSFORMERS:
        needed = f"parity needs {MIN_TRANSFORMERS}.0 or newer"
        raise UsageError(f"transformers is {found}, {needed}; install it with: {INSTALL}")
    return torch, transformers


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a directory; expected a Hugging Face checkpoint with config.json")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: has no config.json; expected a Hugging Face checkpoint")


def _load(path: Path, torch: Any, transformers: Any) -> Any:
    """The model in float32 with every weight from the file; anything made up by transformers is refused."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        if config.model_type != "lfm2":
            raise CheckpointError(f"{path}: model_type is {config.model_type!r}, expected 'lfm2'")
        model, info = transformers.Lfm2ForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: transformers cannot load it: {error}") from None
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = sorted(set(info["missing_keys"]) - tied)
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return model.eval()


def _hparams(model: Any) -> HParams:
    """What transformers runs, in our words; the FFN width is taken from the weight."""
    config = model.config
    heads = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
    rope = getattr(config, "rope_parameters", None) or {}
    return HParams(
        n_vocab=model.model.embed_tokens.weight.shape[0],
        n_ctx_train=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_ff=model.model.layers[0].feed_forward.w1.weight.shape[0],
        n_head=config.num_attention_heads,
        n_head_kv=tuple(heads),
        l_cache=config.conv_L_cache,
        norm_rms_eps=config.norm_eps,
        rope_freq_base=float(rope.get("rope_theta", getattr(config, "rope_theta", 0.0))),
    )
