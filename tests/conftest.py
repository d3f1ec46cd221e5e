"""Settings of the whole suite that must come before NumPy is imported."""

from __future__ import annotations

import os

# The matrices of the tests are tiny: BLAS threads would wait for each other longer than they compute.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
