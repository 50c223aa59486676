"""What must hold of every chat template: rules over the texts that it makes of the battery's conversations.

Pure: texts in, faults out. Who renders is another module's business.

A conversation is asked for at every place where the model speaks: that is a *prompt*. Where a client stands between two
questions it is asked for without the words that begin an answer: that is the *past*.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from quant.chat.conversations import Conversation, Message

MODES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "on": {"enable_thinking": True},
    "off": {"enable_thinking": False},
}
START, OPEN, CLOSE = "[gMASK]<sop>", "<think>", "</think>"
DIFF_LINES = 30


@dataclass(frozen=True)
class RenderRequest:
    """One text to render."""

    conversation: Conversation
    mode: str
    kind: Literal["prompt", "past"]
    upto: int
    """How many of its messages."""
    thinking: bool | None

    @property
    def name(self) -> str:
        """What a fault calls it."""
        return f"{self.conversation.name}, {self.where}"

    @property
    def where(self) -> str:
        """Which of its conversation's texts it is."""
        return f"thinking {self.mode}, {self.kind} {self.upto}"

    @property
    def messages(self) -> list[Message]:
        """What is rendered."""
        return list(self.conversation.messages[: self.upto])

    @property
    def variables(self) -> dict[str, Any]:
        """What the template gets beside messages and tools."""
        thinking = {} if self.thinking is None else {"enable_thinking": self.thinking}
        return {
            **dict(self.conversation.variables),
            **thinking,
            "add_generation_prompt": self.kind == "prompt",
        }


@dataclass(frozen=True)
class Rendering:
    """What an engine made of an ask: a text, or the words with which it refused."""

    text: str | None
    error: str = ""


Renderings = Mapping[str, Rendering]
"""An engine's, by the names of the asks."""


@dataclass(frozen=True)
class TemplateFault:
    """One rule that one text breaks."""

    rule: str
    conversation: str
    where: str
    detail: str
    diff: str = ""
    engine: str = "jinja"


def list_requests(battery: Iterable[Conversation]) -> tuple[RenderRequest, ...]:
    """Every text that the rules look at."""
    return tuple(ask for conversation in battery for ask in _asks(conversation))


def find_faults(
    battery: Sequence[Conversation], made: Renderings, template: str
) -> Iterator[TemplateFault]:
    """Every rule that the renderings of one template break."""
    glm = "<|observation|>" in template
    for ask in list_requests(battery):
        rendered = made[ask.name]
        if ask.conversation.refused:
            yield from _not_refused(ask, rendered)
        elif rendered.text is None:
            yield TemplateFault("renders", ask.conversation.name, ask.where, rendered.error)
        elif ask.kind == "prompt":
            yield from _text_faults(ask, rendered.text, glm)
    for conversation in battery:
        if not conversation.refused:
            yield from _growth_faults(conversation, made)
            yield from _switch_faults(conversation, made, template)


def find_disagreements(
    engine: str, theirs: Renderings, ours: Renderings, battery: Sequence[Conversation]
) -> Iterator[TemplateFault]:
    """Where another engine makes another text of the same template; only what it rendered is compared."""
    for ask in list_requests(battery):
        if ask.name not in theirs:
            continue
        their, our = theirs[ask.name], ours[ask.name]
        if ask.conversation.refused:
            yield from _not_refused(ask, their, engine)
        elif their.text is None:
            yield TemplateFault(
                "engines agree",
                ask.conversation.name,
                ask.where,
                f"refused: {their.error}",
                engine=engine,
            )
        elif our.text is not None and their.text != our.text:
            yield TemplateFault(
                "engines agree",
                ask.conversation.name,
                ask.where,
                "another text",
                format_diff(our.text, their.text, "jinja", engine),
                engine,
            )


def find_changes(
    original: Renderings, patched: Renderings, battery: Sequence[Conversation], meant: Iterable[str]
) -> Iterator[TemplateFault]:
    """Where a patch changes what no replacement of it says that it changes."""
    allowed = set(meant)
    for ask in list_requests(battery):
        before, after = original[ask.name], patched[ask.name]
        if before != after and ask.conversation.name not in allowed:
            shown = format_diff(
                before.text or before.error, after.text or after.error, "original", "patched"
            )
            yield TemplateFault(
                "as the original",
                ask.conversation.name,
                ask.where,
                "no replacement says that it changes this",
                shown,
            )


def render_alike(found: Iterable[TemplateFault]) -> list[tuple[TemplateFault, int]]:
    """One fault for each rule that a conversation breaks in an engine, and how many texts more break it likewise."""
    known: dict[tuple[str, str, str], list[TemplateFault]] = {}
    for fault in found:
        known.setdefault((fault.rule, fault.engine, fault.conversation), []).append(fault)
    return [(first, len(more)) for first, *more in known.values()]


def format_diff(before: str, after: str, name_before: str, name_after: str) -> str:
    """Two texts line by line, cut when it is long."""
    lines = list(
        difflib.unified_diff(
            before.split("\n"), after.split("\n"), name_before, name_after, lineterm="", n=1
        )
    )
    more = [f"... {len(lines) - DIFF_LINES} lines more"] if len(lines) > DIFF_LINES else []
    return "\n".join([*lines[:DIFF_LINES], *more])


def _asks(conversation: Conversation) -> Iterator[RenderRequest]:
    for mode in ("toggled", "toggled otherwise") if conversation.toggled else MODES:
        for n, upto in enumerate(_prompts(conversation)):
            yield RenderRequest(conversation, mode, "prompt", upto, _thinking(mode, n))
        if not conversation.toggled:
            for upto in _pasts(conversation):
                yield RenderRequest(conversation, mode, "past", upto, _thinking(mode, 0))


def _thinking(mode: str, n: int) -> bool | None:
    if mode.startswith("toggled"):
        return n % 2 == (mode != "toggled")
    return MODES[mode].get("enable_thinking")


def _prompts(conversation: Conversation) -> list[int]:
    """Before each answer, and at the end; of what must be refused only the end."""
    messages = conversation.messages
    before = [n for n, m in enumerate(messages) if n and m["role"] == "assistant"]
    return [len(messages)] if conversation.refused else [*before, len(messages)]


def _pasts(conversation: Conversation) -> list[int]:
    """Behind each answer that a question follows, and at the end."""
    messages = conversation.messages
    between = [
        n
        for n in range(1, len(messages))
        if messages[n]["role"] == "user" and _is_settled(messages[:n])
    ]
    return [] if conversation.refused else [*between, len(messages)]


def _is_settled(messages: Sequence[Message]) -> bool:
    """Whether the last word is an answer that looks the same once a question follows.

    Not so where a template keeps the reasoning until then by design: what is given apart, and all of a tool loop.
    """
    last = messages[-1]
    return (
        last["role"] == "assistant"
        and not last.get("reasoning_content")
        and not _thinks_in_loop(messages)
    )


def _thinks_in_loop(messages: Sequence[Message]) -> bool:
    return any(
        m.get("tool_calls") and collect_reasoning(m)
        for m in messages[_last_question(messages) + 1 :]
    )


def _last_question(messages: Sequence[Message]) -> int:
    return max((n for n, m in enumerate(messages) if m["role"] == "user"), default=-1)


def collect_reasoning(message: Message) -> str:
    """What the model thought before an answer, wherever the client keeps it."""
    if message["role"] != "assistant":
        return ""
    if isinstance(apart := message.get("reasoning_content"), str):
        return apart.strip()
    content = message.get("content")
    if not isinstance(content, str) or CLOSE not in content:
        return ""
    return content.split(CLOSE)[0].split(OPEN)[-1].strip()


def _texts(message: Message) -> list[str]:
    """What was said in a message, without what was thought."""
    content = message.get("content")
    found = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
    if message["role"] == "assistant":
        found = [text.split(CLOSE)[-1] for text in found]
    return [text.strip() for text in found]


def _not_refused(
    ask: RenderRequest, rendered: Rendering, engine: str = "jinja"
) -> Iterator[TemplateFault]:
    wanted = ask.conversation.refused
    if rendered.text is not None or wanted not in rendered.error:
        found = "a text" if rendered.text is not None else repr(rendered.error)
        detail = f"expected the error {wanted!r}, found {found}"
        yield TemplateFault("refuses", ask.conversation.name, ask.where, detail, engine=engine)


def _text_faults(ask: RenderRequest, text: str, glm: bool) -> Iterator[TemplateFault]:
    for rule, details in (
        ("one start", _start_faults(ask, text) if glm else ()),
        ("no None", _none_faults(text)),
        ("tool results", _result_faults(ask, text)),
        ("nothing lost", _lost(ask, text)),
        ("old reasoning", _reasoning_faults(ask, text)),
    ):
        yield from (
            TemplateFault(rule, ask.conversation.name, ask.where, detail) for detail in details
        )


def _start_faults(ask: RenderRequest, text: str) -> Iterator[str]:
    own = sum(t.count(START) for m in ask.messages for t in _texts(m))
    if not text.startswith(START) or text.count(START) != 1 + own:
        yield f"expected {START} once, at the beginning, found it {text.count(START) - own} times"


def _none_faults(text: str) -> Iterator[str]:
    if match := re.search(r"\bNone\b", text):
        yield f"the word None, which nobody said: {text[max(0, match.start() - 40) : match.end() + 40]!r}"


def _result_faults(ask: RenderRequest, text: str) -> Iterator[str]:
    empty = sum(m["role"] == "tool" and not any(_texts(m)) for m in ask.messages)
    if len(re.findall(r"<tool_response>\s*</tool_response>", text)) > empty:
        yield "a tool's result came out empty"
    if re.search(r"""['"]type['"]: ['"]text['"]""", text):
        yield "a typed part came out as source text"


def _lost(ask: RenderRequest, text: str) -> Iterator[str]:
    yield from (
        f"what was said is missing: {said!r}"
        for m in ask.messages
        for said in _texts(m)
        if said not in text
    )


def _reasoning_faults(ask: RenderRequest, text: str) -> Iterator[str]:
    question = _last_question(ask.messages)
    for n, message in enumerate(ask.messages):
        if not (thought := collect_reasoning(message)):
            continue
        if n < question and not _kept_by_wish(ask) and thought in text:
            yield f"reasoning of an answer before the last question came back: {thought!r}"
        if n > question and message.get("tool_calls") and thought not in text:
            yield f"reasoning inside a tool loop is missing: {thought!r}"


def _kept_by_wish(ask: RenderRequest) -> bool:
    """Whether the client asks for past reasoning: newer templates of the family keep it then, older ones do not know."""
    return ("clear_thinking", False) in ask.conversation.variables


def _growth_faults(conversation: Conversation, made: Renderings) -> Iterator[TemplateFault]:
    """Every prompt begins the next, and what a client has so far begins what it sends next."""
    mine = [
        ask
        for ask in _asks(conversation)
        if not conversation.toggled and made[ask.name].text is not None
    ]
    for mode in MODES:
        prompts = {a.upto: a for a in mine if a.mode == mode and a.kind == "prompt"}
        pasts = {a.upto: a for a in mine if a.mode == mode and a.kind == "past"}
        for (_, before), (_, after) in pairwise(sorted(prompts.items())):
            if not (_drops_reasoning(before, after) or _thought_unasked(before, after)):
                yield from _begins("prompts grow", before, after, made)
        for upto, past in pasts.items():
            if upto + 1 in prompts and upto not in prompts:
                yield from _begins("past stays", past, prompts[upto + 1], made)
            if upto in prompts:
                yield from _generation_faults(past, prompts[upto], made)


def _drops_reasoning(before: RenderRequest, after: RenderRequest) -> bool:
    """Whether a question ends a tool loop: its reasoning goes then, by design."""
    asked = any(m["role"] == "user" for m in after.messages[before.upto :])
    return asked and _thinks_in_loop(after.messages[: _last_question(after.messages)])


def _thought_unasked(before: RenderRequest, after: RenderRequest) -> bool:
    """Whether the model thought although it was told not to: then the prompt had closed what stands open in the next."""
    kept = [m for m in after.messages[before.upto :] if m.get("tool_calls") or _kept_by_wish(after)]
    return before.thinking is False and any(map(collect_reasoning, kept))


def _begins(
    rule: str, before: RenderRequest, after: RenderRequest, made: Renderings
) -> Iterator[TemplateFault]:
    # A generation prompt that opens the reasoning (GLM-4.7) is closed once the answer stands in the past, by design.
    beginning = str(made[before.name].text).removesuffix(OPEN)
    whole = str(made[after.name].text)
    if not whole.startswith(beginning):
        shown = format_diff(beginning, whole[: len(beginning)], before.name, after.name)
        yield TemplateFault(
            rule,
            after.conversation.name,
            after.where,
            f"it does not begin with {before.kind} {before.upto}",
            shown,
        )


def _generation_faults(
    past: RenderRequest, prompt: RenderRequest, made: Renderings
) -> Iterator[TemplateFault]:
    before, whole = str(made[past.name].text), str(made[prompt.name].text)
    if not whole.startswith(before) or whole == before:
        yield TemplateFault(
            "generation prompt",
            prompt.conversation.name,
            prompt.where,
            "nothing behind the conversation asks the model for its answer",
        )


def _switch_faults(
    conversation: Conversation, made: Renderings, template: str
) -> Iterator[TemplateFault]:
    if conversation.toggled or not ("<|observation|>" in template or "enable_thinking" in template):
        return
    last = {
        a.mode: made[a.name].text
        for a in _asks(conversation)
        if a.kind == "prompt" and a.upto == len(conversation.messages)
    }
    if None in last.values():
        return
    if last["on"] == last["off"]:
        yield TemplateFault(
            "thinking switch", conversation.name, "thinking", "on and off make the same prompt"
        )
    if last["default"] != last["on"]:
        shown = format_diff(str(last["default"]), str(last["on"]), "default", "on")
        yield TemplateFault(
            "thinking switch",
            conversation.name,
            "thinking",
            "on and the default make different prompts",
            shown,
        )
