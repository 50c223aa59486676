"""What a smoke test recorded of a file, and whether the file may be published. Pure.

There are two kinds of checks. *Protocol*: what a client must be able to rely on, whatever the model
knows; all of it must hold. *Quality*: answers that are known. A small file knows less than a large
one, so a variant is compared with the BF16 file: of the answers that BF16 gives correctly, the
fraction that the variant's recipe names must be correct here too.

:class:`SmokeRun` is the record; it is stored, because the same file answers the same again.
:class:`SmokeResult` is the judgment, computed anew from the record each time.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

ANSWERS = "answers"
"""The check that decides about quality. Those of single conversations show where it is lost."""
Kind = Literal["protocol", "quality"]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check, as ``scenarios`` lists it in the JSON of ``quant smoke``."""

    name: str
    kind: Kind
    passed: bool
    detail: str
    prompt: str = ""
    """The last prompt before the failure."""
    answer: str = ""
    """The last answer before the failure."""
    waived: str = ""
    """Why a failure does not stop the release."""

    def json(self) -> dict[str, Any]:
        """Return plain JSON. Empty fields other than the detail are left out."""
        return {k: v for k, v in asdict(self).items() if v != "" or k == "detail"}


@dataclass(frozen=True)
class Exchange:
    """One request to the model and its answer, for the transcript."""

    scenario: str
    thinking: bool
    question: str
    reasoning: str
    answer: str
    calls: tuple[str, ...]
    """As ``name(arguments)``."""
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class AnswerCheck:
    """One answer that is known, and what the model answered."""

    scenario: str
    turn: int
    about: str
    """answer, calls or reasoning: a turn can be checked for each."""
    question: str
    expected: str
    actual: str
    correct: bool

    @property
    def place(self) -> tuple[str, int, str]:
        """Where it was asked: the same for every file."""
        return self.scenario, self.turn, self.about

    def describe(self) -> str:
        """Return what is expected and what was answered."""
        return (
            f"turn {self.turn}, {self.question!r}: expected {self.expected} in the {self.about},"
            f" found {self.actual!r}"
        )

    def json(self) -> dict[str, Any]:
        """Return plain JSON, by the keys of the store."""
        values = asdict(self)
        return values | {"found": values.pop("actual"), "right": values.pop("correct")}


@dataclass(frozen=True)
class SmokeRun:
    """Everything that was recorded of one file."""

    file: str
    server_arguments: tuple[str, ...]
    """llama-server's arguments that can change an answer."""
    checks: tuple[CheckResult, ...]
    """The protocol checks."""
    answers: tuple[AnswerCheck, ...]
    transcript: tuple[Exchange, ...]

    def json(self) -> dict[str, Any]:
        """Return plain JSON, by the keys of the store."""
        return {
            "file": self.file,
            "server": list(self.server_arguments),
            "protocol": [asdict(c) for c in self.checks],
            "answers": [a.json() for a in self.answers],
            "transcript": [asdict(e) for e in self.transcript],
        }


@dataclass(frozen=True)
class SmokeResult:
    """Whether a file may be published, and why."""

    run: SmokeRun
    scenarios: tuple[CheckResult, ...]
    """The protocol checks, then those of quality, with waivers applied."""
    server_log: str = ""
    """The end of the server's log, for a file that failed."""

    @property
    def file(self) -> str:
        """The file's name."""
        return self.run.file

    @property
    def transcript(self) -> tuple[Exchange, ...]:
        """All exchanges with the file."""
        return self.run.transcript

    @property
    def passed(self) -> bool:
        """Whether nothing stops the release."""
        return not any(map(stops_release, self.scenarios))

    @property
    def faults(self) -> tuple[str, ...]:
        """A line for each check that stops the release."""
        return tuple(
            f"{self.file}: {s.name}: {s.detail}" for s in self.scenarios if stops_release(s)
        )

    def json(self) -> dict[str, Any]:
        """Return plain JSON, without the transcript: ``quant smoke --json``."""
        return {
            "file": self.file,
            "passed": self.passed,
            "server": list(self.run.server_arguments),
            "scenarios": [s.json() for s in self.scenarios],
        }


def stops_release(check: CheckResult) -> bool:
    """Return whether a check stops the release by itself."""
    decisive = check.kind == "protocol" or check.name == ANSWERS
    return decisive and not check.passed and not check.waived


def judge_run(
    run: SmokeRun,
    required_answers: float = 1.0,
    reference: SmokeRun | None = None,
    waivers: Mapping[str, str] | None = None,
) -> SmokeResult:
    """Judge what was recorded of a file.

    Args:
        run: The record.
        required_answers: The fraction of the reference's correct answers that must be correct.
        reference: The record of the BF16 file; None requires a fraction of all known answers.
        waivers: Names of checks that may fail, and why.
    """
    checks = [*run.checks, *_quality_checks(run), _answers_check(run, required_answers, reference)]
    # A check that passes shows no waiver: reports list only those that were needed.
    waived = [c if c.passed else replace(c, waived=(waivers or {}).get(c.name, "")) for c in checks]
    return SmokeResult(run, tuple(waived))


def parse_run(facts: Mapping[str, Any]) -> SmokeRun:
    """Return the record that :meth:`SmokeRun.json` wrote."""
    return SmokeRun(
        file=facts["file"],
        server_arguments=tuple(facts["server"]),
        checks=tuple(CheckResult(**c) for c in facts["protocol"]),
        answers=tuple(_parse_answer(a) for a in facts["answers"]),
        transcript=tuple(
            Exchange(**{**e, "calls": tuple(e["calls"])}) for e in facts["transcript"]
        ),
    )


def group_by_scenario(transcript: Sequence[Exchange]) -> dict[str, list[Exchange]]:
    """Return the exchanges by the name of their scenario."""
    groups: dict[str, list[Exchange]] = {}
    for exchange in transcript:
        groups.setdefault(exchange.scenario, []).append(exchange)
    return groups


def _parse_answer(facts: Mapping[str, Any]) -> AnswerCheck:
    values = dict(facts)
    return AnswerCheck(actual=values.pop("found"), correct=values.pop("right"), **values)


def _quality_checks(run: SmokeRun) -> Iterator[CheckResult]:
    """One check for each conversation with known answers."""
    for name in dict.fromkeys(a.scenario for a in run.answers):
        answers = [a for a in run.answers if a.scenario == name]
        wrong = [a for a in answers if not a.correct]
        detail = "; ".join(a.describe() for a in wrong) or f"{len(answers)} of {len(answers)} right"
        actual = "\n".join(a.actual for a in wrong)
        yield CheckResult(name, "quality", not wrong, detail, answer=actual)


def _answers_check(
    run: SmokeRun, required_answers: float, reference: SmokeRun | None
) -> CheckResult:
    """Whether enough of BF16's correct answers are correct here.

    Answers that only this file gives correctly do not count: a variant that trades one answer for
    another is not as good as BF16.
    """
    correct = {a.place for a in run.answers if a.correct}
    # Without a reference every known answer is expected, also one that is wrong here.
    expected = {a.place for a in (reference or run).answers if a.correct or reference is None}
    # 0.7 * 10 is 7.000000000000001 in floating point, and 8 answers would be too many.
    needed = math.ceil(required_answers * len(expected) - 1e-9)
    kept = len(expected & correct)
    what = "that the BF16 file gives" if reference else "that are known"
    detail = f"{kept} of {len(expected)} right answers {what}; {needed} are needed"
    return CheckResult(ANSWERS, "quality", kept >= needed, detail)
