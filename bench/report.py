"""bench/results.json -> bench/results.md and pictures. Run by the measuring scripts; by hand: python bench/report.py

The pictures need matplotlib (pip install "lfm2cpp[bench]"); without it only the tables are written.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from lfm2cpp.benchmark.machine import describe_machine  # noqa: E402
from lfm2cpp.benchmark.report import build_commit  # noqa: E402

LOAD_AVERAGE = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before anything is measured
HERE = Path(__file__).resolve().parent

TITLES = {
    "decode": "Decode: one token after the other",
    "prefill": "Prefill: a prompt at once",
    "depth": "Behind a long context",
    "batched": "Several sequences decoding together",
    "load": "With another busy process on every core",
    "generate": "From `bench` to `run`: sampling and text included",
    "profile": "How near a step comes to what the machine can do",
    "process": "Whole processes",
    "files": "Converting and quantizing",
    "custom": "Also",
}
COMPARED = ("decode", "prefill", "depth", "batched", "load", "custom")


def load_results(folder: Path) -> dict[str, Any]:
    """What was measured so far."""
    if (folder / "results.json").exists():
        return json.loads((folder / "results.json").read_text())
    return {"machine": {}, "opponent": {}, "parts": {}}


def save_part(folder: Path, results: dict[str, Any], part: str, rows: list[dict[str, Any]], *, rounds: int) -> None:
    """Put a part's rows into results.json, with when, on what and how they were measured."""
    results["parts"][part] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": build_commit(),
        "load_average": LOAD_AVERAGE,
        "rounds": rounds,
        "cpu": _cpu(describe_machine()),
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *map(_without_folder, sys.argv[1:])]),
        "rows": rows,
    }
    results["machine"] = _machine()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def _without_folder(argument: str) -> str:
    """Where things lie on the machine that measured tells a reader nothing."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in argument.split(" "))


def _cpu(facts: dict[str, Any]) -> str:
    """What the system calls the CPU, and what LLVM does, which tells a Zen 4 from a Zen 5."""
    return f"{facts['cpu']['name']} ({facts['cpu']['llvm_name']})"


def _machine() -> dict[str, Any]:
    facts = describe_machine()
    return {
        "cpu": _cpu(facts),
        "level": facts["cpu"]["level"],
        "cores": facts["threads"]["physical"],
        "memory": facts["memory"]["total"],
        "platform": facts["platform"],
        "python": facts["python"],
        "versions": {name: v["version"] for name, v in facts["versions"].items() if "tested" in v},
    }


def write_report(folder: Path) -> None:
    """results.md from results.json, and the pictures when they can be drawn."""
    results = load_results(folder)
    names = draw_pictures(folder, results)
    (folder / "results.md").write_text("\n".join(report_lines(results, names)) + "\n")
    print(f"wrote {folder / 'results.md'}" + "".join(f", {name}" for name in names), flush=True)


# --- tables


def report_lines(results: dict[str, Any], pictures: list[str]) -> list[str]:
    lines = ["# Speed, memory and start-up", "", *_conditions(results), ""]
    for name in pictures:
        lines += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})", ""]
    for part, title in TITLES.items():
        if part in results["parts"]:
            lines += _part_lines(part, title, results["parts"][part], results["machine"])
    return lines[:-1]


def _conditions(results: dict[str, Any]) -> list[str]:
    machine, opponent = results["machine"], results["opponent"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [
        f"Machine: {machine.get('cpu')}, {machine.get('cores')} cores, level {machine.get('level')}, "
        f"{machine.get('memory', 0) / 1e9:.0f} GB, {machine.get('platform')}, Python {machine.get('python')}, "
        f"{versions}.",
    ]
    if opponent:
        note = f" {opponent['note']}" if opponent["note"] else ""
        lines.append(f"Beside it: {opponent['name']} at {opponent['commit']}.{note}")
    lines += [
        "",
        "Whole processes run in turn, the order changing every round; a ratio is the median of the rounds' ratios, "
        "with the smallest and the largest behind it. Above 1: lfm2cpp is faster. Speeds are medians, in tokens per "
        "second. "
        "The weights are random, in the true shapes (`lfm2cpp bench --random`).",
    ]
    return lines


def _part_lines(part: str, title: str, data: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    load = data.get("load_average")
    when = f"{data['date']}, commit {data['commit']}, {data['rounds']} rounds"
    when += f", load average {load:.1f} before" if load is not None else ""
    cpu = data.get("cpu", machine.get("cpu"))
    when += f", on {cpu}" if cpu != machine.get("cpu") else ""
    table = {"profile": _profile_table, "process": _process_table, "files": _files_table}.get(part)
    if table is None:
        table = _generate_table if part == "generate" else _ratio_table
    return [f"## {title}", "", f"{when}:", "", f"    {data['command']}", "", *table(data["rows"]), ""]


def _ratio_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | threads | test | lfm2cpp | llama.cpp | ratio | from, to |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['threads']} | {_test(row)} | {row['ours']:.1f} | {row['theirs']:.1f} "
            f"| **{row['ratio']:.2f}** | {_range(row)} |"
        )
    return lines


def _generate_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| model | threads | `run` | `bench` | share | from, to |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['threads']} | {row['ours']:.1f} | {row['theirs']:.1f} | **{row['ratio']:.1%}** "
            f"| {_range(row)} |"
        )
    return lines


def _profile_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | threads | test | step | limit reached | ops of the step | read GB/s | weights GB/s | int8 G MAC/s |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        limits = row["limits"]
        int8, vectors = (limits.get(f"int8{kind}_macs_per_s", 0.0) / 1e9 for kind in ("", "_vector"))
        in_vectors = f" (in vectors {vectors:.0f})" if 0.0 < vectors < int8 else ""
        lines.append(
            f"| {row['model']} | {row['n_threads']} | {row['test']} | {row['step_ns'] / 1e6:.2f} ms "
            f"| **{row['share_of_limit']:.0%}** | {row['ops_share']:.1%} | {limits['read_bytes_per_s'] / 1e9:.1f} "
            f"| {row['weights_read_bytes_per_s'] / 1e9:.1f} | {int8:.0f}{in_vectors} |"
        )
    return lines


def _process_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | test | lfm2cpp | llama.cpp | lfm2cpp peak | llama.cpp peak | file |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['test']} | {row['ours_seconds']:.2f} s | {row['theirs_seconds']:.2f} s "
            f"| {row['ours_megabytes']:.0f} MB | {row['theirs_megabytes']:.0f} MB | {row['file_megabytes']:.0f} MB |"
        )
    return lines


def _files_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| step | lfm2cpp | llama.cpp | ratio | lfm2cpp peak | llama.cpp peak | same bytes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['step']} | {row['ours_seconds']:.2f} s | {row['theirs_seconds']:.2f} s | **{row['ratio']:.2f}** "
            f"| {row['ours_megabytes']:.0f} MB | {row['theirs_megabytes']:.0f} MB "
            f"| {'yes' if row['identical'] else 'no'} |"
        )
    return lines


def _test(row: dict[str, Any]) -> str:
    return row["test"] + (f" @ d{row['depth']}" if row.get("depth") else "")


def _range(row: dict[str, Any]) -> str:
    low, high = row["ratio_range"]
    return f"{low:.2f}, {high:.2f}"


# --- pictures


def draw_pictures(folder: Path, results: dict[str, Any]) -> list[str]:
    """The names of the files drawn, in the order they are shown."""
    try:
        import matplotlib
    except ImportError:
        print('no pictures: matplotlib is missing; pip install "lfm2cpp[bench]"', flush=True)
        return [name for name in ("ratios.png", "depth.png", "roofline.png") if (folder / name).exists()]
    matplotlib.use("Agg")
    drawn = []
    for name, draw in (("ratios.png", _draw_ratios), ("depth.png", _draw_depth), ("roofline.png", _draw_roofline)):
        figure = draw(results["parts"])
        if figure is not None:
            figure.savefig(folder / name, dpi=110, bbox_inches="tight")
            drawn.append(name)
    return drawn


def _draw_ratios(parts: dict[str, Any]) -> Any:
    """A bar a test: how many times as fast as llama.cpp."""
    from matplotlib.figure import Figure

    rows = [row for part in COMPARED if part in parts for row in parts[part]["rows"]]
    if not rows:
        return None
    figure = Figure(figsize=(8, 0.26 * len(rows) + 1))
    axes = figure.subplots()
    labels = [f"{row['model']}, {_test(row)}, {row['threads']} thread{'s'[: row['threads'] > 1]}" for row in rows]
    ratios = [row["ratio"] for row in rows]
    errors = [[abs(row["ratio_range"][side] - row["ratio"]) for row in rows] for side in (0, 1)]
    colours = ["#2f7d4f" if ratio >= 1 else "#b5533c" for ratio in ratios]
    axes.barh(range(len(rows)), ratios, xerr=errors, color=colours, ecolor="#777777")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("speed of lfm2cpp over llama.cpp, median; lines: smallest to largest of the rounds")
    axes.margins(y=0.01)
    return figure


def _draw_depth(parts: dict[str, Any]) -> Any:
    """Speed and time a token over the depth of the context, both programs."""
    from matplotlib.figure import Figure

    if "depth" not in parts:
        return None
    rows = parts["depth"]["rows"]
    tests = list(dict.fromkeys(row["test"] for row in rows))
    figure = Figure(figsize=(9, 3.2 * len(tests)))
    grid = figure.subplots(len(tests), 2, squeeze=False)
    for (speed, cost), test in zip(grid, tests, strict=True):
        of_test = [row for row in rows if row["test"] == test]
        depths = [row["depth"] for row in of_test]
        for side, label, style in (("ours", "lfm2cpp", "o-"), ("theirs", "llama.cpp", "s--")):
            speed.plot(depths, [row[side] for row in of_test], style, label=label)
            cost.plot(depths, [1000 / row[side] for row in of_test], style, label=label)
        speed.set(title=f"{of_test[0]['model']}, {test}", xlabel="tokens of context", ylabel="tokens per second")
        cost.set(title="cost of a token", xlabel="tokens of context", ylabel="ms")
        for axes in (speed, cost):
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def _draw_roofline(parts: dict[str, Any]) -> Any:
    """Multiply-adds a second over multiply-adds a byte, below the roof of this machine."""
    import matplotlib
    from matplotlib.figure import Figure

    if "profile" not in parts:
        return None
    rows = parts["profile"]["rows"]
    read = max(max(r["limits"]["read_bytes_per_s"], r["weights_read_bytes_per_s"]) for r in rows)
    peak = max(r["limits"]["int8_macs_per_s"] for r in rows)
    f32 = max(r["limits"]["f32_macs_per_s"] for r in rows)
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
    intensities = [10 ** (i / 20) for i in range(-20, 81)]
    axes.loglog(intensities, [min(peak, read * x) / 1e9 for x in intensities], "k-", label="int8 roof")
    axes.loglog(intensities, [min(f32, read * x) / 1e9 for x in intensities], "k:", label="float32 roof")
    for row in rows:
        macs, nbytes = (sum(op[key] for op in row["ops"]) for key in ("macs", "bytes"))
        marker = "o" if row["test"].startswith("tg") else "^"
        axes.loglog([macs / nbytes], [macs / row["step_ns"]], marker, label=f"{row['model']} {row['test']}")
    axes.set(xlabel="multiply-adds a byte read", ylabel="G MAC/s of whole steps")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3, which="both")
    return figure


if __name__ == "__main__":
    write_report(HERE)
