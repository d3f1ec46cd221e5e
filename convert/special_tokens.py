"""Special token ids, whether BOS and EOS are added, and the chat template: the rest of `tokenizer.*`.

llama.cpp's converter reads these from tokenizer.json's post-processor, tokenizer_config.json and config.json, in a
certain order that decides both the values and the order of the keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfm2cpp.errors import CheckpointError
from lfm2cpp.gguf import Metadata, Value

from .checkpoint import checked_link, inside
from .json_file import read_object

Note = Callable[[str], None]

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id", "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id", "sep": "tokenizer.ggml.seperator_token_id",
    "pad": "tokenizer.ggml.padding_token_id", "mask": "tokenizer.ggml.mask_token_id",
    "eot": "tokenizer.ggml.eot_token_id", "eom": "tokenizer.ggml.eom_token_id",
}  # fmt: skip
ADD_KEYS = {kind: f"tokenizer.ggml.add_{kind}_token" for kind in ("bos", "eos", "sep")}
MAX_TEMPLATE_BYTES = 1 << 20


@dataclass
class SpecialTokens:
    """Ids and add flags in the order in which they were found."""

    ids: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)


def special_metadata(
    tokenizer: Mapping[str, Any], tokenizer_config: Mapping[str, Any], config: Mapping[str, Any], n_vocab: int
) -> Metadata:
    """The id keys, then the add keys."""
    found = find_special_tokens(tokenizer, tokenizer_config, config)
    for kind, i in found.ids.items():
        if not 0 <= i < n_vocab:
            raise CheckpointError(f"{kind}_token_id is {i}, expected an id below vocab_size {n_vocab}")
    metadata = {ID_KEYS[kind]: Value.u32(i) for kind, i in found.ids.items() if kind in ID_KEYS}
    metadata.update({ADD_KEYS[kind]: Value.bool_(add) for kind, add in found.add.items() if kind in ADD_KEYS})
    return metadata


def find_special_tokens(
    tokenizer: Mapping[str, Any], tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]
) -> SpecialTokens:
    """Names come from tokenizer_config.json, corrected by the post-processor; config.json has what is left."""
    found = SpecialTokens()
    names = {kind: tokenizer_config.get(f"{kind}_token") for kind in KINDS}
    has_config = bool(tokenizer_config)
    names["bos"] = names["bos"] or names["cls"] or names["bos"]
    names["eos"] = names["eos"] or names["sep"] or names["eos"]
    _read_post_processor(tokenizer.get("post_processor"), names, found.add, has_config)
    if has_config:
        for kind in names:
            _read_kind(kind, names[kind], tokenizer, tokenizer_config, found)
    nested = config.get("text_config")
    for kind in names:
        i = config.get(f"{kind}_token_id")
        if i is None and isinstance(nested, dict):
            i = nested.get(f"{kind}_token_id")
        if type(i) is int:
            found.ids.setdefault(kind, i)
    return found


def _read_kind(
    kind: str, name: Any, tokenizer: Mapping[str, Any], tokenizer_config: Mapping[str, Any], found: SpecialTokens
) -> None:
    add = tokenizer_config.get(f"add_{kind}_token")
    if isinstance(add, bool):
        found.add.setdefault(kind, add)
    text = _content(name)
    for token in tokenizer.get("added_tokens", []):
        if text is not None and token.get("content") == text:
            found.ids.setdefault(kind, token["id"])
            return


def _content(name: Any) -> str | None:
    text = name.get("content") if isinstance(name, dict) else name
    return text if isinstance(text, str) else None


def _read_post_processor(processor: Any, names: dict[str, Any], add: dict[str, bool], has_config: bool) -> None:
    """What the post-processor puts around a text; a template may also tell names that the config lacks."""
    if not isinstance(processor, dict):
        return
    steps = processor.get("processors", [processor])
    for step in steps if isinstance(steps, list) else []:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "ByteLevel":
            add.setdefault("bos", False)
            add.setdefault("eos", False)
        elif kind == "RobertaProcessing":
            add.update(bos=True, eos=True, sep=True)
            if has_config:
                names["cls"] = names["cls"] or _first(step.get("cls"), names["bos"])
                names["sep"] = names["sep"] or _first(step.get("sep"), names["eos"])
        elif kind == "TemplateProcessing":
            _read_template(step, names, add, has_config)


def _first(value: Any, fallback: Any) -> Any:
    return value[0] if isinstance(value, list) and value else fallback


def _read_template(step: Mapping[str, Any], names: dict[str, Any], add: dict[str, bool], has_config: bool) -> None:
    single, pair = _items(step, "single"), _items(step, "pair")
    first = _special(single[0]) if len(single) > 1 else None
    last = _special(single[-1]) if len(single) > 1 else None
    if first:
        if not has_config:
            names["bos"] = first
        elif first not in (names["bos"], names["cls"]):
            names["bos"] = names["bos"] or first
            names["cls"] = names["cls"] or first
        add["bos"] = first in (names["bos"], names["cls"])
    if last:
        if not has_config:
            names["eos"] = last
        elif last != names["eos"]:
            # The text ends in another token than the config's EOS, which becomes the end of a turn or message.
            old = "eot" if "eot" not in names else "eom" if "eom" not in names else None
            if old is not None:
                names[old] = names["eos"]
            names["eos"] = last
        add["eos"] = last == names["eos"]
    _read_separator(pair, first, last, names, add, has_config)


def _read_separator(
    pair: list[Any], first: str | None, last: str | None, names: dict[str, Any], add: dict[str, bool], has_config: bool
) -> None:
    """Whether the two texts of a pair have a separator between them: A SEP B."""
    if not pair:
        return
    start = 1 if first and _special(pair[0]) == first else 0
    stop = len(pair) - 1 if last and _special(pair[-1]) == last else len(pair)
    inner = pair[start:stop]
    if not inner or _sequence(inner[0]) != "A" or _sequence(inner[-1]) != "B" or not inner[1:-1]:
        return
    middle = inner[1:-1]
    separators = (names["sep"], names["eos"])
    adds = bool(_special(middle[0])) and _special(middle[0]) in separators and not last
    if len(middle) == 2 and _special(middle[1]) and _special(middle[1]) in separators:
        adds = True
    add["sep"] = adds
    if adds and not names["sep"] and has_config:
        names["sep"] = names["eos"]


def _items(step: Mapping[str, Any], key: str) -> list[Any]:
    value = step.get(key)
    return value if isinstance(value, list) else []


def _special(item: Any) -> str | None:
    entry = item.get("SpecialToken") if isinstance(item, dict) else None
    return entry.get("id") if isinstance(entry, dict) else None


def _sequence(item: Any) -> str | None:
    entry = item.get("Sequence") if isinstance(item, dict) else None
    return entry.get("id") if isinstance(entry, dict) else None


def template_metadata(directory: Path, tokenizer_config: Mapping[str, Any], note: Note) -> Metadata:
    """The chat template. The one in tokenizer_config.json wins over chat_template.jinja, as in llama.cpp."""
    beside = _template_beside(directory)
    if not tokenizer_config:
        if beside is not None:
            note(f"{directory}: no tokenizer_config.json, so the chat template beside it is not used")
        return {}
    template = tokenizer_config.get("chat_template", beside)
    if "chat_template" in tokenizer_config and beside is not None and beside != template:
        note(f"{directory}: the chat template in tokenizer_config.json is used, which differs from the one in a file")
    if isinstance(template, list):
        return _named_templates(template, directory)
    if template is not None and not isinstance(template, str):
        note(f"{directory}: chat_template is {type(template).__name__}, expected text or a list: ignored")
        return {}
    return {"tokenizer.chat_template": Value.string(template)} if template else {}


def _template_beside(directory: Path) -> Any:
    """The template in a file of its own: chat_template.jinja (with additional ones), or the older .json."""
    jinja = inside(directory, "chat_template.jinja")
    if jinja.is_file():
        default = _read_template_file(jinja)
        more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
        if not more:
            return default
        named = [{"name": path.stem, "template": _read_template_file(checked_link(directory, path))} for path in more]
        return [{"name": "default", "template": default}, *named]
    if (directory / "chat_template.json").is_file():
        return read_object(inside(directory, "chat_template.json")).get("chat_template")
    return None


def _read_template_file(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{path}: larger than the {MAX_TEMPLATE_BYTES} bytes that a chat template may have")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _named_templates(templates: list[Any], directory: Path) -> Metadata:
    """Every named template under a key of its own, their names in a list, and the default where one is expected."""
    metadata: Metadata = {}
    names: list[str] = []
    default = None
    for entry in templates:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k, ""), str) for k in ("name", "template")):
            raise CheckpointError(f"{directory}: chat_template must be text or a list of name and template")
        name = re.sub(r"[^A-Za-z0-9]", "_", entry.get("name", ""))
        template = entry.get("template")
        if name == "default" and template is not None:
            default = template
        elif name and template is not None:
            if template:
                metadata[f"tokenizer.chat_template.{name}"] = Value.string(template)
            names.append(name)
    if names:
        metadata["tokenizer.chat_templates"] = Value.strings(sorted(set(names)))
    if default:
        metadata["tokenizer.chat_template"] = Value.string(default)
    return metadata
