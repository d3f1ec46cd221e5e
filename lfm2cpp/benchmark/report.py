"""Results in llama-bench's formats: its table, and CSV, JSON and JSON lines with its keys.

Keys that have no meaning here carry what llama-bench writes for a CPU, so that scripts that compare runs work.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from lfm2cpp import __version__

from .machine import cpu_name
from .measure import Result, average, deviation

FORMATS = ("md", "csv", "json", "jsonl")
DEFAULT_N_BATCH = 512
_ROOT = Path(__file__).resolve().parents[2]

# Column -> width; negative is left-aligned, as in printf.
_WIDTHS = {
    "model": -30, "size": 10, "params": 10, "backend": -10, "threads": 7, "n_batch": 7, "type_k": 6, "type_v": 6,
    "test": 15, "t/s": 20,
}  # fmt: skip


@lru_cache(maxsize=1)
def build_commit() -> str:
    """The commit of a checkout, else the version."""
    if (_ROOT / ".git").exists():
        try:
            command = ["git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD"]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=5).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return __version__


def as_dict(result: Result) -> dict[str, Any]:
    """All of llama-bench's keys but the samples, in its order."""
    setup, test, model = result.setup, result.test, result.model
    return {
        "build_commit": build_commit(),
        "build_number": 0,
        "cpu_info": cpu_name(),
        "gpu_info": "",
        "backends": "CPU",
        "model_filename": model.filename,
        "model_type": model.type,
        "model_size": model.size,
        "model_n_params": model.n_params,
        "n_batch": setup.n_batch,
        "n_ubatch": setup.n_batch,
        "n_threads": setup.n_threads,
        "cpu_mask": "0x0",
        "cpu_strict": False,
        "poll": 50,
        "type_k": setup.kv_type,
        "type_v": setup.kv_type,
        "n_gpu_layers": 0,
        "n_cpu_moe": 0,
        "split_mode": "none",
        "main_gpu": 0,
        "no_kv_offload": False,
        "flash_attn": 1,
        "devices": "none",
        "tensor_split": "0.00",
        "tensor_buft_overrides": "none",
        "load_mode": "auto",
        "lazy_mode": "auto",
        "embeddings": False,
        "no_op_offload": 0,
        "no_host": False,
        "repack": False,
        "fit_target": 0,
        "fit_min_ctx": 0,
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "test_time": result.test_time,
        "avg_ns": round(average(result.samples_ns)),
        "stddev_ns": round(deviation(result.samples_ns)),
        "avg_ts": round(average(result.samples_ts), 6),
        "stddev_ts": round(deviation(result.samples_ts), 6),
    }


def with_samples(result: Result) -> dict[str, Any]:
    samples = {"samples_ns": result.samples_ns, "samples_ts": [round(ts, 6) for ts in result.samples_ts]}
    return {**as_dict(result), **samples}


def render(results: Iterable[Result], output: str, *, shown: tuple[str, ...] = ()) -> Iterator[str]:
    """The lines of a report in one of FORMATS, each as soon as its result is there.

    `shown` are columns of the table beyond the usual ones: n_batch, type_k, type_v.
    """
    return {"md": _markdown, "csv": _csv, "json": _json, "jsonl": _jsonl}[output](results, shown)


def _markdown(results: Iterable[Result], shown: tuple[str, ...]) -> Iterator[str]:
    columns = ("model", "size", "params", "backend", "threads", *shown, "test", "t/s")
    yield _row([_aligned(column, _WIDTHS[column]) for column in columns])
    widths = [_WIDTHS[column] for column in columns]
    yield _row(["-" * (abs(width) - 1) + (":" if width > 0 else "-") for width in widths])
    for result in results:
        cells = _cells(result)
        yield _row([_aligned(cells[column], _WIDTHS[column]) for column in columns])
    yield ""
    yield f"build: {build_commit()} (lfm2cpp {__version__})"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _aligned(text: str, width: int) -> str:
    return text.ljust(-width) if width < 0 else text.rjust(width)


def _cells(result: Result) -> dict[str, str]:
    size, n_params, setup = result.model.size, result.model.n_params, result.setup
    return {
        "model": result.model.type,
        "size": f"{size / 2**20:.2f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB",
        "params": f"{n_params / 1e6:.2f} M" if n_params < 1e9 else f"{n_params / 1e9:.2f} B",
        "backend": "CPU",
        "threads": str(setup.n_threads),
        "n_batch": str(setup.n_batch),
        "type_k": setup.kv_type,
        "type_v": setup.kv_type,
        "test": result.test.name,
        "t/s": f"{average(result.samples_ts):.2f} \u00b1 {deviation(result.samples_ts):.2f}",
    }


def _csv(results: Iterable[Result], shown: tuple[str, ...]) -> Iterator[str]:
    header_done = False
    for result in results:
        fields = as_dict(result)
        if not header_done:
            yield ",".join(fields)
            header_done = True
        line = io.StringIO()
        # llama-bench writes booleans as 0 and 1 here.
        values = [int(value) if isinstance(value, bool) else value for value in fields.values()]
        csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="").writerow(values)
        yield line.getvalue()


def _json(results: Iterable[Result], shown: tuple[str, ...]) -> Iterator[str]:
    yield from json_list(with_samples(result) for result in results)


def _jsonl(results: Iterable[Result], shown: tuple[str, ...]) -> Iterator[str]:
    for result in results:
        yield json.dumps(with_samples(result))


def json_list(items: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A JSON array, every item as soon as it is there."""
    yield "["
    for i, item in enumerate(items):
        yield (", " if i else "  ") + json.dumps(item, indent=2).replace("\n", "\n  ")
    yield "]"
