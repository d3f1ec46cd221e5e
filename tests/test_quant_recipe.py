"""Which type each tensor gets: the table of llama-quantize's choices for LFM2."""

from __future__ import annotations

import pytest

from lfm2cpp.arch import iter_tensors, lfm2
from lfm2cpp.errors import UsageError
from lfm2cpp.ggml import FileType, GGMLType
from quant.encode import ENCODABLE
from quant.recipe import ALIASES, RECIPES, Subject, choose_types, file_shape, find_recipe, is_quantizable, sort_key


def subjects(
    n_embd=1024, n_ff=4608, tied=True, source=GGMLType.BF16, n_head_kv=(0, 8, 0), **extra
) -> dict[str, Subject]:
    hp = lfm2.HParams(
        n_vocab=65536, n_ctx_train=128000, n_embd=n_embd, n_layer=len(n_head_kv), n_ff=n_ff, n_head=n_embd // 64,
        n_head_kv=n_head_kv, l_cache=3, norm_rms_eps=1e-5, rope_freq_base=1e6,
    )  # fmt: skip
    entries = [e for e in iter_tensors(lfm2, hp) if not (e.spec.optional and tied)]
    found = {e.name: Subject(e.name, e.shape, source if e.quantizable else GGMLType.F32, e) for e in entries}
    found |= {name: Subject(name, shape, source, None) for name, shape in extra.items()}
    return dict(sorted(found.items(), key=lambda item: sort_key(item[0])))


def types(name: str, pure: bool = False, weighted: bool = False, **model) -> dict[str, str]:
    chosen = choose_types(find_recipe(name), subjects(**model), pure=pure, weighted=weighted)
    return {n: c.ggml_type.name for n, c in chosen.items()}


ALWAYS_F32 = ("attn_norm", "ffn_norm", "token_embd_norm", "attn_q_norm", "attn_k_norm", "shortconv.conv.")


@pytest.mark.parametrize(("name", "base", "head"), [
    ("Q4_0", "Q4_0", "Q6_K"), ("Q4_1", "Q4_1", "Q6_K"), ("Q5_0", "Q5_0", "Q6_K"), ("Q5_1", "Q5_1", "Q6_K"),
    ("Q6_K", "Q6_K", "Q6_K"), ("Q8_0", "Q8_0", "Q8_0"), ("F16", "F16", "F16"), ("BF16", "BF16", "BF16"),
    ("F32", "F32", "F32"),
])  # fmt: skip
@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_types_of_a_file_type(name, base, head, pure, tied):
    for tensor, found in types(name, pure, tied=tied).items():
        is_head = tensor == ("token_embd.weight" if tied else "output.weight")
        is_small = any(part in tensor for part in ALWAYS_F32)
        assert found == ("F32" if is_small else head if is_head and not pure else base), tensor


# lfm2-facts, 3.3, read from files that llama-quantize wrote; attn_v is counted over the layers that have one.
@pytest.mark.parametrize(("n_layer", "n_attention", "ffn_down", "attn_v"), [
    (16, 6, {0, 1, 4, 7, 10, 13, 14, 15}, {2, 5}),
    (14, 6, {0, 3, 6, 9, 12, 13}, {2, 5}),
    (30, 8, {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29}, {0, 3, 6, 7}),
    (30, 10, {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29}, {0, 3, 6, 8, 9}),
])  # fmt: skip
@pytest.mark.parametrize("name", ["Q4_K_M", "Q5_K_M"])
def test_layers_that_get_more_bits(name, n_layer, n_attention, ffn_down, attn_v):
    base, n_head_kv = name[:4], (0,) * (n_layer - n_attention) + (8,) * n_attention
    found = types(name, n_head_kv=n_head_kv)
    for part, layers, n in (("ffn_down", ffn_down, n_layer), ("attn_v", attn_v, n_attention)):
        of_part = [found[f"blk.{n_layer - n + i}.{part}.weight"] for i in range(n)]
        assert of_part == ["Q6_K" if i in layers else base for i in range(n)]
    assert found["token_embd.weight"] == "Q6_K" and found["blk.0.ffn_up.weight"] == base
    assert set(types(name, pure=True, n_head_kv=n_head_kv).values()) == {base, "F32"}


def test_small_k_files():
    found = types("Q4_K_S", n_head_kv=(8,) * 6 + (0,) * 10)
    assert [found[f"blk.{i}.attn_v.weight"] for i in range(6)] == ["Q5_K"] * 4 + ["Q4_K"] * 2
    assert [found[f"blk.{i}.ffn_down.weight"] for i in range(16)] == ["Q5_K"] * 2 + ["Q4_K"] * 14
    assert set(types("Q5_K_S").values()) == {"Q5_K", "Q6_K", "F32"}


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias):
    assert find_recipe(alias.lower()) is RECIPES[ALIASES[alias]]


def test_copy_keeps_every_type():
    assert set(types("COPY", source=GGMLType.Q5_1).values()) == {"Q5_1", "F32"}


@pytest.mark.parametrize(("n", "fits"), [
    (1024, {"Q4_0": "Q4_0", "Q8_0": "Q8_0", "Q6_K": "Q6_K"}),
    (96, {"Q4_0": "Q4_0", "Q8_0": "Q8_0", "Q6_K": "Q8_0", "Q4_K_S": "Q5_0", "Q5_K_S": "Q5_1"}),  # whole blocks of 32 only
    (80, {"Q4_0": "F16", "Q8_0": "F16", "Q6_K": "F16", "Q4_K_S": "F16", "BF16": "BF16"}),  # none
])  # fmt: skip
def test_fallback_where_rows_are_not_whole_blocks(n, fits):
    for name, expected in fits.items():
        choice = choose_types(find_recipe(name), subjects(n_ff=n))["blk.1.ffn_down.weight"]
        assert choice.ggml_type.name == expected
        assert choice.fell_back == (expected != name)


def test_a_head_that_does_not_fit_falls_back():
    assert types("Q4_0", n_embd=96, n_ff=96)["token_embd.weight"] == "Q8_0"
    assert types("Q4_0", n_embd=96, n_ff=96)["blk.0.ffn_up.weight"] == "Q4_0"


def test_tensors_that_no_table_knows_go_by_name_and_shape():
    extra = {"dense_2.weight": (128, 1024), "dense_2.bias": (1, 128), "x_norm.weight": (4, 64), "table": (64, 64)}
    quantizable = {s.name for s in subjects(**extra).values() if s.entry is None and is_quantizable(s)}
    assert quantizable == {"dense_2.weight"}


@pytest.mark.parametrize(("shape", "in_file"), [
    ((7,), (7,)), ((1, 7), (7,)), ((7, 1), (7, 1)), ((1, 1, 7), (7,)), ((2, 1, 7), (2, 1, 7)), ((1,), (1,)),
])  # fmt: skip
def test_shape_as_ggml_counts_dimensions(shape, in_file):
    assert file_shape(shape) == in_file


def test_one_row_is_no_matrix():
    one = subjects(n_ff=1)
    assert not is_quantizable(one["blk.0.ffn_up.weight"]) and is_quantizable(one["blk.0.ffn_down.weight"])


def test_order_is_by_layer_number_then_name():
    expected = ["output.weight", "token_embd.weight", "token_embd_norm.weight", "zz"]
    expected += ["blk.2.a", "blk.9.A", "blk.9.z", "blk.10.a"]
    assert sorted(reversed(expected), key=sort_key) == expected
    assert sorted(sorted(expected), key=sort_key) == expected


@pytest.mark.parametrize("name", RECIPES)
def test_a_type_is_found_in_any_case_and_by_number(name):
    recipe = RECIPES[name]
    assert find_recipe(name.lower()) is recipe and find_recipe(name.upper()) is recipe
    if recipe.file_type is not None:
        assert find_recipe(str(int(recipe.file_type))) is recipe
        assert FileType[name] == recipe.file_type
        assert {recipe.base, recipe.head} <= set(ENCODABLE)


@pytest.mark.parametrize("name", ["", "Q9_9", "4", "-1", "q4_0 ", "02", "Q3_K_M"])
def test_an_unknown_type_lists_the_known(name):
    with pytest.raises(UsageError, match=" ".join(RECIPES)):
        find_recipe(name)


@pytest.mark.parametrize(("name", "becomes"), [("Q4_0", "Q4_1"), ("Q5_0", "Q5_1"), ("Q4_1", "Q4_1"), ("Q8_0", "Q8_0")])
def test_importances_upgrade_the_first_ffn_down(name, becomes):
    layers = (0, 0, 8) * 6
    plain, weighted = types(name, n_head_kv=layers), types(name, weighted=True, n_head_kv=layers)
    first = {f"blk.{i}.ffn_down.weight": becomes for i in range(len(layers) // 8)}
    assert weighted == plain | first
    assert types(name, pure=True, weighted=True, n_head_kv=layers) == types(name, pure=True, n_head_kv=layers)
