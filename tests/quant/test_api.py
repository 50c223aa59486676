"""The public API: light to import, typed, documented, and its examples run."""

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import quant

FUNCTIONS = [n for n in quant.__all__ if inspect.isfunction(getattr(quant, n))]
EXAMPLES = (
    "quant",
    "quant.cli.options",
    "quant.evaluate.request",
    "quant.job",
    "quant.llama.tensors",
    "quant.plan.forecast",
    "quant.plan.load",
    "quant.evaluate.allocation",
    "quant.quantize.standalone",
    "quant.chat.standalone",
)
"""Modules whose docstrings have examples that need no weights."""


def test_importing_it_imports_nothing_else() -> None:
    code = "import quant, sys; print([m for m in sys.modules if m.startswith('quant.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", quant.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(quant, name) is not None


def test_the_lists_of_names_agree() -> None:
    names = {name for names in quant._MODULES.values() for name in names}
    assert names | {"STAGES", "__version__"} == set(quant.__all__) == set(dir(quant))
    tree = ast.parse(Path(quant.__file__).read_text())
    typed = [
        n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module in quant._MODULES
    ]
    assert {(n.module, a.name) for n in typed for a in n.names} == {
        (module, name) for module, names in quant._MODULES.items() for name in names
    }


def test_another_name_is_an_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="'quant' has no attribute 'bake'"):
        _ = quant.bake


def test_type_checkers_are_told_that_it_is_typed() -> None:
    assert (Path(quant.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_says_what_it_takes_returns_and_raises(name: str) -> None:
    text = inspect.getdoc(getattr(quant, name)) or ""
    sections = ["Args:", "Returns:", "Example:"]
    if name != "list_recipes":  # which cannot fail
        sections.append("Raises:")
    assert not [s for s in sections if s not in text]


@pytest.mark.tools  # some look for llama.cpp's tools
@pytest.mark.parametrize("module", EXAMPLES)
def test_the_examples_run(module: str) -> None:
    tested = importlib.import_module(module)
    failed, attempted = doctest.testmod(tested)
    assert attempted and not failed
