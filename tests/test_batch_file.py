"""`lfm2cpp batch` and its files: answers of many prompts, going on after a crash, what is wrong with lines (H7, G19)."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from bigram_model import HELLO, bigram_gguf, endless_gguf, piece_ids
from cli_process import Cli, started

from lfm2cpp.batch_file import AnswerFile, read_records
from lfm2cpp.errors import OutputError, UsageError


@pytest.fixture(scope="module")
def hello(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bigram_gguf(tmp_path_factory.mktemp("batch") / "hello.gguf", HELLO)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capfd)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return path


def answers(text: str) -> dict[str, Any]:
    """Text, or error code, of each custom_id."""
    found = {}
    for line in text.splitlines():
        answer = json.loads(line)
        assert set(answer) == {"id", "custom_id", "response", "error"} and answer["custom_id"] not in found
        if answer["error"] is not None:
            assert answer["response"] is None
            found[answer["custom_id"]] = answer["error"]["code"]
        else:
            assert answer["response"]["status_code"] == 200
            choice = answer["response"]["body"]["choices"][0]
            found[answer["custom_id"]] = choice["message"]["content"] if "message" in choice else choice["text"]
    return found


def chat(custom_id: str, **body: Any) -> dict[str, Any]:
    """A line in OpenAI's shape."""
    body = {"model": "any", "messages": [{"role": "user", "content": "hi"}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def test_every_prompt_is_answered(cli: Cli, hello: Path, tmp_path: Path) -> None:
    prompts = write(
        tmp_path / "prompts.jsonl", chat("a"), chat("b", max_tokens=3), "", {"custom_id": "c", "prompt": "x\n"},
        {"prompt": [1, piece_ids()["\u010a"]], "max_tokens": 1}, {"custom_id": "\u00e9", "messages": chat("")["body"]["messages"], "stop": "o"},
    )  # fmt: skip
    expected = {"a": "Helo!", "b": "Hel", "c": "Helo!", "line-5": "H", "\u00e9": "Hel"}
    printed = cli("batch", "-m", hello, prompts)
    assert printed.code == 0 and answers(printed.out) == expected
    result = cli("batch", "-m", hello, prompts, tmp_path / "answers.jsonl", "-np", 2)
    assert (result.code, result.out) == (0, "") and answers((tmp_path / "answers.jsonl").read_text()) == expected
    piped = cli("batch", "-m", hello, "-", stdin=prompts.read_bytes())
    assert answers(piped.out) == expected
    shorter = cli("batch", "-m", hello, prompts, "-n", 2)
    assert answers(shorter.out) == {**expected, "a": "He", "b": "Hel", "c": "He", "\u00e9": "He"}, "the line's own count"


def test_what_is_wrong_with_a_line_is_its_answer(cli: Cli, hello: Path, tmp_path: Path) -> None:
    wrong: list[Any] = [
        "garbage", "[1]", '{"custom_id": "cut", "prompt": "x"', {"custom_id": "none"}, {"custom_id": 5, "prompt": "x"},
        {"custom_id": "two", "prompt": "x", "messages": []}, {"custom_id": "temp", "prompt": "x", "temperature": -1},
        {"custom_id": "what", "prompt": "x", "colour": "red"}, {"custom_id": "ids", "prompt": [1, "x"]},
        {"custom_id": "id", "prompt": [400]}, {"custom_id": "empty", "messages": []}, chat("stream", stream=True),
        {"custom_id": "get", "method": "GET", "prompt": "x"}, chat("n", n=2), "[" * 100000, {"custom_id": "role", "messages": [{"role": 5}]},
    ]  # fmt: skip
    long = {"custom_id": "long", "prompt": "x" * 500}
    prompts, out = write(tmp_path / "prompts.jsonl", chat("first"), *wrong, long, chat("last")), tmp_path / "answers"
    result = cli("batch", "-m", hello, "-c", 128, prompts, out)
    assert result.code == 1 and f"17 of 19 prompts failed; see the errors in {out}" in result.err
    found = answers(out.read_text())
    assert found.pop("first") == found.pop("last") == "Helo!"
    assert found.pop("long") == "context_length_exceeded"
    assert len(found) == 16 and set(found.values()) <= {"invalid_request", "failed"}
    again = cli("batch", "-m", hello, "-c", 128, prompts, out)
    assert again.code == 1 and "19 of 19 prompts are answered" in again.err and answers(out.read_text()).keys() > found.keys()


def test_an_id_that_stands_twice_is_said(cli: Cli, hello: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", chat("a"), {"custom_id": "a", "prompt": "other"}, chat("b"))
    result = cli("batch", "-m", hello, prompts, tmp_path / "answers")
    assert result.code == 1 and "custom_id 'a' stands twice" in result.err and "1 of 3 prompts failed" in result.err
    assert answers((tmp_path / "answers").read_text()) == {"a": "Helo!", "b": "Helo!"}


def test_any_id_and_null_fields(cli: Cli, hello: Path, tmp_path: Path) -> None:
    """An id that is no valid text is found again; null is what was not given."""
    lines = '{"custom_id": "\\ud800", "prompt": "\\n"}\n{"custom_id": "n", "prompt": "\\n", "max_tokens": null, "stop": null}\n'
    prompts, out = tmp_path / "prompts", tmp_path / "answers"
    prompts.write_text(lines)
    for _ in range(2):
        assert cli("batch", "-m", hello, prompts, out, "-n", 2).code == 0
    assert answers(out.read_text()) == {"\ud800": "He", "n": "He"}


def test_errors_of_other_prompts_are_not_counted(cli: Cli, hello: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers"
    assert cli("batch", "-m", hello, write(tmp_path / "bad", {"custom_id": "bad"}), out).code == 1
    assert cli("batch", "-m", hello, write(tmp_path / "good", chat("good")), out).code == 0


@pytest.mark.parametrize("torn", [0, 1, 40, 200])
def test_the_same_command_goes_on(cli: Cli, hello: Path, tmp_path: Path, torn: int) -> None:
    """After a kill in the midst of a line: what is whole stays, what is torn is asked for again."""
    prompts, out = write(tmp_path / "prompts.jsonl", *[chat(f"{i}") for i in range(6)]), tmp_path / "answers"
    cli("batch", "-m", hello, prompts, out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:torn])
    result = cli("batch", "-m", hello, prompts, out)
    assert result.code == 0 and "3 of 6 prompts are answered" in result.err
    assert out.read_bytes().startswith(b"".join(lines[:3]))
    assert answers(out.read_text()) == {f"{i}": "Helo!" for i in range(6)}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_continued(tmp_path: Path, how: signal.Signals) -> None:
    model = endless_gguf(tmp_path / "endless.gguf")
    records = [{"custom_id": f"{i}", "prompt": "\n", "max_tokens": 3 if i < 2 else 3000} for i in range(6)]
    prompts, out = write(tmp_path / "prompts.jsonl", *records), tmp_path / "answers"
    with started("batch", "-m", str(model), str(prompts), str(out), "-np", "3") as process:
        deadline = time.monotonic() + 60
        while out.read_bytes().count(b"\n") < 2 if out.exists() else True:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, how)
        code = process.wait(20)
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
    before = answers(out.read_text())
    assert before.keys() >= {"0", "1"} and len(before) < 6 and all(len(text) in (3, 3000) for text in before.values())
    write(prompts, *[{**record, "max_tokens": 3} for record in records])
    with started("batch", "-m", str(model), str(prompts), str(out)) as process:
        assert process.wait(60) == 0
    after = answers(out.read_text())
    assert len(after) == 6 and {name: after[name] for name in before} == before


def test_files_that_are_something_else_are_left_alone(cli: Cli, hello: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", chat("a"))
    text, other = write(tmp_path / "text", "some text", "more"), write(tmp_path / "other", {"custom_id": "a"})
    torn = tmp_path / "torn"
    torn.write_text("no end of line")
    for path in (text, other, torn, prompts, hello):
        before = path.read_bytes()
        result = cli("batch", "-m", hello, prompts, path)
        assert result.code == 2 and str(path) in result.err and path.read_bytes() == before
    assert cli("batch", "-m", hello, prompts, tmp_path).code == 2
    missing = cli("batch", "-m", hello, tmp_path / "nothing", tmp_path / "answers")
    assert missing.code == 1 and "is missing" in missing.err and not (tmp_path / "answers").exists()
    nowhere = cli("batch", "-m", hello, prompts, tmp_path / "no" / "answers")
    assert nowhere.code == 1 and "cannot be written" in nowhere.err
    assert cli("batch", "-m", tmp_path / "none.gguf", prompts, tmp_path / "new").code == 1


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "answers"), pytest.raises(OutputError, match="is being written by another process"):
        AnswerFile(tmp_path / "answers")


def test_a_full_disk_is_said_and_what_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AnswerFile(tmp_path / "answers") as file:
        file.add('{"custom_id": "a", "error": null}\n')

        def full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left on device"):
            file.add('{"custom_id": "b", "error": null}\n')
    monkeypatch.undo()
    with AnswerFile(tmp_path / "answers") as file:
        assert "a" in file.done


def test_options_are_read_under_both_names() -> None:
    line = {"prompt": "x", "temperature": 0.5, "max_completion_tokens": 7, "logit_bias": {"5": 1.0}, "seed": 3}
    (record,) = read_records([json.dumps(line).encode()])
    assert record.options == {"temp": 0.5, "max_tokens": 7, "logit_bias": {5: 1.0}, "seed": 3}
    assert record.custom_id == "line-1" and not record.is_chat
    (chatting,) = read_records([json.dumps(chat("a")).encode()])
    assert chatting.is_chat and chatting.options == {}
    (bad,) = read_records([b"{}"])
    assert isinstance(bad.error, UsageError) and "line 1: expected one of messages and prompt" in str(bad.error)
