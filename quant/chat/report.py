"""A verdict for people and for machines: a transcript in Markdown, and JUnit's XML, which every CI can show. Pure."""

from xml.etree import ElementTree

from quant.chat.verdict import Exchange, SmokeResult, conversations

TRANSCRIPT, JUNIT, JSON, LOG = "transcript.md", "junit.xml", "verdict.json", "server.log"
"""The files that a smoke test leaves."""
FAILED = "failed.md"
"""The transcript again, of a file that knows too little."""
UNFIT = dict.fromkeys(
    (*range(9), 11, 12, *range(14, 32), 0xFFFE, 0xFFFF), "\N{REPLACEMENT CHARACTER}"
)
"""Characters that XML cannot hold; models say them when they are broken."""


def format_transcript(verdict: SmokeResult) -> str:
    """Everything that was found and said."""
    lines = [f"# {verdict.file}: {'passed' if verdict.passed else 'FAILED'}", ""]
    for s in verdict.scenarios:
        state = "passed" if s.passed else f"waived ({s.waived})" if s.waived else "FAILED"
        lines.append(
            f"- {s.name} ({s.kind}): {state}"
            + ("" if s.passed and s.detail == "ok" else f": {s.detail}")
        )
    for s in verdict.scenarios:
        if not s.passed and (s.prompt or s.answer):
            lines += ["", f"## Failed: {s.name} ({s.kind})"]
            lines += ["", "The prompt:", *_block(s.prompt)] if s.prompt else []
            lines += ["", "The answer:", *_block(s.answer)] if s.answer else []
    for name, exchanges in conversations(verdict.transcript).items():
        lines += ["", f"## {name}"]
        for exchange in exchanges:
            lines += ["", *_said(exchange)]
    if not verdict.passed and verdict.log:
        lines += ["", "## The server's last words", *_block(verdict.log)]
    return "\n".join(lines) + "\n"


def format_junit(verdict: SmokeResult, seconds: float = 0.0) -> str:
    """The outcomes as a test suite."""
    failed = [s for s in verdict.scenarios if not s.passed and not s.waived]
    waived = [s for s in verdict.scenarios if not s.passed and s.waived]
    suite = ElementTree.Element(
        "testsuite",
        name=f"smoke {verdict.file}",
        tests=str(len(verdict.scenarios)),
        failures=str(len(failed)),
        skipped=str(len(waived)),
        errors="0",
        time=f"{seconds:.3f}",
    )
    said = conversations(verdict.transcript)
    for s in verdict.scenarios:
        case = ElementTree.SubElement(suite, "testcase", classname=f"smoke.{s.kind}", name=s.name)
        if s in waived:
            ElementTree.SubElement(case, "skipped", message=_fit(f"waived: {s.waived}: {s.detail}"))
        elif s in failed:
            failure = ElementTree.SubElement(case, "failure", message=_fit(s.detail))
            failure.text = _fit(
                f"prompt:\n{s.prompt}\n\nanswer:\n{s.answer}\n\nserver:\n{verdict.log}\n"
            )
        if s.kind == "protocol" and s.name in said:
            out = ElementTree.SubElement(case, "system-out")
            out.text = _fit("\n\n".join("\n".join(_said(e)) for e in said[s.name]))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _said(exchange: Exchange) -> list[str]:
    about = f"{exchange.finish_reason}; {exchange.prompt_tokens} tokens read, {exchange.cached_tokens} of them from the cache"
    lines = [f"**{_line(exchange.question)}**{' (thinking)' if exchange.thinking else ''}"]
    lines += [f"> {line}" for line in exchange.reasoning.splitlines()]
    lines += ["", *_block(exchange.answer)] if exchange.answer else []
    lines += ["", *(f"calls `{call}`" for call in exchange.calls)] if exchange.calls else []
    return [*lines, "", f"({about})"]


def _block(text: str) -> list[str]:
    """Text as it stands, also when it holds fences of its own."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence, *text.splitlines(), fence]


def _line(text: str) -> str:
    return " ".join(text.split())


def _fit(text: str) -> str:
    return text.translate(UNFIT)
