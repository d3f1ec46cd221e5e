"""What a model's name tells: organisation, base name, fine-tune, version, size.

Names on the hub are words joined by hyphens, in no fixed order. The rules are those of llama.cpp's converter, so that
`general.*` keys and default file names come out the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_VERSION = re.compile(r"(?:v|iter)?\d+(?:\.\d+)*", re.IGNORECASE)
_STORAGE = re.compile(r"i?q\d(?:_\w)*|b?fp?(?:16|32)", re.IGNORECASE)
_SIZE = re.compile(r"(?:a|\d+x)?\d+(?:[._]\d+)?[kmbt]\d?|small|mini|medium|large|x?xl", re.IGNORECASE)
_FINETUNE = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
_NOT_TITLED = re.compile(r"v\d+(?:\.\d+)*|\d.*")
_SCALES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class ModelId:
    """The parts of a model id; None for what it does not tell."""

    full_name: str | None = None
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


@dataclass
class _Word:
    text: str
    kinds: set[str] = field(default_factory=set)


def parse_model_id(model_id: str, n_params: int) -> ModelId:
    """The parts of `ORGANISATION/NAME` or `NAME`. `n_params` tells a size from a context length (0: unknown)."""
    if " " in model_id:
        return ModelId(full_name=model_id)  # a sentence, not an id
    organization, slash, name = model_id.partition("/")
    if not slash:
        organization, name = "", model_id
    words = [_classified(part, position, n_params) for position, part in enumerate(filter(None, name.split("-")))]
    _drop_vague_sizes(words)
    _find_basename(words)
    finetune = _joined(words, "finetune")
    version = "-".join(w.text for w in words if "version" in w.kinds and "basename" not in w.kinds) or None
    size_label = "-".join(dict.fromkeys(w.text for w in words if "size" in w.kinds)) or None
    told = finetune or version or size_label
    return ModelId(
        full_name=name,
        # './' and '../' are paths, not organisations; a leading slash leaves an empty one.
        organization=organization if slash and not organization.startswith(".") else None,
        basename=_joined(words, "basename") if told else None,
        finetune=finetune,
        version=version,
        size_label=size_label,
    )


def title(name: str) -> str:
    """`lfm2-350m-chat` -> `Lfm2 350m Chat`; words with capitals, versions and numbers stay."""
    words = name.strip().replace("-", " ").split()
    return " ".join(w.title() if w.islower() and not _NOT_TITLED.fullmatch(w) else w for w in words)


def size_label(n_params: int) -> str:
    """`354M`, `1.2B`, `4.1M`: two digits at least."""
    scale, suffix = next(
        ((s, c) for s, c in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if n_params > s), (1e3, "K")
    )
    # Multiplied by the inverse, because llama.cpp's converter does and the last digit may depend on it.
    scaled = n_params * {1e12: 1e-12, 1e9: 1e-9, 1e6: 1e-6, 1e3: 1e-3}[scale]
    decimals = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{decimals}f}{suffix}"


def file_stem(
    name: str | None, basename: str | None, size: str | None, finetune: str | None, version: str | None, ending: str
) -> str:
    """The default file name: NAME-SIZE-FINETUNE-VERSION-ENDING, leaving out what is not known."""
    first = basename if basename is not None else name if name is not None else "ggml-model"
    stem = first.strip().replace(" ", "-").replace("/", "-")
    if size is not None:
        stem += f"-{size}"
    for part in (finetune, version):
        if part is not None:
            stem += "-" + part.strip().replace(" ", "-")
    return f"{stem}-{ending}"


def _joined(words: list[_Word], kind: str) -> str | None:
    return "-".join(w.text for w in words if kind in w.kinds) or None


def _classified(part: str, position: int, n_params: int) -> _Word:
    if _VERSION.fullmatch(part):
        return _Word(part, {"version"})
    if _STORAGE.fullmatch(part):
        return _Word(part.upper(), {"type"})
    if position and _SIZE.fullmatch(part):
        return _sized(part, n_params)
    if position and _FINETUNE.fullmatch(part):
        return _Word(part, {"finetune"})
    return _Word(part)


def _sized(part: str, n_params: int) -> _Word:
    """A size, or a context length when it is far from the number of parameters."""
    part = part.replace("_", ".")
    if part[-1].isdecimal():  # 7b1 means 7.1b
        part = f"{part[:-2]}.{part[-1]}{part[-2]}"
    if part[-2].isdecimal() and part[-1] in "kmbt":
        part = part[:-1] + part[-1].upper()
    try:
        size = float(part[:-1]) * _SCALES.get(part[-1], 1e-3)
    except ValueError:
        return _Word(part, {"size"})  # a word, or 8x7B
    if n_params and abs(size - n_params) > 7 * n_params // 8:
        return _Word(part[:-1] + part[-1].lower(), {"finetune"})
    return _Word(part, {"size"})


def _drop_vague_sizes(words: list[_Word]) -> None:
    """`mini` is no size beside `7B`."""
    sizes = [w for w in words if "size" in w.kinds]
    if any(c.isdecimal() for w in sizes for c in w.text):
        for word in sizes:
            if word.text.isalpha():
                word.kinds.remove("size")


def _find_basename(words: list[_Word]) -> None:
    """The base name is the words at the start, versions among them; unknown words after it make the fine-tune."""
    at_start = True
    for word in words:
        if at_start and ((not word.kinds and word.text[0].isalpha()) or "version" in word.kinds):
            word.kinds.add("basename")
            continue
        at_start = False
        if not word.kinds:
            word.kinds.add("finetune")
    for word in reversed(words):  # a version at the end of the name is the version, not part of the base name
        if not ("basename" in word.kinds and len(word.kinds) > 1):
            break
        word.kinds.remove("basename")
