"""Patch a chat template by exact replacements, and render conversations with one.

Pure: text in, text out. Every anchor of a patch must occur exactly once, so a template that its authors have changed
stops the work instead of being patched half.
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
from quant.core.format import hash_text
from quant.errors import InputError, raise_problems
from quant.plan.recipe import TemplatePatch


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template as it goes into the files, and what it was before."""

    text: str
    original_sha256: str
    by: TemplatePatch | None = None
    """The patch that was made, if one was."""
    waived: tuple[str, ...] = ()
    """Conversations of the battery that come out wrong, and may."""

    @property
    def sha256(self) -> str:
        """Of the text, in UTF-8, as it stands."""
        return hash_text(self.text)


def patch_template(text: str, by: TemplatePatch | None, where: str) -> ChatTemplate:
    """The template with every replacement made; ``where`` names it in errors.

    A replacement that stands already (its result occurs once, its anchor does not) is left alone, so patching twice
    is patching once. Raises InputError with every anchor that does not occur exactly once.
    """
    problems, patched = [], text
    for n, change in enumerate(by.replacements if by else ()):
        # TOML's literal strings begin with a newline that it drops and end with one that it keeps: both are lines.
        found, done = patched.count(change.find), patched.count(change.replace)
        if done == 1 and found == change.replace.count(change.find):
            continue
        if found != 1:
            first_line = change.find.strip().splitlines()[0]
            problems.append(
                f"{where}: replacement {n + 1} of {by.name if by else ''}: expected its anchor once, found it"
                f" {found} times: {first_line}; the template was changed upstream, so compare it and mend the patch\n"
                + show_nearest_matches(
                    text if text.count(change.find) != 1 else patched, change.find
                )
            )
            continue
        patched = patched.replace(change.find, change.replace)
    raise_problems(problems)
    return ChatTemplate(patched, hash_text(text), by)


def render_template(
    template: str,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """What the model reads for a conversation, by the rules of transformers' ``apply_chat_template``.

    Raises InputError when the template refuses the conversation.
    """
    try:
        return _compiled(template).render(
            messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )
    except (
        Exception
    ) as e:  # a template is a program of strangers: it can fail in every way that Python knows
        said = str(e) or type(e).__name__
        raise InputError(
            f"chat template: cannot render the conversation: {said}{_at(e, template)}"
        ) from e


def _at(error: Exception, template: str) -> str:
    """The line of the template at which it failed, if Jinja knows it; of what cannot be parsed the column too."""
    if isinstance(error, TemplateSyntaxError):
        column = _column(error, template)
        return f" (line {error.lineno}{f', column {column}' if column else ''})"
    lines = [
        f.lineno
        for f in traceback.extract_tb(error.__traceback__)
        if f.filename in ("<template>", "<unknown>")
    ]
    return f" (line {lines[-1]})" if lines else ""


def _column(error: TemplateSyntaxError, template: str) -> int | None:
    """Where on its line the word stands that the parser stumbled over: Jinja tells the line only."""
    if match := re.search(
        r" at (\d+)$", str(error.message)
    ):  # its reader of words counts letters from the beginning
        return int(match[1]) - template.rfind("\n", 0, int(match[1]))
    named = re.search(
        r"(?:unknown tag|filter named|test named|^unexpected) '(.+?)'", str(error.message)
    )
    word = named[1] if named else _stumbled(template, error.lineno)
    lines = template.splitlines()
    line = lines[error.lineno - 1] if 0 < error.lineno <= len(lines) else ""
    return line.index(word) + 1 if word and word in line else None


def _stumbled(template: str, line: int) -> str:
    """The word at which parsing ends, if it stands in that line."""
    try:
        parser = Parser(_environment(), template)
        parser.parse()
    except TemplateError:
        current = parser.stream.current
        return str(current.value) if current.lineno == line else ""
    return ""


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up: blocks trimmed, sandboxed, `tojson` without HTML escapes."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    env.filters["tojson"] = lambda value, **kw: json.dumps(value, **{"ensure_ascii": False, **kw})
    env.globals["raise_exception"] = _raise
    return env


class _Generation(Extension):
    """``{% generation %}``, with which a template marks the assistant's words for training: rendered as they stand."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way to say it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


def _raise(message: str) -> None:
    raise TemplateError(message)
