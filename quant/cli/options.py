"""What the commands share: the group they belong to, and the options that mean the same everywhere."""

from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
variants_option = click.option(
    "--variant", "-v", "variants", multiple=True, metavar="V", help="Only this one; repeatable."
)
work_option = click.option(
    "--work", type=FOLDER, envvar="QUANT_WORK", help="Where finished stages are kept.  [OUT/.work]"
)
tools_option = click.option("--llama-cpp", type=FOLDER, help="A llama.cpp of your own.  [$QUANT_LLAMA_CPP]")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gguf-foundry")
def quant() -> None:
    """From a model's BF16 weights on the hub to a tested GGUF release."""


def one_line(value: Any) -> str:
    """A value in a cell of a table: no line breaks, and not too long."""
    text = " ".join(str(value).split())
    return text if len(text) <= 110 else f"{text[:107]}..."
