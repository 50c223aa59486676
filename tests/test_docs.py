"""The documents are true: their commands exist, their links lead somewhere, and they name every package."""

import re
import shlex
from pathlib import Path

import click
import pytest

import quant
from quant.cli.options import quant as command_line

ROOT = Path(quant.__file__).parent.parent
PAGES = sorted(
    p.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "recipes", "calibration", "tests/benchmarks")
    for p in (ROOT / folder).glob("*.md")
)
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def commands(page: str) -> list[str]:
    """The lines of a page's code blocks that call ``quant``, without comments and alternatives."""
    blocks = FENCE.findall((ROOT / page).read_text())
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    calls = (re.sub(r"\s+#.*$", "", line) for line in lines)
    return [
        call[call.index("quant ") :] for call in calls if re.match(r"(.*uv run )?quant \w", call)
    ]


def unknown_words(call: str) -> list[str]:
    """The commands and options of a call that do not exist."""
    command: click.Command = command_line
    words = shlex.split(call.partition(" | ")[0].replace("…", ""))[1:]
    while words and isinstance(command, click.Group):
        default = command.commands.get("compute") if words[0] not in command.commands else None
        if default:  # `quant imatrix BASE` is `quant imatrix compute BASE`
            command = default
            break
        if words[0] not in command.commands:
            return [words[0]]
        command = command.commands[words.pop(0)]
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {
        "--help",
        "-h",
    }
    options = [w.partition("=")[0] for w in words if re.match(r"--?[a-z]", w)]
    return [o for o in options if o not in known]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_exists(page: str) -> None:
    wrong = {call: words for call in commands(page) if (words := unknown_words(call))}
    assert not wrong


def test_a_command_that_does_not_exist_is_reported() -> None:
    assert unknown_words("quant bake glm-4.6") == ["bake"]
    assert unknown_words("quant build glm-4.6 --fast") == ["--fast"]
    assert commands("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    links = [link.partition("#")[0] for link in LINK.findall((ROOT / page).read_text())]
    local = [link for link in links if link and "://" not in link]
    assert not [link for link in local if not ((ROOT / page).parent / link).exists()]


def test_the_readme_names_every_package() -> None:
    text = (ROOT / "README.md").read_text()
    packages = {p.parent.name for p in (ROOT / "quant").glob("*/__init__.py")}
    assert not [name for name in packages if f"`quant/{name}/`" not in text]


def test_every_package_says_what_is_in_it() -> None:
    paths = (ROOT / "quant").glob("*/__init__.py")
    short = [p.parent.name for p in paths if len(p.read_text().split('"""')[1].split()) < 30]
    assert not short
