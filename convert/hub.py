"""Models of the Hugging Face hub: the files a conversion needs, downloaded into the cache that all tools share.

The configuration comes first, so that a model which cannot be converted costs no gigabytes. Endpoint, cache, token and
time-outs are huggingface_hub's own settings (HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_DOWNLOAD_TIMEOUT, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from lfm2cpp.errors import CheckpointError
from lfm2cpp.hub import explain, is_hub_id, list_files, network_errors, quiet_library

from .checkpoint import INDEX, read_model_config, read_weight_map

Note = Callable[[str], None]

SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "README.md",
    INDEX,
)  # fmt: skip

__all__ = ["fetch_checkpoint", "is_hub_id"]


def fetch_checkpoint(hub_id: str, note: Note, *, offline: bool = False, weights: bool = True) -> Path:
    """The directory of a hub model in the local cache, downloaded as far as needed.

    Raises CheckpointError with the cause and the remedy. With `offline` nothing is asked of the network.
    """
    from huggingface_hub import constants

    if offline or constants.HF_HUB_OFFLINE:
        return _download(hub_id, "config.json", None, offline=True).parent
    quiet_library()
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
    try:
        return list_files(hub_id)
    except network_errors() as error:
        raise _failure(error, hub_id) from None


def _download(hub_id: str, name: str, revision: str | None, *, offline: bool = False) -> Path:
    """The file in the local cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, name, revision=revision, local_files_only=offline))
    except network_errors() as error:
        raise _failure(error, hub_id) from None


def _failure(error: BaseException, hub_id: str) -> CheckpointError:
    return CheckpointError(f"{hub_id}: no such directory, and from the hub: {explain(error, hub_id)}")
