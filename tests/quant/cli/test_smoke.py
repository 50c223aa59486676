"""`quant smoke`: whose conversation is run with a file. What it finds is tested in tests/quant/chat."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quant.chat.gguf_patch import KEY
from tests.gguf_files import LLAMA, key, write
from tests.quant.chat.templates import PATCHED

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("name", "template", "suggestion"),
    [
        ("a.gguf", PATCHED["glm-4.6"], "conversation, thinking on"),  # its family's default model
        ("tiny-glm-BF16.gguf", "{{ messages }}", "conversation, thinking on"),  # its name
        ("a.gguf", "{{ messages }}", "conversation"),  # of no family: the general scenarios
        ("a.gguf", None, "conversation"),
    ],
)
def test_the_scenarios_are_chosen_by_the_name_then_by_the_family_of_a_file(
    name: str, template: str | None, suggestion: str, run: Run, tmp_path: Path
) -> None:
    keys = [*LLAMA, *([key(KEY, template)] if template else [])]
    path = write(tmp_path / name, keys=keys)
    code, printed, error = run("smoke", path, "--scenario", "conversation, thinkin")
    assert (code, printed) == (2, "")
    problem = "error: scenario 'conversation, thinkin' is not known: did you mean "
    assert error == f"{problem}{suggestion!r}?\n"


def test_a_model_that_was_named_comes_first(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", keys=LLAMA)
    _, _, error = run("smoke", path, "--model", "tiny-glm", "--scenario", "a needl")
    assert "did you mean 'a needle'?" in error


def test_an_image_needs_a_vision_projector(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", keys=LLAMA)
    code, _, error = run("smoke", path, "--model", "glm-4.6", "--scenario", "a picture")
    assert code == 2 and "name the vision projector with --mmproj" in error


def test_help_names_the_fields_words(run: Run) -> None:
    code, printed, _ = run("smoke", "--help")
    assert code == 0
    assert "Vision projector (mmproj); adds the image scenario." in " ".join(printed.split())
