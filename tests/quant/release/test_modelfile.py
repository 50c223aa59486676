"""Modelfiles: what is written is what Ollama reads, and what it could not read is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.core.errors import InputError
from quant.release.modelfile import format_modelfile, parse_modelfile

# What Ollama's parser makes of a text (parser/parser_test.go), and None where it wants more.
OLLAMAS = [
    ("plain", "plain"),
    ('"quoted text"', "quoted text"),
    ('"""a\nb"""', "a\nb"),
    ('"""\na\n"""', "\na\n"),
    ('"open', None),
    ('"""open"', None),
    ('""""a""""', '"a"'),
    ('"a "b" c"', 'a "b" c'),
]


@pytest.mark.parametrize(("written", "value"), OLLAMAS)
def test_values_are_read_as_ollama_reads_them(written: str, value: str | None) -> None:
    assert parse_modelfile(written) == value


def test_every_parameter_is_a_line_and_a_list_as_many() -> None:
    params = {"temperature": 1.0, "num_ctx": 4096, "use_mmap": True, "stop": ["<|user|>", 'a"b']}
    assert format_modelfile("M.gguf", params).splitlines() == [
        "FROM ./M.gguf",
        "PARAMETER temperature 1.0",
        "PARAMETER num_ctx 4096",
        "PARAMETER use_mmap true",
        'PARAMETER stop "<|user|>"',
        'PARAMETER stop "a"b"',
    ]


@pytest.mark.parametrize("stop", ["<|user|>", 'a"b', '""x', '"', "two\nlines", " "])
def test_a_stop_is_read_as_it_was_meant(stop: str) -> None:
    assert (
        parse_modelfile(
            format_modelfile("M.gguf", {"stop": [stop]})
            .partition("PARAMETER stop ")[2]
            .removesuffix("\n")
        )
        == stop
    )


@pytest.mark.parametrize(
    "system", ["Be brief.", 'Say "yes".', '"Quoted"', "Two\nlines.", '"', 'ends with "', " blanks "]
)
def test_a_system_prompt_is_read_as_it_was_meant(system: str) -> None:
    written = format_modelfile("M.gguf", {}, system).partition("SYSTEM ")[2].removesuffix("\n")
    assert parse_modelfile(written) == system


@pytest.mark.parametrize("system", ['"""\nfirst', 'a """\nb', '"""'])
def test_a_text_that_its_own_quotes_would_end_is_refused_unless_they_do_not(system: str) -> None:
    if system == '"""':
        assert (
            parse_modelfile(
                format_modelfile("M.gguf", {}, system).partition("SYSTEM ")[2].removesuffix("\n")
            )
            == system
        )
        return
    with pytest.raises(InputError, match="system: expected a text that a Modelfile can hold"):
        format_modelfile("M.gguf", {}, system)


def test_a_file_with_strange_letters_in_its_name_is_quoted() -> None:
    assert format_modelfile("my model.gguf", {}) == "FROM ./my model.gguf\n"
    assert format_modelfile('a"b.gguf', {}) == 'FROM "./a"b.gguf"\n'


@given(st.text(st.sampled_from('ab"\n '), max_size=12), st.booleans())
def test_what_is_written_is_read_back_or_refused(text: str, as_system: bool) -> None:
    try:
        written = format_modelfile(
            "M.gguf", {} if as_system else {"stop": [text]}, text if as_system else None
        )
    except InputError:
        return
    value = written.partition("SYSTEM " if as_system else "PARAMETER stop ")[2].removesuffix("\n")
    assert value == "" if as_system and not text else parse_modelfile(value) == text
