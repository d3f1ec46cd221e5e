"""bench speaks llama-bench's language: ranges, tests, columns, keys; and refuses what cannot be measured."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from lfm2cpp.benchmark.measure import Test as BenchTest
from lfm2cpp.benchmark.measure import average, deviation
from lfm2cpp.benchmark.random_model import write_random_model
from lfm2cpp.benchmark.ranges import parse_range
from lfm2cpp.benchmark.shapes import find_shape
from lfm2cpp.cli.bench import bench
from lfm2cpp.errors import UsageError

TINY = "350M,n_embd=256,n_layer=3,attention=1,n_ff=512,n_vocab=1024,n_ctx_train=512"
ROOT = Path(__file__).resolve().parents[1]

# The keys of llama-bench -o json (ggml 0.25.3), in its order.
LLAMA_BENCH_KEYS = """
    build_commit build_number cpu_info gpu_info backends model_filename model_type model_size model_n_params n_batch
    n_ubatch n_threads cpu_mask cpu_strict poll type_k type_v n_gpu_layers n_cpu_moe split_mode main_gpu no_kv_offload
    flash_attn devices tensor_split tensor_buft_overrides load_mode lazy_mode embeddings no_op_offload no_host repack
    fit_target fit_min_ctx n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts stddev_ts
""".split()
# What llama-batched-bench --output-format jsonl says about a row.
BATCHED_KEYS = ["pp", "tg", "pl", "n_kv", "t_pp", "speed_pp", "t_tg", "speed_tg", "t", "speed"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    write_random_model(path, find_shape(TINY), "Q4_0")
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(bench, [str(arg) for arg in args])


def report(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


# --- ranges


@pytest.mark.parametrize(("text", "numbers"), [
    ("512", [512]),
    ("1,2,4", [1, 2, 4]),
    ("1-4", [1, 2, 3, 4]),
    ("128-512+128", [128, 256, 384, 512]),
    ("64-512*2", [64, 128, 256, 512]),
    ("100-512*3", [100, 300]),
    ("0-10+4", [0, 4, 8]),
    ("7-7", [7]),
    ("8,1-3,16-64*4", [8, 1, 2, 3, 16, 64]),
])  # fmt: skip
def test_ranges(text: str, numbers: list[int]) -> None:
    assert parse_range(text) == numbers


@pytest.mark.parametrize("text", [
    "", ",", "1,", "a", "-5", "1-", "1-2+", "1-2+0", "1-8*1", "1-8*0", "0-8*2", "5-1", "1-2-3", "1+2", "1.5", "1-9/3",
    "12345678901", "1-999999999",
])  # fmt: skip
def test_bad_ranges(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        parse_range(text)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 300))
def test_a_sum_range_is_python_s(first: int, length: int, step: int) -> None:
    assert parse_range(f"{first}-{first + length}+{step}") == list(range(first, first + length + 1, step))


@given(st.text(max_size=12))
def test_any_text_is_numbers_or_a_value_error(text: str) -> None:
    try:
        assert all(number >= 0 for number in parse_range(text))
    except ValueError:
        pass


# --- tests and their statistics


@pytest.mark.parametrize(("test", "name"), [
    (BenchTest(512, 0), "pp512"),
    (BenchTest(0, 128), "tg128"),
    (BenchTest(512, 128), "pp512+tg128"),
    (BenchTest(512, 0, 4096), "pp512 @ d4096"),
    (BenchTest(16, 8, 1), "pp16+tg8 @ d1"),
])  # fmt: skip
def test_names(test: BenchTest, name: str) -> None:
    assert test.name == name


def test_statistics_are_of_a_sample() -> None:
    samples = [3.0, 5.0, 10.0]
    assert average(samples) == 6.0
    assert math.isclose(deviation(samples), math.sqrt((9 + 1 + 16) / 2))
    assert deviation([4.0]) == 0.0


# --- reports


def test_table_is_llama_bench_s(model: Path) -> None:
    lines = report("-m", model, "-p", 8, "-n", 2, "-pg", "4,2", "-d", "0,70", "-t", 1, "-r", 2).splitlines()
    assert lines[:2] == [
        "| model                          |       size |     params | backend    | threads |            test |"
        "                  t/s |",
        "| ------------------------------ | ---------: | ---------: | ---------- | ------: | --------------: |"
        " -------------------: |",
    ]
    rows = [line.split("|") for line in lines[2:8]]
    assert [row[6].strip() for row in rows] == ["pp8", "tg2", "pp4+tg2", "pp8 @ d70", "tg2 @ d70", "pp4+tg2 @ d70"]
    assert {len(line) for line in lines[:8]} == {len(lines[0])}
    for row in rows:
        assert row[1].strip() == "lfm2 ?B Q4_0" and row[4].strip() == "CPU" and row[5].strip() == "1"
        assert re.fullmatch(r"\d+\.\d\d \u00b1 \d+\.\d\d", row[7].strip())
    assert lines[8] == "" and lines[9].startswith("build: ")


def test_columns_appear_when_they_differ_from_the_default(model: Path) -> None:
    header = report("-m", model, "-p", 4, "-n", 0, "-r", 1, "--kv-type", "f16,f32", "-b", 64).splitlines()[0]
    names = ["threads", "n_batch", "type_k", "type_v", "test", "t/s"]
    assert [cell.strip() for cell in header.split("|")[5:-1]] == names


def test_json_has_llama_bench_s_keys(model: Path) -> None:
    entries = json.loads(report("-m", model, "-p", "4,8", "-n", 2, "-t", "1-2", "-r", 3, "-o", "json"))
    assert [(e["n_threads"], e["n_prompt"], e["n_gen"]) for e in entries] == [
        (1, 4, 0), (1, 8, 0), (1, 0, 2), (2, 4, 0), (2, 8, 0), (2, 0, 2),
    ]  # fmt: skip
    for e in entries:
        assert list(e) == [*LLAMA_BENCH_KEYS, "samples_ns", "samples_ts"]
        assert len(e["samples_ns"]) == len(e["samples_ts"]) == 3
        n_tokens = e["n_prompt"] + e["n_gen"]
        for ns, ts in zip(e["samples_ns"], e["samples_ts"], strict=True):
            assert math.isclose(ts, 1e9 * n_tokens / ns, rel_tol=1e-4)
        assert math.isclose(e["avg_ts"], statistics.mean(e["samples_ts"]), rel_tol=1e-6)
        assert math.isclose(e["stddev_ts"], statistics.stdev(e["samples_ts"]), rel_tol=1e-3, abs_tol=1e-5)
        assert math.isclose(e["avg_ns"], statistics.mean(e["samples_ns"]), rel_tol=0, abs_tol=1)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", e["test_time"])


def test_model_is_described_as_llama_cpp_does(model: Path) -> None:
    (entry,) = json.loads(report("-m", model, "-p", 1, "-n", 0, "-r", 1, "-o", "json"))
    n_embd, n_ff, n_vocab = 256, 512, 1024
    conv = 3 * n_embd**2 + n_embd**2 + 3 * n_embd
    attention = 2 * n_embd**2 + 2 * 256 * n_embd + 2 * 64  # as many KV heads as heads
    shared = 3 * n_ff * n_embd + 2 * n_embd
    assert entry["model_n_params"] == n_vocab * n_embd + n_embd + 2 * conv + attention + 3 * shared
    assert entry["model_filename"] == str(model)
    assert entry["model_size"] < model.stat().st_size


def test_csv_and_json_lines_carry_the_same(model: Path) -> None:
    args = ("-m", model, "-p", 4, "-n", 2, "-r", 2)
    rows = list(csv.DictReader(report(*args, "-o", "csv").splitlines()))
    lines = [json.loads(line) for line in report(*args, "-o", "jsonl").splitlines()]
    assert len(rows) == len(lines) == 2
    assert list(rows[0]) == LLAMA_BENCH_KEYS and list(lines[0]) == [*LLAMA_BENCH_KEYS, "samples_ns", "samples_ts"]
    for key in LLAMA_BENCH_KEYS:
        if not key.startswith(("avg_", "stddev_", "test_time")):
            found = lines[0][key]
            assert rows[0][key] == (str(int(found)) if isinstance(found, bool) else str(found))


def test_llama_cpp_s_compare_script_finds_its_keys(model: Path) -> None:
    """The keys that scripts/compare-llama-bench.py refuses to do without."""
    needed = set("""
        cpu_info gpu_info backends n_gpu_layers n_cpu_moe tensor_buft_overrides model_filename model_type n_batch
        n_ubatch embeddings cpu_mask cpu_strict poll n_threads type_k type_v load_mode no_kv_offload split_mode main_gpu
        tensor_split flash_attn n_prompt n_gen n_depth fit_target fit_min_ctx build_commit test_time avg_ts
    """.split())
    assert needed <= set(json.loads(report("-m", model, "-p", 1, "-n", 0, "-r", 1, "-o", "jsonl")))


def test_a_table_of_batches_keeps_its_width() -> None:
    """However fast: decimals go before digits do."""
    from lfm2cpp.benchmark.batched import BatchedResult, BatchedTest, header, row

    def line(seconds: float) -> str:
        return row(BatchedResult(None, BatchedTest(16, 16, 1, False), seconds, seconds))

    assert {len(line(seconds)) for seconds in (1e-5, 1e-4, 0.0031, 2.5)} == {len(header()[0])}
    assert [column.strip() for column in line(1e-5).split("|")][6] == "1600000"


def test_batched(model: Path) -> None:
    args = ("-m", model, "--batched", "-p", 16, "-n", 3, "-npl", "1,5", "-r", 1)
    lines = report(*args).splitlines()
    assert lines[2] == (
        "|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |"
    )
    assert {len(line) for line in lines[2:6]} == {len(lines[2])}
    first, second = (json.loads(line) for line in report(*args, "-o", "jsonl").splitlines())
    assert set(BATCHED_KEYS) <= set(first)
    assert (first["pl"], first["n_kv"], second["pl"], second["n_kv"]) == (1, 19, 5, 95)
    assert math.isclose(second["speed_tg"], 5 * 3 / second["t_tg"])
    assert math.isclose(second["speed_pp"], 5 * 16 / second["t_pp"])
    assert math.isclose(second["speed"], 95 / (second["t_pp"] + second["t_tg"]))
    shared = json.loads(report(*args, "-pps", "-o", "jsonl").splitlines()[1])
    assert shared["n_kv"] == 16 + 15 and math.isclose(shared["speed_pp"], 16 / shared["t_pp"])


def test_more_sequences_than_the_pool_was_made_for(model: Path) -> None:
    (line,) = report("-m", model, "--batched", "-p", 65, "-n", 1, "-npl", 40, "-r", 2, "-o", "jsonl").splitlines()
    assert json.loads(line)["n_kv"] == 40 * 66


# --- what is refused


@pytest.mark.parametrize("args", [
    ["-r", 0], ["-r", -1], ["-t", 0], ["-t", 513], ["-p", "5-1"], ["-n", "x"], ["-d", "-1"], ["-pg", "8"],
    ["-pg", "0,1"], ["-pg", "1,2,3"], ["-b", 0], ["-o", "/nowhere/report"], ["-o", "sql"], ["--nonsense"],
])  # fmt: skip
def test_bad_usage(model: Path, args: list[object]) -> None:
    result = run("-m", model, *args)
    assert result.exit_code == 2 and result.stdout == ""


@pytest.mark.parametrize("args", [
    ["-npl", 3], ["-pps"], ["--seed", 5], ["--force"], ["-pg", "8,8", "--profile"], ["-pg", "8,8", "--batched"],
])  # fmt: skip
def test_options_that_would_do_nothing(model: Path, args: list[object]) -> None:
    result = run("-m", model, *args)
    assert isinstance(result.exception, UsageError) and str(args[0]) in str(result.exception) and result.stdout == ""


@pytest.mark.parametrize(("args", "message"), [
    (["-p", 0, "-n", 0], "nothing to measure"),
    (["-p", 513, "-n", 0], "513"),
    (["-p", 8, "-n", 0, "-d", 510], "518"),
    (["-pg", "500,13", "-p", 0, "-n", 0], "513"),
    (["--kv-type", "q3"], "q3"),
    (["--batched", "-d", 4], "depth"),
    (["--batched", "--profile"], "not both"),
    (["--batched", "-o", "csv"], "jsonl"),
    (["--profile", "-o", "csv"], "jsonl"),
    (["--batched", "-p", 0, "-n", 0], "nothing to measure"),
])  # fmt: skip
def test_what_cannot_be_measured(model: Path, args: list[object], message: str) -> None:
    result = run("-m", model, *args)
    assert getattr(result.exception, "exit_code", None) == 2, result.exception
    assert message in str(result.exception)


def test_no_model() -> None:
    result = CliRunner(env={"LFM2_MODEL": "", "LLAMA_ARG_MODEL": ""}).invoke(bench, [])
    assert getattr(result.exception, "exit_code", None) == 2 and "-m FILE" in str(result.exception)


def test_missing_file_is_an_operation_that_failed(tmp_path: Path) -> None:
    result = run("-m", tmp_path / "no.gguf")
    assert getattr(result.exception, "exit_code", None) == 1 and "no.gguf" in str(result.exception)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_and_closed_pipe(model: Path) -> None:
    command = [sys.executable, "-m", "lfm2cpp", "bench", "-m", str(model), "-p", "1", "-n", "0", "-r", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "error: " in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.DEVNULL).returncode == 141
    finally:
        os.close(writer)
