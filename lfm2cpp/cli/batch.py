"""`lfm2cpp batch`: the answers to a file of prompts, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lfm2cpp.errors import LFM2Error
from lfm2cpp.signals import first_interrupt_calls
from lfm2cpp.terminal import Progress, note

from .loading import load_llm, read_bytes
from .options import generation_options, model_options, sampling_options
from .output import AnswerOutput

if TYPE_CHECKING:
    from lfm2cpp.batch_file import Record
    from lfm2cpp.llm import LLM

INTERRUPTED = 130


@click.command()
@model_options
@click.option("-np", "--parallel", "n_parallel", type=click.IntRange(1, 64), default=8, metavar="N", show_default=True,
              help="Prompts that are answered at a time.")
@sampling_options
@click.argument("prompts", metavar="PROMPTS")
@click.argument("answers", metavar="[ANSWERS]", required=False)  # fmt: skip
def batch(prompts: str, answers: str | None, n_parallel: int, **options: Any) -> int:
    """Answer the prompts of a file, many at a time.

    PROMPTS (- is standard input) has a line of JSON for each, in OpenAI's shape or short:

    \b
    {"custom_id": "a", "body": {"messages": [...], "max_tokens": 100}}
    {"custom_id": "b", "prompt": "Once upon a time", "temperature": 0}

    Answers are added to ANSWERS, or printed, as they come. What the file has already, errors too, is not asked for
    again: after a Ctrl-C or a crash the same command goes on. Options of a line come before those given here. A prompt
    that fails has its error as its answer; the exit code is 1 then.
    """
    from lfm2cpp.batch_file import AnswerFile, read_records

    records = read_records(read_bytes(prompts, "PROMPTS").splitlines())
    with ExitStack() as stack:
        file = None if answers is None else stack.enter_context(AnswerFile(Path(answers), [prompts]))
        write = AnswerOutput().write if file is None else file.add
        new, n_twice = _new(records, set() if file is None else file.done)
        n_failed = n_twice + (0 if file is None else len(file.failed & {record.custom_id for record in records}))
        if len(new) + n_twice < len(records):
            note(f"{len(records) - len(new) - n_twice} of {len(records)} prompts are answered in {answers}")
        if new:
            llm = stack.enter_context(load_llm(options))
            failed = list(_answer(llm, new, n_parallel, generation_options(options), write))
            if len(failed) < len(new):
                note(f"interrupted; {len(new) - len(failed)} prompts are left")
                return INTERRUPTED
            n_failed += sum(failed)
    if n_failed:
        where = f"; see the errors in {answers}" if answers is not None else ""
        raise LFM2Error(f"{n_failed} of {len(records)} prompts failed{where}")
    return 0


def _new(records: list[Record], done: set[str]) -> tuple[list[Record], int]:
    """The records that are not done; and how many have a custom_id that another one has."""
    seen: set[str] = set()
    new, n_twice = [], 0
    for record in records:
        if record.custom_id in seen:
            n_twice += 1
            note(f"custom_id {ascii(record.custom_id)[:60]} stands twice in the prompts; the second one is left out")
        elif record.custom_id not in done:
            new.append(record)
        seen.add(record.custom_id)
    return new, n_twice


def _answer(
    llm: LLM, records: list[Record], n_parallel: int, options: dict[str, Any], write: Callable[[str], None]
) -> Iterator[bool]:
    """Write the answers; yields of each whether it failed. Ends early after a Ctrl-C."""
    from lfm2cpp.batch_file import answer_line
    from lfm2cpp.generate import Generation
    from lfm2cpp.llm import BatchItem
    from lfm2cpp.openai_shapes import chat_completion, completion

    asked = [record for record in records if record.error is None]
    with Progress("answers", total=len(records), unit=" answers") as bar:
        for record in records:
            if record.error is not None:
                write(answer_line(record.custom_id, record.error, None))
                bar.update(1)
                yield True
        items = [BatchItem(record.prompt, record.options) for record in asked]
        running = llm.batch(items, n_parallel=n_parallel, **options)
        with running, first_interrupt_calls(running.stop):
            for number, outcome in running:
                record, body = asked[number], None
                if isinstance(outcome, Generation):
                    body = chat_completion(llm, outcome) if record.is_chat else completion(llm, outcome)
                write(answer_line(record.custom_id, outcome, body))
                bar.update(1)
                yield body is None
