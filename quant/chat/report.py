"""The result of a smoke test for people and CI: a transcript in Markdown, and JUnit XML. Pure."""

from xml.etree import ElementTree

from quant.chat.verdict import CheckResult, Exchange, SmokeResult, group_by_scenario

TRANSCRIPT, JUNIT, JSON, LOG = "transcript.md", "junit.xml", "verdict.json", "server.log"
"""The files that a smoke test leaves."""
FAILED = "failed.md"
"""The transcript of a file whose answers are not good enough, beside the one that is stored."""
NOT_IN_XML = dict.fromkeys(
    (*range(9), 11, 12, *range(14, 32), 0xFFFE, 0xFFFF), "\N{REPLACEMENT CHARACTER}"
)
"""Characters that XML 1.0 forbids (section 2.2). Broken models write them."""


def format_transcript(result: SmokeResult) -> str:
    """Return the checks, the failures with prompt and answer, and every exchange, as Markdown."""
    lines = [f"# {result.file}: {'passed' if result.passed else 'FAILED'}", ""]
    for check in result.scenarios:
        detail = "" if check.passed and check.detail == "ok" else f": {check.detail}"
        lines.append(f"- {check.name} ({check.kind}): {_state(check)}{detail}")
    for check in result.scenarios:
        if not check.passed and (check.prompt or check.answer):
            lines += ["", f"## Failed: {check.name} ({check.kind})"]
            lines += ["", "The prompt:", *_fence(check.prompt)] if check.prompt else []
            lines += ["", "The answer:", *_fence(check.answer)] if check.answer else []
    for name, exchanges in group_by_scenario(result.transcript).items():
        lines += ["", f"## {name}"]
        for exchange in exchanges:
            lines += ["", *_format_exchange(exchange)]
    if not result.passed and result.server_log:
        lines += ["", "## End of the server's log", *_fence(result.server_log)]
    return "\n".join(lines) + "\n"


def format_junit(result: SmokeResult, seconds: float = 0.0) -> str:
    """Return the checks as a JUnit test suite; waived failures are skipped tests.

    Args:
        result: The result.
        seconds: Duration of the whole test.
    """
    failed = [s for s in result.scenarios if not s.passed and not s.waived]
    waived = [s for s in result.scenarios if not s.passed and s.waived]
    suite = ElementTree.Element(
        "testsuite",
        name=f"smoke {result.file}",
        tests=str(len(result.scenarios)),
        failures=str(len(failed)),
        skipped=str(len(waived)),
        errors="0",
        time=f"{seconds:.3f}",
    )
    exchanges = group_by_scenario(result.transcript)
    for s in result.scenarios:
        case = ElementTree.SubElement(suite, "testcase", classname=f"smoke.{s.kind}", name=s.name)
        # JUnit has no waived tests. CI systems show a skipped one with its message, and stay green.
        if s in waived:
            message = _to_xml_text(f"waived: {s.waived}: {s.detail}")
            ElementTree.SubElement(case, "skipped", message=message)
        elif s in failed:
            failure = ElementTree.SubElement(case, "failure", message=_to_xml_text(s.detail))
            failure.text = _to_xml_text(
                f"prompt:\n{s.prompt}\n\nanswer:\n{s.answer}\n\nserver:\n{result.server_log}\n"
            )
        # A conversation can have a check of each kind with its name: its exchanges are listed once.
        if s.kind == "protocol" and s.name in exchanges:
            out = ElementTree.SubElement(case, "system-out")
            texts = ("\n".join(_format_exchange(e)) for e in exchanges[s.name])
            out.text = _to_xml_text("\n\n".join(texts))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _state(check: CheckResult) -> str:
    if check.passed:
        return "passed"
    return f"waived ({check.waived})" if check.waived else "FAILED"


def _format_exchange(exchange: Exchange) -> list[str]:
    question = " ".join(exchange.question.split())
    lines = [f"**{question}**{' (thinking)' if exchange.thinking else ''}"]
    lines += [f"> {line}" for line in exchange.reasoning.splitlines()]
    lines += ["", *_fence(exchange.answer)] if exchange.answer else []
    lines += ["", *(f"calls `{call}`" for call in exchange.calls)] if exchange.calls else []
    tokens = f"{exchange.prompt_tokens} prompt tokens, {exchange.cached_tokens} of them cached"
    return [*lines, "", f"({exchange.finish_reason}; {tokens})"]


def _fence(text: str) -> list[str]:
    """Text in a fence that is longer than any fence in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence, *text.splitlines(), fence]


def _to_xml_text(text: str) -> str:
    return text.translate(NOT_IN_XML)
