"""5,000 mutated safetensors headers: refused with one line or read, within 50 ms of CPU time and 100 MB of memory each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from convert_variants import SMALL
from tiny_model import tiny_hf

N_MUTATIONS = 5_000
MAX_SECONDS = 0.05


def test_mutated_headers(tmp_path: Path) -> None:
    checkpoint = tiny_hf(tmp_path / "hf", **SMALL)
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, here / "fuzz_safetensors.py", checkpoint, str(N_MUTATIONS), "1"]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["refused"] + result["accepted"] == N_MUTATIONS
    # Neither is everything refused, nor are the mutations harmless, nor do all stop at the same check.
    assert result["accepted"] > 20 and result["refused"] > N_MUTATIONS * 3 // 4 and result["messages"] > 60
    assert result["slowest"] < MAX_SECONDS
