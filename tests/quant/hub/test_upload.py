"""Sending to the hub's storage: unseen, once, and no faster than it may."""

from pathlib import Path

import pytest

from quant.core import files
from quant.core.errors import Unreachable
from quant.hub.upload import Destination, RateLimiter, upload_variant
from quant.release.change import plan_change
from quant.release.publish import publish_release
from tests.hub import Fault, Hub
from tests.quant.release.publishing import (
    CONTENT,
    REPO,
    SMALL,
    list_commits,
    list_paths,
    quiet_client,
    read_folder,
    read_repo,
    reset,
    write_release,
)

pytestmark = quiet_client
LARGE = {name: data for name, data in CONTENT.items() if name.endswith(".gguf")}


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_release(tmp_path / "tiny")


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the limiter was asked to let pass."""
    counts: list[int] = []
    monkeypatch.setattr(RateLimiter, "take", lambda _self, count: counts.append(count))
    return counts


def early(folder: Path, *names: str, limit: int | None = None) -> None:
    placed = {name: folder / name for name in names}
    upload_variant(
        placed,
        [files.make_receipt(path, folder) for path in placed.values()],
        Destination(REPO, limit=limit),
    )


def test_never_more_than_the_rate_plus_one_piece_is_sent() -> None:
    clock = Clock()
    limiter = RateLimiter(1000, clock, clock.wait)
    total = 0
    for count in (500, 500, 64, 4000, 1, 0, 936):
        limiter.take(count)
        assert total <= 1000 * clock.now + 1e-6
        total += count
    assert clock.now == pytest.approx((total - 936) / 1000)


def test_idle_time_allows_no_burst() -> None:
    clock = Clock()
    limiter = RateLimiter(1000, clock, clock.wait)
    limiter.take(1000)
    clock.now = 100.0
    limiter.take(1000)
    limiter.take(1000)
    assert clock.now == pytest.approx(101.0)


def test_every_byte_sent_is_counted_by_the_limiter(
    the_hub: Hub, folder: Path, passed: list[int]
) -> None:
    publish_release(plan_change(folder, Destination(REPO, limit=10**6)))
    assert read_repo(the_hub) == read_folder(folder)
    assert sum(passed) >= sum(map(len, read_folder(folder).values()))


def test_without_a_limit_nothing_is_throttled(
    the_hub: Hub, folder: Path, passed: list[int]
) -> None:
    publish_release(plan_change(folder, Destination(REPO)))
    assert passed == []


def test_bytes_sent_again_after_a_failure_are_counted_again(
    the_hub: Hub, folder: Path, passed: list[int]
) -> None:
    upload = next(
        n for n, path in enumerate(list_paths(the_hub, folder)) if path.startswith("/upload/")
    )
    early(folder, "tiny-UD-TQ1_0.gguf", limit=10**6)
    assert sum(passed) == 800
    reset(the_hub)
    passed.clear()
    the_hub.cues = {upload: Fault.BROKEN}
    publish_release(plan_change(folder, Destination(REPO, limit=10**6)))
    once = sum(map(len, read_folder(folder).values()))
    assert sum(passed) > once
    assert read_repo(the_hub) == read_folder(folder)


def test_a_limit_keeps_the_client_from_xet_which_cannot_be_throttled(
    the_hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    publish_release(plan_change(folder, Destination(REPO, limit=10**9)))
    assert read_repo(the_hub) == read_folder(folder)
    assert not the_hub.asked("GET", "xet")


def test_files_sent_early_are_invisible_and_not_sent_again(the_hub: Hub, folder: Path) -> None:
    first, *others = LARGE
    early(folder, first)
    assert read_repo(the_hub) == {}
    assert list_commits(the_hub) == []
    early(folder, first, *others)
    assert read_repo(the_hub) == {}
    sent = len(the_hub.asked("PUT", "^/upload/"))
    assert sent == 1 + 3 + 3  # in parts of 2,000 bytes
    publish_release(plan_change(folder, Destination(REPO)))
    assert len(the_hub.asked("PUT", "^/upload/")) == sent
    assert read_repo(the_hub) == read_folder(folder)
    assert len(list_commits(the_hub)) == 1


@pytest.mark.parametrize("fault", [Fault.DROPPED, Fault.LOST])
def test_whichever_early_request_fails_the_release_is_one_commit(
    the_hub: Hub, tmp_path: Path, fault: Fault
) -> None:
    folder = write_release(tmp_path / "small", SMALL)
    large = [name for name in SMALL if name.endswith(".gguf")]
    for _ in range(2):  # the client's first upload in a process may ask one thing more
        early(folder, *large)
        count = len(the_hub.requests)
        reset(the_hub)
    assert count > 5
    for k in range(count):
        the_hub.cues = {k: fault}
        try:
            early(folder, *large)
        except Unreachable as e:
            assert "run again to continue" in str(e)
        the_hub.cues = {}
        assert read_repo(the_hub) == {}
        early(folder, *large)
        publish_release(plan_change(folder, Destination(REPO)))
        assert read_repo(the_hub) == read_folder(folder)
        assert len(list_commits(the_hub)) == 1
        reset(the_hub)
