"""The result of a file: the protocol must hold, and a fraction of BF16's answers too."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from quant.chat.verdict import (
    ANSWERS,
    AnswerCheck,
    CheckResult,
    Exchange,
    SmokeRun,
    judge_run,
    parse_run,
)

FINE = CheckResult("stream", "protocol", True, "ok")
BROKEN = CheckResult("stream", "protocol", False, "another text", "the prompt", "the answer")
EXCHANGE = Exchange("a", True, "Hello", "Hm.", "Hi", ("f({})",), "stop", 10, 4)


def answers(*right: bool) -> tuple[AnswerCheck, ...]:
    return tuple(
        AnswerCheck(f"s{n}", 1, "answer", "Who?", "'Eve'", "Eve" if r else "Rosa", r)
        for n, r in enumerate(right)
    )


def make_run(*right: bool, protocol: tuple[CheckResult, ...] = (FINE,)) -> SmokeRun:
    return SmokeRun("f.gguf", ("--jinja",), protocol, answers(*right), (EXCHANGE,))


def test_a_file_without_faults_passes() -> None:
    result = judge_run(make_run(True, True))
    assert result.passed and result.faults == ()
    assert [(s.name, s.kind, s.passed) for s in result.scenarios] == [
        ("stream", "protocol", True),
        ("s0", "quality", True),
        ("s1", "quality", True),
        (ANSWERS, "quality", True),
    ]


def test_one_protocol_fault_stops_the_release() -> None:
    result = judge_run(make_run(True, protocol=(FINE, BROKEN)))
    assert not result.passed
    assert result.faults == ("f.gguf: stream: another text",)


@pytest.mark.parametrize(
    ("right", "share", "passed"),
    [(10, 1.0, True), (9, 1.0, False), (7, 0.7, True), (6, 0.7, False), (0, 0.0, True)],
)
def test_the_required_fraction_decides_how_many_answers_are_needed(
    right: int, share: float, passed: bool
) -> None:
    result = judge_run(make_run(*[n < right for n in range(10)]), share)
    assert result.passed is passed
    assert result.scenarios[-1].detail.startswith(f"{right} of 10 right answers that are known; ")


def test_answers_that_bf16_gets_wrong_are_not_required() -> None:
    reference = make_run(True, True, False, False)
    assert judge_run(make_run(True, True, False, False), 1.0, reference).passed
    result = judge_run(make_run(True, False, True, True), 1.0, reference)
    assert not result.passed
    assert result.faults == (
        f"f.gguf: {ANSWERS}: 1 of 2 right answers that the BF16 file gives; 2 are needed",
    )
    assert judge_run(make_run(False), 1.0, make_run(False)).passed


def test_a_wrong_answer_is_reported_and_stops_nothing_if_enough_are_correct() -> None:
    result = judge_run(make_run(True, False), 0.5)
    assert result.passed
    [off] = [s for s in result.scenarios if not s.passed]
    assert (off.name, off.detail) == (
        "s1",
        "turn 1, 'Who?': expected 'Eve' in the answer, found 'Rosa'",
    )
    assert off.answer == "Rosa"


def test_a_waived_failure_passes_and_stays_visible() -> None:
    result = judge_run(
        make_run(False, protocol=(BROKEN,)), waivers={"stream": "known", ANSWERS: "tiny", "s0": "x"}
    )
    assert result.passed
    assert [(s.name, s.waived) for s in result.scenarios] == [
        ("stream", "known"),
        ("s0", "x"),
        (ANSWERS, "tiny"),
    ]


def test_a_waiver_of_a_passed_check_leaves_no_trace() -> None:
    assert (
        judge_run(make_run(True), waivers={"stream": "known"}).scenarios
        == judge_run(make_run(True)).scenarios
    )


def test_the_json_of_a_result_keeps_its_keys() -> None:
    document: dict[str, Any] = json.loads(
        json.dumps(judge_run(make_run(True, protocol=(FINE, BROKEN))).json())
    )
    assert document.keys() == {"file", "passed", "server", "scenarios"}
    assert document["scenarios"][0] == {
        "name": "stream",
        "kind": "protocol",
        "passed": True,
        "detail": "ok",
    }
    assert document["scenarios"][1] == {k: v for k, v in asdict(BROKEN).items() if k != "waived"}


def test_a_record_survives_json_with_the_keys_of_the_store() -> None:
    once = make_run(True, False, protocol=(FINE, BROKEN))
    assert parse_run(json.loads(json.dumps(once.json()))) == once
    assert replace(once, file="g") != once
    stored = once.json()
    assert stored.keys() == {"file", "server", "protocol", "answers", "transcript"}
    assert stored["answers"][0].keys() == {
        "scenario",
        "turn",
        "about",
        "question",
        "expected",
        "found",
        "right",
    }
