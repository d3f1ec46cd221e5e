#!/usr/bin/env bash
# All tests of the kernels and the golden logits at every level that this machine can run: natively, as a Haswell (AVX2),
# a Cascade Lake (AVX-512 without GFNI), an Alder Lake (AVX-VNNI) and plain x86-64, and at each level picked by
# LFM2CPP_SIMD. About 20 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

"$PYTHON" -m pytest -q tests/test_kernels_words.py tests/test_kernels_mul_mat.py tests/test_kernels_ops.py \
    tests/test_kernels_attention.py tests/test_kernels_sample.py tests/test_engine_golden.py tests/test_engine_laws.py "$@"
"$PYTHON" -m pytest -q tests/test_kernels_levels.py --run-slow "$@"
