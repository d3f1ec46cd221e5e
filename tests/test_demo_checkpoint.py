"""The demonstration checkpoint is what it says: a real LFM2 directory, small, with LFM2's tokenizer and a template."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from bench.demo_text import training_chat
from bench.demo_tokenizer import BOS, IM_END, LFM2_SPLIT, SPECIAL_TOKENS, ChatEncoder, train_tokenizer
from lfm2cpp.text.template import ChatTemplate

DEMO = Path(__file__).resolve().parents[1] / "lfm2cpp" / "demo"
MODEL = DEMO / "model"
MAX_BYTES = 10_000_000


def read(name: str) -> dict:
    return json.loads((MODEL / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_size() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.name for path in MODEL.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_shape() -> None:
    config = read("config.json")
    assert config["architectures"] == ["Lfm2ForCausalLM"] and config["model_type"] == "lfm2"
    assert set(config["layer_types"]) == {"conv", "full_attention"}
    assert config["hidden_size"] % 256 == 0
    assert config["hidden_size"] // config["num_attention_heads"] == 64
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["norm_eps"] == 1e-5 and config["rope_parameters"]["rope_theta"] == 1e6
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 7, 0)


def test_weights_are_bf16_and_finite() -> None:
    config = read("config.json")
    with safe_open(MODEL / "model.safetensors", "numpy") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
        width = file.get_slice("model.layers.0.feed_forward.w1.weight").get_shape()[0]
        rows = file.get_slice("model.embed_tokens.weight").get_shape()[0]
    assert width % 256 == 0 and width != config["intermediate_size"]  # written before the adjustment, as LFM2 does
    assert rows == config["vocab_size"] and "lm_head.weight" not in names
    data = (MODEL / "model.safetensors").read_bytes()
    bits = np.frombuffer(data[8 + int.from_bytes(data[:8], "little") :], "<u2")
    assert np.all(bits & 0x7F80 != 0x7F80)


def test_tokenizer_is_lfm2_s_kind(tokenizer: Tokenizer) -> None:
    settings = read("tokenizer.json")
    assert [tokenizer.token_to_id(text) for text in SPECIAL_TOKENS] == list(range(14))
    assert settings["model"]["ignore_merges"] is True
    assert settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == LFM2_SPLIT
    assert tokenizer.get_vocab_size() < read("config.json")["vocab_size"]  # so that there are padding rows
    assert tokenizer.encode("1234567890", add_special_tokens=False).tokens == list("1234567890")
    assert not [piece for piece in tokenizer.get_vocab() if re.search(r"\d\d", piece)]


@pytest.mark.parametrize("text", ["What is 23 + 45?", "\0\x80\u00e9\u65e5\U0001f600 \r\n\t x", " ", "<|im_end|>'S"])
def test_tokenizer_keeps_every_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.ids[0] == BOS
    assert tokenizer.decode(ids.ids[1:], skip_special_tokens=False) == text


def test_tokenizer_can_be_trained_again(tokenizer: Tokenizer) -> None:
    rng = Random("tokenizer-0")
    chats = (training_chat(rng, 10) for _ in range(4000))
    again = train_tokenizer((m["content"] for chat in chats for m in chat), tokenizer.get_vocab_size())
    assert again.get_vocab() == tokenizer.get_vocab()


def test_template_is_in_the_tokenizer_config_and_is_what_was_trained(tokenizer: Tokenizer) -> None:
    config = read("tokenizer_config.json")
    assert "{%- generation -%}" in config["chat_template"]
    template = ChatTemplate(
        config["chat_template"], label="demo", special_pieces=tuple(SPECIAL_TOKENS),
        token_names={"bos_token": config["bos_token"]},
    )  # fmt: skip
    rng = Random(5)
    for _ in range(20):
        chat = training_chat(rng, 4)
        for answer_next in (False, True):
            text = template.render(chat, add_generation_prompt=answer_next).text
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert ids == ChatEncoder(tokenizer).encode(chat, answer_next=answer_next)[0]
            assert ids.count(BOS) == 1


def test_mask_covers_the_answers(tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "23 + 45"}, {"role": "assistant", "content": "68"}]
    ids, mask = ChatEncoder(tokenizer).encode(chat)
    wanted = [token for token, learnt in zip(ids, mask, strict=True) if learnt]
    assert wanted == [*tokenizer.encode("68", add_special_tokens=False).ids, IM_END]


def test_transformers_agrees(tokenizer: Tokenizer) -> None:
    """Its own template engine, and its own logits now."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs = transformers.AutoTokenizer.from_pretrained(MODEL)
    chat = [*training_chat(Random(1), 3), {"role": "user", "content": "What is 23 + 45?"}]
    made = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert made == ChatEncoder(tokenizer).encode(chat, answer_next=True)[0]
    masked = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert list(masked["assistant_masks"]) == ChatEncoder(tokenizer).encode(chat)[1]
    model = transformers.Lfm2ForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    with np.load(DEMO / "expected_logits.npz") as stored, torch.no_grad():
        logits = model(torch.tensor(stored["ids_0"][None].astype(np.int64))).logits[0].numpy()
        expected = stored["logits_0"]
    assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected)
