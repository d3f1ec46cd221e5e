"""The chat in a terminal: read a message, answer it, remember both.

Commands are in repl_commands.py, the ways to type in repl_input.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lfm2cpp.errors import LFM2Error
from lfm2cpp.terminal import printable

from .output import AnswerOutput, dimmed
from .repl_input import MessageInput
from .run import show, timings_line

if TYPE_CHECKING:
    from lfm2cpp.generate import Generation
    from lfm2cpp.llm import LLM

TWICE_SECONDS = 2.0  # a second Ctrl-C at the prompt within this time leaves


class Leave(Exception):
    """Ends the chat with an exit code."""

    def __init__(self, code: int = 0) -> None:
        self.code = code


class Repl:
    """One conversation with one model. `messages` is all the state there is of it; the engine follows."""

    def __init__(
        self,
        llm: LLM,
        source: MessageInput,
        output: AnswerOutput,
        *,
        settings: dict[str, Any],
        system: str | None = None,
        timings: bool = True,
    ) -> None:
        self.llm = llm
        self.output = output
        self.settings = settings  # options of LLM.chat_stream that were chosen here or on the command line
        self.system = system
        self.timings = timings
        self.messages: list[dict[str, str]] = []  # without the system message
        self.attached: list[str] = []  # texts of /read, for the next message
        self.last: Generation | None = None
        self._source = source
        self._interrupted_at = -TWICE_SECONDS

    def run(self, first: str | None = None) -> int:
        """Talk until the input ends; returns the exit code."""
        try:
            if first is not None:
                self._try(lambda: self.ask(first))
            while True:
                self._turn()
        except Leave as leave:
            return leave.code

    def _turn(self) -> None:
        try:
            text = self._source.read()
        except EOFError:
            raise Leave(0) from None
        except KeyboardInterrupt:
            self._interrupt_at_prompt()
            return
        self._try(lambda: self.handle(text))

    def _try(self, turn: Callable[[], None]) -> None:
        """A turn; what goes wrong in it does not end the chat."""
        try:
            turn()
        except LFM2Error as error:
            self.say(f"error: {error}")
        except KeyboardInterrupt:
            self.say("interrupted")

    def _interrupt_at_prompt(self) -> None:
        now = time.monotonic()
        if now - self._interrupted_at < TWICE_SECONDS:
            raise Leave(130)
        self._interrupted_at = now
        self.say("Ctrl-C again, Ctrl-D or /exit leaves.")

    def handle(self, text: str) -> None:
        """One message or command. LFM2Error leaves the conversation as it was."""
        from .repl_commands import run_command

        if text.startswith("/") and not text.startswith("//"):
            run_command(self, text)
        elif text.strip() or self.attached:
            self.ask(text[1:] if text.startswith("//") else text)

    def say(self, text: str) -> None:
        """Something of the program's own, on stderr."""
        click.echo(dimmed(printable(text, tty=True)), err=True)

    # -- the conversation --------------------------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """Send a message, with the files read since the last one before it, and show the answer."""
        content = "\n\n".join([*self.attached, text] if text.strip() else self.attached)
        self.answer([*self.messages, {"role": "user", "content": content}])
        self.attached = []

    def answer(self, messages: list[dict[str, str]]) -> None:
        """Answer `messages`, which become the conversation together with what was said, even if it was cut short."""
        stream = self.llm.chat_stream([*self.system_messages(), *messages], **self.settings)
        result = show(stream, self.output)
        self.last = result
        if result.finish_reason == "interrupted" and not result.token_ids:
            self.say("interrupted; the message was not sent")
            return
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        if result.finish_reason == "interrupted":
            self.say("interrupted")
        elif "context" in result.detail:
            self.say(f"{result.detail}; /clear or /undo makes room")
        elif result.finish_reason == "stop" and not result.token_ids:
            self.say(f"no answer: {result.detail}")
        if self.timings:
            self.say(timings_line(result))

    def system_messages(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def without_last_answer(self) -> list[dict[str, str]]:
        """The conversation up to its last question, which is included."""
        messages = list(self.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return messages
