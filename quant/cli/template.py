"""The commands about chat templates: patch one, render a conversation with one, check one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quant.cli import progress
from quant.cli.options import FILE, collect_options, json_option, quant, tools_option

if TYPE_CHECKING:
    from quant.chat.check import TemplateReport, TemplateUnderTest

patch_option = click.option(
    "--patch",
    "patch_name",
    metavar="NAME",
    help="Template patch by name (recipes/templates) or path, or none.  [the model recipe's]",
)


@dataclass(frozen=True)
class RenderOptions:
    """The options of ``quant template render``."""

    model_or_gguf: str
    conversation: Path
    no_thinking: bool
    tools_file: Path | None
    patch_name: str | None


@quant.group(short_help="Patch, render or check chat templates.")
def template() -> None:
    """Chat templates: patch one, render a conversation with one, check one."""


@template.command("patch")
@click.argument("gguf", type=FILE)
@click.option(
    "--patch",
    "name",
    metavar="NAME",
    help="Template patch by name (recipes/templates) or path.  [the one that fits]",
)
@click.option(
    "--out",
    "-o",
    type=FILE,
    required=True,
    help="The file to write; for a split model, its first shard.",
)
def patch_gguf(gguf: Path, name: str | None, out: Path) -> None:
    """Write GGUF (or its first shard) with a patched chat template; tensors are unchanged."""
    from quant.chat.gguf_patch import describe_patch, patch_file

    for line in describe_patch(patch_file(gguf, out, name)):
        progress.print_line(line)


@template.command()
@click.argument("model_or_gguf")
@click.argument("conversation", type=FILE)
@click.option("--no-thinking", is_flag=True, help="Turn reasoning off.")
@click.option("--tools", "tools_file", type=FILE, help="JSON file with the declared tools.")
@patch_option
@collect_options(RenderOptions)
def render(options: RenderOptions) -> None:
    """Print the prompt of CONVERSATION: JSON, a list of messages as in OpenAI's API."""
    from quant.chat.check import load_template
    from quant.chat.engines import render_in_sandbox
    from quant.chat.messages import Conversation
    from quant.chat.renderings import RenderRequest
    from quant.core.errors import InputError

    messages = _read_objects(options.conversation, "messages")
    tools = _read_objects(options.tools_file, "tools") if options.tools_file else []
    chosen = load_template(options.model_or_gguf, options.patch_name)
    request = RenderRequest(
        conversation=Conversation(str(options.conversation), tuple(messages), tuple(tools)),
        mode="off" if options.no_thinking else "default",
        # After the assistant's answer there is nothing to generate, so no generation prompt is
        # added.
        kind="past" if messages[-1].get("role") == "assistant" else "prompt",
        upto=len(messages),
        # None sets no variable: the template's own default applies, which differs by model.
        thinking=False if options.no_thinking else None,
    )
    renderings = render_in_sandbox(chosen.text, [request], tokens=chosen.tokens)
    rendering = renderings[request.name]
    progress.print_line(_describe(chosen))
    if rendering.text is None:
        raise InputError(f"{chosen.source}: {rendering.error}")
    # Exactly the prompt, to be compared or piped; the description went to standard error.
    click.echo(rendering.text, nl=False)


@template.command()
@click.argument("model_or_gguf")
@patch_option
@click.option("--no-server", is_flag=True, help="Leave llama-server out.")
@json_option
@tools_option
def check(
    model_or_gguf: str,
    patch_name: str | None,
    no_server: bool,
    as_json: bool,
    llama_cpp: Path | None,
) -> None:
    """Render the test conversations in every engine and compare; exit 1 if one of them fails."""
    from quant.chat import check as checks
    from quant.llama import toolchain

    chosen = checks.load_template(model_or_gguf, patch_name)
    tools = None if no_server else toolchain.find_toolchain(llama_cpp)
    report = checks.check_template(chosen, tools)
    if as_json:
        click.echo(json.dumps(report.json(), ensure_ascii=False))
    else:
        _show(report)
    raise SystemExit(0 if report.passed else 1)


def _describe(chosen: "TemplateUnderTest") -> str:
    return f"template: {chosen.source}{f', patched by {chosen.patch.name}' if chosen.patch else ''}"


def _show(report: "TemplateReport") -> None:
    """Print a block for each rule that a conversation breaks in an engine, with the first text."""
    from quant.chat.rules import group_faults

    unpatched = "" if report.template.patch else ", without a patch"
    click.echo(_describe(report.template) + unpatched)
    for fault, more in group_faults(report.faults):
        click.echo(f"\nFAILED {fault.conversation}: {fault.rule} ({fault.engine})")
        others = f"; and {more} more texts" if more else ""
        click.echo(f"    {fault.where}: {fault.detail}{others}")
        for line in fault.diff.splitlines():
            click.echo(f"    {line}")
    engines = ", ".join(f"{name} {count}" for name, count in report.engines.items())
    # A conversation can break several rules in several engines and counts once.
    failed = len(dict.fromkeys(f.conversation for f in report.faults))
    click.echo(
        f"\n{report.conversations} conversations; texts compared: {engines};"
        f" {failed} conversations fail"
    )


def _read_objects(path: Path, what: str) -> list[dict[str, Any]]:
    """Read a list of JSON objects. Raise InputError if the file has none."""
    from quant.core.errors import InputError

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise InputError(f"{path}: expected JSON, found something else ({e})") from e
    # Bare, or under its name as in the body of a request to OpenAI's API.
    value = value.get(what) if isinstance(value, dict) else value
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        raise InputError(f"{path}: expected a list of {what}, each an object")
    return value
