"""A Hugging Face model directory: which files it is made of, and where its tensors lie.

Only safetensors are read; pickles are never opened. Files must lie in the directory, or in the blobs folder of the
hub cache that the directory belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2cpp.errors import CheckpointError

from .hparams import check_architecture
from .json_file import read_object
from .provenance import read_model_card
from .safetensors_file import StoredTensor, read_header
from .shown import some
from .vocab import TokenizerFiles

Note = Callable[[str], None]

NEEDED = (
    "config.json, tokenizer.json, tokenizer_config.json, and model.safetensors "
    "or model.safetensors.index.json with its shards"
)
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_TOKENIZER_BYTES = 128 << 20
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been found and whose headers have been checked."""

    directory: Path
    name: str  # of the directory, which names the model when nothing else does
    config: dict[str, Any]
    generation_config: dict[str, Any]
    card: dict[str, Any]
    tensors: list[StoredTensor]  # in llama.cpp's order: shard by shard, by name within one

    @property
    def config_file(self) -> str:
        return str(self.directory / "config.json")


def open_checkpoint(directory: Path, note: Note, *, weights_optional: bool = False) -> Checkpoint:
    """Find and check the files of a model directory. Raises CheckpointError."""
    _check_directory(directory)
    config = read_model_config(directory)
    tensors = _read_tensors(directory, note)
    if not tensors and not weights_optional:
        raise _no_weights(directory)
    return Checkpoint(
        directory=directory,
        name=directory.name if directory.name not in ("", "..") else directory.resolve().name,
        config=config,
        generation_config=_generation_config(directory, note),
        card=read_model_card(inside(directory, "README.md"), note),
        tensors=tensors,
    )


def read_model_config(directory: Path) -> dict[str, Any]:
    """config.json, of a supported architecture."""
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise CheckpointError(f"{directory}: is a LoRA adapter, not a model; merge it into its base model first")
        raise CheckpointError(f"{directory}: has no config.json; a checkpoint needs {NEEDED}")
    config = read_object(inside(directory, "config.json"))
    check_architecture(config, str(directory / "config.json"))
    return config


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """tokenizer.json and its companions."""
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(f"{directory}: has no tokenizer.json; a checkpoint needs {NEEDED}")
    path = inside(directory, "tokenizer.json")
    tokenizer = read_object(path, max_bytes=MAX_TOKENIZER_BYTES)

    def companion(name: str) -> dict[str, Any]:
        return read_object(inside(directory, name)) if (directory / name).is_file() else {}

    return TokenizerFiles(
        directory=str(directory), text=path.read_text(encoding="utf-8-sig"), tokenizer=tokenizer,
        config=companion("tokenizer_config.json"), special_tokens_map=companion("special_tokens_map.json"),
        added_tokens=companion("added_tokens.json"),
    )  # fmt: skip


def inside(directory: Path, name: str) -> Path:
    """The path of a file of the checkpoint, by its plain name."""
    if name != Path(name).name or name in ("", ".", "..") or "\\" in name:
        raise CheckpointError(f"{directory}: refers to the file {name[:200]!r}, which is not in the directory itself")
    return checked_link(directory, directory / name)


def checked_link(directory: Path, path: Path) -> Path:
    """The path itself, wherever its links lead, as long as that is part of the checkpoint."""
    root, target = directory.resolve(), path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # a hub cache: REPO/snapshots/REVISION/NAME is a link to REPO/blobs/HASH
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: is a link to {target}, outside of the checkpoint; copy the file instead")
    return path


def _check_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    if not directory.exists():
        raise CheckpointError(f"{directory}: no such directory; a checkpoint needs {NEEDED}")
    if directory.suffix == ".gguf":
        raise CheckpointError(f"{directory}: is a GGUF file already; to make it smaller use lfm2cpp quantize")
    raise CheckpointError(f"{directory}: is not a directory; give the directory that holds {NEEDED}")


def _read_tensors(directory: Path, note: Note) -> list[StoredTensor]:
    files = _weight_files(directory, note)
    if files and any(path.suffix in PICKLES for path in directory.iterdir()):
        note(f"{directory}: has pickle files beside the safetensors; they are not opened")
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in sorted(read_header(path).items()):
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name[:80]!r} is in {tensors[name].path.name} as well")
            tensors[name] = tensor
    if (directory / INDEX).is_file():
        _check_index(directory, tensors)
    return list(tensors.values())


def _weight_files(directory: Path, note: Note) -> list[Path]:
    """The safetensors files that make up the model, sorted by name; the index decides where there is one."""
    present = sorted(p.name for p in directory.iterdir() if p.name.startswith("model") and p.suffix == ".safetensors")
    if (directory / INDEX).is_file():
        names = sorted(set(read_weight_map(directory).values()))
        paths = [inside(directory, name) for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise CheckpointError(f"{directory}: shards of {INDEX} are missing: {some(missing)}; download them")
        if extra := sorted(set(present) - set(names)):
            note(f"{directory}: not in {INDEX} and not used: {some(extra)}")
        return paths
    if "model.safetensors" in present:
        if others := [name for name in present if name != "model.safetensors"]:
            note(f"{directory}: model.safetensors is used, these are not: {some(others)}")
        return [_regular(inside(directory, "model.safetensors"))]
    return [inside(directory, name) for name in _complete_series(directory, present)]


def _complete_series(directory: Path, present: list[str]) -> list[str]:
    """Shards without an index: model-00001-of-0000N to the last, or nothing at all."""
    matches = [match for name in present if (match := _SHARD.fullmatch(name))]
    counts = {int(match.group(2)) for match in matches}
    if not matches:
        return []
    n = max(counts)
    missing = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, min(n, 1000) + 1)]
    missing = [name for name in missing if name not in present]
    if len(counts) > 1 or missing:
        raise CheckpointError(f"{directory}: shards are missing: {some(missing)}; download them and {INDEX}")
    return [match.group() for match in matches]


def _regular(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a regular file")
    return path


def read_weight_map(directory: Path) -> dict[str, str]:
    path = inside(directory, INDEX)
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    if not all(file.endswith(".safetensors") for file in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map names files that are not .safetensors")
    return weight_map


def _check_index(directory: Path, tensors: dict[str, StoredTensor]) -> None:
    """The index and the shards must tell the same story about every tensor."""
    weight_map = read_weight_map(directory)
    wrong = [n for n in weight_map if n not in tensors or tensors[n].path.name != weight_map[n]]
    if wrong:
        raise CheckpointError(f"{directory / INDEX}: tensors are not in the shards it names: {some(wrong)}")
    if unlisted := sorted(set(tensors) - set(weight_map)):
        raise CheckpointError(f"{directory / INDEX}: tensors of the shards are not listed: {some(unlisted)}")


def _generation_config(directory: Path, note: Note) -> dict[str, Any]:
    """Not all models have a valid one, and none needs it."""
    if not (directory / "generation_config.json").is_file():
        return {}
    try:
        return read_object(inside(directory, "generation_config.json"))
    except CheckpointError as error:
        note(f"{error}: ignored")
        return {}


def _no_weights(directory: Path) -> CheckpointError:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if (directory / "adapter_config.json").is_file():
        return CheckpointError(f"{directory}: is a LoRA adapter, not a model; merge it into its base model first")
    if pickles:
        return CheckpointError(
            f"{directory}: has only pickle files ({some(pickles)}), which are never opened because they can run code; "
            "save the model as safetensors (transformers: model.save_pretrained(DIRECTORY)) and convert that"
        )
    return CheckpointError(f"{directory}: has no weights; a checkpoint needs {NEEDED}")
