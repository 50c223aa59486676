"""The journal: what counts after the end of a process, and after a reboot of the machine."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant.quantize.engine import journal
from quant.quantize.engine.journal import HEAD, RECORD, ErrorSums

BOUND, OTHER = b"b" * 32, b"o" * 32
NOW, LATER = b"1" * 36, b"2" * 36
ENTRIES = {
    (0, 0): ErrorSums(0.5, 2.0),
    (0, 1): ErrorSums(0.25, 1.0),
    (3, 0): ErrorSums(0.0, 0.0),
    (1, 7): ErrorSums(1e-30, 1e30),
}


def write_journal(path: Path, marked: int = 0, before: int = 0) -> Path:
    """Write a journal of all entries: ``before`` of them at its start, a mark after ``marked``."""
    entries = list(ENTRIES.items())
    log = journal.start_journal(path, BOUND, NOW, dict(entries[:before]))
    for n, (key, sums) in enumerate(entries[before:], before + 1):
        log.add(*key, sums)
        if n == marked:
            log.mark(log.records)
    log.close()
    return path


def test_entries_are_read_back(tmp_path: Path) -> None:
    assert journal.read_journal(write_journal(tmp_path / "j"), BOUND, NOW) == ENTRIES
    assert journal.read_journal(write_journal(tmp_path / "j", before=2), BOUND, NOW) == ENTRIES


@pytest.mark.parametrize("marked", [0, 1, 2, 3, 4])
def test_after_a_reboot_only_marked_entries_count(tmp_path: Path, marked: int) -> None:
    assert journal.read_journal(write_journal(tmp_path / "j", marked), BOUND, LATER) == dict(
        list(ENTRIES.items())[:marked]
    )


def test_entries_at_the_start_are_marked(tmp_path: Path) -> None:
    assert journal.read_journal(write_journal(tmp_path / "j", before=3), BOUND, LATER) == dict(
        list(ENTRIES.items())[:3]
    )


def test_a_mark_covers_the_entries_from_before_the_flush(tmp_path: Path) -> None:
    log = journal.start_journal(tmp_path / "j", BOUND, NOW, {})
    log.add(0, 0, ErrorSums(1, 1))
    records = log.records
    log.add(0, 1, ErrorSums(1, 1))  # while the data is being flushed
    log.mark(records)
    log.close()
    assert journal.read_journal(tmp_path / "j", BOUND, LATER) == {(0, 0): ErrorSums(1, 1)}


def test_a_journal_of_other_work_has_no_entries(tmp_path: Path) -> None:
    assert journal.read_journal(write_journal(tmp_path / "j"), OTHER, NOW) == {}
    assert journal.read_journal(tmp_path / "none", BOUND, NOW) == {}
    (tmp_path / "empty").write_bytes(b"")
    assert journal.read_journal(tmp_path / "empty", BOUND, NOW) == {}


@pytest.fixture(scope="module")
def marked_journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a journal with a mark after two entries. It is written once: that waits for the disk."""
    return write_journal(tmp_path_factory.mktemp("journal") / "j", marked=2).read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, HEAD.size + 6 * RECORD.size), st.integers(1, 255))
def test_cut_or_damaged_anywhere_it_has_no_wrong_entries(
    tmp_path: Path, marked_journal: bytes, position: int, flip: int
) -> None:
    data = marked_journal
    (tmp_path / "cut").write_bytes(data[:position])
    for now in (NOW, LATER):
        entries = journal.read_journal(tmp_path / "cut", BOUND, now)
        assert entries.items() <= ENTRIES.items()
        assert len(entries) <= max(position - HEAD.size, 0) // RECORD.size
    if position < len(data) and not HEAD.size - 36 <= position < HEAD.size:
        flipped = bytes([data[position] ^ flip])
        (tmp_path / "damaged").write_bytes(data[:position] + flipped + data[position + 1 :])
        damaged = journal.read_journal(tmp_path / "damaged", BOUND, NOW)
        assert damaged.items() <= ENTRIES.items()


def test_nothing_is_read_after_a_hole_of_zeros(tmp_path: Path) -> None:
    path = write_journal(tmp_path / "j")
    data = path.read_bytes()
    hole = HEAD.size + 2 * RECORD.size
    path.write_bytes(data[:hole] + bytes(RECORD.size) + data[hole + RECORD.size :])
    assert journal.read_journal(path, BOUND, NOW) == dict(
        [*ENTRIES.items()][:1]
    )  # the first record is the mark of the start


def test_a_machine_has_one_boot_id_until_it_restarts() -> None:
    assert len(journal.read_boot_id()) == 36 and journal.read_boot_id() == journal.read_boot_id()
