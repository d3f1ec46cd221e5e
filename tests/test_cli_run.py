"""`lfm2cpp run`: what goes where, exit codes, bad input (E1-E6, E9-E14, A27, A28)."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
from bigram_model import HELLO, bigram_gguf, endless_gguf, piece_ids
from cli_process import COMMAND, Cli, environment, finish, first, lfm2cpp, modules_imported, shell, started
from tiny_model import Weights, tiny_gguf

from lfm2cpp.cli.output import AnswerOutput
from lfm2cpp.cli.run import show
from lfm2cpp.generate import Event, Generation, Piece, Timings

CONTROLS = ["A", "\u011b", "]", "5", "2", "\u0107", "\u010d", "B", "\u011a", "<|im_end|>"]  # A ESC ] 5 2 BEL CR B 0x1a
T = gguf.GGUFValueType
ENDED = Generation("12345", (1, 2, 3, 4, 5), (0,), "interrupted", "", Timings(0, 1, 0.0, 5, 0.0), 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "hello": bigram_gguf(folder / "hello.gguf", HELLO),
        "endless": endless_gguf(folder / "endless.gguf"),
        "controls": bigram_gguf(folder / "controls.gguf", CONTROLS),
        "bird": bigram_gguf(folder / "bird.gguf", ["\u00c3", "\u00a9", "!", "<|im_end|>"]),  # the two bytes of e-acute
    }


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capfd)


# -- the answer -----------------------------------------------------------------------------------------------------


def test_stdout_carries_only_the_text(cli: Cli, models: dict[str, Path]) -> None:
    result = cli("run", "-m", models["hello"], "-p", "hi")
    assert (result.code, result.out, result.err) == (0, "Helo!\n", "")


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["-p", "hi"], b"not read", "hi"),
        (["-p", "-"], b"from a pipe\n", "from a pipe"),
        ([], b"from a pipe\r\n", "from a pipe"),
        (["-p", "-", "-p", "then this"], b"a\nb\n\n", "a\nb\n\nthen this"),
        (["-p", "one", "-p", "two"], b"", "one\ntwo"),
        (["-p", r"a\nb\t\x41\\n\q"], b"", "a\nb\tA\\n\\q"),
        (["-p", r"a\nb", "--no-escape"], b"", r"a\nb"),
        (["-p", r"a\nb", "-no-e"], b"", r"a\nb"),
        (["-p", ""], b"", ""),
        (["-p", "<|im_end|>"], b"", "<|im_end|>"),
        ([], b"\xff\xfe bad \xc3", "\ufffd\ufffd bad \ufffd"),
        ([], b"nul \x00 in it", "nul \x00 in it"),
        (["-p", "\udcff\udc80"], b"", "\ufffd\ufffd"),
    ],
)
def test_where_prompts_come_from(
    cli: Cli, models: dict[str, Path], arguments: list[str], stdin: bytes, prompt: str
) -> None:
    result = cli("run", "-m", models["hello"], *arguments, "--json", stdin=stdin)
    assert result.code == 0, result.err
    ids = json.loads(result.out)["prompt_ids"]
    text = f"<|startoftext|><|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert decode(models["hello"], ids) == text
    assert ids.count(7) == 1


def decode(path: Path, ids: list[int]) -> str:
    from lfm2cpp.gguf import read_gguf
    from lfm2cpp.text.vocab import Vocab

    with read_gguf(path) as file:
        return Vocab(file).detokenize(ids, special=True)


def test_prompts_from_files_and_a_system_message(cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbffrom a file\n")
    (tmp_path / "s.txt").write_text("be brief\n")
    files = ["-f", tmp_path / "p.txt", "-p", "more", "-sysf", tmp_path / "s.txt"]
    result = cli("run", "-m", models["hello"], *files, "--json")
    text = decode(models["hello"], json.loads(result.out)["prompt_ids"])
    assert "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nfrom a file\nmore<|im_end|>" in text


def test_json(cli: Cli, models: dict[str, Path]) -> None:
    result = cli("run", "-m", models["hello"], "-p", "hi", "--json", "-n", 3, "-s", 9)
    answer = json.loads(result.out)
    assert answer["text"] == "Hel" and answer["ids"] == [piece_ids()[p] for p in "Hel"]
    assert (answer["finish_reason"], answer["seed"]) == ("length", 9)
    assert set(answer["timings"]) >= {"prompt_n", "prompt_ms", "predicted_n", "predicted_ms"}
    assert answer["timings"]["predicted_n"] == 3 and result.err == ""


def test_prompt_ids_are_evaluated_as_they_are(cli: Cli, models: dict[str, Path]) -> None:
    newline = piece_ids()["\u010a"]
    answer = json.loads(cli("run", "-m", models["hello"], "--prompt-ids", f"5, {newline}", "--json").out)
    assert answer["prompt_ids"] == [5, newline] and answer["text"] == "Helo!"


def test_raw_continues_text(cli: Cli, models: dict[str, Path]) -> None:
    for flag in ("--raw", "-no-cnv", "--no-conversation"):
        assert cli("run", "-m", models["hello"], flag, "-p", "x\\n").out == "Helo!\n"
    answer = json.loads(cli("run", "-m", models["hello"], "--raw", "-p", "<|im_end|>", "--json", "-n", 0).out)
    assert 7 not in answer["prompt_ids"] and answer["ids"] == []
    answer = json.loads(cli("run", "-m", models["hello"], "--raw", "--parse-special", "-p", "<|im_end|>", "--json").out)
    assert answer["prompt_ids"] == [1, 7]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-n", "2"], "He\n"),
        (["-n", "-1"], "Helo!\n"),
        (["-n", "0"], ""),
        (["-r", "o!"], "Hel\n"),
        (["--stop", "l", "-r", "e"], "H\n"),
        (["--temp", "0"], "Helo!\n"),
        (["--temp", "0", "-l", f"{piece_ids()['H']}-inf", "-n", "1"], "<|pad|>"),
        (["-cnv", "-st", "--no-display-prompt"], "Helo!\n"),
        (["--chat-template", "chatml"], "Helo!\n"),
        (["-sp"], "Helo!\n"),
        (["-t", "1", "-c", "256", "-ctk", "f32"], "Helo!\n"),
        (["--top-k", "1", "--top-p", "0.5", "--min-p", "0.1", "--repeat-penalty", "1.0", "-s", "-1"], "Helo!\n"),
    ],
)
def test_options(cli: Cli, models: dict[str, Path], arguments: list[str], text: str) -> None:
    result = cli("run", "-m", models["hello"], "-p", "hi", *arguments)
    assert result.code == 0 and (result.out == text or text == "<|pad|>" and "H" not in result.out), result.err


def test_environment_twins(cli: Cli, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_MODEL", str(models["hello"]))
    monkeypatch.setenv("LFM2_THREADS", "1")
    assert cli("run", "-p", "hi").out == "Helo!\n"


def test_verbose_says_more_on_stderr(cli: Cli, models: dict[str, Path]) -> None:
    result = cli("run", "-m", models["hello"], "-p", "hi", "-v", "-s", 4)
    assert result.out == "Helo!\n" and "seed 4" in result.err and "tokens per second" in result.err
    assert "context 32768" in result.err


def test_what_is_typed_comes_before_the_environment(
    cli: Cli, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_HF_REPO", "a/b")
    assert cli("run", "-m", models["hello"], "-p", "hi").out == "Helo!\n"
    monkeypatch.setenv("LFM2_MODEL", str(tmp_path / "precious.gguf"))
    (tmp_path / "precious.gguf").write_text("precious")
    monkeypatch.chdir(tmp_path)
    cli("bench", "--random", "230M,n_layer=1,n_vocab=512,n_embd=64,n_ff=64,n_head=2,n_head_kv=1", "F32", "--force", "-p", 0, "-n", 0)
    assert (tmp_path / "precious.gguf").read_text() == "precious" and list(tmp_path.glob("LFM2-*.gguf"))


def test_one_template_only(cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "t").write_text("chatml")
    both = ("--chat-template", "chatml", "--chat-template-file", tmp_path / "t")
    assert cli("run", "-m", models["hello"], "-p", "hi", *both).code == 2


@pytest.mark.usefixtures("steady_machine")
def test_drafts_are_counted(cli: Cli, models: dict[str, Path]) -> None:
    """"abab..." is drafted from itself; the answer is the same without."""
    command = ("run", "-m", models["endless"], "-p", "hi", "-n", 60)
    answer, plain = (json.loads(cli(*command, *most, "--json").out) for most in ((), ("--draft-max", 0)))
    assert answer["ids"] == plain["ids"] and len(answer["ids"]) == 60
    assert 30 < answer["timings"]["draft_n_accepted"] <= answer["timings"]["draft_n"]
    assert plain["timings"]["draft_n"] == plain["timings"]["draft_n_accepted"] == 0
    assert "draft acceptance = 1.00" in cli(*command, "-v").err
    assert "draft acceptance" not in cli(*command, "-v", "--draft-max", 0).err
    refused = cli(*command, "--draft-max", 16)
    assert refused.code == 2 and "draft_max is 16, expected a whole number from 0 to 15 (0 is off)" in refused.err


def test_a_full_context_is_said(cli: Cli, models: dict[str, Path]) -> None:
    """E3."""
    result = cli("run", "-m", models["endless"], "-p", "hi", "-c", 64)
    assert result.code == 0 and result.out.startswith("abab") and "the context of 64 tokens is full" in result.err


def test_all_masked_is_said(cli: Cli, models: dict[str, Path]) -> None:
    """E5: the bigram model has 392 real tokens."""
    bias = [part for i in range(392) for part in ("-l", f"{i}-inf")]
    result = cli("run", "-m", models["hello"], "-p", "hi", *bias, "--json")
    assert json.loads(result.out)["finish_reason"] == "stop" and "forbidden" in result.err


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temp", "nan"], 2, "temp is nan"),
        (["--temp", "inf"], 2, "temp is inf"),
        (["--temp", "-1"], 2, "temp is -1.0"),
        (["--temp", "warm"], 2, "'warm' is not a valid float"),
        (["--top-k", "-5"], 2, "top_k is -5"),
        (["--top-p", "2"], 2, "top_p is 2.0"),
        (["--min-p", "-0.1"], 2, "min_p is -0.1"),
        (["--repeat-penalty", "0"], 2, "repeat_penalty is 0"),
        (["-s", str(2**64)], 2, "seed is 18446744073709551616"),
        (["-s", "-7"], 2, "seed is -7"),
        (["-n", "-2"], 2, "max_tokens is -2"),
        (["-n", "1e3"], 2, "'1e3' is not a valid integer"),
        (["-l", "400+1"], 2, "logit_bias names token 400"),
        (["-l", "-3+1"], 2, "--logit-bias '-3+1' is not ID+BIAS"),
        (["-l", "5"], 2, "is not ID+BIAS"),
        (["-l", "5+x"], 2, "is not ID+BIAS"),
        (["-l", "5+nan"], 2, "logit_bias of token 5 is nan"),
        (["-c", "-5"], 2, "--ctx-size is -5"),
        (["-c", str(10**12)], 2, "context size is 1000000000000"),
        (["-c", "128001"], 2, "context size is 128001"),
        (["-t", "0"], 2, "--threads is 0"),
        (["-ctk", "q9"], 2, "KV type 'q9'"),
        (["-ctk", "f16", "-ctv", "f32"], 2, "-ctk f16 and -ctv f32 differ"),
        (["--prompt-ids", "1,x"], 2, "--prompt-ids '1,x' is no list"),
        (["--prompt-ids", ""], 2, "--prompt-ids '' is no list"),
        (["--prompt-ids", "1,-2"], 2, "is no list"),
        (["--prompt-ids", "400"], 2, "not both"),
        (["-f", "/nowhere/at/all"], 1, "--file /nowhere/at/all is missing"),
        (["-f", "/tmp"], 1, "--file /tmp is a directory"),
        (["-f", "/dev/zero"], 1, "--file /dev/zero is no regular file"),
        (["--parse-special"], 2, "--parse-special needs --raw"),
        (["--raw", "-sys", "x"], 2, "a system message needs the chat template"),
        (["-sys", "x", "-sysf", "y"], 2, "not both"),
        (["--chat-template", "{% if %}"], 1, "the chat template is no Jinja"),
        (["--chat-template", "{{ ''.__class__.__mro__ }}"], 1, "the chat template was stopped"),
        (["--chat-template-file", "/nowhere"], 1, "--chat-template-file /nowhere is missing"),
        (["-hf", "a/b"], 2, "give one model"),
        (["--nonsense"], 2, "No such option"),
        (["-c", "16", "-p", "word " * 100], 1, "> ctx 16 tokens"),
        (["-c", "16", "-p", "x" * 1_000_000], 1, "> ctx 16 tokens"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_bad_arguments(cli: Cli, models: dict[str, Path], arguments: list[str], code: int, message: str) -> None:
    result = cli("run", "-m", models["hello"], "-p", "hi", *arguments)
    assert result.code == code and message in result.err and result.out == "", result
    assert len([line for line in result.err.splitlines() if line.lower().startswith("error: ")]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-p", "x"], 2, "give one model: -m FILE, or -hf"),
        (["-m", "/nowhere/m.gguf", "-p", "x"], 1, "No such file"),
        (["-m", "/tmp", "-p", "x"], 1, "a directory"),
        (["-hf", "nonsense", "-p", "x"], 2, "is no hub id"),
    ],
)
def test_bad_models(cli: Cli, arguments: list[str], code: int, message: str) -> None:
    result = cli("run", *arguments)
    assert result.code == code and message in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("stdin", [b"", b"\n", None])
def test_no_prompt_at_all(cli: Cli, models: dict[str, Path], stdin: bytes | None) -> None:
    result = cli("run", "-m", models["hello"], stdin=stdin)
    assert result.code == 2 and "no prompt: give -p TEXT" in result.err


def test_prompt_ids_outside_the_vocabulary(cli: Cli, models: dict[str, Path]) -> None:
    """E6."""
    result = cli("run", "-m", models["hello"], "--prompt-ids", "1,400")
    assert result.code == 2 and "token id 400 is not a whole number from 0 to 399" in result.err


@pytest.mark.parametrize("tensor", ["token_embd_norm.weight", "blk.1.ffn_up.weight"])
def test_a_model_that_computes_nan(cli: Cli, tmp_path: Path, tensor: str) -> None:
    """A27: the tensor is named, and with it the layer."""

    def spoil(weights: Weights) -> None:
        weights[tensor].reshape(-1)[3] = float("nan")

    result = cli("run", "-m", tiny_gguf(tmp_path / "nan.gguf", edit=spoil), "-p", "hi")
    assert result.code == 1 and result.out == "" and "error: non-finite logits" in result.err
    assert f"tensor {tensor} holds 1 NaN or Inf, the first in row 0; the file is damaged" in result.err


def test_a_broken_template_in_the_file(cli: Cli, tmp_path: Path) -> None:
    path = bigram_gguf(tmp_path / "m.gguf", HELLO, metadata={"tokenizer.chat_template": (T.STRING, "{{ 1 ")})
    result = cli("run", "-m", path, "-p", "hi")
    assert result.code == 1 and "use --chat-template chatml, or --raw" in result.err
    assert cli("run", "-m", path, "-p", "hi", "--chat-template", "chatml").out == "Helo!\n"
    assert cli("run", "-m", path, "-p", "x\\n", "--raw").out == "Helo!\n"


# -- pipes, signals, terminals --------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    lines, heavy = modules_imported("numba numpy jinja2 tokenizers prompt_toolkit huggingface_hub", "run", "--help")
    assert any("--prompt-ids" in line for line in lines) and heavy == []


def test_a_run_imports_no_more_than_it_needs(models: dict[str, Path]) -> None:
    names = "numba prompt_toolkit huggingface_hub torch gguf"
    lines, heavy = modules_imported(names, "run", "-m", models["hello"], "-p", "x")
    assert (lines, heavy) == (["Helo!"], [])


def test_an_open_pipe_as_stdin_is_not_waited_for(models: dict[str, Path]) -> None:
    """E10: the pipe is never closed and never written."""
    with started("run", "-m", models["hello"], "-p", "hi") as process:
        assert process.wait(timeout=60) == 0
        assert process.stdout is not None and process.stdout.read() == b"Helo!\n"


@pytest.mark.parametrize("redirect", ["<&-", "</dev/null"])
def test_closed_and_empty_stdin(models: dict[str, Path], redirect: str) -> None:
    with_prompt = shell(f"$LFM run -m {models['hello']} -p hi {redirect}")
    assert (with_prompt.code, with_prompt.out) == (0, "Helo!\n"), with_prompt.err
    without = shell(f"$LFM run -m {models['hello']} {redirect}")
    assert (without.code, without.out) == (2, "") and "no prompt" in without.err


def test_a_reader_that_leaves_is_no_error(models: dict[str, Path]) -> None:
    """E11: 141, and nothing on stderr."""
    with started("run", "-m", models["endless"], "-p", "hi") as process:
        assert process.stdout is not None and process.stderr is not None
        assert first(process, 10) == b"ababababab"
        process.stdout.close()
        assert process.wait(timeout=20) == 141
        assert process.stderr.read() == b""


def test_head(models: dict[str, Path]) -> None:
    result = shell(f"$LFM run -m {models['endless']} -p hi | head -c 4")
    assert (result.code, result.out, result.err) == (0, "abab", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_full_disk_as_stdout(models: dict[str, Path]) -> None:
    with open("/dev/full", "wb") as full:
        result = lfm2cpp("run", "-m", models["hello"], "-p", "hi", stdout=full)
    assert result.code == 1 and "stdout cannot be written: No space left" in result.err and result.err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", ["tokenize -m MODEL hi", "inspect MODEL", "doctor", "--version", "run --help"])
def test_a_full_disk_as_stdout_of_any_command(models: dict[str, Path], command: str, buffered: bool) -> None:
    """Also when Python notices it only at the end."""
    arguments = [models["hello"] if word == "MODEL" else word for word in command.split()]
    with open("/dev/full", "wb") as full:
        result = lfm2cpp(*arguments, stdout=full, env={"PYTHONUNBUFFERED": "" if buffered else "1"})
    assert result.code == 1 and "No space left" in result.err and result.err.count("\n") == 1


def test_a_closed_stdout(models: dict[str, Path]) -> None:
    result = shell(f"$LFM run -m {models['hello']} -p hi >&-")
    assert result.code == 1 and "stdout is closed" in result.err


def test_ctrl_c_ends_with_130_at_once(models: dict[str, Path]) -> None:
    """E9: within 0.3 s on a quiet machine; the limit here leaves room for a busy one. What was said stays."""
    with started("run", "-m", models["endless"], "-p", "hi") as process:
        assert process.stdout is not None
        head = first(process, 20).decode()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        result = finish(process)
        assert result.code == 130 and time.monotonic() - sent < 1.5
        text = (head + result.out).rstrip("\n")
        assert text == ("ab" * len(text))[: len(text)]


class Struck:
    """A stream of 1, 2, 3, 4, 5 that a Ctrl-C strikes while the pieces in `at` are on their way out of it."""

    def __init__(self, *at: int) -> None:
        self.at, self.step, self.n_stops = at, 0, 0

    def __iter__(self) -> Struck:
        return self

    def __next__(self) -> Event:
        self.step += 1
        if self.step in self.at:
            signal.raise_signal(signal.SIGINT)
        return Piece(str(self.step), self.step) if self.step <= 5 else ENDED

    def stop(self) -> None:
        self.n_stops += 1


@pytest.mark.parametrize("at", range(1, 7))
def test_ctrl_c_loses_no_piece(capsys: pytest.CaptureFixture[str], at: int) -> None:
    """Not even the one that was taken from the stream and is not written yet."""
    stream: Any = Struck(at)
    assert show(stream, AnswerOutput()) is ENDED
    assert (capsys.readouterr().out, stream.n_stops) == ("12345\n", 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_leaves_at_once() -> None:
    stream: Any = Struck(2, 4)
    with pytest.raises(KeyboardInterrupt):
        show(stream, None)
    assert stream.step == 4 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_with_json_gives_the_part_that_there_is(models: dict[str, Path]) -> None:
    with started("run", "-m", models["endless"], "-p", "hi", "--json", "-v") as process:
        assert process.stderr is not None
        assert b"context" in process.stderr.readline()  # loaded
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        result = finish(process)
        assert result.code == 130 and json.loads(result.out)["finish_reason"] == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_signals(models: dict[str, Path], number: int) -> None:
    with started("run", "-m", models["endless"], "-p", "hi") as process:
        assert process.stdout is not None
        first(process, 20)
        process.send_signal(number)
        assert finish(process).code == 128 + number


def test_ctrl_c_while_loading(models: dict[str, Path]) -> None:
    for delay in (0.1, 0.2, 0.4):
        with started("run", "-m", models["endless"], "-p", "hi") as process:
            time.sleep(delay)
            for _ in range(3):  # Python loses one that strikes in a callback of its import system: one presses again
                process.send_signal(signal.SIGINT)
                try:
                    process.communicate(timeout=10)
                    break
                except subprocess.TimeoutExpired:
                    pass
            # Before Python has set itself up nobody can catch the signal.
            assert process.returncode in (130, -signal.SIGINT, 1)


def test_escape_sequences_reach_a_pipe_but_no_terminal(models: dict[str, Path]) -> None:
    """E13."""
    pexpect = pytest.importorskip("pexpect")
    arguments = ["run", "-m", str(models["controls"]), "-p", "hi"]
    assert lfm2cpp(*arguments).out == "A\x1b]52\x07\rB\x1a\n"
    child = pexpect.spawn(COMMAND[0], [*COMMAND[1:], *arguments], env=environment(TERM="xterm"), timeout=60)
    child.expect(pexpect.EOF)
    assert child.before.replace(b"\r\n", b"\n").endswith(b"A]52B\n") and b"\x1b]" not in child.before
    child.close()
    assert child.exitstatus == 0


@pytest.mark.parametrize("extra", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"TERM": "dumb"}])
def test_any_locale(models: dict[str, Path], extra: dict[str, str]) -> None:
    """E12: a stdout that cannot show a character does not end the program."""
    result = lfm2cpp("run", "-m", models["bird"], "-p", "é🙂", env=extra)
    assert result.code == 0 and result.out in ("é!\n", "?!\n"), result
