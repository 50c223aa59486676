"""The tiny model's tokenizer: byte-level BPE cut as GLM-4 cuts its text, with GLM's special tokens and chat template."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.models.corpus import Conversation, code_pieces, conversations

VOCABULARY = 4096
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = """
<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|>
<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|> <|begin_of_audio|> <|end_of_audio|>
<|begin_of_transcription|> <|end_of_transcription|> <|code_prefix|> <|code_middle|> <|code_suffix|> /nothink
""".split()
TAGS = """
<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <arg_key> </arg_key> <arg_value> </arg_value>
<|begin_of_box|> <|end_of_box|> <|image|> <|video|>
""".split()
TEMPLATE_SHA256 = "44f815868bf0"
"""How the digest of GLM-4.6's chat template begins, its last newline left out."""


@dataclass(frozen=True)
class Text:
    """Token ids, and how much each counts in the loss."""

    ids: list[int]
    weights: list[float]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Text":
        return Text(self.ids[part], self.weights[part])


@dataclass(frozen=True)
class TinyTokenizer:
    """Turns conversations and code into token ids."""

    tokens: Tokenizer
    template: str

    @classmethod
    def train(cls, seed: int, vocabulary: int = VOCABULARY) -> "TinyTokenizer":
        """A vocabulary of that many tokens, learnt from conversations and, less, from code."""
        tokens = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokens.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokens.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary - len(SPECIAL) - len(TAGS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokens.train_from_iterator(training_text(seed), trainer)
        tokens.add_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
        tokens.add_tokens([AddedToken(token, normalized=False, special=False) for token in TAGS])
        assert tokens.get_vocab_size() == vocabulary
        return cls(tokens, original_template())

    @classmethod
    def load(cls, folder: Path) -> "TinyTokenizer":
        """What ``save`` wrote."""
        template = (folder / "chat_template.jinja").read_text()
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")), template)

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return int(self.tokens.get_vocab_size())

    def id(self, token: str) -> int:
        """The number of one token."""
        number = self.tokens.token_to_id(token)
        assert number is not None, token
        return number

    def plain(self, text: str) -> Text:
        """Text as it stands, each token weighing one."""
        ids = self.tokens.encode(text, add_special_tokens=False).ids
        return Text(ids, [1.0] * len(ids))

    def chat(self, conversation: Conversation, rng: Random) -> Text:
        """A conversation as the template renders it, ended the way the next turn or the end of the text would."""
        end = "<|user|>" if rng.random() < 0.6 else "<|endoftext|>"
        ids = self.tokens.encode(
            render(conversation, self.template) + end, add_special_tokens=False
        ).ids
        return Text(
            ids, self.chat_weights(ids, conversation.thinking, 0.2 if rng.random() < 0.35 else 0.0)
        )

    def chat_weights(self, ids: list[int], thinking: bool, others: float) -> list[float]:
        """One for what the assistant says and for the token that ends it, ``others`` for the rest.

        The empty thoughts that the template puts into past turns count nothing when thinking is on:
        the model must not learn to say them.
        """
        user, assistant, thought = (
            self.id("<|user|>"),
            self.id("<|assistant|>"),
            self.id("</think>"),
        )
        roles = {
            user,
            assistant,
            self.id("<|observation|>"),
            self.id("<|system|>"),
            self.id("<|endoftext|>"),
        }
        last_user = max(index for index, token in enumerate(ids[:-1]) if token == user)
        weights, speaking, emptied = [], False, False
        for index, token in enumerate(ids):
            weights.append(0.0 if emptied else 1.0 if speaking else others)
            if token in roles:
                speaking = token == assistant
                emptied = speaking and thinking and index < last_user
            elif token == thought:
                emptied = False
        return weights

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
        self.tokens.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(self.template)
        config = {
            "additional_special_tokens": [token for token in SPECIAL if token != "/nothink"],
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 4096,
            "padding_side": "left",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def training_text(seed: int) -> Iterator[str]:
    """What the vocabulary is learnt from: rendered conversations without their special tokens, and code."""
    template = original_template()
    for conversation in islice(conversations(seed + 5), 16_000):
        text = render(conversation, template)
        for mark in SPECIAL + TAGS:
            text = text.replace(mark, "\0")
        yield from text.split("\0")
    yield from islice(code_pieces(seed + 6), 800)


def render(conversation: Conversation, template: str) -> str:
    """The conversation as transformers would render it with this template."""
    return compiled(template).render(
        messages=conversation.messages,
        tools=conversation.tools or None,
        enable_thinking=conversation.thinking,
        add_generation_prompt=False,
    )


COMPILED: dict[str, jinja2.Template] = {}


def compiled(template: str) -> jinja2.Template:
    """The template, parsed once, in an environment set up as transformers does it."""
    if template not in COMPILED:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = tojson
        COMPILED[template] = environment.from_string(template)
    return COMPILED[template]


def tojson(value: Any, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii)


def original_template() -> str:
    """GLM-4.6's own chat template: ggml's copy, which the environment carries, with its one change undone."""
    text = Path(sysconfig.get_path("purelib"), "templates", "GLM-4.6.jinja").read_text()
    head, tail = "{% set _args = tc.arguments or {} %}\n", "{% for k, v in _args.items() %}"
    start, end = text.index(head), text.index(tail)
    text = f"{text[:start]}{{% set _args = tc.arguments %}}\n{text[end:]}"
    digest = hashlib.sha256(text.removesuffix("\n").encode()).hexdigest()
    if not digest.startswith(TEMPLATE_SHA256):
        raise SystemExit(f"the chat template is not GLM-4.6's: sha256 {digest}")
    return text
