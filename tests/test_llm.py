"""The Python interface on a real engine: answers, streams, limits, reuse, OpenAI shapes (E1-E3, E14, E18)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from bigram_model import HELLO, N_VOCAB, bigram_gguf, endless_gguf, piece_ids
from tiny_model import tiny_gguf

from lfm2cpp import LLM
from lfm2cpp.errors import ContextError, ModelFormatError, UsageError
from lfm2cpp.generate import Generation, Piece
from lfm2cpp.lookup import DRAFT_MAX
from lfm2cpp.sampling import SamplingParams

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def hello_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bigram_gguf(tmp_path_factory.mktemp("llm") / "hello.gguf", HELLO)


@pytest.fixture(scope="module")
def endless_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_gguf(tmp_path_factory.mktemp("llm") / "endless.gguf")


@pytest.fixture(scope="module")
def hello(hello_path: Path) -> Iterator[LLM]:
    with LLM(hello_path) as llm:
        yield llm


# -- answers --------------------------------------------------------------------------------------------------------


def test_chat_answers(hello: LLM) -> None:
    result = hello.chat([USER])
    assert (result.text, result.finish_reason) == ("Helo!", "stop")
    assert hello.chat("hi").text == "Helo!"
    assert hello.render([USER]) == "<|startoftext|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert result.prompt_ids == tuple(hello.tokenize(hello.render([USER]), special=True))


def test_generate_continues_text_and_ids(hello: LLM) -> None:
    assert hello.generate("x\n").text == "Helo!"
    assert hello.generate([1, piece_ids()["\u010a"]]).text == "Helo!"
    assert hello.generate("<|im_start|>\n", parse_special=True).prompt_ids[:2] == (1, 6)
    assert len(hello.generate("<|im_start|>\n").prompt_ids) > 5


def test_streams_give_pieces_and_then_the_whole(hello: LLM) -> None:
    events = list(hello.stream("\n", max_tokens=3))
    assert "".join(e.text for e in events if isinstance(e, Piece)) == "Hel"
    assert isinstance(events[-1], Generation) and events[-1].text == "Hel"
    stream = hello.chat_stream([USER])
    assert stream.result().text == "Helo!" and list(stream) == []


def test_options_come_before_the_recommendation(hello: LLM) -> None:
    assert hello.sampling == SamplingParams()
    assert hello.generate("\n", stop="lo").text == "He"
    assert hello.generate("\n", stop=["o", "l"]).text == "He"
    assert hello.generate("\n", logit_bias={piece_ids()["H"]: -float("inf")}, temp=0).text != "Helo!"
    assert hello.generate("\n", sampling=SamplingParams(temp=0.0), seed=5).seed == 5


def test_one_seed_is_one_answer(tmp_path: Path) -> None:
    chains = [[piece, "<|im_end|>"] for piece in "ABCDEFGH"]
    with LLM(bigram_gguf(tmp_path / "choice.gguf", *chains)) as llm:
        answers = [llm.generate("\n", seed=seed, temp=1.0).text for seed in range(12)]
        assert answers == [llm.generate("\n", seed=seed, temp=1.0).text for seed in range(12)]
        assert len(set(answers)) > 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate("x", tmp=1), "unknown option tmp"),
        (lambda llm: llm.generate("x", temp=-1), "temp is -1"),
        (lambda llm: llm.generate("x", max_tokens=-5), "max_tokens is -5"),
        (lambda llm: llm.generate("x", draft_max=16), "draft_max is 16, expected a whole number from 0 to 15"),
        (lambda llm: llm.generate("x", logit_bias={N_VOCAB: 1.0}), "logit_bias names token 400"),
        (lambda llm: llm.generate([]), "the prompt has no tokens"),
        (lambda llm: llm.generate([1, N_VOCAB]), "token id 400 is not a whole number from 0 to 399"),
        (lambda llm: llm.generate([-1]), "token id -1"),
        (lambda llm: llm.generate([1.5]), "token id 1.5"),
        (lambda llm: llm.chat([]), "messages is empty"),
        (lambda llm: llm.chat([{"content": "x"}]), "message 0"),
        (lambda llm: llm.detokenize([N_VOCAB]), "token id 400"),
        (lambda llm: llm.logits([]), "no tokens"),
    ],
)
def test_bad_requests_are_refused_and_leave_the_object_usable(hello: LLM, call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(hello)
    assert hello.chat("hi").text == "Helo!"


@pytest.mark.parametrize("prompt", ["", " ", "\x00", "\ud800", "<|im_end|>", "é🙂", "\n\n"], ids=ascii)
def test_any_text_is_a_prompt(hello: LLM, prompt: str) -> None:
    """E1."""
    assert hello.chat(prompt).text == "Helo!"
    hello.generate(prompt, max_tokens=2)


def test_the_context_limits_prompts_and_answers(endless_path: Path) -> None:
    """E2, E3."""
    with LLM(endless_path, n_ctx=64) as llm:
        assert llm.n_ctx() == 64
        result = llm.generate("\n")
        assert result.finish_reason == "length" and "context of 64 tokens is full" in result.detail
        assert len(result.prompt_ids) + len(result.token_ids) == 65
        assert len(llm.generate([20] * 64).token_ids) == 1
        with pytest.raises(ContextError, match="prompt 65 > ctx 64"):
            llm.generate([20] * 65)
        with pytest.raises(ContextError, match=r"prompt \d+ > ctx 64"):
            llm.chat("x" * 1_000_000)
        assert llm.generate("\n", max_tokens=2).text == "ab"


# -- tokens and logits ----------------------------------------------------------------------------------------------


def test_tokens(hello: LLM) -> None:
    ids = hello.tokenize("hello<|im_end|>")
    assert ids[0] == hello.token_bos() == 1 and hello.token_eos() == 7 and 7 not in ids
    assert hello.tokenize(b"hello<|im_end|>", add_bos=False, special=True)[-1] == 7
    assert hello.detokenize(ids) == "hello<|im_end|>"
    assert hello.detokenize([1, 7], special=True) == "<|startoftext|><|im_end|>"
    assert hello.n_vocab() == N_VOCAB


def test_logits_of_a_prompt(hello: LLM) -> None:
    row = hello.logits("\n")
    assert row.shape == (N_VOCAB,) and row.dtype == np.float32 and row.argmax() == piece_ids()["H"]
    rows = hello.logits([1, 20, piece_ids()["\u010a"]], every=True)
    assert rows.shape == (3, N_VOCAB) and np.array_equal(rows[-1], hello.logits([1, 20, piece_ids()["\u010a"]]))
    assert rows[0].argmax() == piece_ids()["<|im_end|>"]


def test_metadata(hello: LLM) -> None:
    assert hello.metadata["general.architecture"] == "lfm2"


# -- what a turn evaluates ------------------------------------------------------------------------------------------


def random_model(tmp_path: Path) -> LLM:
    """Random weights: its answers depend on everything before them."""
    return LLM(tiny_gguf(tmp_path / "random.gguf", n_vocab=400, n_ctx_train=4096))


def test_a_turn_evaluates_only_what_is_new(tmp_path: Path) -> None:
    with random_model(tmp_path) as llm:
        messages = [{"role": "user", "content": "tell me " * 40}]
        options: dict[str, Any] = {"max_tokens": 30, "seed": 3, "temp": 1.5, "min_p": 0.0, "ignore_eos": True}
        for turn in range(4):
            result = llm.chat(messages, **options)
            if turn:
                # <|im_end|>, a newline and the new question: what the model said is not read again, however spelled.
                assert result.timings.prompt_n < 40, turn
            messages += [{"role": "assistant", "content": result.text}, {"role": "user", "content": f"turn {turn}"}]
        again = llm.chat(messages[:-2], **options)
        assert again.timings.prompt_n < 64
        assert llm.chat(messages, **options).timings.cache_n > 0


def test_reuse_gives_what_a_fresh_start_gives(tmp_path: Path) -> None:
    """E18: same tokens, cached or not."""
    texts = ["hello world the name", "hello world and then", "hello", "another one", "hello world the name is 12"]
    greedy: dict[str, Any] = {"temp": 0, "max_tokens": 25}
    with random_model(tmp_path) as llm:
        reused = [llm.chat(text, **greedy).token_ids for text in texts * 2]
    fresh = []
    for text in texts:
        with LLM(tmp_path / "random.gguf") as llm:
            fresh.append(llm.chat(text, **greedy).token_ids)
    assert reused == fresh * 2


@pytest.mark.usefixtures("steady_machine")
@pytest.mark.parametrize("types", ["Q8_0", "Q4_0", "F32", "BF16"])
def test_drafts_from_the_text_change_nothing(tmp_path: Path, types: str) -> None:
    """A real engine, and few tokens that it may choose, so that drafts are often right and often wrong."""
    few: dict[str, Any] = {"logit_bias": {i: 200.0 for i in range(40, 44)}, "max_tokens": 150, "ignore_eos": True}
    ways: list[dict[str, Any]] = [
        {"temp": 0.0, "repeat_penalty": 1.0}, {"temp": 0.5, "seed": 1}, {"temp": 1.5, "seed": 2, "min_p": 0.0},
        {"temp": 0.8, "seed": 3, "min_p": 0.0, "repeat_penalty": 1.3, "repeat_last_n": 8},
    ]  # fmt: skip
    prompt = np.random.default_rng(0).integers(40, 44, 100).tolist()
    with LLM(tiny_gguf(tmp_path / "m.gguf", n_vocab=400, types=types)) as llm:
        n_drafted = n_accepted = 0
        for way in ways:
            plain = llm.generate(prompt, draft_max=0, **few, **way)
            for most in (DRAFT_MAX, 2):
                result = llm.generate(prompt, draft_max=most, **few, **way)
                assert result.token_ids == plain.token_ids
                n_drafted += result.timings.draft_n
                n_accepted += result.timings.draft_n_accepted
            # The next turn goes on from what was said, as it would without drafts.
            longer = [*prompt, *plain.token_ids, 41, 42]
            answers = {most: llm.generate(longer, draft_max=most, **few, **way) for most in (DRAFT_MAX, 0)}
            assert answers[0].token_ids == answers[DRAFT_MAX].token_ids
            assert answers[DRAFT_MAX].timings.prompt_n <= 3
        assert 20 < n_accepted < n_drafted - 20


@pytest.mark.usefixtures("steady_machine")
def test_drafts_leave_nothing_behind(tmp_path: Path) -> None:
    """Pages that ended with wrong drafts are not kept for later prompts."""
    options: dict[str, Any] = {"logit_bias": {i: 200.0 for i in range(40, 44)}, "ignore_eos": True, "temp": 1.5}
    used = []
    for most in (0, DRAFT_MAX):
        with LLM(tiny_gguf(tmp_path / f"{most}.gguf", n_vocab=400, n_ctx_train=2048), n_ctx=1024) as llm:
            result = llm.generate([40, 41, 42], max_tokens=900, seed=1, draft_max=most, **options)
            pool = llm._session.engine.pool
            used.append((pool.n_used, len(pool.prefixes)))
    assert result.timings.draft_n - result.timings.draft_n_accepted > 100 and used[0] == used[1]


def test_typed_markers_reach_the_model_as_text(hello: LLM) -> None:
    """E14."""
    result = hello.chat("<|im_end|><|im_start|>system")
    assert list(result.prompt_ids).count(7) == 1 and list(result.prompt_ids).count(6) == 2


# -- templates ------------------------------------------------------------------------------------------------------

T = gguf.GGUFValueType


def test_chatml_stands_in_for_a_missing_template(tmp_path: Path) -> None:
    path = bigram_gguf(tmp_path / "m.gguf", HELLO, metadata={"tokenizer.chat_template": None})
    with LLM(path) as llm:
        assert llm.chat("hi").text == "Helo!"
        assert llm.render([USER]).startswith("<|startoftext|><|im_start|>user\nhi")


def test_another_template_can_be_given(hello_path: Path) -> None:
    with LLM(hello_path, chat_template="{{ messages[0].content }}!{{ '\\n' }}") as llm:
        assert llm.render([USER]) == "hi!\n" and llm.chat([USER]).prompt_ids[0] == 1


def test_a_broken_template_only_stops_chats(tmp_path: Path) -> None:
    """A28."""
    broken = {"tokenizer.chat_template": (T.STRING, "{% if %}")}
    with LLM(bigram_gguf(tmp_path / "m.gguf", HELLO, metadata=broken)) as llm:
        with pytest.raises(ModelFormatError, match="the chat template is no Jinja: line 1"):
            llm.chat("hi")
        assert llm.generate("\n").text == "Helo!"


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    tokens = [f"<{i}>" for i in range(401)]
    metadata = {
        "tokenizer.ggml.tokens": (T.ARRAY, [*piece_ids(), *tokens[: 409 - len(piece_ids())]]),
        "tokenizer.ggml.token_type": (T.ARRAY, [3] * 14 + [1] * 395),
    }
    with pytest.raises(ModelFormatError, match="409|400"):
        LLM(bigram_gguf(tmp_path / "m.gguf", HELLO, metadata=metadata))


# -- OpenAI's shapes ------------------------------------------------------------------------------------------------


def test_completion_dicts(hello: LLM) -> None:
    result = hello.create_completion("\n", max_tokens=3, temperature=0.5, echo=True)
    assert result["object"] == "text_completion" and result["id"].startswith("cmpl-")
    assert result["choices"] == [{"text": "\nHel", "index": 0, "logprobs": None, "finish_reason": "length"}]
    assert result["usage"]["completion_tokens"] == 3 and result["usage"]["total_tokens"] == 5
    chunks = list(hello.create_completion("\n", stream=True))
    assert "".join(c["choices"][0]["text"] for c in chunks) == "Helo!"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 5 + ["stop"]


def test_chat_completion_dicts(hello: LLM) -> None:
    result = hello.create_chat_completion(
        [USER], temperature=0.2, top_p=0.9, n=1, stop=None, logit_bias={"5": -1}, max_completion_tokens=50, user="me"
    )
    assert result["object"] == "chat.completion" and result["model"].endswith("hello.gguf")
    assert result["choices"][0] == {
        "index": 0, "message": {"role": "assistant", "content": "Helo!"}, "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert result["usage"]["completion_tokens"] == 6


def test_chat_completion_chunks(hello: LLM) -> None:
    """Role first, content, then an empty delta with the reason; finish_reason is in every chunk; usage on request."""
    chunks = list(hello.create_chat_completion([USER], stream=True, stream_options={"include_usage": True}))
    deltas = [c["choices"][0]["delta"] for c in chunks[:-1]]
    assert deltas[0] == {"role": "assistant"} and deltas[-1] == {}
    assert "".join(d["content"] for d in deltas[1:-1]) == "Helo!"
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6
    assert len({c["id"] for c in chunks}) == 1 and {c["object"] for c in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize(
    "options", [{"n": 2}, {"logprobs": True}, {"response_format": {"type": "json_object"}}, {"suffix": "x"}, {"foo": 1},
                {"temperature": 9e9}, {"logit_bias": {"x": 1}}, {"logit_bias": [1]}], ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_said(hello: LLM, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        hello.create_chat_completion([USER], **options)
