"""Patch a chat template by exact replacements, and render conversations with a template.

Pure: text in, text out. Every anchor of a patch must occur exactly once. If the authors change
their template, the patch stops the work instead of being half applied.
"""

import json
import re
import traceback
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quant.chat.patch_hints import show_nearest_matches
from quant.core.errors import InputError, raise_problems
from quant.core.format import hash_text
from quant.plan.recipe import TemplatePatch

_OFFSET = re.compile(r" at (\d+)$")
_QUOTED_WORD = re.compile(r"(?:unknown tag|filter named|test named|^unexpected) '(.+?)'")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template as it goes into the files, and what it was before."""

    text: str
    original_sha256: str
    by: TemplatePatch | None = None
    """The patch that was applied, if any."""
    waived: tuple[str, ...] = ()
    """Test conversations that fail, and may."""

    @property
    def sha256(self) -> str:
        """The sha256 of the text in UTF-8."""
        return hash_text(self.text)


def patch_template(text: str, patch: TemplatePatch | None, source: str) -> ChatTemplate:
    """Return the template with every replacement applied.

    A replacement that has been applied before (its result occurs once, its anchor does not) is
    skipped, so patching twice is patching once.

    Args:
        text: The template.
        patch: The replacements; None leaves the text as it is.
        source: The template's name in errors.

    Raises:
        InputError: Anchors do not occur exactly once. Each is named with its nearest match.
    """
    problems, patched = [], text
    for n, change in enumerate(patch.replacements if patch else ()):
        # An anchor is whole lines: TOML's literal strings drop the newline that they begin with
        # and keep the one that they end with.
        count, results = patched.count(change.find), patched.count(change.replace)
        # A result may contain its own anchor ("b" -> "(b)"); those occurrences are no anchors.
        if results == 1 and count == change.replace.count(change.find):
            continue
        if count != 1:
            first_line = change.find.strip().splitlines()[0]
            # If the authors' text has the anchor, an earlier replacement changed it: the hint
            # has to show the text after that one.
            searched = text if text.count(change.find) != 1 else patched
            problems.append(
                f"{source}: replacement {n + 1} of {patch.name if patch else ''}: expected its"
                f" anchor once, found it {count} times: {first_line}; the template was changed"
                " upstream, so compare it and update the patch\n"
                + show_nearest_matches(searched, change.find)
            )
            continue
        patched = patched.replace(change.find, change.replace)
    raise_problems(problems)
    return ChatTemplate(patched, hash_text(text), patch)


def render_template(
    template: str,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """Return the prompt of a conversation, by the rules of transformers' ``apply_chat_template``.

    Raises:
        InputError: The template refuses the conversation, or fails.
    """
    try:
        return _compile(template).render(
            messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )
    except Exception as e:  # a template can fail in every way that Python has
        reason = str(e) or type(e).__name__
        raise InputError(
            f"chat template: cannot render the conversation: {reason}{_describe_place(e, template)}"
        ) from e


def _describe_place(error: Exception, template: str) -> str:
    """The line of the template at which it failed; for syntax errors the column too."""
    if isinstance(error, TemplateSyntaxError):
        column = _find_column(error, template)
        return f" (line {error.lineno}{f', column {column}' if column else ''})"
    # Jinja compiles a template to Python whose frames have the template's line numbers.
    lines = [
        f.lineno
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename in ("<template>", "<unknown>")
    ]
    return f" (line {lines[-1]})" if lines else ""


def _find_column(error: TemplateSyntaxError, template: str) -> int | None:
    """The column of a syntax error. Jinja gives the line only, so it is derived from the message.

    Jinja's lexer names the offset from the beginning; its parser names the word, or nothing.
    """
    if match := _OFFSET.search(str(error.message)):
        return int(match[1]) - template.rfind("\n", 0, int(match[1]))
    quoted = _QUOTED_WORD.search(str(error.message))
    word = quoted[1] if quoted else _find_unparsed_word(template, error.lineno)
    lines = template.splitlines()
    line = lines[error.lineno - 1] if 0 < error.lineno <= len(lines) else ""
    return line.index(word) + 1 if word and word in line else None


def _find_unparsed_word(template: str, line: int) -> str:
    """The word at which parsing ends, if it is in that line."""
    try:
        parser = Parser(_environment(), template)
        parser.parse()
    except TemplateError:
        current = parser.stream.current
        return str(current.value) if current.lineno == line else ""
    return ""


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up (``_compile_jinja_template`` in chat_template_utils.py).

    Blocks are trimmed, ``tojson`` escapes neither HTML nor Unicode, and a template may call
    ``raise_exception``. transformers' ``strftime_now`` is left out: a prompt with today's date is
    not reproducible.
    """
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    env.filters["tojson"] = lambda value, **kw: json.dumps(value, **{"ensure_ascii": False, **kw})
    env.globals["raise_exception"] = _raise
    return env


class _Generation(Extension):
    """``{% generation %}``, which marks the assistant's text for training: rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares the attribute as a plain set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        # A scope, because transformers' CallBlock is one too: what a template sets inside does not
        # change the variable outside.
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


def _raise(message: str) -> None:
    raise TemplateError(message)
