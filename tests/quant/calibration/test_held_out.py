"""Held-out texts by domain: a kind that is long enough has its own text, the rest is pooled."""

from quant.calibration.held_out import describe_short_kinds, group_by_domain, list_short_kinds
from quant.calibration.text import HeldOutText


def documents(**sizes: int) -> tuple[HeldOutText, ...]:
    return tuple(HeldOutText(k, "", k, "en", k[0] * n) for k, n in sizes.items())


def chunks(text: str) -> int:
    return len(text) // 10


def test_short_kinds_are_pooled_as_one_domain() -> None:
    texts = group_by_domain(documents(chat=45, code=40, maths=20, json=25), chunks)
    assert {name: len(text) for name, text in texts.items()} == {
        "chat": 45,
        "code": 40,
        "other": 45,
    }


def test_a_pool_that_is_too_short_is_left_out() -> None:
    assert list(group_by_domain(documents(chat=45, maths=20), chunks)) == ["chat"]


def test_kinds_in_no_text_are_listed() -> None:
    kept = documents(chat=45, maths=12, json=12)
    assert list_short_kinds(kept, group_by_domain(kept, chunks)) == ["json", "maths"]
    assert (
        describe_short_kinds(["json", "maths"])
        == "not measured, too little held-out text: json, maths"
    )
    pooled = documents(chat=45, maths=20, json=25)
    assert (
        list_short_kinds(pooled, group_by_domain(pooled, chunks)) == []
        and describe_short_kinds([]) == ""
    )


def test_a_small_set_is_one_domain_or_none() -> None:
    assert group_by_domain(documents(chat=25, maths=20), chunks).keys() == {"all"}
    assert group_by_domain(documents(chat=5), chunks) == {}
