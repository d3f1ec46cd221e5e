"""What the GGUF types do to a weight, for training with it and for judging its effect.

The Q4_0 and Q8_0 here follow the formats; Q6_K is a plain nearest rounding without the search
that the real encoder does, so it is slightly worse than the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float16).to(torch.float32)


def _inverse(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == 0, 0.0, 1.0 / x)


def _signed_max(blocks: torch.Tensor) -> torch.Tensor:
    """Of each block the element of largest magnitude, with its sign."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


def round_q8_0(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.reshape(-1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (torch.round(blocks * _inverse(scale)) * _half(scale)).reshape(weight.shape)


def round_q4_0(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.reshape(-1, 32)
    scale = _signed_max(blocks) / -8
    steps = torch.floor(blocks * _inverse(scale) + 8.5).clamp(0, 15) - 8
    return (steps * _half(scale)).reshape(weight.shape)


def round_q6_k(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.reshape(-1, 16, 16)
    scale = _signed_max(blocks) / -32
    super_scale = _signed_max(scale.squeeze(-1)).unsqueeze(-1) / -128
    scale = torch.round(scale * _inverse(super_scale)).clamp(-128, 127) * _half(super_scale)
    steps = torch.round(blocks * _inverse(scale)).clamp(-32, 31)
    return (steps * scale).reshape(weight.shape)


def _rounded(name: str, weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What a GGUF of this kind holds: norms and convolution kernels stay as they are."""
    weight = weight.to(torch.bfloat16).to(torch.float32)
    if weight.ndim != 2 or kind == "BF16":
        return weight
    if kind == "Q8_0":
        return round_q8_0(weight)
    return round_q6_k(weight) if "embed_tokens" in name else round_q4_0(weight)


@contextmanager
def rounded_weights(model: torch.nn.Module, kind: str) -> Iterator[None]:
    """The model with its weights as a BF16, Q8_0 or Q4_0 file holds them; exact again after.

    A backward pass inside gives the gradient at the rounded weights, an optimizer step after it
    moves the exact ones: training learns weights that survive the rounding.
    """
    exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_rounded(name, parameter, kind))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(exact[name])
