"""From the options that name a model to a loaded one, with progress on stderr."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2cpp.errors import LFM2Error, UsageError
from lfm2cpp.terminal import Progress, note

if TYPE_CHECKING:
    from lfm2cpp.llm import LLM

FILE_OPTIONS = ("model", "hf_repo", "hf_file", "offline")
MAX_TEXT_FILE = 8 << 20  # bytes of a prompt or template read from a file


def model_path(options: dict[str, Any]) -> Path:
    """The GGUF that -m or -hf name, downloaded if need be; takes its options out of `options`."""
    model, repo, name, offline = (options.pop(option) for option in FILE_OPTIONS)
    if model is not None and repo is not None:  # what was typed comes before what the environment says
        model, repo = (value if is_typed(option) else None for value, option in ((model, "model"), (repo, "hf_repo")))
    if (model is None) == (repo is None):
        raise UsageError("give one model: -m FILE, or -hf USER/REPO[:QUANT]")
    if model is not None:
        return Path(model)
    from lfm2cpp.hub import download, parse_hub_id

    hub_id = parse_hub_id(repo)
    if hub_id is None:
        raise UsageError(f"-hf {ascii(repo)} is no hub id, expected USER/REPO or USER/REPO:QUANT")
    return download(hub_id[0], name, quant=hub_id[1], offline=offline)


def is_typed(option: str) -> bool:
    """Whether an option of the command that runs was given on its command line, and not by the environment."""
    source = click.get_current_context().get_parameter_source(option)
    return source is click.core.ParameterSource.COMMANDLINE


def load_llm(options: dict[str, Any]) -> LLM:
    """The model that `options` describe; takes the model options out of it."""
    from lfm2cpp.llm import LLM

    path = model_path(options)
    n_ctx, n_threads = options.pop("ctx_size"), thread_count(options.pop("threads"))
    kv_type = _kv_type(options.pop("cache_type_k"), options.pop("cache_type_v"))
    if n_ctx < 0:
        raise UsageError(f"--ctx-size is {n_ctx}, expected a number of tokens, or 0 for the model's own")
    template, template_file = options.pop("chat_template"), options.pop("chat_template_file")
    if template is not None and template_file is not None:
        raise UsageError("give --chat-template or --chat-template-file, not both")
    if template_file is not None:
        template = read_text(template_file, "--chat-template-file")
    with CompileProgress() as progress:
        return LLM(
            path, n_ctx or None, n_threads, kv_type, options.pop("verbose"),
            chat_template=template, force=options.pop("force"), progress=progress,
        )  # fmt: skip


def thread_count(threads: int) -> int | None:
    """--threads as the engine takes it: None is one a core."""
    if threads == 0 or threads < -1 or threads > 1024:
        raise UsageError(f"--threads is {threads}, expected 1 to 1024, or -1 for one a core")
    return None if threads == -1 else threads


def _kv_type(k: str | None, v: str | None) -> str:
    if k is not None and v is not None and k != v:
        raise UsageError(f"-ctk {k} and -ctv {v} differ; the cache has one type for both")
    return (k or v or "f16").lower()


class CompileProgress:
    """Shows kernels being compiled, which happens once a machine and takes seconds."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bar: Progress | None = None

    def __enter__(self) -> CompileProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, kernel: str, done: int, total: int) -> None:
        if self._bar is None:
            note("compiling kernels for this CPU; this happens once")
        if self._bar is None or total != self._bar.total:
            self._stack.close()
            self._bar = self._stack.enter_context(Progress("kernels", total=total, unit=" kernels"))
        self._bar.update(done - self._bar.done)


def read_text(path: str, what: str, *, limit: int = MAX_TEXT_FILE) -> str:
    """A text file as text. LFM2Error when it cannot be read, is binary or has more than `limit` bytes."""
    return _read(path, what, limit).decode("utf-8-sig", "replace")


def read_bytes(path: str, what: str) -> bytes:
    """A text file, or standard input for -, as bytes, without limit. LFM2Error when it cannot be read or is binary."""
    if path == "-":
        return read_stdin().encode()
    return _read(path, what, None).removeprefix(codecs.BOM_UTF8)


def _read(path: str, what: str, limit: int | None) -> bytes:
    try:
        # A shell's <(command) is a pipe with somebody at its other end; any other pipe may wait for ever.
        if not Path(path).is_file() and not path.startswith(("/dev/fd/", "/proc/self/fd/")):
            kind = "is a directory" if Path(path).is_dir() else "is no regular file"
            raise LFM2Error(f"{what} {path} {kind if os.path.lexists(path) else 'is missing'}")
        with open(path, "rb") as file:
            data = file.read() if limit is None else file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise LFM2Error(f"{what} {ascii(path)} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if limit is not None and len(data) > limit:
        raise LFM2Error(f"{what} {path} has more than {limit} bytes; give a shorter text")
    if b"\0" in data:
        raise LFM2Error(f"{what} {path} is not text: it holds zero bytes")
    return data


def read_stdin() -> str:
    """All of stdin as text; what is not UTF-8 becomes U+FFFD."""
    if sys.stdin is None:
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    except OSError as error:
        raise LFM2Error(f"stdin cannot be read: {error.strerror}") from None


def stdin_is_tty() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def without_last_newline(text: str) -> str:
    """Files and pipes end in a newline that nobody meant to send."""
    return text[:-2] if text.endswith("\r\n") else text[:-1] if text.endswith("\n") else text
