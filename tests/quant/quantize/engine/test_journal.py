"""The journal: what was written before the end of a process, and what can be believed after that of a machine."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant.quantize.engine import journal
from quant.quantize.engine.journal import HEAD, RECORD, BlockSums

BOUND, OTHER = b"b" * 32, b"o" * 32
NOW, LATER = b"1" * 36, b"2" * 36
ENTRIES = {
    (0, 0): BlockSums(0.5, 2.0),
    (0, 1): BlockSums(0.25, 1.0),
    (3, 0): BlockSums(0.0, 0.0),
    (1, 7): BlockSums(1e-30, 1e30),
}


def written(path: Path, marked: int = 0, before: int = 0) -> Path:
    """A journal of all entries, of which some were there when it was begun, and a mark after some."""
    entries = list(ENTRIES.items())
    made = journal.start_journal(path, BOUND, NOW, dict(entries[:before]))
    for n, (key, sums) in enumerate(entries[before:], before + 1):
        made.add(*key, sums)
        if n == marked:
            made.mark(made.records)
    made.close()
    return path


def test_what_was_added_is_read_again(tmp_path: Path) -> None:
    assert journal.read_journal(written(tmp_path / "j"), BOUND, NOW) == ENTRIES
    assert journal.read_journal(written(tmp_path / "j", before=2), BOUND, NOW) == ENTRIES


@pytest.mark.parametrize("marked", [0, 1, 2, 3, 4])
def test_after_a_reboot_only_what_a_mark_covers_is_believed(tmp_path: Path, marked: int) -> None:
    assert journal.read_journal(written(tmp_path / "j", marked), BOUND, LATER) == dict(
        list(ENTRIES.items())[:marked]
    )


def test_entries_it_began_with_are_covered_from_the_start(tmp_path: Path) -> None:
    assert journal.read_journal(written(tmp_path / "j", before=3), BOUND, LATER) == dict(
        list(ENTRIES.items())[:3]
    )


def test_a_mark_covers_what_was_there_when_the_flush_began(tmp_path: Path) -> None:
    made = journal.start_journal(tmp_path / "j", BOUND, NOW, {})
    made.add(0, 0, BlockSums(1, 1))
    records = made.records
    made.add(0, 1, BlockSums(1, 1))  # while the data is being flushed
    made.mark(records)
    made.close()
    assert journal.read_journal(tmp_path / "j", BOUND, LATER) == {(0, 0): BlockSums(1, 1)}


def test_a_journal_of_other_work_says_nothing(tmp_path: Path) -> None:
    assert journal.read_journal(written(tmp_path / "j"), OTHER, NOW) == {}
    assert journal.read_journal(tmp_path / "none", BOUND, NOW) == {}
    (tmp_path / "empty").write_bytes(b"")
    assert journal.read_journal(tmp_path / "empty", BOUND, NOW) == {}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, HEAD.size + 6 * RECORD.size), st.integers(1, 255))
def test_cut_or_damaged_anywhere_it_says_nothing_that_is_not_so(
    tmp_path: Path, at: int, flip: int
) -> None:
    data = written(tmp_path / "j", marked=2).read_bytes()
    (tmp_path / "cut").write_bytes(data[:at])
    for now in (NOW, LATER):
        cut = journal.read_journal(tmp_path / "cut", BOUND, now)
        assert cut.items() <= ENTRIES.items()
        whole = max(at - HEAD.size, 0) // RECORD.size
        assert len(cut) <= whole
    if at < len(data) and not HEAD.size - 36 <= at < HEAD.size:
        (tmp_path / "damaged").write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        assert journal.read_journal(tmp_path / "damaged", BOUND, NOW).items() <= ENTRIES.items()


def test_holes_of_zeros_end_what_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "j")
    data = path.read_bytes()
    hole = HEAD.size + 2 * RECORD.size
    path.write_bytes(data[:hole] + bytes(RECORD.size) + data[hole + RECORD.size :])
    assert journal.read_journal(path, BOUND, NOW) == dict(
        [*ENTRIES.items()][:1]
    )  # the first record is the mark of the start


def test_a_machine_has_one_boot_id_until_it_restarts() -> None:
    assert len(journal.read_boot_id()) == 36 and journal.read_boot_id() == journal.read_boot_id()
