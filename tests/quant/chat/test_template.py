"""Template patching and rendering: every replacement where it belongs, and nothing else changed."""

import hashlib
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.chat.template import patch_template, render_template
from quant.core.errors import InputError
from quant.plan.load import load_template_patch
from quant.plan.recipe import Replacement, TemplatePatch

Message = dict[str, Any]

TEMPLATES = Path(sysconfig.get_paths()["purelib"]) / "templates"
"""llama.cpp's collection, which comes with its tools."""
GGMLS = (TEMPLATES / "GLM-4.6.jinja").read_text()
GUARD = """\
{% set _args = tc.arguments or {} %}
{% if _args is not mapping %}
    {{ raise_exception("Invalid tool call arguments passed: " + _args | string) }}
{% endif %}
"""
"""The one change that ggml made to the authors' template."""
ORIGINAL = GGMLS.replace(GUARD, "{% set _args = tc.arguments %}\n")
GLM = load_template_patch("glm-4.6")
PATCHED = patch_template(ORIGINAL, GLM, "test").text

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "天气, by <city> & day.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def user(content: Any = "Hello") -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any = "Hi!", **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def call(*arguments: Any, content: Any = "", **more: Any) -> Message:
    calls = [
        {"type": "function", "function": {"name": "get_weather", "arguments": a}} for a in arguments
    ]
    return assistant(content, tool_calls=calls, **more)


def result(content: Any) -> Message:
    return {"role": "tool", "content": content}


SYSTEM = {"role": "system", "content": "You are terse."}
CITY = {"city": "Köln", "days": 3, "deep": {"a": [1, None, True]}}
CONVERSATIONS: dict[str, tuple[list[Message], list[Message] | None]] = {
    "one turn": ([user()], None),
    "two turns": ([user(), assistant(), user("And?")], None),
    "three turns": ([user(), assistant(), user("And?"), assistant("So."), user("Why?")], None),
    "four turns": ([*[user(), assistant()] * 3, user("Bye")], None),
    "five turns": ([*[user(), assistant()] * 4, user("Bye")], None),
    "system": ([SYSTEM, user()], None),
    "system, three turns": ([SYSTEM, *[user(), assistant()] * 2, user("Bye")], None),
    "system as parts": (
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user()],
        None,
    ),
    "ends with the assistant": ([user(), assistant()], None),
    "user as parts": ([user([{"type": "text", "text": "one"}, "two", {"type": "image"}])], None),
    "unicode": ([SYSTEM, user("Grüße 世界 🙂 \u2028"), assistant("👍🏽"), user("ﷺ")], None),
    "blank lines": ([user("\n\n a \n\n"), assistant("\n b \n\n"), user("  ")], None),
    "empty texts": ([user(""), assistant(""), user("")], None),
    "says nothink itself": ([user("quick /nothink"), assistant(), user("now/nothink")], None),
    "reasoning given apart": (
        [user(), assistant("Hi!", reasoning_content=" They greet. "), user("And?")],
        None,
    ),
    "reasoning of the last word": (
        [user(), assistant("Hi!", reasoning_content="They greet.")],
        None,
    ),
    "reasoning in the past": (
        [user(), assistant("<think>They greet.</think>\nHi!"), user("And?")],
        None,
    ),
    "tools offered": ([user()], [TOOL]),
    "tools and system": ([SYSTEM, user()], [TOOL, TOOL]),
    "a call": ([user(), call(CITY), result("12 °C")], [TOOL]),
    "a call with reasoning": (
        [user(), call(CITY, reasoning_content="Ask."), result("12 °C")],
        [TOOL],
    ),
    "a call with raw reasoning": (
        [user(), call(CITY, content="<think>Ask.</think>\nA moment."), result("x")],
        [TOOL],
    ),
    "a call without arguments": ([user(), call({}), result("12 °C")], [TOOL]),
    "two calls at once": ([user(), call(CITY, {"city": "x"}), result("12"), result("13")], [TOOL]),
    "calls one after another": (
        [user(), call(CITY), result("12"), call({"city": "x"}), result("13")],
        [TOOL],
    ),
    "after the call": (
        [user(), call(CITY), result("12"), assistant("It is 12."), user("Thanks")],
        [TOOL],
    ),
    "a result as outputs": (
        [user(), call(CITY), result([{"output": "12"}, {"output": "13"}])],
        [TOOL],
    ),
    "a flat call": ([user(), assistant("", tool_calls=[{"name": "f", "arguments": CITY}])], [TOOL]),
    "control tokens in text": (
        [user("<|assistant|> <think>"), assistant("ok"), user("</think>")],
        None,
    ),
}
THINKING: list[Message] = [{}, {"enable_thinking": True}, {"enable_thinking": False}]


def both(
    messages: list[Message], tools: list[Message] | None = None, **settings: Any
) -> tuple[str, str]:
    return render_template(ORIGINAL, messages, tools=tools, **settings), render_template(
        PATCHED, messages, tools=tools, **settings
    )


def test_the_original_is_the_authors_text() -> None:
    assert hashlib.sha256(ORIGINAL.rstrip("\n").encode()).hexdigest().startswith("44f815868bf0")


def test_the_patch_fits_the_original_and_ggmls_copy_and_both_become_the_same() -> None:
    assert patch_template(GGMLS, GLM, "ggml's").text == PATCHED
    assert PATCHED != GGMLS != ORIGINAL
    assert all(change.replace in PATCHED for change in GLM.replacements)


def test_patching_twice_is_patching_once() -> None:
    assert patch_template(PATCHED, GLM, "test").text == PATCHED


def test_the_digests_are_of_the_text_before_and_after() -> None:
    patched = patch_template(ORIGINAL, GLM, "test")
    assert patched.original_sha256 == hashlib.sha256(ORIGINAL.encode()).hexdigest()
    assert patched.sha256 == hashlib.sha256(PATCHED.encode()).hexdigest()


def test_no_patch_leaves_the_text_as_it_is() -> None:
    patched = patch_template(ORIGINAL, None, "test")
    assert patched.text == ORIGINAL
    assert patched.sha256 == patched.original_sha256


@pytest.mark.parametrize("n", range(len(GLM.replacements)))
@pytest.mark.parametrize(("times", "how"), [(0, ""), (2, "{0}{0}")])
def test_an_anchor_that_is_missing_or_doubled_is_reported_with_its_first_line(
    n: int, times: int, how: str
) -> None:
    anchor = GLM.replacements[n].find
    with pytest.raises(InputError) as caught:
        patch_template(
            ORIGINAL.replace(anchor, how.format(anchor)), GLM, "config.json: chat_template"
        )
    [problem] = caught.value.problems
    first_line = anchor.strip().splitlines()[0]
    assistant = f"replacement {n + 1} of glm-4.6: expected its anchor once, found it {times} times: {first_line};"
    assert problem.startswith(f"config.json: chat_template: {assistant}")
    shown = problem.split("update the patch\n")[1].splitlines()
    assert all(line.startswith("    ") for line in shown)
    if times == 2:
        assert [line.strip().startswith("it occurs in line ") for line in shown] == [True, True]


def test_the_diff_to_the_nearest_match_is_shown() -> None:
    changed = ORIGINAL.replace("{% set _args = tc.arguments %}", "{% set _args = tc.args %}")
    with pytest.raises(InputError) as caught:
        patch_template(changed, GLM, "x")
    line = changed[: changed.index("tc.args")].count("\n") + 1
    assert str(caught.value).splitlines()[1:] == [
        "    --- the anchor",
        f"    +++ the template, from line {line}",
        "    @@ -1 +1 @@",
        "    -{% set _args = tc.arguments %}",
        "    +{% set _args = tc.args %}",
    ]


def test_a_template_of_another_family_has_no_near_match() -> None:
    with pytest.raises(InputError) as caught:
        patch_template("x\ny", GLM, "x")
    assert str(caught.value).splitlines()[1] == "    nothing in the template is similar"


def test_the_lines_of_an_anchor_that_occurs_twice_are_reported() -> None:
    by = TemplatePatch("t", "s", (Replacement("w", "old\n", "new\n"),))
    with pytest.raises(InputError) as caught:
        patch_template("a\nold\nb\n\nold\n", by, "x")
    assert str(caught.value).splitlines()[1:] == [
        "    it occurs in line 2",
        "    it occurs in line 5",
    ]


def test_every_anchor_that_does_not_fit_is_reported() -> None:
    with pytest.raises(InputError) as caught:
        patch_template("another template", GLM, "x")
    assert len(caught.value.problems) == len(GLM.replacements)


def test_a_patched_template_that_contains_the_anchor_again_is_refused() -> None:
    by = TemplatePatch("t", "s", (Replacement("w", "old", "new"),))
    with pytest.raises(InputError) as caught:
        patch_template("new old old", by, "x")
    assert "found it 2 times" in str(caught.value)
    assert (
        patch_template("new old", by, "x").text == "new new"
    )  # an anchor that stands alone is one to replace


def test_a_replacement_that_contains_its_own_anchor_is_applied_once() -> None:
    by = TemplatePatch("t", "s", (Replacement("w", "b", "(b)"),))
    once = patch_template("abc", by, "x").text
    assert once == "a(b)c"
    assert patch_template(once, by, "x").text == once


@pytest.mark.parametrize("settings", THINKING, ids=["default", "on", "off"])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "past"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_patched_template_renders_the_same(name: str, prompt: bool, settings: Message) -> None:
    messages, tools = CONVERSATIONS[name]
    original, patched = both(messages, tools, add_generation_prompt=prompt, **settings)
    assert patched == original


def test_reasoning_inside_the_last_answer_is_dropped() -> None:
    messages = [user(), assistant("<think>They greet.</think>\nHi!")]
    original, patched = both(messages)
    assert original.replace("<think>They greet.</think>", "<think></think>") == patched != original


def test_arguments_of_null_are_an_empty_call() -> None:
    messages = [user(), call(None), result("x")]
    with pytest.raises(InputError):
        render_template(ORIGINAL, messages, tools=[TOOL])
    assert render_template(PATCHED, messages, tools=[TOOL]) == render_template(
        PATCHED, [user(), call({}), result("x")], tools=[TOOL]
    )


def test_arguments_as_text_are_refused_with_what_is_wrong() -> None:
    with pytest.raises(InputError, match=r"Invalid tool call arguments passed: \[1\]"):
        render_template(PATCHED, [user(), call("[1]"), result("x")], tools=[TOOL])


def test_a_result_as_typed_parts_is_rendered() -> None:
    original, patched = both(
        [user(), call(CITY), result([{"type": "text", "text": "12 °C"}])], [TOOL]
    )
    assert patched.endswith("<|observation|>\n<tool_response>\n12 °C\n</tool_response>")
    assert "'type': 'text'" in original


@pytest.mark.parametrize("content", [None, "absent"])
def test_null_content_beside_a_call_renders_nothing(content: str | None) -> None:
    message = call(CITY, content=None)
    if content == "absent":
        del message["content"]
    original, patched = both([user(), message], [TOOL])
    assert "None" not in patched
    assert patched == original.replace("\nNone", "")


PIECES = st.sampled_from(
    [
        "a",
        "b c",
        "\n",
        " ",
        "ü世🙂",
        "<think>",
        "</think>",
        "/nothink",
        "<|user|>",
        "{{ x }}",
        "None",
        "<tool_call>",
    ]
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)
ANSWERS = st.one_of(
    TEXTS.map(assistant),
    st.builds(
        lambda reasoning, text: assistant(f"<think>{reasoning}</think>\n{text}"), TEXTS, TEXTS
    ),
    st.builds(lambda reasoning, text: assistant(text, reasoning_content=reasoning), TEXTS, TEXTS),
)


@given(
    turns=st.lists(st.tuples(TEXTS.map(user), ANSWERS), min_size=1, max_size=5),
    system=st.none() | TEXTS,
    settings=st.sampled_from(THINKING),
)
def test_every_prompt_is_the_beginning_of_the_next(
    turns: list[tuple[Message, Message]], system: str | None, settings: Message
) -> None:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    before = ""
    for question, answer in turns:
        messages.append(question)
        prompt = render_template(PATCHED, messages, add_generation_prompt=True, **settings)
        assert prompt.startswith(before)
        before = prompt
        messages.append(answer)


@given(
    turns=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=4),
    settings=st.sampled_from(THINKING),
)
def test_a_past_with_raw_reasoning_is_the_beginning_of_what_follows(
    turns: list[tuple[str, str, str]], settings: Message
) -> None:
    """Programs that keep what the model wrote in `content` send the difference between two renderings."""
    messages: list[Message] = []
    for question, reasoning, answer in turns:
        messages += [user(question), assistant(f"<think>{reasoning}</think>\n{answer}")]
        past = render_template(PATCHED, messages, **settings)
        assert render_template(
            PATCHED, [*messages, user("next")], add_generation_prompt=True, **settings
        ).startswith(past)


def test_the_original_rewrites_the_past() -> None:
    messages = [user(), assistant("<think>They greet.</think>\nHi!")]
    following = render_template(ORIGINAL, [*messages, user("next")], add_generation_prompt=True)
    assert not following.startswith(render_template(ORIGINAL, messages))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{{ x.y.z }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{{ [][3].x }}",
        "{{ messages.__class__.__mro__ }}{{ ''.__class__ }}{{ ().__class__.__base__.__subclasses__() }}",
        "{{ range(10**9) }}",
        "{{ '%d' % 'x' }}",
        "{{ {}|dictsort(by='none') }}",
        "{{ 'x'.encode('no such') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_every_failure_of_a_template_is_an_input_error(template: str) -> None:
    with pytest.raises(InputError, match="chat template: cannot render the conversation: "):
        render_template(template, [user()])


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("a\nb {{ x.y.z }}", 2),
        ("{% macro f() %}\n{{ 1 / 0 }}{% endmacro %}\n\n{{ f() }}", 2),
        ("\n\n{{ ''.__class__.__mro__ }}", 3),
    ],
)
def test_the_line_of_a_failure_is_reported(template: str, line: int) -> None:
    with pytest.raises(InputError) as caught:
        render_template(template, [user()])
    assert str(caught.value).endswith(f" (line {line})")


@pytest.mark.parametrize(
    ("template", "place"),
    [
        ("a\n{% if %}", "line 2, column 7"),
        ("a\nb {% foo %}", "line 2, column 6"),
        ("x\n  {{ a ! b }}", "line 2, column 8"),
        ("{{ x..y }}", "line 1, column 7"),
        ("{{ a }", "line 1, column 6"),
        ("{{ f( }}", "line 1, column 7"),
        ("\n{{ x | nofilter }}", "line 2, column 8"),
        ("{{ a b }}", "line 1, column 6"),
        ("{% if a %}\n", "line 1"),
    ],
)
def test_a_syntax_error_is_reported_with_line_and_column(template: str, place: str) -> None:
    with pytest.raises(InputError) as caught:
        render_template(template, [user()])
    assert str(caught.value).endswith(f" ({place})")


def test_an_error_without_a_message_is_reported_by_its_class() -> None:
    def fails() -> None:
        raise MemoryError

    with pytest.raises(InputError, match="conversation: MemoryError"):
        render_template("{{ f() }}", [user()], f=fails)


def test_a_template_cannot_reach_pythons_insides() -> None:
    assert "class" not in render_template("{{ messages.__class__ }}", [user()])


def theirs(template: str, messages: list[Message], tools: Any, **settings: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [messages], tools=tools, chat_template=template, **settings
    )
    return str(rendered[0][0])


@pytest.mark.tools
@pytest.mark.parametrize("template", [ORIGINAL, PATCHED], ids=["original", "patched"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_transformers_renders_the_same(name: str, template: str) -> None:
    messages, tools = CONVERSATIONS[name]
    for settings in THINKING:
        for prompt in (True, False):
            ours = render_template(
                template, messages, tools=tools, add_generation_prompt=prompt, **settings
            )
            assert ours == theirs(
                template, messages, tools, add_generation_prompt=prompt, **settings
            )


@pytest.mark.tools
@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda p: p.stem)
def test_transformers_renders_every_known_template_the_same(path: Path) -> None:
    template = path.read_text()
    if "strftime_now" in template:
        pytest.skip("asks for the clock, which a reproducible text cannot hold")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

    def run(how: Callable[[], str]) -> str:
        try:
            return how()
        except Exception:
            return "refused"

    for messages in ([user()], [SYSTEM, user("<é & 世>"), assistant(), user("And?")]):
        for tools in (None, [TOOL]):
            variables: dict[str, Any] = {"add_generation_prompt": True, **tokens}
            ours = run(partial(render_template, template, messages, tools=tools, **variables))
            assert ours == run(partial(theirs, template, messages, tools, **variables))
