"""20,000 mutated GGUF headers: refused with one line or read, within 50 ms of CPU time and 100 MB of memory each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny_model import tiny_gguf

N_MUTATIONS = 20_000
MAX_SECONDS = 0.05


def test_mutated_headers(tmp_path: Path) -> None:
    base = tiny_gguf(
        tmp_path / "base.gguf", n_embd=32, n_layer=2, attention=(1,), n_head=2, n_head_kv=1, n_ff=32, n_vocab=288
    )
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, here / "fuzz_gguf.py", base, str(N_MUTATIONS), "1", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["refused"] + result["accepted"] == N_MUTATIONS
    # Neither does the reader refuse everything, nor are the mutations harmless, nor do all stop at the same check.
    assert result["accepted"] > 100 and result["refused"] > N_MUTATIONS // 2 and result["messages"] > 100
    assert result["slowest"] < MAX_SECONDS
