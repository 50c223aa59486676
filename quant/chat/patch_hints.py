"""Show why a patch's anchor does not fit a template: the nearest match as a diff, or all matches.

Pure.
"""

import difflib

INDENT = "    "
MIN_RATIO = 0.4
"""Similarity (difflib's ratio) below which lines are not a near match."""
MAX_MATCHES = 4


def show_nearest_matches(text: str, anchor: str) -> str:
    """Return a hint for an anchor that must occur once in a text and does not.

    Returns:
        Indented lines: the line numbers of an anchor that occurs more than once, or the diff
        between the anchor and the most similar lines of the text.
    """
    lines = text.splitlines()
    if (count := text.count(anchor)) > 1:
        numbers = [_line_number(text, anchor, n) for n in range(min(count, MAX_MATCHES))]
        return "\n".join(f"{INDENT}it occurs in line {number}" for number in numbers)
    wanted = anchor.strip("\n").splitlines()
    start = _find_nearest(lines, wanted)
    if start is None:
        return f"{INDENT}nothing in the template is similar"
    nearest = lines[start : start + len(wanted)]
    diff = difflib.unified_diff(
        wanted, nearest, "the anchor", f"the template, from line {start + 1}", lineterm=""
    )
    return "\n".join(INDENT + line for line in diff)


def _find_nearest(lines: list[str], wanted: list[str]) -> int | None:
    """The index at which the most similar lines begin; as many lines as the anchor has."""
    best_ratio, best_start = MIN_RATIO, None
    # From 200 characters on, autojunk would ignore the frequent ones: blanks and braces, which
    # templates consist of.
    matcher = difflib.SequenceMatcher(autojunk=False)
    # difflib caches what it knows of the second sequence, so the anchor is that one.
    matcher.set_seq2("\n".join(wanted))
    for start in range(max(1, len(lines) - len(wanted) + 1)):
        matcher.set_seq1("\n".join(lines[start : start + len(wanted)]))
        # Two cheap upper bounds first: ratio() is quadratic in the length.
        if (
            matcher.real_quick_ratio() > best_ratio
            and matcher.quick_ratio() > best_ratio
            and (ratio := matcher.ratio()) > best_ratio
        ):
            best_ratio, best_start = ratio, start
    return best_start


def _line_number(text: str, anchor: str, occurrence: int) -> int:
    """The line of an occurrence, the first of which has number 0."""
    at = -1
    for _ in range(occurrence + 1):
        at = text.index(anchor, at + 1)
    # An anchor may begin with newlines; a reader looks for its first text.
    return text.count("\n", 0, at) + 1 + (len(anchor) - len(anchor.lstrip("\n")))
