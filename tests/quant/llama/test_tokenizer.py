"""The tokenizer: llama-tokenize's ids, the same as the bindings' that evaluation reads texts with."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quant.core.errors import InputError, ToolError
from quant.llama import toolchain
from quant.llama.model import LoadedModel
from quant.llama.model_file import ModelFile
from quant.llama.tokenizer import CharacterCounter, Tokenizer
from quant.llama.toolchain import Toolchain
from tests.gguf_files import LLAMA, key, write

Fake = Callable[..., Toolchain]
TEXTS = {
    "empty": "",
    "a conversation": "[gMASK]<sop><|user|>\nHello<|assistant|>\n<think></think>\nHi!",
    "only control tokens": "<|user|><|user|><|endoftext|>",
    "half a control token": "<|user and |>",
    "other scripts": "Grüße, 世界! 🙂\n",
    "an escape that is none": "<|assistant|>\nHi\\n",
    "spaces": "   \t\n\n  x ",
    "a replacement character": "cut \ufffd off",
    "a long word": "a" * 5000,
}
CONTROL_KEYS = [
    *(k for k in LLAMA if k.name != "tokenizer.ggml.tokens"),
    key("tokenizer.ggml.tokens", ["a", "<s>", "", "<u>"]),
    key("tokenizer.ggml.token_type", [1, 3, 3, 3]),
]


@pytest.fixture
def model(tmp_path: Path) -> ModelFile:
    return ModelFile.open(write(tmp_path / "m.gguf", keys=CONTROL_KEYS))


@pytest.fixture(scope="module")
def tokenizer(tiny_glm: ModelFile) -> Tokenizer:
    return Tokenizer(tiny_glm, toolchain.find_toolchain())


@pytest.fixture(scope="module")
def loaded(tiny_glm: ModelFile) -> Iterator[LoadedModel]:
    model = LoadedModel(str(tiny_glm.path), context=64, threads=1)
    yield model
    model.close()


@pytest.mark.tools
@pytest.mark.parametrize("name", TEXTS)
def test_the_bindings_give_the_ids_of_llama_tokenize(
    tokenizer: Tokenizer, loaded: LoadedModel, name: str
) -> None:
    ids = tokenizer.tokenize(TEXTS[name])
    assert loaded.tokenize(TEXTS[name].encode()).tolist() == ids
    assert tokenizer.count(TEXTS[name]) == len(ids)
    assert (len(ids) > 0) == (name != "empty")


@pytest.mark.tools
@pytest.mark.parametrize("text", [b"\xff\xfe", b"a\xc3(b", b"<|user|>\x80", "🙂".encode()[:3]])
def test_bytes_that_are_no_utf8_are_cut_alike(
    tokenizer: Tokenizer, loaded: LoadedModel, tmp_path: Path, text: bytes
) -> None:
    (tmp_path / "text").write_bytes(text)
    options = ("-f", "text", "--ids", "--no-escape", "-lv", "1")
    log = tmp_path / "log"
    tokenizer.tools.run(
        "llama-tokenize", ["-m", tokenizer.file.path, *options], cwd=tmp_path, log=log
    )
    assert log.read_text().splitlines()[-1] == str(loaded.tokenize(text).tolist())


@pytest.mark.tools
def test_a_control_token_is_one_token_and_nothing_is_added(tokenizer: Tokenizer) -> None:
    assert tokenizer.count("<|user|>") == 1
    assert not tokenizer.adds_bos
    vocabulary = tokenizer.file.metadata["tokenizer.ggml.tokens"]
    assert tokenizer.tokenize("<|user|>") == [vocabulary.index("<|user|>")]


@pytest.mark.tools
def test_texts_that_are_counted_together_have_the_counts_of_each(tokenizer: Tokenizer) -> None:
    texts = list(TEXTS.values())
    assert tokenizer.count_each(texts) == tuple(map(tokenizer.count, texts))


def test_no_process_is_started_to_count_no_texts(model: ModelFile, fake_tools: Fake) -> None:
    assert Tokenizer(model, fake_tools(llama_tokenize="exit 1")).count_each(()) == ()


def test_texts_are_separated_by_a_control_token_that_none_of_them_has(
    model: ModelFile, fake_tools: Fake, tmp_path: Path
) -> None:
    tools = fake_tools(
        llama_tokenize=f"cp text {tmp_path}/text; echo 'a warning'; echo '[0, 3, 0]'"
    )
    assert Tokenizer(model, tools).count_each(["a <s>", "b"]) == (1, 1)
    assert (tmp_path / "text").read_text() == "a <s><u>b"
    with pytest.raises(InputError, match=r"m\.gguf: tokenizer: expected a control token that the"):
        Tokenizer(model, tools).count_each(["<s>", "<u>"])


def test_a_separator_that_is_not_one_token_is_an_error(model: ModelFile, fake_tools: Fake) -> None:
    tools = fake_tools(llama_tokenize="echo '[0, 0, 0]'")
    with pytest.raises(InputError, match=r"expected '<s>' to be one token, found something else"):
        Tokenizer(model, tools).count_each(["a", "b"])


def test_the_token_of_the_beginning_is_counted_once(fake_tools: Fake, tmp_path: Path) -> None:
    keys = [k for k in CONTROL_KEYS if k.name != "tokenizer.ggml.add_bos_token"]
    path = write(tmp_path / "m.gguf", keys=[*keys, key("tokenizer.ggml.add_bos_token", True)])
    tokenizer = Tokenizer(ModelFile.open(path), fake_tools(llama_tokenize="echo '[9, 0, 1, 0]'"))
    assert tokenizer.adds_bos
    assert tokenizer.count("a") == 4
    assert tokenizer.count_each(["a", "a"]) == (1, 1)


def test_a_tool_that_prints_no_tokens_is_an_error(model: ModelFile, fake_tools: Fake) -> None:
    tools = fake_tools(llama_tokenize="echo 'nothing of use'")
    with pytest.raises(ToolError, match=r"expected a list of tokens, found \['nothing of use'\]"):
        Tokenizer(model, tools).tokenize("a")


def test_the_digest_changes_with_the_vocabulary_and_the_build_only(
    model: ModelFile, fake_tools: Fake, tmp_path: Path
) -> None:
    digest = Tokenizer(model, fake_tools()).digest
    template = [*CONTROL_KEYS, key("tokenizer.chat_template", "{{ x }}")]
    other = ModelFile.open(write(tmp_path / "template.gguf", keys=template))
    assert Tokenizer(other, fake_tools()).digest == digest
    more = [*CONTROL_KEYS, key("tokenizer.ggml.pre", "glm4")]
    other = ModelFile.open(write(tmp_path / "pre.gguf", keys=more))
    assert Tokenizer(other, fake_tools()).digest != digest
    newer = fake_tools("version: 0.6.0 (build 1, commit abc)")
    assert Tokenizer(model, newer).digest != digest


def test_characters_are_counted_without_a_model() -> None:
    assert CharacterCounter().count_each(["", "ab", "ü🙂"]) == (0, 2, 2)
