"""`lfm2cpp warmup`: compile kernels ahead of time, as the last step of an installation or of a container image."""

from __future__ import annotations

import time
from pathlib import Path

import click

from lfm2cpp.errors import OutputError, UsageError


@click.command()
@click.option("-m", "--model", type=click.Path(path_type=Path), metavar="FILE",
              help="Compile what this GGUF file needs; without it, what files of every type need, and the encoders.")
@click.option("--kv-type", metavar="TYPE", default="f16", show_default=True, help="With -m: the type of the KV cache.")
def warmup(model: Path | None, kv_type: str) -> None:
    """Compile the kernels for this CPU now, so that no first start has to wait. What is cached already stays.

    Exit 1 when the kernels cannot be kept.
    """
    from lfm2cpp.benchmark.machine import folder_is_writable
    from lfm2cpp.kernels.cache import KernelCache
    from lfm2cpp.kernels.library import library

    began = time.perf_counter()
    cache = KernelCache()
    names = _needed(model, kv_type)
    missing = [name for name in names if cache.read(name) is None]
    if missing and not folder_is_writable(cache.folder):
        raise OutputError(f"kernels cannot be kept in {cache.folder}; set LFM2CPP_CACHE_DIR to a writable folder")
    library().load(missing, _show)
    lost = [name for name in missing if cache.read(name) is None]
    if lost:
        raise OutputError(f"{len(lost)} kernels could not be kept in {cache.folder}; is the disk full?")
    click.echo(
        f"{len(names)} kernels ready in {cache.folder}: {len(missing)} compiled in {time.perf_counter() - began:.1f} s,"
        f" {len(names) - len(missing)} were there"
    )


def _needed(model: Path | None, kv_type: str) -> list[str]:
    from lfm2cpp.benchmark.kernel_names import all_kernels, file_kernels
    from lfm2cpp.engine.memory import KV_TYPES

    if kv_type not in KV_TYPES:
        raise UsageError(f"KV type {kv_type!r} is not one of {', '.join(KV_TYPES)}")
    if model is not None:
        return file_kernels(model, kv_type)
    from quant.encode import KERNELS, WEIGHTED_KERNELS

    return list(dict.fromkeys([*all_kernels(KV_TYPES), *KERNELS.values(), *WEIGHTED_KERNELS.values()]))


def _show(name: str, done: int, total: int) -> None:
    """A line a kernel: compiling one takes long enough to be read."""
    if name:
        click.echo(f"compiling {done + 1}/{total}: {name.removeprefix('lfm2cpp.kernels.')}", err=True)
