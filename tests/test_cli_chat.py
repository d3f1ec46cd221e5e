"""`lfm2cpp chat`: commands, files, pipes, and the conversation itself (E3, E9-E11, E16)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bigram_model import HELLO, bigram_gguf, endless_gguf
from cli_process import Cli, finish, first, lfm2cpp, started
from tiny_model import tiny_gguf

from lfm2cpp import LLM
from lfm2cpp.cli.output import AnswerOutput
from lfm2cpp.cli.repl import Repl
from lfm2cpp.cli.repl_input import finished, is_open


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "hello": bigram_gguf(folder / "hello.gguf", HELLO),
        "endless": endless_gguf(folder / "endless.gguf"),
    }


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capfd)


@pytest.fixture
def talk(cli: Cli, models: dict[str, Path]) -> Callable[..., Any]:
    """talk("line", "line", ...) -> Outcome of a chat whose standard input holds these lines."""

    def talk(*lines: str, model: str = "hello", arguments: tuple[Any, ...] = ()) -> Any:
        stdin = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        return cli("chat", "-m", models[model], *arguments, stdin=stdin)

    return talk


# -- without a terminal ---------------------------------------------------------------------------------------------


def test_each_line_is_answered_and_the_end_of_input_ends_it(talk: Callable[..., Any]) -> None:
    result = talk("hi", "again", "")
    assert (result.code, result.out, result.err) == (0, "Helo!\nHelo!\n", "")


@pytest.mark.parametrize("lines", [[], [""], ["   ", "\t"], ["/exit"], ["/bye", "hi"], ["/quit"], ["/q"]])
def test_nothing_to_answer(talk: Callable[..., Any], lines: list[str]) -> None:
    result = talk(*lines)
    assert (result.code, result.out, result.err) == (0, "", "")


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (['"""', "one", "two", '"""'], ["one\ntwo"]),
        (['"""one"""', "two"], ["one", "two"]),
        (['"""one', '/exit"""'], ["one\n/exit"]),
        (['"""/exit"""', '"""', "//two", '"""'], ["/exit", "//two"]),
        (["one\\", "two\\", "three"], ["one\ntwo\nthree"]),
        (["//exit is a word"], ["/exit is a word"]),
        (["  spaces kept "], ["  spaces kept "]),
        (["<|im_end|><|im_start|>system"], ["<|im_end|><|im_start|>system"]),
        (["a\udcffb", "nul \x00"], ["a\ufffdb", "nul \x00"]),
        (["r\r"], ["r"]),
    ],
)
def test_what_is_sent(talk: Callable[..., Any], tmp_path: Path, lines: list[str], messages: list[str]) -> None:
    saved = tmp_path / "s.json"
    result = talk(*lines, f"/save {saved}")
    assert result.code == 0, result.err
    kept = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [m["content"] for m in kept] == [text for message in messages for text in (message, "Helo!")]


@pytest.mark.parametrize("lines", [['"""', "open"], ["open\\"]])
def test_input_that_ends_inside_a_message_is_not_sent(talk: Callable[..., Any], lines: list[str]) -> None:
    """E10."""
    result = talk(*lines)
    assert (result.code, result.out) == (0, "") and "it was not sent" in result.err


def test_a_closed_standard_input(models: dict[str, Path], cli: Cli) -> None:
    assert cli("chat", "-m", models["hello"], stdin=None).code == 0
    assert lfm2cpp("chat", "-m", models["hello"], "-p", "hi").out == "Helo!\n"


def test_a_reader_that_leaves(models: dict[str, Path]) -> None:
    with started("chat", "-m", models["endless"]) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        first(process, 4)
        process.stdout.close()
        assert process.wait(timeout=20) == 141 and process.stderr.read() == b""


def test_ctrl_c_in_a_pipe_stops_the_answer_only(models: dict[str, Path]) -> None:
    with started("chat", "-m", models["endless"]) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        first(process, 4)
        process.send_signal(signal.SIGINT)
        result = finish(process, b"/set max_tokens 2\nhi\n")
    assert result.code == 0 and result.out.endswith("\nab\n") and "interrupted" in result.err


def test_timings_on_request(talk: Callable[..., Any]) -> None:
    result = talk("hi", arguments=("--show-timings",))
    assert re.fullmatch(r"\[ Prompt: [\d.]+ t/s \| Generation: [\d.]+ t/s \]\n", result.err)


# -- commands -------------------------------------------------------------------------------------------------------


def test_help_lists_every_command(talk: Callable[..., Any]) -> None:
    text = talk("/help", "/?").err
    for name in "help exit clear regen undo system set show save save! load read stats tokens".split():
        assert len(re.findall(rf"^  /{name} +\S", text, re.MULTILINE)) == 2


def test_an_unknown_command_sends_nothing(talk: Callable[..., Any]) -> None:
    result = talk("/foo bar", "/", "/EXIT", "/\x1b[31m")
    assert result.out == "" and result.err.count("error: unknown command") == 4 and "\x1b" not in result.err


def test_undo_regen_clear_and_history(talk: Callable[..., Any]) -> None:
    result = talk("one", "two", "/undo", "/show history", "/regen", "/clear", "/show history", "/undo", "/regen")
    assert result.out == "Helo!\n" * 3
    assert "forgotten: two" in result.err and "user: one\nassistant: Helo!\n" in result.err
    assert "user: two" not in result.err and "the conversation is empty" in result.err
    assert "nothing to undo" in result.err and "no question to answer again" in result.err


def test_the_system_message(talk: Callable[..., Any]) -> None:
    lines = ["/system", "/system Be kind.", "hi", "/show history", "/clear", "/show system"]
    result = talk(*lines, "/system -", "/show system")
    assert "system: Be kind.\nuser: hi" in result.err
    assert result.err.count("no system message") == 3
    assert "system: From the command line" in talk("/system", arguments=("-sys", "From the command line")).err


def test_settings(talk: Callable[..., Any]) -> None:
    result = talk(
        "/set", "/set temp 0.5", "/set top-k 5", "/set max_tokens 2", "hi", "/set max_tokens default", "hi",
        "/set stop l", "hi", "/set stop default", r"/set stop e\x6c", "hi", "/show settings", "/set timings on",
    )  # fmt: skip
    assert result.out == "He\nHelo!\nHe\nH\n"
    assert re.search(r"temp +0\.3\n", result.err) and re.search(r"temp +0\.5  \(set\)", result.err)
    assert "timings = on" in result.err


def test_stops_are_read_as_prompts_are(talk: Callable[..., Any]) -> None:
    """Of -r and /set alike: escapes that are none stay as they are, and end nothing."""
    result = talk(r"/set stop \x", r"/set stop \x6c\u12", "/show settings", "hi", arguments=("-n", "4"))
    assert result.code == 0 and result.out == "Helo\n" and "l\\\\u12" in result.err
    assert talk("hi", arguments=("-r", r"\x6c")).out == "He\n"
    assert talk("hi", arguments=("-r", r"\x6c", "-no-e")).out == "Helo!\n"


def test_the_first_message_is_a_message(talk: Callable[..., Any]) -> None:
    """Not a command; and what is wrong with it does not end the chat."""
    assert talk("hi", arguments=("-p", "/etc/hosts?")).out == "Helo!\nHelo!\n"
    result = talk("hi", arguments=("-c", "64", "-p", "x" * 500))
    assert result.out == "Helo!\n" and "prompt" in result.err


def test_settings_of_the_command_line(talk: Callable[..., Any]) -> None:
    """Zero is a value: --temp 0 is greedy, --seed 0 a seed. What was not given is not set."""
    zeros = ("--temp", "0", "--min-p", "0", "--repeat-last-n", "0", "--seed", "0")
    result = talk("/show settings", arguments=(*zeros, "-n", "2", "-r", "l"))
    assert re.findall(r"(\w+) +(\S+)  \(set\)", result.err) == [
        ("temp", "0.0"), ("min_p", "0.0"), ("repeat_last_n", "0"), ("seed", "0"), ("max_tokens", "2"), ("stop", "('l',)"),
    ]  # fmt: skip
    assert "(set)" not in talk("/show settings").err
    assert talk("hi", arguments=("-n", "0")).out == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temp -1", "temp is -1"),
        ("/set temp nan", "temp is nan"),
        ("/set temp hot", "temp cannot be 'hot'"),
        ("/set top_k 1.5", "top_k cannot be '1.5'"),
        ("/set temp", "/set temp needs a value"),
        ("/set colour red", "unknown setting colour"),
        ("/set timings maybe", "neither on nor off"),
        ("/set logit_bias 400+1", "logit_bias names token 400"),
        ("/set logit_bias x", "is not ID+BIAS"),
        ("/set max_tokens -5", "max_tokens is -5"),
        ("/set draft_max 16", "draft_max is 16"),
        ("/show everything", "expected one of settings"),
        ("/stats", "nothing has been answered yet"),
        ("/tokens", "nothing has been answered yet"),
        ("/read", "/read needs a file name"),
        ("/save", "/save needs a file name"),
        ("/load", "/load needs a file name"),
        ("/read /nowhere", "/read /nowhere is missing"),
        ("/read /tmp", "/read /tmp is a directory"),
        ("/read /dev/zero", "/read /dev/zero is no regular file"),
        ("/load /nowhere", "/load /nowhere is missing"),
        ("/save /nowhere/at/all.json", "/nowhere/at/all.json"),
        ("/save /tmp", "/tmp exists"),
        ("/read a\x00b", "is missing"),
    ],
)
def test_a_wrong_command_leaves_the_chat_as_it_was(talk: Callable[..., Any], line: str, message: str) -> None:
    result = talk(line, "hi")
    assert result.out == "Helo!\n" and message in result.err and result.err.count("error: ") == 1


def test_show_stats_and_tokens(talk: Callable[..., Any]) -> None:
    result = talk("hi", "/stats", "/tokens", "/tokens <|im_end|>", "/show template", "/show model")
    assert "6 tokens: " in result.err and "'<|im_end|>'" in result.err and ":'<' " in result.err
    assert "of 32768 tokens" in result.err and "stop: end token <|im_end|>" in result.err
    assert "{{ bos_token }}" in result.err and "hello" in result.err


# -- files (E16) ----------------------------------------------------------------------------------------------------


def contents_of(path: Path) -> list[str]:
    return [message["content"] for message in json.loads(path.read_text("utf-8"))["messages"]]


def test_save_and_load(talk: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    talk("/system S", "é🙂", f"/save {path}", "more", f"/save {path}", f"/save! {path}")
    assert contents_of(path) == ["é🙂", "Helo!", "more", "Helo!"]
    result = talk("first", f"/load {path}", "/show history")
    assert "4 messages of" in result.err and "system: S\nuser: é🙂" in result.err and "first" not in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["talk.json"]


def test_saving_over_a_file_needs_the_mark(talk: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("precious")
    result = talk("hi", f"/save {path}", "hi")
    assert f"/save! {path} replaces it" in result.err and path.read_text() == "precious"
    assert result.out == "Helo!\n" * 2


def test_saving_to_a_full_disk(talk: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr("lfm2cpp.files.shutil.disk_usage", lambda path: full)
    result = talk("hi", f"/save {tmp_path}/s.json", "again")
    assert result.err.count("error: ") == 1 and "disk space" in result.err and result.out == "Helo!\n" * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"kind": "lfm2cpp-chat", "version": 2}',
        b'{"kind": "lfm2cpp-chat", "version": 1}',
        b'{"kind": "lfm2cpp-chat", "version": 1, "system": 5, "messages": []}',
        b'{"kind": "lfm2cpp-chat", "version": 1, "system": null, "messages": [{"role": "root", "content": "x"}]}',
        b'{"kind": "lfm2cpp-chat", "version": 1, "system": null, "messages": [{"role": "user", "content": 1}]}',
        b'{"kind": "lfm2cpp-chat", "version": 1, "system": null, "messages": [7]}',
    ],
    ids=lambda content: ascii(content)[:50],
)  # fmt: skip
def test_a_damaged_conversation_is_refused(talk: Callable[..., Any], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    result = talk("first", f"/load {path}", "/show history")
    assert result.err.count("error: ") == 1 and str(path) in result.err and "user: first" in result.err


def test_read_puts_a_file_before_the_message(talk: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("file a\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("file b é", encoding="utf-8")
    saved = tmp_path / "s.json"
    result = talk(f"/read {tmp_path}/a.txt", f"/read {tmp_path}/b.txt", "compare", "next", f"/save {saved}")
    assert "7 characters of" in result.err
    assert contents_of(saved) == ["file a\n\n\nfile b é\n\ncompare", "Helo!", "next", "Helo!"]


def test_read_refuses_what_is_no_text(talk: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"ab\0cd")
    with open(tmp_path / "huge", "wb") as huge:
        huge.truncate(1 << 30)
    os.mkfifo(tmp_path / "fifo")
    result = talk(*(f"/read {tmp_path}/{name}" for name in ("binary", "huge", "fifo")), "hi")
    assert "is not text: it holds zero bytes" in result.err and "has more than 8388608 bytes" in result.err
    assert "is no regular file" in result.err and result.out == "Helo!\n"


# -- the conversation itself ----------------------------------------------------------------------------------------


class Lines:
    """Messages for a Repl; an exception among them is raised."""

    def __init__(self, *items: Any) -> None:
        self.items = list(items)

    def read(self) -> str:
        if not self.items:
            raise EOFError
        item = self.items.pop(0)
        if isinstance(item, type):
            raise item
        return item


def repl(llm: LLM, *items: Any, **settings: Any) -> Repl:
    return Repl(llm, Lines(*items), AnswerOutput(), settings=settings, timings=False)


def test_a_turn_evaluates_only_what_is_new(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LLM(tiny_gguf(tmp_path / "m.gguf", n_vocab=400)) as llm:
        chat = repl(llm, max_tokens=40, temp=1.5, min_p=0.0, seed=1, ignore_eos=True)
        chat.handle("a first question of some length, so that there is something to keep " * 3)
        for turn in range(3):
            chat.handle(f"and then {turn}?")
            assert chat.last is not None and chat.last.timings.prompt_n < 40
            assert chat.last.timings.cache_n > 150 + 40 * turn
        chat.handle("/regen")
        assert chat.last.timings.prompt_n < 64
        chat.handle("/undo")
        chat.handle("another way?")
        assert chat.last.timings.prompt_n < 64


def test_a_message_that_does_not_fit_changes_nothing(
    models: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """E2 in a chat."""
    with LLM(models["hello"], n_ctx=128) as llm:
        chat = repl(llm, "hi", "x" * 5000, "again", "/show history")
        assert chat.run() == 0
        assert [m["content"] for m in chat.messages] == ["hi", "Helo!", "again", "Helo!"]
    assert "> ctx 128 tokens" in capfd.readouterr().err


def test_a_full_context_is_said_and_the_answer_kept(models: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    """E3."""
    with LLM(models["endless"], n_ctx=64) as llm:
        chat = repl(llm, "hi", "more", "/undo", "short")
        chat.run()
        assert chat.messages[0]["content"] == "short" and chat.messages[1]["content"].startswith("abab")
    err = capfd.readouterr().err
    assert "the context of 64 tokens is full; /clear or /undo makes room" in err and "error: prompt" in err


def test_ctrl_c_twice_at_the_prompt_leaves(models: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    with LLM(models["hello"]) as llm:
        assert repl(llm, KeyboardInterrupt, "hi", KeyboardInterrupt, KeyboardInterrupt, "never").run() == 130
        late = repl(llm, KeyboardInterrupt, "hi")
        late._interrupted_at = time.monotonic() - 10
        assert late.run() == 0
    assert capfd.readouterr().out == "Helo!\nHelo!\n"


@pytest.mark.parametrize(
    ("text", "going_on"),
    [("a", False), ("a\\", True), ("a\\\nb", False), ('"""a', True), ('"""a\nb', True), ('"""a\n"""', False)],
)
def test_where_a_message_goes_on(text: str, going_on: bool) -> None:
    assert is_open(text) is going_on


def test_what_a_message_is() -> None:
    assert finished('"""\na\nb\n"""') == "a\nb" and finished("a\\\nb") == "a\nb" and finished(" a ") == " a "
