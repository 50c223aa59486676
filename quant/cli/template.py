"""The commands about chat templates: mend one in a file, see what it makes of a conversation, hold it against the battery."""

import json
from pathlib import Path
from typing import Any

import click

from quant.cli import progress
from quant.cli.options import FILE, json_option, quant, tools_option

patch_option = click.option(
    "--patch",
    "patch_name",
    metavar="NAME",
    help="A name of recipes/templates, a path, or none.  [the model recipe's]",
)


@quant.group()
def template() -> None:
    """Chat templates: mend one, see what it renders, check it."""


@template.command("patch")
@click.argument("gguf", type=FILE)
@click.option(
    "--patch",
    "name",
    metavar="NAME",
    help="A name of recipes/templates, or a path.  [the one that fits]",
)
@click.option(
    "--out",
    "-o",
    type=FILE,
    required=True,
    help="The file to write; of a split model, its first shard.",
)
def patch_gguf(gguf: Path, name: str | None, out: Path) -> None:
    """Write GGUF (the first shard, if it is split) with its chat template mended; the tensors stay as they are."""
    from quant.chat.gguf_patch import describe_patch, patch_file

    for line in describe_patch(patch_file(gguf, out, name)):
        progress.print_line(line)


@template.command()
@click.argument("model_or_gguf")
@click.argument("conversation", type=FILE)
@click.option("--no-thinking", is_flag=True, help="With thinking switched off.")
@click.option("--tools", "tools_file", type=FILE, help="JSON: the tools that are declared.")
@patch_option
def render(
    model_or_gguf: str,
    conversation: Path,
    no_thinking: bool,
    tools_file: Path | None,
    patch_name: str | None,
) -> None:
    """What the model reads for CONVERSATION: JSON, a list of messages as in OpenAI's interface."""
    from quant.chat.check import load_template
    from quant.chat.conversations import Conversation
    from quant.chat.engines import render_in_sandbox
    from quant.chat.rules import RenderRequest
    from quant.errors import InputError

    messages, tools = (
        _objects(conversation, "messages"),
        _objects(tools_file, "tools") if tools_file else [],
    )
    taken = load_template(model_or_gguf, patch_name)
    asked = Conversation(str(conversation), tuple(messages), tuple(tools))
    mode, thinking = ("off", False) if no_thinking else ("default", None)
    ask = RenderRequest(
        asked,
        mode,
        "past" if messages[-1].get("role") == "assistant" else "prompt",
        len(messages),
        thinking,
    )
    made = render_in_sandbox(taken.text, [ask], tokens=taken.tokens)[ask.name]
    progress.print_line(
        f"template: {taken.where}{f', patched by {taken.patch.name}' if taken.patch else ''}"
    )
    if made.text is None:
        raise InputError(f"{taken.where}: {made.error}")
    click.echo(made.text, nl=False)


@template.command()
@click.argument("model_or_gguf")
@patch_option
@click.option("--no-server", is_flag=True, help="Without llama-server.")
@json_option
@tools_option
def check(
    model_or_gguf: str,
    patch_name: str | None,
    no_server: bool,
    as_json: bool,
    llama_cpp: Path | None,
) -> None:
    """Render the battery of conversations in every engine; exit 1 with the names of those that come out wrong."""
    from quant.chat import check as checks
    from quant.llama import toolchain

    taken = checks.load_template(model_or_gguf, patch_name)
    report = checks.check_template(
        taken, None if no_server else toolchain.find_toolchain(llama_cpp)
    )
    if as_json:
        click.echo(json.dumps(report.json(), ensure_ascii=False))
    else:
        _show(report)
    raise SystemExit(0 if report.passed else 1)


def _show(report: Any) -> None:
    """One block for each rule that a conversation breaks in an engine, with the first text that breaks it."""
    from quant.chat.rules import render_alike

    taken = report.taken
    click.echo(
        f"template: {taken.where}{f', patched by {taken.patch.name}' if taken.patch else ', as it is'}"
    )
    for fault, more in render_alike(report.faults):
        click.echo(f"\nFAILED {fault.conversation}: {fault.rule} ({fault.engine})")
        click.echo(
            f"    {fault.where}: {fault.detail}" + (f"; and {more} texts more" if more else "")
        )
        for line in fault.diff.splitlines():
            click.echo(f"    {line}")
    engines = ", ".join(f"{name} {count}" for name, count in report.engines.items())
    failed = dict.fromkeys(f.conversation for f in report.faults)
    click.echo(
        f"\n{report.conversations} conversations; texts compared: {engines}; {len(failed)} conversations fail"
    )


def _objects(path: Path, what: str) -> list[dict[str, Any]]:
    """A list of JSON objects, bare or under its name. Raises InputError."""
    from quant.errors import InputError

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise InputError(f"{path}: expected JSON, found something else ({e})") from e
    found = found.get(what) if isinstance(found, dict) else found
    if (
        not isinstance(found, list)
        or not found
        or not all(isinstance(item, dict) for item in found)
    ):
        raise InputError(f"{path}: expected a list of {what}, each an object")
    return found
