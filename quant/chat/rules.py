"""Rules for chat templates: what must hold of the texts that a template makes.

Pure: texts in, faults out. Each rule stands for a client or an engine that broke on a real
template.

renders
    Every conversation that a client may send gets a prompt. ``arguments: null`` crashed GLM-4.6's.
refuses
    Malformed tool calls are refused in the template's own words, not with ``'str' has no 'items'``.
one start
    The start of a prompt occurs once. With BOS twice llama.cpp warns, and models answer worse.
no None
    ``content: null``, which OpenAI's API returns beside tool calls, must not become the word None,
    as Jinja in transformers, vLLM and SGLang writes it.
tool results
    A result as typed parts is neither empty (llama.cpp) nor a Python literal (transformers).
nothing lost
    Every text of the conversation is in the prompt.
old reasoning
    Reasoning of earlier turns is dropped and that of a running tool loop kept, as in training.
prompts grow
    Each prompt begins the next. Otherwise the server's KV cache is lost at every turn.
past stays
    The past begins the next prompt. llama.cpp's ``common_chat_format_single`` (common/chat.cpp)
    sends ``next.substr(past.size())``: it aborts, or cuts the question, if the template rewrites
    the past. This was the bug of the first GLM-4.6 GGUFs: the first turn works, the second breaks.
generation prompt
    A prompt ends with the tokens that begin an answer. Otherwise the model continues the question.
thinking switch
    Reasoning can be switched, and the default is the one of the family.

A rule that needs a fact which the family does not state is not applied.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quant.chat.families import ModelFamily, ReasoningFormat
from quant.chat.messages import Conversation, Message
from quant.chat.renderings import (
    MODES,
    Rendering,
    Renderings,
    RenderRequest,
    collect_reasoning,
    conversation_requests,
    has_loop_reasoning,
    last_question,
    list_requests,
)

DIFF_LINES = 30
CONTEXT_CHARACTERS = 40
_NONE = re.compile(r"\bNone\b")
# Python's repr has single quotes, JSON has double ones.
_TYPED_PART = re.compile(r"""['"]type['"]: ['"]text['"]""")


@dataclass(frozen=True)
class TemplateFault:
    """One rule that one text breaks."""

    rule: str
    conversation: str
    where: str
    detail: str
    diff: str = ""
    engine: str = "jinja"


def find_faults(
    conversations: Sequence[Conversation], renderings: Renderings, family: ModelFamily
) -> Iterator[TemplateFault]:
    """Yield every rule that the renderings of one template break.

    Args:
        conversations: The test conversations of the family.
        renderings: What the engine returned for ``list_requests(conversations)``.
        family: Facts of the model's family.
    """
    for request in list_requests(conversations):
        rendering = renderings[request.name]
        if request.conversation.refused:
            yield from _refusal_faults(request, rendering)
        elif rendering.text is None:
            yield _fault("renders", request, rendering.error)
        elif request.kind == "prompt":
            yield from _text_faults(request, rendering.text, family)
    for conversation in conversations:
        if not conversation.refused:
            yield from _growth_faults(conversation, renderings)
            yield from _switch_faults(conversation, renderings, family.reasoning)


def find_disagreements(
    engine: str, theirs: Renderings, ours: Renderings, conversations: Sequence[Conversation]
) -> Iterator[TemplateFault]:
    """Yield where another engine makes another text of the same template.

    Only what it rendered is compared. The texts are compared whole, byte for byte: one blank more
    or less is another token for the model.
    """
    for request in list_requests(conversations):
        if request.name not in theirs:
            continue
        their, our = theirs[request.name], ours[request.name]
        if request.conversation.refused:
            yield from _refusal_faults(request, their, engine)
        elif their.text is None:
            yield _fault("engines agree", request, f"refused: {their.error}", engine=engine)
        elif our.text is not None and their.text != our.text:
            diff = format_diff(our.text, their.text, "jinja", engine)
            yield _fault("engines agree", request, "different text", diff, engine)


def find_changes(
    original: Renderings,
    patched: Renderings,
    conversations: Sequence[Conversation],
    intended: Iterable[str],
) -> Iterator[TemplateFault]:
    """Yield where a patch changes a conversation that no replacement lists in ``changes``."""
    allowed = set(intended)
    for request in list_requests(conversations):
        before, after = original[request.name], patched[request.name]
        if before != after and request.conversation.name not in allowed:
            texts = before.text or before.error, after.text or after.error
            diff = format_diff(*texts, "original", "patched")
            detail = "changed, but no replacement lists it in `changes`"
            yield _fault("as the original", request, detail, diff)


def group_faults(faults: Iterable[TemplateFault]) -> list[tuple[TemplateFault, int]]:
    """Return the first fault of each rule, engine and conversation, and the number of others."""
    groups: dict[tuple[str, str, str], list[TemplateFault]] = {}
    for fault in faults:
        groups.setdefault((fault.rule, fault.engine, fault.conversation), []).append(fault)
    return [(first, len(others)) for first, *others in groups.values()]


def format_diff(before: str, after: str, name_before: str, name_after: str) -> str:
    """Return a unified diff of two texts, cut after :data:`DIFF_LINES` lines."""
    lines = list(
        difflib.unified_diff(
            before.split("\n"), after.split("\n"), name_before, name_after, lineterm="", n=1
        )
    )
    more = [f"... {len(lines) - DIFF_LINES} more lines"] if len(lines) > DIFF_LINES else []
    return "\n".join([*lines[:DIFF_LINES], *more])


def _fault(
    rule: str, request: RenderRequest, detail: str, diff: str = "", engine: str = "jinja"
) -> TemplateFault:
    return TemplateFault(rule, request.conversation.name, request.where, detail, diff, engine)


def _refusal_faults(
    request: RenderRequest, rendering: Rendering, engine: str = "jinja"
) -> Iterator[TemplateFault]:
    expected = request.conversation.refused
    if rendering.text is not None or expected not in rendering.error:
        actual = "a text" if rendering.text is not None else repr(rendering.error)
        detail = f"expected the error {expected!r}, found {actual}"
        yield _fault("refuses", request, detail, engine=engine)


def _text_faults(request: RenderRequest, text: str, family: ModelFamily) -> Iterator[TemplateFault]:
    for rule, details in (
        ("one start", _start_faults(request, text, family.prompt_start)),
        ("no None", _none_faults(text)),
        ("tool results", _result_faults(request, text, family)),
        ("nothing lost", _missing_texts(request, text)),
        ("old reasoning", _reasoning_faults(request, text, family.reasoning)),
    ):
        yield from (_fault(rule, request, detail) for detail in details)


def _start_faults(request: RenderRequest, text: str, start: str) -> Iterator[str]:
    # A user may quote the tokens; what he wrote does not count.
    quoted = sum(t.count(start) for m in request.messages for t in _spoken_texts(request, m))
    if start and (not text.startswith(start) or text.count(start) != 1 + quoted):
        yield f"expected {start} once, at the start, found it {text.count(start) - quoted} times"


def _none_faults(text: str) -> Iterator[str]:
    # The test conversations never say None, so the template made it.
    if match := _NONE.search(text):
        start, end = max(0, match.start() - CONTEXT_CHARACTERS), match.end() + CONTEXT_CHARACTERS
        yield f"the word None, which no message contains: {text[start:end]!r}"


def _result_faults(request: RenderRequest, text: str, family: ModelFamily) -> Iterator[str]:
    calls = family.tool_calls
    if calls and calls.result_open:
        empty = sum(
            m["role"] == "tool" and not any(_spoken_texts(request, m)) for m in request.messages
        )
        pattern = rf"{re.escape(calls.result_open)}\s*{re.escape(calls.result_close)}"
        if len(re.findall(pattern, text)) > empty:
            yield "a tool's result is empty in the prompt"
    if _TYPED_PART.search(text):
        yield "a typed part is in the prompt as a Python or JSON literal"


def _missing_texts(request: RenderRequest, text: str) -> Iterator[str]:
    yield from (
        f"missing from the prompt: {spoken!r}"
        for message in request.messages
        for spoken in _spoken_texts(request, message)
        if spoken not in text
    )


def _spoken_texts(request: RenderRequest, message: Message) -> list[str]:
    """The texts of a message without its reasoning, stripped: templates may strip blanks."""
    content = message.get("content")
    texts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
    reasoning = request.conversation.reasoning
    if message["role"] == "assistant" and reasoning:
        # Raw reasoning is the template's to drop: "old reasoning" has the rule for it.
        texts = [text.split(reasoning.close)[-1] for text in texts]
    return [text.strip() for text in texts]


def _reasoning_faults(
    request: RenderRequest, text: str, reasoning: ReasoningFormat | None
) -> Iterator[str]:
    if not reasoning or not reasoning.drops_past:
        return
    question = last_question(request.messages)
    for n, message in enumerate(request.messages):
        if not (thought := collect_reasoning(message, reasoning)):
            continue
        if n < question and not _keeps_reasoning(request) and thought in text:
            yield f"reasoning of an answer before the last question is in the prompt: {thought!r}"
        if n > question and message.get("tool_calls") and thought not in text:
            yield f"reasoning inside a tool loop is missing: {thought!r}"


def _keeps_reasoning(request: RenderRequest) -> bool:
    """Whether the client asks for past reasoning. GLM-4.7 keeps it then; GLM-4.6 cannot."""
    reasoning = request.conversation.reasoning
    return bool(reasoning and (reasoning.keep_variable, False) in request.conversation.variables)


def _growth_faults(conversation: Conversation, renderings: Renderings) -> Iterator[TemplateFault]:
    """Each prompt begins the next one, and a past begins the prompt that follows it."""
    if conversation.toggled:
        return
    requests = [
        r for r in conversation_requests(conversation) if renderings[r.name].text is not None
    ]
    for mode in MODES:
        prompts = {r.upto: r for r in requests if r.mode == mode and r.kind == "prompt"}
        pasts = {r.upto: r for r in requests if r.mode == mode and r.kind == "past"}
        for (_, before), (_, after) in pairwise(sorted(prompts.items())):
            if not (_ends_tool_loop(before, after) or _has_unasked_reasoning(before, after)):
                yield from _prefix_faults("prompts grow", before, after, renderings)
        for upto, past in pasts.items():
            # A past before a question begins the prompt after it. At the end, past and prompt have
            # the same messages, and differ by the generation prompt.
            if upto + 1 in prompts and upto not in prompts:
                yield from _prefix_faults("past stays", past, prompts[upto + 1], renderings)
            if upto in prompts:
                yield from _generation_faults(past, prompts[upto], renderings)


def _ends_tool_loop(before: RenderRequest, after: RenderRequest) -> bool:
    """Whether a question ends a tool loop with reasoning, which templates drop then by design."""
    has_question = any(m["role"] == "user" for m in after.messages[before.upto :])
    loop = after.messages[: last_question(after.messages)]
    return has_question and has_loop_reasoning(loop, after.conversation.reasoning)


def _has_unasked_reasoning(before: RenderRequest, after: RenderRequest) -> bool:
    """Whether an answer has reasoning although it was off: the prompt had closed it already."""
    kept = [
        m for m in after.messages[before.upto :] if m.get("tool_calls") or _keeps_reasoning(after)
    ]
    reasoning = after.conversation.reasoning
    return before.thinking is False and any(collect_reasoning(m, reasoning) for m in kept)


def _prefix_faults(
    rule: str, before: RenderRequest, after: RenderRequest, renderings: Renderings
) -> Iterator[TemplateFault]:
    # A generation prompt that opens the reasoning (GLM-4.7) is closed once the answer is in the
    # past, by design.
    reasoning = after.conversation.reasoning
    prefix = str(renderings[before.name].text).removesuffix(reasoning.open if reasoning else "")
    whole = str(renderings[after.name].text)
    if not whole.startswith(prefix):
        diff = format_diff(prefix, whole[: len(prefix)], before.name, after.name)
        yield _fault(rule, after, f"does not begin with {before.kind} {before.upto}", diff)


def _generation_faults(
    past: RenderRequest, prompt: RenderRequest, renderings: Renderings
) -> Iterator[TemplateFault]:
    before, whole = str(renderings[past.name].text), str(renderings[prompt.name].text)
    if not whole.startswith(before) or whole == before:
        yield _fault("generation prompt", prompt, "the rendered prompt has no generation prompt")


def _switch_faults(
    conversation: Conversation, renderings: Renderings, reasoning: ReasoningFormat | None
) -> Iterator[TemplateFault]:
    if conversation.toggled or not reasoning or not reasoning.switch:
        return
    last = {
        r.mode: renderings[r.name].text
        for r in conversation_requests(conversation)
        if r.kind == "prompt" and r.upto == len(conversation.messages)
    }
    if None in last.values():
        return
    where, name = "thinking", conversation.name
    if last["on"] == last["off"]:
        yield TemplateFault("thinking switch", name, where, "on and off render the same prompt")
    if reasoning.on_by_default and last["default"] != last["on"]:
        diff = format_diff(str(last["default"]), str(last["on"]), "default", "on")
        detail = "on and the default render different prompts"
        yield TemplateFault("thinking switch", name, where, detail, diff)
