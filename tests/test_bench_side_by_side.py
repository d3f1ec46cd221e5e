"""The runner that puts us beside llama.cpp: who runs when, which numbers become ratios, what the report says.

llama.cpp's tools are played by a script that answers like them, with speeds that are known.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = "350M,n_embd=256,n_layer=2,attention=1,n_ff=256,n_vocab=512"

sys.path.append(str(ROOT / "bench"))
from peer import BatchedCase, Case, batched_speeds, whole_process  # noqa: E402
from report import load_results, report_lines, write_report  # noqa: E402
from side_by_side import batched, summary  # noqa: E402

LLAMA_BENCH = """#!{python}
import argparse, json, sys
parser = argparse.ArgumentParser()
for name in "mpndtro":
    parser.add_argument("-" + name)
args = parser.parse_args()
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
entries = [dict(n_prompt=int(p), n_gen=0, avg_ts=100.0) for p in args.p.split(",") if int(p)]
entries += [dict(n_prompt=0, n_gen=int(n), avg_ts=10.0) for n in args.n.split(",") if int(n)]
print(json.dumps([dict(e, build_commit="abc123", n_depth=int(args.d or 0)) for e in entries]))
"""

BATCHED_BENCH = """#!{python}
import sys
print("common_init: noise", file=sys.stderr)
for pl in sys.argv[sys.argv.index("-npl") + 1].split(","):
    print('{{"n_kv_max": 99, "pl": %s, "speed_tg": %s}}' % (pl, 5.0 * int(pl)), file=sys.stderr)
"""


def program(path: Path, source: str, **values: str) -> Path:
    path.write_text(source.format(python=sys.executable, **values))
    path.chmod(0o755)
    return path


@pytest.fixture
def llama_bench(tmp_path: Path) -> Path:
    return program(tmp_path / "llama-bench", LLAMA_BENCH, log=str(tmp_path / "log"))


def test_ratios_are_medians_of_rounds() -> None:
    """Not the ratio of medians: each round is a comparison of its own."""
    found = summary([10.0, 30.0, 20.0], [10.0, 10.0, 40.0])
    assert (found["ours"], found["theirs"], found["ratio"]) == (20.0, 10.0, 1.0)
    assert found["ratio_range"] == [0.5, 3.0]


def test_custom_part_end_to_end(tmp_path: Path, llama_bench: Path) -> None:
    command = [
        sys.executable, "bench/side_by_side.py", "--llama-bench", str(llama_bench), "--part", "custom", "--shape", TINY,
        "Q8_0", "-p", "5", "-n", "3", "-d", "0,64", "--rounds", "2", "-r", "1", "-t", "1", "--models",
        str(tmp_path / "models"), "--out", str(tmp_path), "--note", "A script.",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = load_results(tmp_path)
    rows = results["parts"]["custom"]["rows"]
    assert [(row["test"], row["depth"]) for row in rows] == [("pp5", 0), ("tg3", 0), ("pp5", 64), ("tg3", 64)]
    for row in rows:
        theirs = 100.0 if row["test"] == "pp5" else 10.0
        assert row["theirs"] == theirs and row["ours"] > 0
        low, high = row["ratio_range"]
        assert low <= row["ratio"] <= high
    assert results["opponent"] == {"name": "llama.cpp", "commit": "abc123", "note": "A script."}
    asked = (tmp_path / "log").read_text().splitlines()
    assert sum("-p 5 -n 3 -d 64 -t 1 -r 1 -o json" in line for line in asked) == 2  # a round each
    report = (tmp_path / "results.md").read_text()
    for text in ("A script.", "abc123", "| pp5 @ d64 |", "llama.cpp", "python bench/side_by_side.py"):
        assert text in report


def test_batched_speeds_are_read_from_either_stream(tmp_path: Path) -> None:
    fake = program(tmp_path / "llama-batched-bench", BATCHED_BENCH)
    case = BatchedCase(tmp_path / "any.gguf", 1, 16, 4, (1, 8))
    assert batched_speeds([str(fake)], case) == {"1": 5.0, "8": 40.0}


def test_batched_part_names_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    class Played:
        args = SimpleNamespace(batched_bench=Path("llama-batched-bench"), threads=2)

        def model(self, *_: str) -> Path:
            return Path("LFM2-350M-random-Q4_0.gguf")

        def in_turn(self, *_: object) -> dict[str, dict[str, object]]:
            return {pl: summary([2.0 * int(pl)], [1.0 * int(pl)]) for pl in ("1", "8")}

    rows = list(batched(Played()))
    assert [(row["test"], row["ratio"]) for row in rows] == [("1 sequence", 2.0), ("8 sequences", 2.0)]
    assert "8 sequences" in capsys.readouterr().out


def test_arguments_are_llama_bench_s() -> None:
    case = Case(Path("m.gguf"), 2, (16, 64), (), 4096)
    assert case.arguments(3) == "-m m.gguf -p 16,64 -n 0 -d 4096 -t 2 -r 3 -o json".split()


def test_failures_are_told(tmp_path: Path, llama_bench: Path) -> None:
    broken = program(tmp_path / "broken", "#!{python}\nimport os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    command = [sys.executable, "bench/side_by_side.py", "--llama-bench", str(broken), "--part", "custom", "--shape",
               TINY, "F32", "-p", "2", "--models", str(tmp_path), "--out", str(tmp_path), "-t", "1"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "SIGILL" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(SystemExit, match="failed"):
        whole_process([sys.executable, "-c", "raise SystemExit(3)"])


def test_whole_process_measures_time_and_memory() -> None:
    code = "import time; data = bytearray(200_000_000); data[::4096] = b'x' * len(data[::4096]); time.sleep(0.3)"
    seconds, megabytes = whole_process([sys.executable, "-c", code])
    assert 0.3 < seconds < 30 and 200 < megabytes < 400


EVERY_PART = {
    "machine": {"cpu": "C", "cores": 2, "level": "avx2", "memory": 8e9, "platform": "P", "python": "3", "versions": {}},
    "opponent": {"name": "llama.cpp", "commit": "abc", "note": ""},
    "parts": {
        part: {"date": "today", "commit": "def", "load_average": 0.1, "rounds": 3, "command": "python x", "rows": rows}
        for part, rows in {
            "decode": [{"model": "M", "threads": 1, "test": "tg9", "depth": 0, "ours": 2.0, "theirs": 1.0, "ratio": 2.0,
                        "ratio_range": [1.5, 2.5]}],
            "depth": [{"model": "M", "threads": 2, "test": "tg9", "depth": d, "ours": 2.0, "theirs": 1.0, "ratio": 2.0,
                       "ratio_range": [2.0, 2.0]} for d in (0, 64)],
            "generate": [{"model": "M", "threads": 2, "test": "run", "ours": 9.5, "theirs": 10.0, "ratio": 0.95,
                          "ratio_range": [0.9, 1.0]}],
            "profile": [{"model": "M", "n_threads": 2, "test": "tg9", "step_ns": 5e6, "share_of_limit": 0.9,
                         "ops_share": 0.98,
                         "limits": {"read_bytes_per_s": 4e10, "int8_macs_per_s": 5e11, "f32_macs_per_s": 1e11},
                         "weights_read_bytes_per_s": 3e10, "ops": [{"macs": 10, "bytes": 20}]}],
            "process": [{"model": "M", "threads": 2, "test": "first token", "file_megabytes": 220.0,
                         "ours_seconds": 0.5, "theirs_seconds": 0.4, "ours_megabytes": 400.0,
                         "theirs_megabytes": 500.0}],
            "files": [{"step": "350M: quantize to Q4_0", "ours_seconds": 1.0, "theirs_seconds": 2.0, "ratio": 2.0,
                       "ours_megabytes": 100.0, "theirs_megabytes": 200.0, "identical": True}],
        }.items()
    },
}  # fmt: skip


def test_report_of_every_part(tmp_path: Path) -> None:
    lines = report_lines(EVERY_PART, ["ratios.png"])
    text = "\n".join(lines)
    for expected in (
        "![ratios](ratios.png)", "| M | 1 | tg9 | 2.0 | 1.0 | **2.00** | 1.50, 2.50 |", "| tg9 @ d64 |", "**95.0%**",
        "**90%** | 98.0% |", "| 0.50 s | 0.40 s | 400 MB | 500 MB | 220 MB |", "| **2.00** | 100 MB | 200 MB | yes |",
    ):  # fmt: skip
        assert expected in text
    for table in text.split("\n\n"):  # every table is as wide in all of its lines
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1


def test_a_part_that_was_measured_elsewhere_says_so() -> None:
    files = {**EVERY_PART["parts"]["files"], "cpu": "D"}
    results = {**EVERY_PART, "parts": {**EVERY_PART["parts"], "files": files}}
    assert ["on D" in line for line in report_lines(results, []) if "commit def" in line].count(True) == 1


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "results.json").write_text(json.dumps(EVERY_PART))
    write_report(tmp_path)
    for name in ("ratios.png", "depth.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in (tmp_path / "results.md").read_text()
