"""Show why an anchor does not stand where a patch needs it: a difference to what comes nearest, or all its places. Pure."""

import difflib

INDENT = "    "
LEAST = 0.4
"""Lines that are less alike than this are not what was meant."""
PLACES = 4


def show_nearest_matches(text: str, anchor: str) -> str:
    """The difference between an anchor and the text that is most like it, or the lines at which it stands more than once."""
    lines = text.splitlines()
    if (count := text.count(anchor)) > 1:
        return "\n".join(
            [
                f"{INDENT}it stands in line {_line(text, anchor, n)}"
                for n in range(min(count, PLACES))
            ]
        )
    wanted = anchor.strip("\n").splitlines()
    start = _nearest(lines, wanted)
    if start is None:
        return f"{INDENT}nothing in the template is like it"
    there = lines[start : start + len(wanted)]
    difference = difflib.unified_diff(
        wanted, there, "the anchor", f"the template, from line {start + 1}", lineterm=""
    )
    return "\n".join(INDENT + line for line in difference)


def _nearest(lines: list[str], wanted: list[str]) -> int | None:
    """Where as many lines begin as are wanted that are most like them."""
    best, found = LEAST, None
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2("\n".join(wanted))
    for start in range(max(1, len(lines) - len(wanted) + 1)):
        matcher.set_seq1("\n".join(lines[start : start + len(wanted)]))
        if (
            matcher.real_quick_ratio() > best
            and matcher.quick_ratio() > best
            and (ratio := matcher.ratio()) > best
        ):
            best, found = ratio, start
    return found


def _line(text: str, anchor: str, number: int) -> int:
    """The line of an occurrence, the first of which has number 0."""
    at = -1
    for _ in range(number + 1):
        at = text.index(anchor, at + 1)
    return text.count("\n", 0, at) + 1 + (len(anchor) - len(anchor.lstrip("\n")))
