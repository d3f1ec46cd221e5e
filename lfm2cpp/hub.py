"""GGUF files of the Hugging Face hub, through huggingface_hub: its cache, its tokens, its resumed downloads."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import LFM2Error, UsageError

# Which file of a repository, when nobody says: the quickest first.
PREFERRED = ("Q4_0", "Q8_0", "Q4_K_M")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<quant>[\w.-]+))?")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def parse_hub_id(name: str) -> tuple[str, str | None] | None:
    """`user/repo` or `user/repo:quant` -> (repo id, quant or None); None when `name` is neither."""
    match = _HUB_ID.fullmatch(name)
    return (match["repo"], match["quant"]) if match else None


def download(
    repo_id: str,
    filename: str | None = None,
    *,
    quant: str | None = None,
    offline: bool = False,
    **options: Any,
) -> Path:
    """The local path of one GGUF of a repository (of its first shard, with the others beside it), fetched if needed.

    `filename` is a glob; without it `quant` is looked for in the names. `options` go to hf_hub_download (cache_dir,
    local_dir, revision, token). Raises LFM2Error with the files there are when none or several fit.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UsageError(f"{ascii(repo_id)} is no hub id, expected user/repo")
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        if offline:
            return _from_cache(repo_id, filename, quant, options)
        from huggingface_hub import hf_hub_download, list_repo_files

        files = list_repo_files(repo_id, revision=options.get("revision"), token=options.get("token"))
        chosen = choose(repo_id, files, filename, quant)
        paths = [hf_hub_download(repo_id, name, **options) for name in [chosen, *_other_shards(chosen, files)]]
        return Path(paths[0])
    except LFM2Error:
        raise
    except Exception as error:  # huggingface_hub raises dozens of classes, several of them from other packages
        raise LFM2Error(_explain(repo_id, error)) from None


def choose(repo_id: str, files: Sequence[str], filename: str | None, quant: str | None) -> str:
    """The one file that `filename` (a glob) or `quant` means; of a split model its first shard."""
    ggufs = sorted(f for f in files if f.lower().endswith(".gguf") and "mmproj" not in f.lower())
    firsts = [f for f in ggufs if not (m := _SHARD.search(f)) or m[1] == "00001"]
    if filename is not None:
        found = [f for f in firsts if fnmatch.fnmatch(f, filename) or fnmatch.fnmatch(Path(f).name, filename)]
    elif quant is not None:
        found = [f for f in firsts if re.search(rf"(^|[-._/]){re.escape(quant)}[-._]", f, re.IGNORECASE)]
    else:
        ranked = (([f for f in firsts if re.search(rf"[-._]{q}[-._]", f)]) for q in PREFERRED)
        found = next((fs for fs in ranked if fs), firsts[:1])
    if len(found) == 1:
        return found[0]
    wanted = filename or quant or "*.gguf"
    problem = "no file matches" if not found else f"{len(found)} files match"
    listed = ", ".join(found or firsts or ["no GGUF file at all"])
    raise LFM2Error(f"{repo_id}: {problem} {ascii(wanted)}; there are: {listed}")


def _other_shards(first: str, files: Sequence[str]) -> list[str]:
    match = _SHARD.search(first)
    if not match:
        return []
    stem = first[: match.start()]
    return sorted(f for f in files if f != first and f.startswith(stem) and _SHARD.search(f))


def _from_cache(repo_id: str, filename: str | None, quant: str | None, options: dict[str, Any]) -> Path:
    """The file among those downloaded before; touches no network."""
    from huggingface_hub import snapshot_download

    options = {k: v for k, v in options.items() if k in ("cache_dir", "local_dir", "revision")}
    root = Path(snapshot_download(repo_id, local_files_only=True, allow_patterns=["*.gguf"], **options))
    files = [path.relative_to(root).as_posix() for path in root.rglob("*.gguf")]
    return root / choose(repo_id, files, filename, quant)


def _explain(repo_id: str, error: Exception) -> str:
    """One line for whatever huggingface_hub raised, with the remedy where there is one."""
    kind = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if kind == "GatedRepoError" or status == 403:
        return f"{repo_id}: access must be requested on its hub page first; then log in with: hf auth login"
    if kind == "RepositoryNotFoundError" or status in (401, 404):
        return f"{repo_id}: not found on the hub, or private; check the name, or log in with: hf auth login"
    if kind in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        return f"{repo_id}: not in the local cache, and the hub is off or out of reach"
    if status == 429:
        return f"{repo_id}: the hub asks to slow down (429); try again later, or log in with: hf auth login"
    return f"{repo_id}: the hub could not be reached: {kind}: {' '.join(str(error).split())[:200]}"
