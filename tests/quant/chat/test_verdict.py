"""The verdict on a file: the protocol must hold, and of the BF16 file's answers a share."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from quant.chat.verdict import ANSWERS, Answer, Exchange, Outcome, SmokeRun, judge_run, parse_run

FINE = Outcome("stream", "protocol", True, "ok")
BROKEN = Outcome("stream", "protocol", False, "another text", "the prompt", "the answer")
SAID = Exchange("a", True, "Hello", "Hm.", "Hi", ("f({})",), "stop", 10, 4)


def answers(*right: bool) -> tuple[Answer, ...]:
    return tuple(
        Answer(f"s{n}", 1, "answer", "Who?", "'Eve'", "Eve" if r else "Rosa", r)
        for n, r in enumerate(right)
    )


def heard(*right: bool, protocol: tuple[Outcome, ...] = (FINE,)) -> SmokeRun:
    return SmokeRun("f.gguf", ("--jinja",), protocol, answers(*right), (SAID,))


def test_a_file_that_knows_all_and_speaks_well_passes() -> None:
    verdict = judge_run(heard(True, True))
    assert verdict.passed and verdict.faults == ()
    assert [(s.name, s.kind, s.passed) for s in verdict.scenarios] == [
        ("stream", "protocol", True),
        ("s0", "quality", True),
        ("s1", "quality", True),
        (ANSWERS, "quality", True),
    ]


def test_one_broken_protocol_is_enough() -> None:
    verdict = judge_run(heard(True, protocol=(FINE, BROKEN)))
    assert not verdict.passed
    assert verdict.faults == ("f.gguf: stream: another text",)


@pytest.mark.parametrize(
    ("right", "share", "passed"),
    [(10, 1.0, True), (9, 1.0, False), (7, 0.7, True), (6, 0.7, False), (0, 0.0, True)],
)
def test_the_share_decides_how_many_answers_are_needed(
    right: int, share: float, passed: bool
) -> None:
    verdict = judge_run(heard(*[n < right for n in range(10)]), share)
    assert verdict.passed is passed
    assert verdict.scenarios[-1].detail.startswith(f"{right} of 10 right answers that are known; ")


def test_what_the_bf16_file_does_not_know_is_not_asked_of_others() -> None:
    reference = heard(True, True, False, False)
    assert judge_run(heard(True, True, False, False), 1.0, reference).passed
    verdict = judge_run(heard(True, False, True, True), 1.0, reference)
    assert not verdict.passed
    assert verdict.faults == (
        f"f.gguf: {ANSWERS}: 1 of 2 right answers that the BF16 file gives; 2 are needed",
    )
    assert judge_run(heard(False), 1.0, heard(False)).passed


def test_a_single_wrong_answer_is_told_and_stops_nothing_when_enough_are_right() -> None:
    verdict = judge_run(heard(True, False), 0.5)
    assert verdict.passed
    [off] = [s for s in verdict.scenarios if not s.passed]
    assert (off.name, off.detail) == (
        "s1",
        "turn 1, 'Who?': expected 'Eve' in the answer, found 'Rosa'",
    )
    assert off.answer == "Rosa"


def test_a_waiver_lets_a_failure_pass_and_stays_to_be_read() -> None:
    verdict = judge_run(
        heard(False, protocol=(BROKEN,)), waivers={"stream": "known", ANSWERS: "tiny", "s0": "x"}
    )
    assert verdict.passed
    assert [(s.name, s.waived) for s in verdict.scenarios] == [
        ("stream", "known"),
        ("s0", "x"),
        (ANSWERS, "tiny"),
    ]


def test_a_waiver_of_what_passed_leaves_no_trace() -> None:
    assert (
        judge_run(heard(True), waivers={"stream": "known"}).scenarios
        == judge_run(heard(True)).scenarios
    )


def test_a_verdict_as_json_keeps_its_keys() -> None:
    said: dict[str, Any] = json.loads(
        json.dumps(judge_run(heard(True, protocol=(FINE, BROKEN))).json())
    )
    assert said.keys() == {"file", "passed", "server", "scenarios"}
    assert said["scenarios"][0] == {
        "name": "stream",
        "kind": "protocol",
        "passed": True,
        "detail": "ok",
    }
    assert said["scenarios"][1] == {k: v for k, v in asdict(BROKEN).items() if k != "waived"}


def test_what_was_heard_is_the_same_after_json() -> None:
    once = heard(True, False, protocol=(FINE, BROKEN))
    assert parse_run(json.loads(json.dumps(once.json()))) == once
    assert replace(once, file="g") != once
