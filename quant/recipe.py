"""Which type each tensor of a file type is stored in: the only place that knows what "Q4_0" does to a model.

The rules are llama-quantize's. A file type has a base type for the matrices; the matrix that makes the logits costs
more when it is wrong, so most file types give it more bits: Q4_0 stores it as Q6_K. In a model with tied embeddings
that matrix is token_embd, else it is output. The K-quants also give more bits to the matrices of some layers that are
worth them (Upgrade), as do Q4_0 and Q5_0 where an importance matrix is at hand. `pure` gives every matrix the base
type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lfm2cpp.arch import TensorEntry
from lfm2cpp.errors import UsageError
from lfm2cpp.ggml import TRAITS, FileType, GGMLType


@dataclass(frozen=True)
class Upgrade:
    """A type for some of the matrices `blk.N.{part}.weight`: the i-th of n, counted over the layers that have one."""

    part: str
    ggml_type: GGMLType
    applies: Callable[[int, int], bool]
    weighted: bool | None = None  # only where the matrices are quantized by importance; False: only where not


def first_four(i: int, n: int) -> bool:
    return i < 4


def first_eighth(i: int, n: int) -> bool:
    return i < n // 8


def use_more_bits(i: int, n: int) -> bool:
    """llama-quantize's: the first and the last eighth, and every third in between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@dataclass(frozen=True)
class Recipe:
    """A file type. Without a base type every tensor stays what it is."""

    name: str
    file_type: FileType | None
    base: GGMLType | None
    head: GGMLType | None  # of the matrix that makes the logits
    summary: str
    upgrades: tuple[Upgrade, ...] = ()


SMALL = Upgrade("attn_v", GGMLType.Q5_K, first_four), Upgrade("ffn_down", GGMLType.Q5_K, first_eighth)
MEDIUM = Upgrade("attn_v", GGMLType.Q6_K, use_more_bits), Upgrade("ffn_down", GGMLType.Q6_K, use_more_bits)

# By importance, the first layers of ffn_down want a minimum.
WEIGHTED_Q4_0 = (Upgrade("ffn_down", GGMLType.Q4_1, first_eighth, weighted=True),)
WEIGHTED_Q5_0 = (Upgrade("ffn_down", GGMLType.Q5_1, first_eighth, weighted=True),)
# Without, those of IQ4_NL want more bits. (Its attn_v, too, where four query heads share a KV head already in the first
# layer; an LFM2's first layer has none.)
IQ4_NL_MORE = (Upgrade("ffn_down", GGMLType.Q5_K, first_eighth, weighted=False),)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("Q4_0", FileType.Q4_0, GGMLType.Q4_0, GGMLType.Q6_K, "4.5 bits a weight, the fastest", WEIGHTED_Q4_0),
        Recipe("Q4_1", FileType.Q4_1, GGMLType.Q4_1, GGMLType.Q6_K, "5 bits, scale and minimum"),
        Recipe("Q5_0", FileType.Q5_0, GGMLType.Q5_0, GGMLType.Q6_K, "5.5 bits", WEIGHTED_Q5_0),
        Recipe("Q5_1", FileType.Q5_1, GGMLType.Q5_1, GGMLType.Q6_K, "6 bits, scale and minimum"),
        Recipe("IQ4_NL", FileType.IQ4_NL, GGMLType.IQ4_NL, GGMLType.Q6_K, "4.5 bits, denser at zero", IQ4_NL_MORE),
        Recipe("Q4_K_S", FileType.Q4_K_S, GGMLType.Q4_K, GGMLType.Q6_K, "4.5 bits, 5.5 in a few layers", SMALL),
        Recipe("Q4_K_M", FileType.Q4_K_M, GGMLType.Q4_K, GGMLType.Q6_K, "4.5 bits, 6.6 in some layers", MEDIUM),
        Recipe("Q5_K_S", FileType.Q5_K_S, GGMLType.Q5_K, GGMLType.Q6_K, "5.5 bits"),
        Recipe("Q5_K_M", FileType.Q5_K_M, GGMLType.Q5_K, GGMLType.Q6_K, "5.5 bits, 6.6 in some layers", MEDIUM),
        Recipe("Q6_K", FileType.Q6_K, GGMLType.Q6_K, GGMLType.Q6_K, "6.6 bits"),
        Recipe("Q8_0", FileType.Q8_0, GGMLType.Q8_0, GGMLType.Q8_0, "8.5 bits, next to no loss"),
        Recipe("F16", FileType.F16, GGMLType.F16, GGMLType.F16, "half precision"),
        Recipe("BF16", FileType.BF16, GGMLType.BF16, GGMLType.BF16, "what most checkpoints hold"),
        Recipe("F32", FileType.F32, GGMLType.F32, GGMLType.F32, "single precision"),
        Recipe("COPY", None, None, None, "every tensor as it is"),
    )
}

ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# What a row takes that is not whole blocks of the type chosen for it; F16 when that does not fit either.
FALLBACK: dict[GGMLType, GGMLType] = {
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
}

OUTPUT, TOKEN_EMBD = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class Choice:
    """The type a tensor gets, and the one it would have got if its rows were whole blocks of that."""

    ggml_type: GGMLType
    wanted: GGMLType

    @property
    def fell_back(self) -> bool:
        return self.ggml_type != self.wanted


@dataclass(frozen=True)
class Subject:
    """A stored tensor that waits for its type; `entry` is its place in the architecture's table, if it has one."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType
    entry: TensorEntry | None


def find_recipe(name: str) -> Recipe:
    """The recipe of a type name or alias, in any case, or of a file type's number. UsageError with the list."""
    by_number = {str(int(r.file_type)): r for r in RECIPES.values() if r.file_type is not None}
    upper = name.upper()
    recipe = RECIPES.get(ALIASES.get(upper, upper)) or by_number.get(name)
    if recipe is None:
        raise UsageError(f"unknown type {name!r}; choose one of: {' '.join(RECIPES)}")
    return recipe


def choose_types(
    recipe: Recipe, subjects: Mapping[str, Subject], *, pure: bool = False, weighted: bool = False
) -> dict[str, Choice]:
    """The type of every tensor of a file, by name; `subjects` are all its tensors, in the order of `sort_key`.

    `weighted`: whether an importance matrix is at hand.
    """
    special = {} if pure else _special_types(recipe, subjects, weighted)
    return {name: _choose_type(special.get(name, recipe.base), subject) for name, subject in subjects.items()}


def _special_types(recipe: Recipe, subjects: Mapping[str, Subject], weighted: bool) -> dict[str, GGMLType]:
    """Of the tensors that do not take the base type, by name."""
    if recipe.head is None:
        return {}
    found = {TOKEN_EMBD if OUTPUT not in subjects else OUTPUT: recipe.head}
    for upgrade in recipe.upgrades:
        if upgrade.weighted not in (None, weighted):
            continue
        of_part = [name for name in subjects if re.fullmatch(rf"blk\.\d+\.{upgrade.part}\.weight", name)]
        for i, name in enumerate(of_part):
            if upgrade.applies(i, len(of_part)):
                found[name] = upgrade.ggml_type
    return found


def _choose_type(wanted: GGMLType | None, subject: Subject) -> Choice:
    """The type of one tensor that is to have the `wanted` one, if any."""
    if wanted is None or not is_quantizable(subject):
        return Choice(subject.ggml_type, subject.ggml_type)
    n_per_row, ggml_type = subject.shape[-1], wanted
    if n_per_row % TRAITS[ggml_type].block_size:
        ggml_type = FALLBACK.get(ggml_type, ggml_type)
    if n_per_row % TRAITS[ggml_type].block_size:
        ggml_type = GGMLType.F16
    return Choice(ggml_type, wanted)


def is_quantizable(subject: Subject) -> bool:
    """Whether llama-quantize would change this tensor's type at all: a matrix of more than one row."""
    if len(file_shape(subject.shape)) < 2:
        return False
    if subject.entry is not None:
        return subject.entry.quantizable
    # A tensor that no table knows: its name decides.
    return subject.name.endswith("weight") and not subject.name.endswith("_norm.weight")


def file_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as ggml counts dimensions: without leading ones (which are trailing in the file)."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def sort_key(name: str) -> tuple[int, bytes]:
    """llama-quantize's order of tensors: those outside the layers first, then by layer, then by name."""
    match = re.match(r"blk\.(\d+)", name)
    return (int(match[1]) if match else -1, name.encode())
