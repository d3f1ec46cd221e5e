"""What stands between an LLM object and its engine: one sequence that is reused from call to call.

Everything here runs on the worker's thread, one job at a time, except loading and closing.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import ModelFormatError, UsageError
from .generate import Event, Generation, Request, check_fits, generate
from .gguf.check import find_non_finite
from .gguf.values import ValueType
from .many import Ask, generate_many
from .sampling import NonFiniteLogits, load_kernel
from .text.vocab import VISIBLE_PIECES, Segment, Vocab, split_at
from .worker import Worker

if TYPE_CHECKING:
    from .text.template import ChatTemplate, Rendered

F32 = NDArray[np.float32]
PAGE_TOKENS = 64  # what older conversations left behind comes in pages


def give_back_memory() -> None:
    """Let the system have what was freed: glibc keeps it otherwise, 8 MB after building a vocabulary of 65,536."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Session:
    """An engine, its vocabulary and template, a sequence, and the worker that owns them."""

    def __init__(self, path: str | os.PathLike[str], *, template: str | None = None, **engine_options: Any) -> None:
        from .engine.engine import Engine

        self.engine = Engine(path, **engine_options)
        try:
            load_kernel(engine_options.get("progress"))
            self.vocab = Vocab(self.engine.gguf)
            if self.vocab.n_tokens > self.engine.n_vocab:
                raise ModelFormatError(
                    f"{self.engine.path}: tokenizer.ggml.tokens has {self.vocab.n_tokens} tokens, "
                    f"but token_embd.weight only {self.engine.n_vocab} rows"
                )
        except BaseException:
            self.engine.close()
            raise
        give_back_memory()
        self._template_source = template
        self._template: ChatTemplate | None = None
        self._template_lock = threading.Lock()
        self._sequence: Any = None
        self._said = Transcript()
        self._running: threading.Event | None = None
        self.worker = Worker("lfm2cpp-llm")

    # -- text --------------------------------------------------------------------------------------------------

    @property
    def template(self) -> ChatTemplate:
        """The chat template, compiled when first needed: the caller's, the file's, or ChatML."""
        with self._template_lock:
            if self._template is None:
                from .text.template import CHATML, ChatTemplate

                gguf, vocab = self.engine.gguf, self.vocab
                source = self._template_source or gguf.get("tokenizer.chat_template", ValueType.STRING, "")
                ids = {"bos_token": vocab.bos_id, "eos_token": vocab.eos_id, "pad_token": vocab.pad_id}
                self._template = ChatTemplate(
                    CHATML if source in ("", "chatml") else source,
                    label=str(self.engine.path),
                    special_pieces=vocab.special_pieces,
                    token_names={name: vocab.piece(i) for name, i in ids.items() if i is not None},
                )
            return self._template

    # -- jobs --------------------------------------------------------------------------------------------------

    def complete(self, request: Request, emit: Callable[[Event], None], stop: threading.Event) -> Generation:
        """Generate after the prompt ids of `request`."""
        with self._at_work(stop):
            check_fits(len(request.prompt_ids), self.engine.n_ctx)
            sequence = self._sequence_for(request.prompt_ids)
            try:
                return generate(self.engine, sequence, self.vocab, request, emit=emit, stop=stop)
            except NonFiniteLogits as error:
                raise self._explained(error) from error

    def complete_many(
        self, asks: Iterable[Ask], n_parallel: int, emit: Callable[[Any], None], stop: threading.Event
    ) -> None:
        """Emit (number, answer or error) of each request as it ends, n_parallel at a time; ends when stopped."""
        if self._sequence is not None:  # the memory may be needed; what it has read in whole pages stays
            self._sequence.close()
            self._sequence = None
        with self._at_work(stop):
            try:
                for number, outcome in generate_many(self.engine, self.vocab, asks, n_parallel=n_parallel, stop=stop):
                    emit((number, self._explained(outcome) if isinstance(outcome, NonFiniteLogits) else outcome))
            except KeyboardInterrupt:
                if not stop.is_set():
                    raise
                if self.worker.closed:
                    raise UsageError("this LLM was closed while it generated") from None

    @contextmanager
    def _at_work(self, stop: threading.Event) -> Iterator[None]:
        """While a job runs that `stop` ends: closing sets it, and has perhaps been asked for already."""
        self._running = stop
        try:
            if self.worker.closed:
                stop.set()
            yield
        finally:
            self._running = None

    def _explained(self, error: NonFiniteLogits) -> NonFiniteLogits:
        """The error with the first weight that is to blame, which names its layer."""
        found = next(find_non_finite(self.engine.gguf), None)
        if found is None:
            why = "no weight is NaN or Inf, so a sum overflowed; try a file of another type"
        else:
            why = f"{found}; the file is damaged, make or download it anew"
        return NonFiniteLogits(f"{error}; {self.engine.path}: {why}")

    def rendered_ids(self, rendered: Rendered) -> tuple[int, ...]:
        """The token ids of a conversation."""
        return tuple(self.vocab.encode_segments(rendered.segments, add_bos=self.vocab.add_bos))

    def answer(
        self, rendered: Rendered, request: Request, emit: Callable[[Event], None], stop: threading.Event
    ) -> Generation:
        """Generate after a rendered conversation; of one that goes on, what was said before keeps its very tokens."""
        ids, rest = self._said.resume(rendered.segments)
        ids += self.vocab.encode_segments(rest, add_bos=self.vocab.add_bos and not ids)
        result = self.complete(replace(request, prompt_ids=tuple(ids)), emit, stop)
        self._said.remember(rendered.segments, result, self.vocab)
        return result

    def logits(self, ids: Sequence[int], every: bool) -> F32:
        """(n_vocab,) after the last of `ids`, or (len(ids), n_vocab) after each of them."""
        check_fits(len(ids), self.engine.n_ctx)
        sequence = self.engine.sequence()
        try:
            kept = 0 if every else sequence.reuse_prefix(ids)
            rows = self.engine.evaluate([(sequence, list(ids[kept:]))], logits="all" if every else "last")[0]
            return rows if every else rows[0]
        finally:
            sequence.close()

    def _sequence_for(self, ids: Sequence[int]) -> Any:
        """The sequence, cut back to what it shares with `ids`, or a fresh one that found more in older pages."""
        if self._sequence is None:
            self._sequence = self.engine.sequence()
        kept = self._sequence.reuse_prefix(ids)
        if kept < PAGE_TOKENS:
            fresh = self.engine.sequence()
            if fresh.reuse_prefix(ids) > kept:
                self._sequence, fresh = fresh, self._sequence
            fresh.close()
        return self._sequence

    # -- ending ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop what runs, end the worker, let the engine go. Does nothing in a forked child."""
        if self.worker.in_other_process:
            return
        self.worker.refuse()
        if (running := self._running) is not None:
            running.set()
        self.worker.close()
        self.engine.close()


class Transcript:
    """The conversation that was last had, as text and as ids, so that a longer one can go on from its very ids.

    A model may spell its answer in other tokens than the tokenizer would; rendering the next turn from text alone
    would then have to evaluate the answer again. A mark stands after each prompt and each answer, so that going
    back some turns (undo, regenerate) finds its ids as well.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._tagged = ""
        self._marks: list[tuple[int, int]] = []  # lengths of _tagged and of _ids

    def resume(self, segments: Sequence[Segment]) -> tuple[list[int], list[Segment]]:
        """The ids of the longest part that `segments` begin with, and the segments after it. Forgets the rest."""
        whole = "".join(_tag(*segment) for segment in segments)
        while self._marks and not whole.startswith(self._tagged[: self._marks[-1][0]]):
            self._marks.pop()
        n_chars, n_ids = self._marks[-1] if self._marks else (0, 0)
        self._tagged = self._tagged[:n_chars]
        del self._ids[n_ids:]
        return list(self._ids), _after(segments, n_chars)

    def remember(self, segments: Sequence[Segment], result: Generation, vocab: Vocab) -> None:
        """A prompt of `segments` and its answer; of an answer cut at a stop string only the prompt."""
        self._tagged = "".join(_tag(*segment) for segment in segments)
        self._ids = list(result.prompt_ids)
        self._marks.append((len(self._tagged), len(self._ids)))
        if result.detail.startswith("stop string"):
            return
        ids = list(result.token_ids)
        if ids and vocab.is_eog(ids[-1]):
            ids.pop()
        self._ids += ids
        self._tagged += "".join(_tag(*part) for part in split_at(result.text, VISIBLE_PIECES))
        self._marks.append((len(self._tagged), len(self._ids)))


def _after(segments: Sequence[Segment], n_chars: int) -> list[Segment]:
    """What follows the first `n_chars` of the tagged `segments`."""
    for i, (text, special) in enumerate(segments):
        tagged = _tag(text, special)
        if n_chars < len(tagged):
            tail = (text, True) if special else (tagged[n_chars:].replace("\0\0", "\0"), False)
            return [tail, *segments[i + 1 :]]
        n_chars -= len(tagged)
    return []


def _tag(text: str, special: bool) -> str:
    """A spelling in which the piece `<|x|>` and the same characters as text differ."""
    return f"\0[{text}\0]" if special else text.replace("\0", "\0\0")
