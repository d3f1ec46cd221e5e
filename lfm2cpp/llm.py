"""The Python interface: `from lfm2cpp import LLM`.

    with LLM("LFM2-350M-Q4_0.gguf") as llm:
        print(llm.chat([{"role": "user", "content": "What is 2+2?"}]).text)
        for event in llm.stream("Once upon a time", max_tokens=50): ...

An LLM may be used from several threads: calls queue. Ctrl-C in a call leaves it usable.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .generate import Event, Generation, Piece, Prefill, Request, Timings
from .many import MOST_PARALLEL, N_PARALLEL
from .presets import recommended_sampling
from .sampling import SamplingParams, in_range
from .worker import Batch, Stream

if TYPE_CHECKING:
    from .session import Session

__all__ = [
    "LLM", "Batch", "BatchItem", "Event", "Generation", "Piece", "Prefill", "SamplingParams", "Stream", "Timings",
]  # fmt: skip

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]] | str

_SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))


@dataclass(frozen=True)
class BatchItem:
    """A prompt of a batch with options of its own, which come before those of the batch."""

    prompt: Prompt | Messages
    options: Mapping[str, Any] = field(default_factory=dict)


class LLM:
    """A loaded model.

    `path` is a GGUF file, or a hub id `user/repo[:quant]` when no such file exists. `n_ctx` None takes the model's
    context; memory is committed as it fills. `kv_type` is f16, f32 or q8_0. `chat_template` is Jinja source or
    "chatml", instead of the file's. `force` loads a model that the memory does not suffice for. Raises
    ModelFormatError, ContextError or UsageError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n_ctx: int | None = None,
        n_threads: int | None = None,
        kv_type: str = "f16",
        verbose: bool = False,
        *,
        chat_template: str | None = None,
        force: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        from .session import Session

        started = time.perf_counter()
        options = {"n_ctx": n_ctx, "n_threads": n_threads, "kv_type": kv_type, "force": force, "progress": progress}
        self._session = session = Session(_local_path(path), template=chat_template, **options)
        # Also runs at the end of the interpreter, before daemon threads are cut off in the middle of something.
        self._finalizer = weakref.finalize(self, session.close)
        self.path: Path = session.engine.path
        self.sampling: SamplingParams = recommended_sampling(session.engine.gguf)  # what calls start from
        self.load_ms = 1e3 * (time.perf_counter() - started)
        if verbose:
            self._describe()

    def _describe(self) -> None:
        """What was loaded, on stderr."""
        from .ggml import FileType
        from .kernels import level
        from .terminal import format_size, note

        engine = self._session.engine
        file_type = self.metadata.get("general.file_type")
        ftype = FileType(file_type).name if file_type in set(FileType) else "mixed types"
        name, size = self.metadata.get("general.name", "no name"), format_size(engine.gguf.nbytes)
        note(
            f"{self.path}: {name}, {ftype}, {size}, context {self.n_ctx()}, vocabulary {self.n_vocab()}, "
            f"{engine.n_threads} threads, {level.target().level.name}"
        )

    @classmethod
    def from_pretrained(cls, repo_id: str, filename: str | None = None, **options: Any) -> LLM:
        """Load a GGUF of the hub, downloading it if needed. `filename` is a glob such as "*Q4_0.gguf".

        `quant`, `offline`, `cache_dir`, `local_dir`, `revision` and `token` are the hub's, the rest LLM's options.
        """
        from .hub import download

        names = ("quant", "offline", "cache_dir", "local_dir", "revision", "token")
        hub_options = {name: options.pop(name) for name in names if name in options}
        return cls(download(repo_id, filename, **hub_options), **options)

    # -- generation --------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Continue `prompt` (text, or token ids as they are) and return when done. Options: see `stream`."""
        return self.stream(prompt, **options).result()

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """Continue `prompt` and return its events while they come.

        Options: `max_tokens` (None: to the end), `stop` (a string or several), `ignore_eos`, `show_special` (special
        tokens in the text), `parse_special` (special tokens in the prompt), `draft_max` (tokens drafted from the text
        and checked in one step: the answer is the same without, 0, but takes longer where it repeats the prompt),
        `sampling` (a SamplingParams instead of this model's recommended one) and its fields by name: temp, top_k,
        top_p, min_p, repeat_penalty, seed, ...
        """
        ids = self._prompt_ids(prompt, options.pop("parse_special", False))
        request = self._request(ids, options)
        session = self._open_session()
        return Stream(session.worker, lambda emit, stop: session.complete(request, emit, stop), owner=self)

    def chat(self, messages: Messages, **options: Any) -> Generation:
        """Answer a conversation: messages of {"role", "content"}, or one question as text."""
        return self.chat_stream(messages, **options).result()

    def chat_stream(self, messages: Messages, *, tools: Sequence[Any] | None = None, **options: Any) -> Stream:
        """`chat`, with its events while they come. A conversation that goes on evaluates only what is new in it."""
        session = self._open_session()
        request = self._request((0,), options)  # the ids are known when it is this call's turn
        rendered = session.template.render(_as_messages(messages), tools=tools)
        return Stream(session.worker, lambda emit, stop: session.answer(rendered, request, emit, stop), owner=self)

    def batch(
        self, prompts: Iterable[Prompt | Messages | BatchItem], *, n_parallel: int = N_PARALLEL, **options: Any
    ) -> Batch:
        """Answer many prompts, n_parallel of them at a time, which takes a fraction of the time that one after the
        other does; the answers are the same.

        Text and token ids are continued as by `generate`, lists of messages are answered as by `chat`, with the options
        of `stream` but for draft_max; a BatchItem has options of its own besides. `prompts` are taken when it is their
        turn, by another thread, and must not use this LLM. The Batch gives (number, Generation or LFM2Error) as they
        end; see Batch.in_order.
        """
        if isinstance(prompts, (str, bytes)):
            raise UsageError("a batch is of several prompts; put a single one into a list, or use generate")
        if not in_range(n_parallel, int, 1, MOST_PARALLEL):
            raise UsageError(f"n_parallel is {ascii(n_parallel)[:40]}, expected a number from 1 to {MOST_PARALLEL}")
        self.check_options({name: value for name, value in options.items() if name != "parse_special"})
        session = self._open_session()
        asks = (partial(self._ask, prompt, options) for prompt in prompts)
        return Batch(session.worker, lambda emit, stop: session.complete_many(asks, n_parallel, emit, stop), owner=self)

    def _ask(self, prompt: Any, options: Mapping[str, Any]) -> Request:
        """The request of one prompt of a batch."""
        options = dict(options)
        if isinstance(prompt, BatchItem):
            options |= prompt.options
            prompt = prompt.prompt
        parse_special, tools = options.pop("parse_special", False), options.pop("tools", None)
        request = self._request((0,), options)
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            ids = self._session.rendered_ids(self._session.template.render(prompt, tools=tools))
        else:
            ids = self._prompt_ids(prompt, parse_special)
        return replace(request, prompt_ids=ids)

    def _prompt_ids(self, prompt: Prompt, parse_special: bool) -> tuple[int, ...]:
        return tuple(
            self.tokenize(prompt, special=parse_special) if isinstance(prompt, str) else self._checked_ids(prompt)
        )

    def _request(self, ids: tuple[int, ...], options: dict[str, Any]) -> Request:
        sampling = options.pop("sampling", None) or self.sampling
        if not isinstance(sampling, SamplingParams):
            raise UsageError(f"sampling is {ascii(sampling)[:40]}, expected a SamplingParams")
        overrides = {name: options.pop(name) for name in list(options) if name in _SAMPLING_FIELDS}
        sampling = replace(sampling, **{name: value for name, value in overrides.items() if value is not None})
        self._check_bias(sampling)
        stop = options.pop("stop", None) or ()
        names = ("max_tokens", "ignore_eos", "show_special", "draft_max")
        known = {name: value for name in names if (value := options.pop(name, None)) is not None}
        if options:
            raise UsageError(f"unknown option {', '.join(sorted(options))}; see help(LLM.stream)")
        if not isinstance(stop, (str, list, tuple)):
            raise UsageError(f"stop is {ascii(stop)[:40]}, expected a string or several")
        return Request(ids, sampling, stop=(stop,) if isinstance(stop, str) else tuple(stop), **known)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise UsageError for options that `stream` and `chat_stream` would refuse."""
        self._request((0,), dict(options))

    def _check_bias(self, sampling: SamplingParams) -> None:
        for token_id in sampling.logit_bias or ():
            if token_id >= self.n_vocab():
                raise UsageError(f"logit_bias names token {token_id}, expected an id from 0 to {self.n_vocab() - 1}")

    # -- OpenAI's shapes ---------------------------------------------------------------------------------------

    def create_completion(self, prompt: Prompt, **options: Any) -> Any:
        """OpenAI's text completion as a dict, or an iterator of chunks with `stream=True`."""
        from .openai_shapes import create_completion

        return create_completion(self, prompt, **options)

    def create_chat_completion(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """OpenAI's chat completion as a dict, or an iterator of chunks with `stream=True`."""
        from .openai_shapes import create_chat_completion

        return create_chat_completion(self, messages, **options)

    # -- tokens and logits -------------------------------------------------------------------------------------

    def tokenize(self, text: str | bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Ids of `text`; special pieces in it become their tokens only with `special`."""
        vocab = self._open_session().vocab
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return vocab.tokenize(text, add_bos=add_bos and vocab.add_bos, parse_special=special)

    def detokenize(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids`, without special tokens unless asked for."""
        return self._open_session().vocab.detokenize(self._checked_ids(ids), special=special)

    def render(self, messages: Messages, *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as the chat template writes it."""
        template = self._open_session().template
        return template.render(_as_messages(messages), add_generation_prompt=add_generation_prompt, **variables).text

    def template_source(self) -> str:
        """The chat template in use."""
        return self._open_session().template.source

    def logits(self, prompt: Prompt, *, every: bool = False) -> NDArray[np.float32]:
        """Logits (n_vocab,) for the token after `prompt`, or (n_tokens, n_vocab) after each of its tokens."""
        ids = self._prompt_ids(prompt, False)
        if not ids:
            raise UsageError("the prompt has no tokens; give at least one")
        session = self._open_session()
        outcome: list[Any] = []
        done = threading.Event()

        def job() -> None:
            try:
                outcome.append(session.logits(ids, every))
            except BaseException as error:  # raised again in the caller's thread
                outcome.append(error)
            done.set()

        session.worker.submit(job)
        while not done.wait(0.25) and session.worker.alive:
            pass
        if not outcome:
            raise UsageError("this LLM was closed while it evaluated")
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def n_ctx(self) -> int:
        """Tokens that a conversation can hold."""
        return self._session.engine.n_ctx

    def n_vocab(self) -> int:
        """Length of a row of logits; the last of them may belong to no token."""
        return self._session.engine.n_vocab

    def token_bos(self) -> int | None:
        return self._session.vocab.bos_id

    def token_eos(self) -> int | None:
        return self._session.vocab.eos_id

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's metadata: key -> Python value."""
        return {key: value.value for key, value in self._session.engine.gguf.metadata.items()}

    def _checked_ids(self, ids: Iterable[int]) -> list[int]:
        if not isinstance(ids, Iterable):
            raise UsageError(f"a prompt is {ascii(ids)[:40]}, expected text or token ids")
        n_vocab, checked = self.n_vocab(), list(ids)
        for token_id in checked:
            if not isinstance(token_id, (int, np.integer)) or isinstance(token_id, bool) or not 0 <= token_id < n_vocab:
                raise UsageError(f"token id {ascii(token_id)[:40]} is not a whole number from 0 to {n_vocab - 1}")
        return [int(token_id) for token_id in checked]

    # -- life --------------------------------------------------------------------------------------------------

    def _open_session(self) -> Session:
        self._session.worker.check()
        return self._session

    def close(self) -> None:
        """Stop what runs and let the file and the memory go. Safe to call twice."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("an LLM cannot be pickled or copied; pass its path and load it where it is needed")


def _local_path(path: str | os.PathLike[str]) -> Path:
    from .hub import download, parse_hub_id

    if not isinstance(path, str) or path.lower().endswith(".gguf") or os.path.lexists(path):
        return Path(path)
    hub_id = parse_hub_id(path)
    return Path(path) if hub_id is None else download(hub_id[0], quant=hub_id[1])


def _as_messages(messages: Messages) -> Sequence[Mapping[str, Any]]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
