"""The report of a smoke test for people and for CI."""

from xml.etree import ElementTree

from quant.chat.report import format_junit, format_transcript
from quant.chat.verdict import CheckResult, Exchange, SmokeResult, SmokeRun

BROKEN = CheckResult(
    "a stream",
    "protocol",
    False,
    "another <text> & more",
    "[gMASK]<sop>\n```",
    "bad \0 \x1b answer \ufffe",
)
PASSED = CheckResult("a talk", "protocol", True, "ok")
WAIVED = CheckResult("calls", "protocol", False, "no call", waived="known")
EXCHANGE = Exchange(
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
RUN = SmokeRun("f.gguf", (), (), (), (EXCHANGE,))
RESULT = SmokeResult(RUN, (PASSED, BROKEN, WAIVED), "    the end")


def test_a_transcript_has_failures_with_prompt_and_answer_and_the_end_of_the_log() -> None:
    text = format_transcript(RESULT)
    assert text.startswith("# f.gguf: FAILED\n")
    assert (
        "- a talk (protocol): passed\n- a stream (protocol): FAILED: another <text> & more\n"
        in text
    )
    assert "- calls (protocol): waived (known): no call\n" in text
    assert "## Failed: a stream (protocol)\n\nThe prompt:\n````\n[gMASK]<sop>\n```\n````\n" in text
    assert "## End of the server's log\n```\n    the end\n```\n" in text


def test_a_transcript_has_every_exchange() -> None:
    text = format_transcript(RESULT)
    assert (
        "## a talk\n\n**Hello there** (thinking)\n> They\n> greet.\n\n````\n```python\nx\n```\n````\n"
        in text
    )
    assert 'calls `f({"a":1})`\n' in text
    assert "(stop; 10 prompt tokens, 4 of them cached)" in text


def test_the_transcript_of_a_file_that_passed_has_no_log() -> None:
    text = format_transcript(SmokeResult(SmokeRun("f.gguf", (), (), (), ()), (PASSED,), "log"))
    assert text == "# f.gguf: passed\n\n- a talk (protocol): passed\n"


def test_junit_counts_failures_and_waivers() -> None:
    suite = ElementTree.fromstring(format_junit(RESULT, 1.5))
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


def test_junit_is_valid_xml_whatever_a_model_writes() -> None:
    [failure] = ElementTree.fromstring(format_junit(RESULT)).findall(".//failure")
    assert "bad \ufffd \ufffd answer \ufffd" in str(failure.text)
    assert "prompt:\n[gMASK]<sop>\n```\n\nanswer:\n" in str(failure.text)
