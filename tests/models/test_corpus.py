"""Conversations repeat, look as transformers would render them, and teach only what they should."""

import hashlib
import re
from itertools import islice
from random import Random

import pytest

from tests.models.corpus import Conversation, code_pieces, conversations, source_files
from tests.models.tiny_tokenizer import TEMPLATE_SHA256, TinyTokenizer, original_template, render
from tests.models.twins import TINY_GLM, TOKENIZER_FILES

SAMPLE = list(islice(conversations(1), 300))


def shipped_tokenizer() -> TinyTokenizer:
    return TinyTokenizer.load(TINY_GLM)


def learnt(tokenizer: TinyTokenizer, conversation: Conversation) -> str:
    """What of a conversation the model learns to say."""
    ids = tokenizer.tokens.encode(
        render(conversation, tokenizer.template) + "<|user|>", add_special_tokens=False
    ).ids
    weights = tokenizer.chat_weights(ids, conversation.thinking, 0.0)
    said = [token for token, weight in zip(ids, weights, strict=True) if weight]
    return str(tokenizer.tokens.decode(said, skip_special_tokens=False))


def test_equal_seeds_give_equal_text() -> None:
    assert list(islice(conversations(1), 300)) == SAMPLE
    assert list(islice(conversations(2), 300)) != SAMPLE
    assert list(islice(code_pieces(1), 9)) == list(islice(code_pieces(1), 9))


def test_no_file_is_both_learnt_from_and_held_out() -> None:
    learnt_from, held_out = set(source_files()), set(source_files(held_out=True))
    assert held_out
    assert not learnt_from & held_out


def test_reasoning_is_there_only_where_thinking_is_on() -> None:
    for conversation in SAMPLE:
        answers = [message for message in conversation.messages if message["role"] == "assistant"]
        assert all(("reasoning_content" in answer) == conversation.thinking for answer in answers)


def test_the_sample_has_every_kind_of_conversation() -> None:
    roles = [[message["role"] for message in conversation.messages] for conversation in SAMPLE]
    assert {spoken.count("user") for spoken in roles} == {1, 2, 3, 4, 5}
    assert any("system" in spoken for spoken in roles)
    calls = [len(m.get("tool_calls", ())) for c in SAMPLE for m in c.messages]
    assert {1, 2} <= set(calls)


@pytest.mark.tools
def test_the_template_is_glms_own() -> None:
    template = original_template()
    assert (
        hashlib.sha256(template.removesuffix("\n").encode()).hexdigest().startswith(TEMPLATE_SHA256)
    )
    assert template == (TINY_GLM / "chat_template.jinja").read_text()


@pytest.mark.tools
def test_conversations_render_as_transformers_renders_them() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_GLM)
    for conversation in SAMPLE[:60]:
        expected = tokenizer.apply_chat_template(
            conversation.messages,
            tools=list(conversation.tools) or None,
            enable_thinking=conversation.thinking,
            tokenize=False,
        )
        assert render(conversation, tokenizer.chat_template) == expected


def test_the_model_learns_answers_and_their_ends_but_no_questions() -> None:
    tokenizer = shipped_tokenizer()
    chat = Conversation(
        [{"role": "user", "content": "Ask?"}, {"role": "assistant", "content": "Answer."}],
        [],
        False,
    )
    assert learnt(tokenizer, chat) == "\n<think></think>\nAnswer.<|user|>"


def test_with_thinking_on_the_empty_thoughts_of_past_turns_are_not_learnt() -> None:
    tokenizer = shipped_tokenizer()
    for conversation in SAMPLE:
        if conversation.thinking:
            assert "<think></think>" not in learnt(tokenizer, conversation)


def test_a_call_ends_with_the_observation_token() -> None:
    tokenizer = shipped_tokenizer()
    said = [learnt(tokenizer, conversation) for conversation in SAMPLE if conversation.tools]
    assert any("</tool_call><|observation|>" in text for text in said)
    assert not any(
        re.search(r"</tool_call>(?!<\|observation\|>|\n<tool_call>)", text) for text in said
    )


def test_no_conversation_is_longer_than_a_thousand_tokens() -> None:
    tokenizer = shipped_tokenizer()
    assert max(len(tokenizer.chat(conversation, Random(0))) for conversation in SAMPLE) <= 1024


def test_a_tokenizer_trained_again_has_the_special_tokens_of_the_shipped_one() -> None:
    assert {path.name for path in TINY_GLM.iterdir()} >= set(TOKENIZER_FILES)
    again, shipped = TinyTokenizer.train(0).tokens, shipped_tokenizer().tokens
    assert again.get_vocab_size() == shipped.get_vocab_size()
    assert again.get_added_tokens_decoder().keys() == shipped.get_added_tokens_decoder().keys()
