"""A verdict for people and for machines."""

from xml.etree import ElementTree

from quant.chat.report import format_junit, format_transcript
from quant.chat.verdict import Exchange, Outcome, SmokeResult

BROKEN = Outcome(
    "a stream",
    "protocol",
    False,
    "another <text> & more",
    "[gMASK]<sop>\n```",
    "bad \0 \x1b answer \ufffe",
)
PASSED = Outcome("a talk", "protocol", True, "ok")
WAIVED = Outcome("calls", "protocol", False, "no call", waived="known")
SAID = Exchange(
    "a talk",
    True,
    "Hello\nthere",
    "They\ngreet.",
    "```python\nx\n```",
    ('f({"a":1})',),
    "stop",
    10,
    4,
)
VERDICT = SmokeResult("f.gguf", False, (PASSED, BROKEN, WAIVED), (SAID,), (), "    the end")


def test_a_transcript_says_what_failed_with_prompt_and_answer_and_the_servers_last_words() -> None:
    text = format_transcript(VERDICT)
    assert text.startswith("# f.gguf: FAILED\n")
    assert (
        "- a talk (protocol): passed\n- a stream (protocol): FAILED: another <text> & more\n"
        in text
    )
    assert "- calls (protocol): waived (known): no call\n" in text
    assert "## Failed: a stream (protocol)\n\nThe prompt:\n````\n[gMASK]<sop>\n```\n````\n" in text
    assert "## The server's last words\n```\n    the end\n```\n" in text


def test_a_transcript_holds_every_exchange() -> None:
    text = format_transcript(VERDICT)
    assert (
        "## a talk\n\n**Hello there** (thinking)\n> They\n> greet.\n\n````\n```python\nx\n```\n````\n"
        in text
    )
    assert 'calls `f({"a":1})`\n' in text
    assert "(stop; 10 tokens read, 4 of them from the cache)" in text


def test_a_file_that_passed_says_nothing_of_its_server() -> None:
    text = format_transcript(SmokeResult("f.gguf", True, (PASSED,), (), (), "log"))
    assert text == "# f.gguf: passed\n\n- a talk (protocol): passed\n"


def test_junit_counts_failures_and_what_was_waived() -> None:
    suite = ElementTree.fromstring(format_junit(VERDICT, 1.5))
    assert suite.attrib == {
        "name": "smoke f.gguf",
        "tests": "3",
        "failures": "1",
        "skipped": "1",
        "errors": "0",
        "time": "1.500",
    }
    talk, stream, calls = suite
    assert (talk.attrib["classname"], talk.attrib["name"], [e.tag for e in talk]) == (
        "smoke.protocol",
        "a talk",
        ["system-out"],
    )
    assert [e.tag for e in stream] == ["failure"] and stream[0].attrib == {
        "message": "another <text> & more"
    }
    assert [e.attrib["message"] for e in calls] == ["waived: known: no call"]


def test_junit_can_be_read_whatever_a_model_said() -> None:
    [failure] = ElementTree.fromstring(format_junit(VERDICT)).findall(".//failure")
    assert "bad \ufffd \ufffd answer \ufffd" in str(failure.text)
    assert "prompt:\n[gMASK]<sop>\n```\n\nanswer:\n" in str(failure.text)
