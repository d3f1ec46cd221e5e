"""What the demonstration is for: the converted model answers what it has not seen, and equals transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lfm2cpp.demo import demo
from lfm2cpp.errors import CheckFailed
from lfm2cpp.gguf import read_gguf
from lfm2cpp.llm import LLM

EXACT_SHARE = 0.95  # of the held-out questions of each skill, F32
SKILLS = {  # skill -> the kinds of question that ask for it, 100 each
    "arithmetic": ("addition", "subtraction"),
    "facts": ("facts",),
    "ordering words": ("alphabetical", "descending", "reverse"),
    "recall": ("recall_name", "recall_number"),
}
QUANTIZED_SHARE = 0.9  # of some questions of all skills together
SOME = 10  # questions a skill for the quantized files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return demo.make_files(tmp_path_factory.mktemp("demo"), lambda text: None)


@pytest.fixture(scope="module")
def f32(files: dict[str, Path]) -> Iterator[LLM]:
    with LLM(files["F32"], kv_type=demo.KV_TYPE) as llm:
        yield llm


def test_every_held_out_question_belongs_to_a_skill() -> None:
    assert sorted(kind for kinds in SKILLS.values() for kind in kinds) == sorted(demo.held_out())
    assert {len(questions) for questions in demo.held_out().values()} == {100}


@pytest.mark.parametrize("skill", SKILLS)
def test_f32_answers_the_held_out_questions(f32: LLM, skill: str) -> None:
    questions = [question for kind in SKILLS[skill] for question in demo.held_out()[kind]]
    wrong = [q for q in questions if not demo.is_answered(f32, q)]
    assert len(wrong) <= (1 - EXACT_SHARE) * len(questions), [(q["messages"][-1], q["answer"]) for q in wrong]


def test_f32_equals_transformers(f32: LLM) -> None:
    assert demo.logits_error(f32) <= demo.F32_LIMIT == 1e-5  # numeric contract, 1


@pytest.mark.parametrize("file_type", demo.TYPES[1:])
def test_quantized_files_do_as_well_as_their_type_allows(files: dict[str, Path], file_type: str) -> None:
    with LLM(files[file_type], kv_type=demo.KV_TYPE) as llm:
        questions = demo.some_questions(SOME)
        n_exact = sum(demo.is_answered(llm, question) for question in questions)
        assert n_exact >= QUANTIZED_SHARE * len(questions)
        error = demo.logits_error(llm)
    assert 1e-3 < error <= demo.error_limit(file_type)


def test_sizes_come_from_the_files(files: dict[str, Path]) -> None:
    bits = {file_type: demo.bits_per_weight(path) for file_type, path in files.items()}
    assert bits["F32"] == 32
    assert 8.5 <= bits["Q8_0"] < 8.6
    assert 4.5 < bits["Q4_0"] < 4.9  # the embedding is Q6_K


def test_one_wrong_tensor_is_noticed(files: dict[str, Path], tmp_path: Path) -> None:
    """Two rows of one projection change places; everything else is as it was."""
    spoiled = tmp_path / "spoiled.gguf"
    data = bytearray(files["F32"].read_bytes())
    with read_gguf(files["F32"]) as gguf:
        tensor = gguf.tensors["blk.1.attn_q.weight"]
        start, n_row = tensor.offset, tensor.nbytes // tensor.shape[0]
    first, last = slice(start, start + n_row), slice(start + 3 * n_row, start + 4 * n_row)
    data[first], data[last] = data[last], data[first]
    spoiled.write_bytes(data)
    with LLM(spoiled, kv_type=demo.KV_TYPE) as llm:
        row = demo.judge(llm, "F32")
    assert not row.passed
    with pytest.raises(CheckFailed, match="spoiled.gguf.*lfm2cpp parity"):
        demo.check([dataclasses.replace(row, error=0.0), row])


def test_a_nan_does_not_pass() -> None:
    row = demo.Judged("F32", Path("x.gguf"), 1, 32.0, 1.0, float("nan"), 1.0, 0, 1)
    with pytest.raises(CheckFailed):
        demo.check([row])


def test_stored_logits_cover_padding_rows() -> None:
    for ids, logits in demo.stored_logits():
        assert logits.shape == (len(ids), 1536) and logits.dtype == np.float32
        assert np.isfinite(logits).all()
