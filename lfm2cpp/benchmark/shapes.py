"""The shapes of the LFM2 text models, by the names they are sold under, and shapes that differ in some numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from lfm2cpp.arch.lfm2 import HParams
from lfm2cpp.errors import UsageError

N_PIECES = 64400  # of the 65,536 rows of the vocabulary; the others are [PADn]
MIN_PIECES = 14 + 256  # special tokens and bytes


@dataclass(frozen=True)
class Shape:
    """Everything that decides how large the tensors of a model are. `attention` lists the attention layers."""

    name: str
    n_embd: int
    n_layer: int
    attention: tuple[int, ...]
    n_ff: int
    n_head: int
    n_head_kv: int = 8
    n_vocab: int = 65536
    n_pieces: int = N_PIECES  # of the vocabulary that are not padding
    l_cache: int = 3
    n_ctx_train: int = 128000

    def hparams(self) -> HParams:
        kv = tuple(self.n_head_kv if il in self.attention else 0 for il in range(self.n_layer))
        return HParams(
            n_vocab=self.n_vocab, n_ctx_train=self.n_ctx_train, n_embd=self.n_embd, n_layer=self.n_layer,
            n_ff=self.n_ff, n_head=self.n_head, n_head_kv=kv, l_cache=self.l_cache, norm_rms_eps=1e-5,
            rope_freq_base=1e6,
        )  # fmt: skip


_ATTENTION_16 = (2, 5, 8, 10, 12, 14)
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("230M", 1024, 14, (2, 4, 6, 8, 10, 12), 2560, 16),
        Shape("350M", 1024, 16, _ATTENTION_16, 4608, 16),
        Shape("700M", 1536, 16, _ATTENTION_16, 6912, 24),
        Shape("1.2B", 2048, 16, _ATTENTION_16, 8192, 32),
        Shape("2.6B", 2048, 30, (2, 5, 9, 13, 17, 21, 24, 27), 10752, 32),
    )
}
# llama.cpp tells the models apart by these widths.
NAME_OF_N_FF = {shape.n_ff: shape.name for shape in SHAPES.values()}
_NUMBERS = tuple(f.name for f in fields(Shape) if f.name not in ("name", "attention"))


def find_shape(text: str) -> Shape:
    """`350M`, or with changes: `350M,n_vocab=128000` or `350M,n_embd=256,n_layer=4,attention=1+3,n_ff=512`.

    Numbers that follow from others follow: heads of 64 columns, the attention layers that there still are, as much
    padding of the vocabulary as it allows. UsageError names what is wrong.
    """
    name, *changes = (part.strip() for part in text.split(","))
    base = next((shape for shape in SHAPES.values() if shape.name.lower() == name.lower()), None)
    if base is None:
        raise UsageError(f"unknown shape {name!r}; expected {', '.join(SHAPES)}, perhaps with changes: 350M,n_layer=4")
    numbers: dict[str, int] = {}
    attention: tuple[int, ...] | None = None
    for change in changes:
        key, _, value = change.partition("=")
        try:
            if key == "attention":
                attention = tuple(sorted({int(il) for il in value.split("+") if il}))
            elif key in _NUMBERS:
                numbers[key] = int(value)
            else:
                raise UsageError(f"shape {text!r}: {key!r} is none of {', '.join((*_NUMBERS, 'attention'))}")
        except ValueError:
            raise UsageError(f"shape {text!r}: {change!r} is no number, or list such as attention=1+3") from None
    shape = _changed(base, numbers, attention) if changes else base
    _check(shape, text)
    return replace(shape, name=text.replace(",", "-").replace("=", "")) if changes else shape


def _changed(base: Shape, numbers: dict[str, int], attention: tuple[int, ...] | None) -> Shape:
    n_layer = numbers.get("n_layer", base.n_layer)
    layers = attention if attention is not None else tuple(il for il in base.attention if il < n_layer)
    follows: dict[str, int] = {}
    if "n_embd" in numbers:
        follows["n_head"] = max(1, numbers["n_embd"] // 64)
        follows["n_head_kv"] = min(base.n_head_kv, numbers.get("n_head", follows["n_head"]))
    if "n_vocab" in numbers:
        follows["n_pieces"] = max(MIN_PIECES, numbers["n_vocab"] * N_PIECES // 65536)
    return replace(base, attention=layers, **{**follows, **numbers})  # type: ignore[arg-type]


def _check(shape: Shape, text: str) -> None:
    def require(condition: bool, rule: str) -> None:
        if not condition:
            raise UsageError(f"shape {text!r}: {rule}")

    require(all(getattr(shape, name) >= 1 for name in _NUMBERS), "every number must be 1 or more")
    require(shape.n_layer <= 512, f"n_layer is {shape.n_layer}, expected at most 512")
    require(all(0 <= il < shape.n_layer for il in shape.attention), f"attention layers must be below {shape.n_layer}")
    require(shape.l_cache >= 2, f"l_cache is {shape.l_cache}, expected 2 or more")
    require(shape.n_embd % 32 == 0 and shape.n_ff % 32 == 0, "n_embd and n_ff must be multiples of 32, a block")
    require(shape.n_embd % (2 * shape.n_head) == 0, f"{shape.n_embd} columns do not make {shape.n_head} heads")
    require(shape.n_head % shape.n_head_kv == 0, f"{shape.n_head} heads do not share {shape.n_head_kv} KV heads")
    require(MIN_PIECES <= shape.n_pieces <= shape.n_vocab,
            f"n_pieces is {shape.n_pieces}, expected {MIN_PIECES} to n_vocab, which is {shape.n_vocab}")  # fmt: skip
    require(shape.n_vocab <= 1 << 20 and shape.n_embd <= 1 << 16 and shape.n_ff <= 1 << 18, "a number is too large")
