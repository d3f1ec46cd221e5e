"""From two paths to a report: load both models, make sure that they are one, pick the tokens, run and judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lfm2cpp import __version__, reference
from lfm2cpp.arch.validate import ModelFacts, validate_model
from lfm2cpp.errors import CheckpointError
from lfm2cpp.gguf.reader import GGUFFile, read_gguf

from .check import File, greedy_choices, judge, run_both
from .models import check_same_shape, check_same_vocabulary, compare_weights
from .report import Report, Score
from .runners import EngineRunner, Runner

DEFAULT_PROMPT = "The quick brown fox jumps over the lazy dog. 12 + 34 = 46, said the fox."
N_RANDOM_TOKENS = 24
# float64 copies of the weights are kept up to this size; a larger model is unpacked again for each pass.
MAX_KEPT_BYTES = 4 << 30

MakeRunner = Callable[..., AbstractContextManager[Runner]]


@dataclass(frozen=True)
class Request:
    """What to compare. `gguf` None: convert the checkpoint to F32. `ids` win over `prompt`."""

    hf: Path
    gguf: Path | None = None
    prompt: str | None = None
    ids: Sequence[int] | None = None
    n_decode: int = 8
    kv_type: str = "f32"
    n_threads: int | None = None


def check_parity(
    request: Request, *, runner: MakeRunner = EngineRunner, progress: Callable[[str], None] = lambda text: None
) -> Report:
    """Run the whole check. Raises UsageError without torch, CheckpointError when the two are not one model.

    `runner(path, n_ctx=, n_threads=, kv_type=)` is who is compared with Hugging Face: the engine.
    """
    from .hf import HFRunner, require_torch

    require_torch()
    with _gguf(request, progress) as path, read_gguf(path) as gguf:
        facts = validate_model(gguf)
        progress("loading the checkpoint into transformers, float32")
        hf = HFRunner(request.hf)
        check_same_shape(hf.hparams, facts.hparams)
        check_same_vocabulary(request.hf, gguf)
        tokens, scores = _tokens(request, gguf, facts.hparams.n_vocab)
        progress(f"running both on {len(tokens)} tokens, then {request.n_decode} one by one")
        n_ctx = len(tokens) + request.n_decode + 1
        with runner(path, n_ctx=n_ctx, n_threads=request.n_threads, kv_type=request.kv_type) as ours:
            runs = run_both(hf, ours, tokens, request.n_decode)
        file = _file(path, facts, request.kv_type)
        progress("comparing the weights")
        lines = compare_weights(hf, file.model, file.types)
        progress("comparing the intermediates")
        judged, more_scores = judge(runs, file)
        return Report(
            hf=str(request.hf),
            gguf=str(request.gguf) if request.gguf else "converted to F32 for this check",
            versions={"lfm2cpp": __version__, **hf.versions},
            mode="float32" if file.is_exact else "rounded",
            kinds=["conv" if facts.hparams.is_conv(il) else "attention" for il in range(facts.hparams.n_layer)],
            tokens=tokens,
            hf_tokens=runs.continuation,
            our_tokens=greedy_choices(runs),
            lines=lines + judged,
            scores=scores + more_scores,
            notes=[*gguf.warnings, *facts.warnings, *_unseen(runs.hf["prefill"], runs.ours["prefill"])],
        )


def _file(path: Path, facts: ModelFacts, kv_type: str) -> File:
    """The GGUF for the judge; its weights stay unpacked between passes if they are not too large."""
    n_weights = sum(math.prod(info.shape) for info in facts.tensors.values())
    model = reference.load_model(path, keep=8 * n_weights <= MAX_KEPT_BYTES)
    return File(model, {name: info.ggml_type for name, info in facts.tensors.items()}, kv_type)


@contextmanager
def _gguf(request: Request, progress: Callable[[str], None]) -> Iterator[Path]:
    """The file to compare: the user's, or one converted for the occasion and removed afterwards."""
    if request.gguf is not None:
        yield request.gguf
        return
    from convert.hf_to_gguf import ConvertOptions, convert_hf_to_gguf

    with TemporaryDirectory(prefix="lfm2cpp-parity-") as folder:
        progress("converting the checkpoint to F32")
        path = Path(folder) / "model-F32.gguf"
        convert_hf_to_gguf(request.hf, ConvertOptions(outtype="f32", outfile=path))
        yield path


def _tokens(request: Request, gguf: GGUFFile, n_vocab: int) -> tuple[list[int], list[Score]]:
    """The prompt's ids by Hugging Face's tokenizer, and how many of them ours would choose differently."""
    if request.ids is not None:
        return list(request.ids), []
    path = request.hf / "tokenizer.json"
    if not path.is_file():
        if request.prompt is not None:
            raise CheckpointError(f"{path}: not found, so a prompt cannot be tokenized; give token ids with --ids")
        return np.random.default_rng(0).integers(0, n_vocab, N_RANDOM_TOKENS).tolist(), []
    from tokenizers import Tokenizer

    from lfm2cpp.text.vocab import Vocab

    prompt = DEFAULT_PROMPT if request.prompt is None else request.prompt
    theirs = Tokenizer.from_file(str(path)).encode(prompt).ids
    ours = Vocab(gguf).tokenize(prompt, add_bos=True, parse_special=True)
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    return theirs, [Score("prompt", "tokens that differ", max(len(ours), len(theirs)) - same, 0)]


def _unseen(theirs: Sequence[str], ours: Sequence[str]) -> list[str]:
    """What we show and this version of transformers does not."""
    names = [name for name in ours if name not in theirs]
    return [f"{len(names)} intermediates are not visible in transformers, the first is {names[0]}"] if names else []

