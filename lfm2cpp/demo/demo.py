"""The whole chain on the model that comes along: checkpoint -> F32 GGUF -> Q8_0 and Q4_0, each one judged.

Each file is compared with logits that transformers computed from the same checkpoint in float32, and is asked
questions that were not in the model's training text. bench/train_demo.py made all of that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.errors import CheckFailed

if TYPE_CHECKING:
    from lfm2cpp.llm import LLM

F32 = NDArray[np.float32]
DEMO_DIR = Path(__file__).resolve().parent
MODEL_DIR = DEMO_DIR / "model"

TYPES = ("F32", "Q8_0", "Q4_0")
CHAT_TYPE = "Q8_0"  # the one to talk to
QUESTIONS_PER_SKILL = 20
SPEED_TOKENS = 128
GREEDY: dict[str, Any] = {"temp": 0.0, "repeat_penalty": 1.0, "max_tokens": 64}

KV_TYPE = "f32"  # nothing is rounded but the weights; the default f16 would be the F32 file's whole error

# Relative RMS error of the logits that two float32 implementations stay below (numeric contract).
F32_LIMIT = 1e-5
# Quantized: this many times what the rounding of weights and activations costs, see `error_limit`.
ROUNDING_RATIO = 1.5

SCRIPT = (
    "My name is Ada.",
    "What is 23 + 45?",
    "Sort: pear, apple, fig",
    "What is the capital of France?",
    "Reverse the order of these words: bread, milk, honey",
    "What is 91 - 37?",
    "What is my name?",
)


@dataclass(frozen=True)
class Judged:
    """One row of the table: a file, and how it did. `error` is against transformers' float32 logits."""

    file_type: str
    path: Path
    nbytes: int
    bits_per_weight: float
    tokens_per_second: float
    error: float
    limit: float
    n_exact: int
    n_questions: int

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def file_path(folder: Path, file_type: str) -> Path:
    return folder / f"lfm2-demo-{file_type}.gguf"


def make_files(folder: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """Convert the checkpoint and quantize it; files of an earlier run are replaced."""
    from convert.hf_to_gguf import ConvertOptions, convert_hf_to_gguf
    from quant.quantize import quantize_file

    paths = {file_type: file_path(folder, file_type) for file_type in TYPES}
    say(f"converting {MODEL_DIR} to {paths['F32'].name}")
    options = ConvertOptions(outtype="f32", outfile=paths["F32"], model_name="LFM2 demo", force=True)
    convert_hf_to_gguf(MODEL_DIR, options)
    for file_type in TYPES[1:]:
        say(f"quantizing it to {paths[file_type].name}")
        quantize_file(paths["F32"], paths[file_type], file_type, force=True)
    return paths


def judge(llm: LLM, file_type: str) -> Judged:
    """Measure one file: size, speed, error, exact answers."""
    questions = some_questions(QUESTIONS_PER_SKILL)
    n_exact = sum(is_answered(llm, question) for question in questions)
    return Judged(
        file_type=file_type,
        path=llm.path,
        nbytes=llm.path.stat().st_size,
        bits_per_weight=bits_per_weight(llm.path),
        tokens_per_second=decode_speed(llm),
        error=logits_error(llm),
        limit=error_limit(file_type),
        n_exact=n_exact,
        n_questions=len(questions),
    )


def check(rows: list[Judged]) -> None:
    """Raise CheckFailed for the first file that is farther from transformers than its type explains."""
    for row in rows:
        if not row.passed:
            raise CheckFailed(
                f"{row.path.name}: logits differ from transformers' by {row.error:.2e} relative RMS, expected at most "
                f"{row.limit:.2e}; `lfm2cpp parity {MODEL_DIR} -m {row.path}` names the layer, `lfm2cpp doctor` the CPU"
            )


# -- what is measured ------------------------------------------------------------------------------------------


def bits_per_weight(path: Path) -> float:
    """Bits of tensor data for each weight, norms included."""
    from lfm2cpp.gguf import read_gguf

    with read_gguf(path) as gguf:
        n_weights = sum(int(np.prod(t.shape, dtype=object)) for t in gguf.tensors.values())
        return 8 * sum(t.nbytes for t in gguf.tensors.values()) / n_weights


def decode_speed(llm: LLM) -> float:
    """Tokens generated per second, one sequence, after a short prompt."""
    ids = next(stored_logits())[0]
    result = llm.generate(ids, **{**GREEDY, "max_tokens": SPEED_TOKENS, "ignore_eos": True, "draft_max": 0})
    return result.timings.predicted_per_second


def logits_error(llm: LLM) -> float:
    """Relative RMS error over all stored rows; columns beyond the tokenizer count too."""
    squared_error = squared_size = 0.0
    for ids, expected in stored_logits():
        difference = llm.logits(ids, every=True).astype(np.float64) - expected
        squared_error += float(np.sum(difference**2))
        squared_size += float(np.sum(expected.astype(np.float64) ** 2))
    return (squared_error / squared_size) ** 0.5


def error_limit(file_type: str) -> float:
    """What `logits_error` may be.

    Stored with the logits is what rounding the weights alone does to them in transformers. The runtime also rounds
    activations to 8 bits, which costs about what Q8_0 weights cost; the two are independent, so squares add up.
    """
    if file_type == "F32":
        return F32_LIMIT
    with np.load(DEMO_DIR / "expected_logits.npz") as stored:
        weights, activations = float(stored[f"error_{file_type}"]), float(stored["error_Q8_0"])
    return ROUNDING_RATIO * (weights**2 + activations**2) ** 0.5


def stored_logits() -> Iterator[tuple[list[int], F32]]:
    """Token ids (n,) and transformers' float32 logits (n, n_vocab) after each of them, prompt by prompt."""
    with np.load(DEMO_DIR / "expected_logits.npz") as stored:
        for i in range(sum(name.startswith("ids_") for name in stored)):
            yield stored[f"ids_{i}"].tolist(), stored[f"logits_{i}"]


# -- questions -------------------------------------------------------------------------------------------------


def held_out() -> dict[str, list[dict[str, Any]]]:
    """Skill -> [{"messages": a chat that ends in a question, "answer": the only right answer}]."""
    return json.loads((DEMO_DIR / "held_out.json").read_text(encoding="utf-8"))


def some_questions(per_skill: int) -> list[dict[str, Any]]:
    """The first held-out questions of each skill."""
    return [question for rows in held_out().values() for question in rows[:per_skill]]


def is_answered(llm: LLM, question: dict[str, Any]) -> bool:
    """Whether the greedy answer is right to the letter, and ends where it should."""
    result = llm.chat(question["messages"], **GREEDY)
    return result.text == question["answer"] and result.finish_reason == "stop"
