"""Every threshold of the parity check, with its reason. Errors are relative RMS unless said otherwise."""

from __future__ import annotations

from lfm2cpp.ggml import GGMLType

# An F32 file: what two float32 implementations that only add in another order stay below (numeric contract, 1).
FLOAT32 = 1e-5
# ... except where transformers' own float32 is farther than that from exact arithmetic, in deep stacks of random
# weights: ours may then be this many times as far from transformers as transformers is from float64.
ROUNDING_RATIO = 3.0
# ... and beyond this it is no rounding but another function.
ROUNDING_MAX = 1e-4
FLOAT32_KL = 1e-6  # nats

# Other files: one operation of ours against float64 on the same inputs.
EXACT_OP = 1e-5  # norms, rotation, gates, convolution, residuals: no rounding is allowed there
F16_KV_ATTENTION = 1e-3  # 2^-11 on each key and value, seen through one softmax
LINEAR_RATIO = 1.5  # times the error of exact arithmetic on rounded activations

# Other files, whole: against transformers, times the error of the reference with rounded activations. Nearly all of
# it is the file's own loss, the same on both sides; on the golden checkpoint llama.cpp's logits are within 0.3 % of
# this figure for BF16, Q8_0, Q6_K and both kinds of Q4_0. The rest depends on how the roundings fall, which averages
# out with more tokens: see `slack`. Measured for the engine over six seeds: at most 1.07 at 24 tokens, 1.17 at 2.
FILE_RATIO = 1.15

# GGUF weight against the checkpoint's, for the worst row. The block types' figures are the worst that one block can
# do: half a step, over the RMS of a block that is one outlier and near-zeros; Q4_0 also cuts the opposite extreme, and
# the 6-bit scales and minima of Q4_K and Q5_K are rounded, too.
WEIGHT = {
    GGMLType.F32: 1e-7,
    GGMLType.F16: 1e-3,
    GGMLType.BF16: 4e-3,
    GGMLType.Q8_0: 1.5e-2,
    GGMLType.Q6_K: 5e-2,
    GGMLType.Q5_K: 0.18,
    GGMLType.Q4_K: 0.28,
    GGMLType.Q5_0: 0.13,
    GGMLType.Q5_1: 0.13,
    GGMLType.Q4_1: 0.25,
    GGMLType.IQ4_NL: 0.25,
    GGMLType.Q4_0: 0.25,
}


def slack(n_tokens: int) -> float:
    """FILE_RATIO, wider for few tokens."""
    return FILE_RATIO + 0.5 / n_tokens**0.5
