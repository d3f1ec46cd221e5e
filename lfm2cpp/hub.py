"""The Hugging Face hub: GGUF files to run, and what every use of huggingface_hub needs said in one line.

Endpoint, cache, token and time-outs are huggingface_hub's own settings (HF_ENDPOINT, HF_HOME, HF_TOKEN, ...).
"""

from __future__ import annotations

import fnmatch
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import LFM2Error, UsageError

# Which file of a repository, when nobody says: the quickest first.
PREFERRED = ("Q4_0", "Q8_0", "Q4_K_M")
_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form ORGANISATION/NAME; a local path of that name is looked for first."""
    return bool(re.fullmatch(_REPO, name))


def parse_hub_id(name: str) -> tuple[str, str | None] | None:
    """`user/repo` or `user/repo:quant` -> (repo id, quant or None); None when `name` is neither."""
    match = re.fullmatch(rf"({_REPO})(?::([\w.-]+))?", name)
    return (match[1], match[2]) if match else None


def download(
    repo_id: str, filename: str | None = None, *, quant: str | None = None, offline: bool = False, **options: Any
) -> Path:
    """The local path of one GGUF of a repository (of its first shard, with the others beside it), fetched if needed.

    `filename` is a glob; without it `quant` is looked for in the names. `options` go to hf_hub_download (cache_dir,
    local_dir, revision, token). Raises LFM2Error with the files there are when none or several fit, and with the
    cause and the remedy when the hub does not give them.
    """
    if not is_hub_id(repo_id):
        raise UsageError(f"{ascii(repo_id)} is no hub id, expected USER/REPO")
    from huggingface_hub import constants, hf_hub_download

    quiet_library()
    try:
        if offline or constants.HF_HUB_OFFLINE:
            return _from_cache(repo_id, filename, quant, options)
        files = list_files(repo_id, revision=options.get("revision"), token=options.get("token"))
        chosen = choose(repo_id, files, filename, quant)
        paths = [hf_hub_download(repo_id, name, **options) for name in [chosen, *_other_shards(chosen, files)]]
        return Path(paths[0])
    except network_errors() as error:
        raise LFM2Error(f"{repo_id}: {explain(error, repo_id)}") from None


def choose(repo_id: str, files: Sequence[str], filename: str | None, quant: str | None) -> str:
    """The one file that `filename` (a glob) or `quant` means; of a split model its first shard."""
    ggufs = sorted(f for f in files if f.lower().endswith(".gguf") and "mmproj" not in f.lower())
    firsts = [f for f in ggufs if not (m := _SHARD.search(f)) or m[1] == "00001"]
    if filename is not None:
        found = [f for f in firsts if fnmatch.fnmatch(f, filename) or fnmatch.fnmatch(Path(f).name, filename)]
    elif quant is not None:
        found = [f for f in firsts if _names_quant(f, quant)]
    else:
        ranked = ([f for f in firsts if _names_quant(f, preferred)] for preferred in PREFERRED)
        found = next((names for names in ranked if names), firsts[:1])
    if len(found) == 1:
        return found[0]
    problem = "no file matches" if not found else f"{len(found)} files match"
    listed = ", ".join(found or firsts or ["no GGUF file at all"])
    raise LFM2Error(f"{repo_id}: {problem} {ascii(filename or quant or '*.gguf')}; there are: {listed}")


def _names_quant(name: str, quant: str) -> bool:
    return bool(re.search(rf"(^|[-._/]){re.escape(quant)}[-._]", name, re.IGNORECASE))


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
    return root / choose(repo_id, [path.relative_to(root).as_posix() for path in root.rglob("*.gguf")], filename, quant)


# -- the library, and its failures -----------------------------------------------------------------------------


def list_files(repo_id: str, *, revision: str | None = None, token: Any = None) -> list[str]:
    """A model's files: one request with a time-out and no repetition, so that trouble shows at once.

    Raises `network_errors()`.
    """
    from huggingface_hub import HfApi, constants

    info = HfApi(token=token).model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return sorted(sibling.rfilename for sibling in info.siblings or [])


def quiet_library() -> None:
    """No warnings before our one line; a progress bar on a terminal only."""
    from huggingface_hub import utils

    utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if sys.stderr is None or not sys.stderr.isatty():
        utils.disable_progress_bars()  # type: ignore[attr-defined]


def network_errors() -> tuple[type[Exception], ...]:
    """OSError, ValueError (a malformed id), and the HTTP library's own, which huggingface_hub lets through."""
    libraries = [sys.modules[name] for name in ("httpx2", "httpx") if name in sys.modules]
    found = [getattr(library, name) for library in libraries for name in ("HTTPError", "InvalidURL")]
    return (OSError, ValueError, *found)


def explain(error: BaseException, repo_id: str) -> str:
    """The cause and the remedy. Never the error's own text, which may carry addresses with signatures or tokens."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    chain = list(_chain(error))
    host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]  # without a password
    page = f"{urlsplit(constants.ENDPOINT).scheme}://{host}/{repo_id}"
    status = next((s for s in map(_status, chain) if s), None)
    login = "log in with 'hf auth login' or set HF_TOKEN"
    if any(isinstance(e, GatedRepoError) for e in chain):
        return f"access is gated ({status}): accept the licence at {page}, then {login}"
    if status == 401 and _sent_token():
        return f"the token was not accepted (401); {login} anew"
    if status in (401, 404) or any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return f"no such model ({status}) at {page}, or it is private; check the name, or {login}"
    if status == 403:
        return f"access is forbidden (403); see {page}, and {login} as somebody who may read it"
    if status == 429:
        return f"too many requests (429); wait some minutes, or {login} for a higher limit"
    if status:
        return f"{host} answered {status}; try again later"
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain) or _is_uncached(error):
        return "not complete in the local cache, and the network is off (--offline or HF_HUB_OFFLINE); run once online"
    return _explain_connection(error, chain, host)


def _explain_connection(error: BaseException, chain: Sequence[BaseException], host: str) -> str:
    names = " ".join(type(e).__name__ for e in chain)
    if "Timeout" in names:
        return f"{host} did not answer in time; try again, or raise HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT"
    if any(isinstance(e, socket.gaierror) for e in chain) or "resolution" in str(error) or "not known" in str(error):
        return f"the name {host} cannot be resolved; check the network, or use --offline with a cached model"
    if "Connect" in names or "Protocol" in names or "ReadError" in names or "NetworkError" in names:
        return f"the connection to {host} failed; check the network, or use --offline with a cached model"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename or 'hub cache'})"
    return f"{type(error).__name__}; check the name and the network, or give a local directory"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_uncached(error: BaseException) -> bool:
    """Not in the cache for the sole reason that nobody may ask the network."""
    missing = type(error).__name__ in ("LocalEntryNotFoundError", "IncompleteSnapshotError")
    return missing and error.__cause__ is None


def _sent_token() -> bool:
    from huggingface_hub import get_token

    return bool(os.environ.get("HF_TOKEN") or get_token())
