"""Models of the Hugging Face hub: the files a conversion needs, downloaded into the cache that all tools share.

The configuration comes first, so that a model which cannot be converted costs no gigabytes. Endpoint, cache, token and
time-outs are huggingface_hub's own settings (HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_DOWNLOAD_TIMEOUT, ...).
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lfm2cpp.errors import CheckpointError

from .checkpoint import INDEX, read_model_config, read_weight_map

Note = Callable[[str], None]

SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "README.md",
    INDEX,
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form ORGANISATION/NAME; a directory of that name is looked for first."""
    return bool(_HUB_ID.fullmatch(model))


def fetch_checkpoint(hub_id: str, note: Note, *, offline: bool = False, weights: bool = True) -> Path:
    """The directory of a hub model in the local cache, downloaded as far as needed.

    Raises CheckpointError with the cause and the remedy. With `offline` nothing is asked of the network.
    """
    from huggingface_hub import constants

    if offline or constants.HF_HUB_OFFLINE:
        return _download(hub_id, "config.json", None, offline=True).parent
    _quiet_library()
    names = _list_files(hub_id)
    if "config.json" not in names:
        raise CheckpointError(f"{hub_id}: the model on the hub has no config.json: not in transformers' format")
    directory = _download(hub_id, "config.json", None).parent  # of the newest revision; the rest must be of the same
    revision = directory.name
    read_model_config(directory)
    for name in names:
        if any(fnmatch(name, pattern) for pattern in SMALL_FILES):
            _download(hub_id, name, revision)
    if weights:
        has_index = (directory / INDEX).is_file()
        wanted = set(read_weight_map(directory).values()) if has_index else {"model.safetensors"}
        for name in sorted(wanted & set(names)):  # others are found missing later, with everything else that is
            if not (directory / name).is_file():
                note(f"{hub_id}: fetching {name} into the hub cache")
                _download(hub_id, name, revision)
    return directory


def _list_files(hub_id: str) -> list[str]:
    """The model's files: one request with a time-out and no repetition, so that trouble shows at once."""
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi().model_info(hub_id, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except _network_errors() as error:
        raise _failure(error, hub_id) from None
    return sorted(sibling.rfilename for sibling in info.siblings or [])


def _download(hub_id: str, name: str, revision: str | None, *, offline: bool = False) -> Path:
    """The file in the local cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, name, revision=revision, local_files_only=offline))
    except _network_errors() as error:
        raise _failure(error, hub_id) from None


def _quiet_library() -> None:
    """No warnings before our one line; a progress bar on a terminal only."""
    from huggingface_hub import utils

    utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if sys.stderr is None or not sys.stderr.isatty():
        utils.disable_progress_bars()  # type: ignore[attr-defined]


def _failure(error: BaseException, hub_id: str) -> CheckpointError:
    return CheckpointError(f"{hub_id}: no such directory, and from the hub: {_explain(error, hub_id)}")


def _network_errors() -> tuple[type[Exception], ...]:
    """OSError, ValueError (a malformed id), and the HTTP library's own, which huggingface_hub lets through."""
    libraries = [sys.modules[name] for name in ("httpx2", "httpx") if name in sys.modules]
    found = [getattr(library, name) for library in libraries for name in ("HTTPError", "InvalidURL")]
    return (OSError, ValueError, *found)


def _explain(error: BaseException, hub_id: str) -> str:
    """The cause and the remedy. Never the error's own text, which may carry addresses with signatures or tokens."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    chain = list(_chain(error))
    host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]  # without a password
    page = f"{urlsplit(constants.ENDPOINT).scheme}://{host}/{hub_id}"
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
