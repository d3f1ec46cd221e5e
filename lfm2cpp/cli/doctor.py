"""`lfm2cpp doctor`: what this machine has, what was chosen, and how fast it can be. The first thing in a bug report."""

from __future__ import annotations

import json
from typing import Any

import click

from lfm2cpp.terminal import format_size

LABEL_WIDTH = 16


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
@click.option("--quick", is_flag=True, help="Do not measure bandwidth and multiply rates (2 seconds, up to 1 GB).")
def doctor(as_json: bool, quick: bool) -> None:
    """Show CPU features, threads, kernel cache, library versions, memory, and the speeds this machine reaches."""
    from lfm2cpp.benchmark.machine import describe_machine

    facts = describe_machine()
    facts["warnings"] = find_warnings(facts)
    facts["limits"] = [] if quick else measure(facts["threads"]["chosen"])
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        click.echo("\n".join(describe(facts)))


def measure(n_threads: int) -> list[dict[str, Any]]:
    from lfm2cpp.benchmark.limits import measure_limits

    from .loading import CompileProgress

    with CompileProgress() as progress:
        return [limits.to_json() for limits in measure_limits(sorted({1, n_threads}), progress)]


def find_warnings(facts: dict[str, Any]) -> list[str]:
    """What may be wrong, a sentence each with the remedy."""
    warnings = []
    for name, entry in facts["versions"].items():
        if entry["version"] is None and "tested" in entry:
            warnings.append(f"{name} is not installed; pip install --force-reinstall lfm2cpp")
        elif not entry.get("in_range", True):
            low, high = entry["tested"]
            warnings.append(f"{name} {entry['version']} is outside the tested range, {low} to {high}")
    cache = facts["kernel_cache"]
    if not cache["writable"]:
        warnings.append(
            f"kernels cannot be cached in {cache['folder']}, so every process compiles them anew; "
            "set LFM2CPP_CACHE_DIR to a writable folder"
        )
    level, best = facts["cpu"]["level"], facts["cpu"]["usable_levels"][0]
    if level != best:
        warnings.append(f"LFM2CPP_SIMD picks {level}, though this CPU has {best}")
    elif level == "generic":
        warnings.append("no SIMD level fits this CPU, so everything runs on the generic one, which is slow")
    for refused in facts["cpu"]["refused_levels"]:
        warnings.append(
            f"this CPU has {refused}, but Linux does not let this process use its registers, so prompts are slower; "
            "the kernel must be 5.16 or newer and the container must allow arch_prctl"
        )
    quota = facts["threads"]["cgroup_quota"]
    if quota is not None and quota < 1:
        warnings.append(f"the container may use {quota:g} of one CPU: expect pauses")
    return warnings


def _row(label: str, text: str) -> str:
    return f"  {label:<{LABEL_WIDTH}}{text}"


def describe(facts: dict[str, Any]) -> list[str]:
    """The facts as lines."""
    lines = [f"lfm2cpp {facts['lfm2cpp']}, Python {facts['python']}, {facts['platform']}", ""]
    for part in (_cpu_lines, _thread_lines, _memory_lines, _cache_lines, _version_lines, _limit_lines):
        lines += part(facts)
    lines.append("")
    lines += [f"Warning: {warning}" for warning in facts["warnings"]] or ["Nothing looks wrong."]
    return lines


def _cpu_lines(facts: dict[str, Any]) -> list[str]:
    cpu = facts["cpu"]
    level = cpu["level"] + (f" (LFM2CPP_SIMD={cpu['LFM2CPP_SIMD']})" if cpu["LFM2CPP_SIMD"] else "")
    override = f", NUMBA_CPU_NAME={cpu['NUMBA_CPU_NAME']}" if cpu["NUMBA_CPU_NAME"] else ""
    return [
        _row("CPU", f"{cpu['name']} ({cpu['machine']}, LLVM calls it {cpu['llvm_name']}{override})"),
        _row("SIMD level", f"{level}, of {', '.join(cpu['usable_levels'])}"),
        _row("features", " ".join(cpu["features"]) or "none that a level needs"),
    ]


def _thread_lines(facts: dict[str, Any]) -> list[str]:
    threads = facts["threads"]
    quota = "none" if threads["cgroup_quota"] is None else f"{threads['cgroup_quota']:g} CPUs"
    return [
        _row("threads", f"{threads['chosen']} chosen ({threads['physical']} physical cores, {threads['logical']} "
                        f"logical, {threads['affinity']} in the affinity, cgroup quota {quota})"),
    ]  # fmt: skip


def _memory_lines(facts: dict[str, Any]) -> list[str]:
    memory = facts["memory"]
    limit = "none" if memory["cgroup_limit"] is None else format_size(memory["cgroup_limit"])
    total, available = format_size(memory["total"]), format_size(memory["available"])
    return [_row("memory", f"{total}, {available} available, container limit {limit}")]


def _cache_lines(facts: dict[str, Any]) -> list[str]:
    cache = facts["kernel_cache"]
    state = f"{cache['cached']} of {cache['kernels']} kernels, {format_size(cache['nbytes'])}"
    older = f", {cache['older_folders']} folders of other versions beside it" if cache["older_folders"] else ""
    return [_row("kernel cache", cache["folder"]), _row("", f"{state}{older}")]


def _version_lines(facts: dict[str, Any]) -> list[str]:
    versions = facts["versions"]
    tested = [f"{name} {entry['version'] or 'missing'}" for name, entry in versions.items() if "tested" in entry]
    others = [f"{name} {entry['version'] or 'missing'}" for name, entry in versions.items() if "tested" not in entry]
    return [_row("libraries", ", ".join(tested)), _row("", ", ".join(others))]


def _limit_lines(facts: dict[str, Any]) -> list[str]:
    if not facts["limits"]:
        return [_row("speed", "not measured (--quick)")]
    lines = []
    for i, limits in enumerate(facts["limits"]):
        threads = f"{limits['n_threads']} thread{'s'[: limits['n_threads'] > 1]}"
        int8, vectors = limits["int8_macs_per_s"] / 1e9, limits["int8_vector_macs_per_s"] / 1e9
        in_vectors = f" (in vectors {vectors:.0f})" if vectors < int8 else ""
        lines.append(_row(
            "" if i else "speed",
            f"{threads}: reads {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, int8 {int8:.0f} G MAC/s{in_vectors}, "
            f"float32 {limits['f32_macs_per_s'] / 1e9:.0f} G MAC/s",
        ))  # fmt: skip
    return lines
