"""Where a model comes from and how it wants to be sampled: the `general.*` keys.

Sources, the first that knows wins: the front matter of README.md, `_name_or_path` of config.json, the directory's
name. Then generation_config.json for the sampling, and over all of it the --metadata file and --model-name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lfm2cpp.errors import CheckpointError, UsageError
from lfm2cpp.gguf import Metadata, Value

from .model_names import parse_model_id, title
from .shown import shown

Facts = dict[str, Any]  # by GGUF key without `general.`
Note = Callable[[str], None]

MAX_CARD_BYTES = 16 << 20

# Every scalar key in the order of the file, with the type of its value.
SCALARS: dict[str, str] = {
    "sampling.sequence": "string", "sampling.top_k": "i32", "sampling.top_p": "f32", "sampling.min_p": "f32",
    "sampling.xtc_probability": "f32", "sampling.xtc_threshold": "f32", "sampling.temp": "f32",
    "sampling.penalty_last_n": "i32", "sampling.penalty_repeat": "f32", "sampling.mirostat": "i32",
    "sampling.mirostat_tau": "f32", "sampling.mirostat_eta": "f32",
    "name": "string", "author": "string", "version": "string", "organization": "string", "finetune": "string",
    "basename": "string", "description": "string", "quantized_by": "string", "size_label": "string",
    "license": "string", "license.name": "string", "license.link": "string",
    "url": "string", "doi": "string", "uuid": "string", "repo_url": "string",
    "source.url": "string", "source.doi": "string", "source.uuid": "string", "source.repo_url": "string",
}  # fmt: skip
RELATED_FIELDS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")
# What generation_config.json calls the sampling keys; a later name is asked when the first is absent.
GENERATION_KEYS: dict[str, tuple[str, ...]] = {
    "sequence": ("sequence",), "top_k": ("top_k",), "top_p": ("top_p",), "min_p": ("min_p",),
    "xtc_probability": ("xtc_probability",), "xtc_threshold": ("xtc_threshold",), "temp": ("temperature",),
    "penalty_last_n": ("penalty_last_n",), "penalty_repeat": ("penalty_repeat", "repetition_penalty"),
    "mirostat": ("mirostat",), "mirostat_tau": ("mirostat_tau",), "mirostat_eta": ("mirostat_eta",),
}  # fmt: skip
# What model cards call them, in the order in which they are asked; a card's url is that of the source.
CARD_KEYS: dict[str, tuple[str, ...]] = {
    "name": ("name", "model_name"), "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"), "organization": ("organization", "model_organization"),
    "description": ("description", "model_description"), "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"), "size_label": ("size_label", "model_size_label"),
    "source.url": ("url", "model_url"), "source.doi": ("doi", "model_doi"),
    "source.uuid": ("uuid", "model_uuid"), "source.repo_url": ("repo_url", "model_repo_url"),
    "license": ("license",), "license.name": ("license_name",), "license.link": ("license_link",),
}  # fmt: skip
LISTS: dict[str, tuple[str, ...]] = {"tags": ("tags", "pipeline_tag"), "languages": ("languages", "language")}
RELATED: dict[str, tuple[str, ...]] = {
    "base_models": ("base_model", "base_models", "base_model_sources"),
    "datasets": ("datasets", "dataset", "dataset_sources"),
}
# The keys of a --metadata file. llama.cpp takes the licence's text from the card only.
_WHERE = "check generation_config.json or --metadata"
OVERRIDABLE = (set(SCALARS) - {"license"}) | set(LISTS) | set(RELATED)


def gather_facts(
    card: Mapping[str, Any],
    config: Mapping[str, Any],
    directory_name: str,
    generation: Mapping[str, Any],
    n_params: int,
) -> Facts:
    """What all the sources of a checkpoint directory say."""
    facts: Facts = {}
    for key, names in CARD_KEYS.items():
        facts[key] = next((card[n] for n in names if card.get(n) is not None), None)
    for key, names in RELATED.items():
        if any(name in card for name in names):
            value = next(card[name] for name in names if name in card)
            facts[key] = [_related(entry, n_params) for entry in _as_list(value)]
    for key, names in LISTS.items():
        values = [card[name] for name in names if card.get(name) is not None]
        facts[key] = [item for value in values for item in _as_list(value)] if values else None
    hub_name = config.get("_name_or_path")
    if isinstance(hub_name, str) and hub_name.count("/") <= 1:  # more is a path on somebody's computer
        _add_id(facts, hub_name, n_params)
    _add_id(facts, directory_name, n_params)
    for key, names in GENERATION_KEYS.items():
        facts["sampling." + key] = next((generation[name] for name in names if name in generation), None)
    return facts


def apply_override(facts: Facts, override: Mapping[str, Any], file: Path, note: Note) -> None:
    """Let a --metadata file have its say; keys it must not set are told and ignored, as llama.cpp ignores them."""
    for key, value in override.items():
        name = key.removeprefix("general.")
        if name not in OVERRIDABLE or not key.startswith("general."):
            note(f"{file}: key {key!r} is not one that --metadata can set: ignored")
            continue
        if name in RELATED and not (isinstance(value, list) and all(isinstance(entry, dict) for entry in value)):
            raise UsageError(f"{file}: {key} must be a list of objects")
        facts[name] = value


def general_metadata(facts: Facts) -> Metadata:
    """The `general.*` keys that follow general.type, in the order of the file. Empty texts and lists are left out."""
    metadata: Metadata = {}
    for key, kind in SCALARS.items():
        _put(metadata, "general." + key, facts.get(key), kind)
    for plural, key in (("base_models", "base_model"), ("datasets", "dataset")):
        if (entries := facts.get(plural)) is not None:
            metadata[f"general.{key}.count"] = Value.u32(len(entries))
            for i, entry in enumerate(entries):
                for name in RELATED_FIELDS:
                    _put(metadata, f"general.{key}.{i}.{name}", entry.get(name), "string")
    for key in LISTS:
        if items := _as_list(facts.get(key)):
            metadata["general." + key] = Value.strings([_text(item) for item in items])
    return metadata


def read_model_card(path: Path, note: Note) -> dict[str, Any]:
    """The YAML front matter of a README.md; empty when there is none or it cannot be read."""
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8") as file:
            lines = file.read(MAX_CARD_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        note(f"{path}: not read ({shown(error)}): no model card metadata")
        return {}
    if not lines or lines[0] != "---":
        return {}
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    return _front_matter("\n".join(lines[1:end]) + "\n", path, note)


def _front_matter(text: str, path: Path, note: Note) -> dict[str, Any]:
    import yaml  # a dependency of huggingface_hub; only wanted when there is a card

    # YAML reads the language code of Norwegian as false, and refuses tabs.
    text = text.replace("- no\n", '- "no"\n').replace("\t", "  ")
    try:
        card = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        note(f"{path}: front matter is not valid YAML ({shown(' '.join(str(error).split()))}): ignored")
        return {}
    return card if isinstance(card, dict) else {}


def _add_id(facts: Facts, model_id: str, n_params: int) -> None:
    """Fill in what a model id tells and nobody has told before."""
    parts = parse_model_id(model_id, n_params)
    told = {
        "name": None if parts.full_name is None else title(parts.full_name),
        "organization": parts.organization, "basename": parts.basename, "finetune": parts.finetune,
        "version": parts.version, "size_label": parts.size_label,
    }  # fmt: skip
    for key, value in told.items():
        if facts.get(key) is None:
            facts[key] = value if key != "organization" or value is None else title(value)


def _related(entry: Any, n_params: int) -> dict[str, Any]:
    """A base model or data set as a card names it: an id, a link, or an object that says it all."""
    if isinstance(entry, dict):
        return entry
    if not isinstance(entry, str):
        return {}
    if not entry.startswith(("http://", "https://", "ssh://")):
        related = _related_id(entry, n_params)
        parts = parse_model_id(entry, n_params)
        if parts.organization is not None and parts.full_name is not None:
            related["repo_url"] = f"https://huggingface.co/{parts.organization}/{parts.full_name}"
        return related
    on_hub = re.match(r"https?://huggingface.co/([^/]+/[^/]+)$", entry)
    return {"repo_url": entry, **(_related_id(on_hub.group(1), n_params) if on_hub else {})}


def _related_id(model_id: str, n_params: int) -> dict[str, Any]:
    parts = parse_model_id(model_id, n_params)
    told = {
        "name": None if parts.full_name is None else title(parts.full_name),
        "organization": None if parts.organization is None else title(parts.organization),
        "version": parts.version,
    }
    return {key: value for key, value in told.items() if value is not None}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def _text(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _put(metadata: Metadata, key: str, value: Any, kind: str) -> None:
    if value is None or value == "" or value == []:
        return
    if kind == "string":
        metadata[key] = Value.string(",".join(map(_text, value)) if isinstance(value, list) else _text(value))
        return
    if not isinstance(value, (int, float)) or value != value or (kind == "i32" and int(value) != value):
        expected = "a whole number" if kind == "i32" else "a number"
        raise CheckpointError(f"{key} is {shown(value)}, expected {expected}; {_WHERE}")
    if abs(value) > (2**31 - 1 if kind == "i32" else 3e38):
        raise CheckpointError(f"{key} is {value}, out of range; {_WHERE}")
    metadata[key] = Value.i32(int(value)) if kind == "i32" else Value.f32(value)
