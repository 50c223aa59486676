"""What a smoke test found in a file, and whether the file may be published. Pure.

Two kinds of outcome. *Protocol*: what a client must be able to rely on whatever the model knows; all of it must hold.
*Quality*: known answers. A small file knows less than a large one, so its answers are compared with those of the BF16
file: of what that one gives rightly, a share that the variant's recipe names must be right here too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

ANSWERS = "answers"
"""The outcome that decides about quality; those of single conversations only tell where it is lost."""


@dataclass(frozen=True)
class Outcome:
    """One thing that was tried."""

    name: str
    kind: Literal["protocol", "quality"]
    passed: bool
    detail: str
    prompt: str = ""
    """What the model had read when it went wrong."""
    answer: str = ""
    """What it said then."""
    waived: str = ""
    """Why a failure does not stop the release."""

    def json(self) -> dict[str, Any]:
        """As plain JSON; what belongs to failures stands only there."""
        said = asdict(self)
        return {k: v for k, v in said.items() if v != "" or k == "detail"}


@dataclass(frozen=True)
class Exchange:
    """One question and what came back."""

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
class Answer:
    """One thing that the model had to know."""

    scenario: str
    turn: int
    about: str
    """answer, calls or reasoning: a turn can ask for each."""
    question: str
    expected: str
    found: str
    right: bool

    @property
    def place(self) -> tuple[str, int, str]:
        """Where it was asked: the same in every file."""
        return self.scenario, self.turn, self.about

    @property
    def words(self) -> str:
        """What is wrong with it."""
        return f"turn {self.turn}, {self.question!r}: expected {self.expected} in the {self.about}, found {self.found!r}"


@dataclass(frozen=True)
class SmokeRun:
    """Everything that one file said; the same file says the same again."""

    file: str
    server: tuple[str, ...]
    """The server's arguments beside the file."""
    protocol: tuple[Outcome, ...]
    answers: tuple[Answer, ...]
    transcript: tuple[Exchange, ...]

    def json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SmokeResult:
    """Whether a file may be published, and why."""

    file: str
    passed: bool
    scenarios: tuple[Outcome, ...]
    transcript: tuple[Exchange, ...]
    server: tuple[str, ...] = ()
    log: str = ""
    """The last words of the server, when something failed."""

    def json(self) -> dict[str, Any]:
        """As plain JSON, without the transcript."""
        head = {"file": self.file, "passed": self.passed, "server": list(self.server)}
        return head | {"scenarios": [s.json() for s in self.scenarios]}

    @property
    def faults(self) -> tuple[str, ...]:
        """A line for everything that stops the release."""
        return tuple(f"{self.file}: {s.name}: {s.detail}" for s in self.scenarios if stops(s))


def stops(outcome: Outcome) -> bool:
    """Whether an outcome stops the release by itself."""
    decisive = outcome.kind == "protocol" or outcome.name == ANSWERS
    return decisive and not outcome.passed and not outcome.waived


def judge_run(
    heard: SmokeRun,
    share: float = 1.0,
    reference: SmokeRun | None = None,
    waivers: Mapping[str, str] | None = None,
) -> SmokeResult:
    """The verdict on a file, by what the BF16 file said (no reference: it is measured by what is known).

    ``share`` of the right answers must be right here too; ``waivers`` says of names why their failure is no hindrance.
    """
    outcomes = [*heard.protocol, *_quality(heard), _enough(heard, share, reference)]
    waived = [
        replace(o, waived=(waivers or {}).get(o.name, "")) if not o.passed else o for o in outcomes
    ]
    return SmokeResult(
        heard.file, not any(map(stops, waived)), tuple(waived), heard.transcript, heard.server
    )


def parse_run(facts: Mapping[str, Any]) -> SmokeRun:
    """What :meth:`Heard.json` wrote."""
    return SmokeRun(
        facts["file"],
        tuple(facts["server"]),
        tuple(Outcome(**o) for o in facts["protocol"]),
        tuple(Answer(**a) for a in facts["answers"]),
        tuple(Exchange(**{**e, "calls": tuple(e["calls"])}) for e in facts["transcript"]),
    )


def _quality(heard: SmokeRun) -> Iterator[Outcome]:
    """What was known in each conversation."""
    for name in dict.fromkeys(a.scenario for a in heard.answers):
        asked = [a for a in heard.answers if a.scenario == name]
        wrong = [a for a in asked if not a.right]
        said = "\n".join(a.found for a in wrong)
        detail = "; ".join(a.words for a in wrong) or f"{len(asked)} of {len(asked)} right"
        yield Outcome(name, "quality", not wrong, detail, answer=said)


def _enough(heard: SmokeRun, share: float, reference: SmokeRun | None) -> Outcome:
    """Whether enough of what the BF16 file knows is known here."""
    right = {a.place for a in heard.answers if a.right}
    asked = {a.place for a in (reference or heard).answers if a.right or reference is None}
    needed = math.ceil(share * len(asked) - 1e-9)  # 0.7 of 10 is 7 and a little more
    kept = len(asked & right)
    of = "that the BF16 file gives" if reference else "that are known"
    detail = f"{kept} of {len(asked)} right answers {of}; {needed} are needed"
    return Outcome(ANSWERS, "quality", kept >= needed, detail)


def conversations(transcript: Sequence[Exchange]) -> dict[str, list[Exchange]]:
    """The exchanges by the scenario that they belong to."""
    found: dict[str, list[Exchange]] = {}
    for exchange in transcript:
        found.setdefault(exchange.scenario, []).append(exchange)
    return found
