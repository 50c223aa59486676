"""The store: work is done once, believed only when whole, and survives every way to die."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.core import files
from quant.core.errors import InputError
from quant.core.store import RECEIPT, Store, StoredResult, hash_inputs
from tests.processes import PATIENCE_SECONDS

INPUTS = {"source": "abc", "settings": {"n": 1}}
FACTS = {"answer": 42}


class Work:
    """Work that counts how often it is done."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Path) -> Mapping[str, Any]:
        assert list(folder.iterdir()) == []
        self.times += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "out").write_text("bytes")
        return FACTS


def test_work_is_done_once_and_then_reused(tmp_path: Path) -> None:
    work, store = Work(), Store(tmp_path)
    first = store.run_once("stage", INPUTS, work)
    second = store.run_once("stage", INPUTS, work)
    assert work.times == 1
    assert (first.fresh, second.fresh) == (True, False)
    assert first.folder == second.folder == tmp_path / "stage" / hash_inputs(INPUTS)
    assert first.facts == second.facts == FACTS
    assert (
        first.receipts
        == second.receipts
        == (files.make_receipt(first.path("sub/out"), first.folder),)
    )
    assert second.receipt("sub/out").bytes == 5
    assert sorted(p.name for p in (tmp_path / "stage").iterdir()) == [hash_inputs(INPUTS)]


def test_other_inputs_and_other_stages_are_other_work(tmp_path: Path) -> None:
    work, store = Work(), Store(tmp_path)
    store.run_once("stage", INPUTS, work)
    store.run_once("stage", INPUTS | {"more": 1}, work)
    store.run_once("other", INPUTS, work)
    assert work.times == 3


@given(
    st.dictionaries(
        st.text(max_size=3), st.integers() | st.text(max_size=3) | st.lists(st.text(max_size=2))
    ),
    st.dictionaries(
        st.text(max_size=3), st.integers() | st.text(max_size=3) | st.lists(st.text(max_size=2))
    ),
)
def test_keys_are_equal_when_and_only_when_the_inputs_are(
    a: dict[str, Any], b: dict[str, Any]
) -> None:
    assert (hash_inputs(a) == hash_inputs(b)) == (a == b)
    assert hash_inputs(a) == hash_inputs(dict(reversed(a.items())))


def test_the_place_of_a_value_counts_and_not_only_its_letters() -> None:
    assert hash_inputs({"a": ["bc"]}) != hash_inputs({"ab": ["c"]})
    assert hash_inputs({"a": "1"}) != hash_inputs({"a": 1})


def damage_length(done: StoredResult) -> None:
    done.path("sub/out").write_text("longer than it was")


def damage_file(done: StoredResult) -> None:
    done.path("sub/out").unlink()


def damage_receipt(done: StoredResult) -> None:
    (done.folder / RECEIPT).write_text("{")


def damage_no_receipt(done: StoredResult) -> None:
    (done.folder / RECEIPT).unlink()


def damage_inputs(done: StoredResult) -> None:
    record = json.loads((done.folder / RECEIPT).read_text())
    (done.folder / RECEIPT).write_text(json.dumps(record | {"inputs": {"of": "others"}}))


def damage_no_facts(done: StoredResult) -> None:
    record = json.loads((done.folder / RECEIPT).read_text())
    del record["facts"]
    (done.folder / RECEIPT).write_text(json.dumps(record))


def damage_form(done: StoredResult) -> None:
    (done.folder / RECEIPT).write_text("[]")


def damage_bytes(done: StoredResult) -> None:
    (done.folder / RECEIPT).write_bytes(b"\xff\xfe")


DAMAGES = [v for k, v in list(globals().items()) if k.startswith("damage_")]


@pytest.mark.parametrize(
    "damage", DAMAGES, ids=[d.__name__.removeprefix("damage_") for d in DAMAGES]
)
def test_a_folder_that_does_not_fit_its_receipt_is_done_again(tmp_path: Path, damage: Any) -> None:
    work, store = Work(), Store(tmp_path)
    damage(store.run_once("stage", INPUTS, work))
    again = store.run_once("stage", INPUTS, work)
    assert work.times == 2
    assert again.fresh
    assert again.path("sub/out").read_text() == "bytes"


def test_a_partial_folder_is_no_result(tmp_path: Path) -> None:
    work, store = Work(), Store(tmp_path)
    done = store.run_once("stage", INPUTS, work)
    done.folder.rename(done.folder.with_name(done.folder.name + ".partial"))
    assert store.run_once("stage", INPUTS, work).fresh
    assert work.times == 2


def test_what_an_interrupted_run_left_is_kept_only_when_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept: list[bool] = []

    def make(folder: Path) -> Mapping[str, Any]:
        kept.append((folder / "half").exists())
        (folder / "half").write_text("x")
        if len(kept) < 3:
            raise KeyboardInterrupt
        return {}

    for keep in (True, True):
        with pytest.raises(KeyboardInterrupt):
            store.run_once("stage", INPUTS, make, keep_partial=keep)
    store.run_once("stage", INPUTS, make)
    assert kept == [False, True, False]


def test_intact_files_of_damaged_work_can_be_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    damage_length(store.run_once("stage", INPUTS, Work()))
    left: list[str] = []

    def make(folder: Path) -> Mapping[str, Any]:
        left.extend(p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")))
        return {}

    assert store.run_once("stage", INPUTS, make, keep_partial=True).fresh
    assert left == ["sub", "sub/out"]  # and not the receipt


@pytest.mark.parametrize("failure", [ValueError, InputError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_under_the_final_name(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    def make(folder: Path) -> Mapping[str, Any]:
        (folder / "f").write_text("x")
        raise failure("stop")

    with pytest.raises(failure, match="stop"):
        Store(tmp_path).run_once("stage", INPUTS, make)
    assert [p.name for p in (tmp_path / "stage").iterdir()] == [f"{hash_inputs(INPUTS)}.partial"]


def test_links_are_no_outputs(tmp_path: Path) -> None:
    def make(folder: Path) -> Mapping[str, Any]:
        (folder / "link").symlink_to(Path(__file__))
        (folder / "f").write_text("x")
        return {}

    assert [r.path for r in Store(tmp_path).run_once("stage", INPUTS, make).receipts] == ["f"]


def child(
    code: str, *args: str | Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    program = textwrap.dedent(code)
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, **env or {}),
    )


HOLDER = """
    import sys, time
    from pathlib import Path
    from quant.core.store import Store
    with Store(Path(sys.argv[1])).lock():
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_second_process_is_refused_and_the_holder_is_named(tmp_path: Path) -> None:
    with child(HOLDER, tmp_path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError) as caught, Store(tmp_path).lock():
            pass
        holder.kill()
    assert str(caught.value).startswith(f"{tmp_path}: in use by process {holder.pid} on ")


def test_the_folder_is_free_after_its_holder_was_killed(tmp_path: Path) -> None:
    with child(HOLDER, tmp_path) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.send_signal(signal.SIGKILL)
    with Store(tmp_path).lock():
        assert str(os.getpid()) in (tmp_path / "held-by").read_text()
    assert not (tmp_path / "held-by").exists()


def test_the_folder_is_free_after_a_failure_inside(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), Store(tmp_path).lock():
        raise ValueError("inside")
    with Store(tmp_path).lock():
        pass


DYING = """
    import os, sys
    from pathlib import Path
    from quant.core import files, store

    root, where = Path(sys.argv[1]), sys.argv[2]

    def die_before(module, name, when=lambda *a: True):
        real = getattr(module, name)
        def dying(*args, **kwargs):
            if when(*args):
                os._exit(9)
            return real(*args, **kwargs)
        setattr(module, name, dying)

    def make(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "out").write_text("by")
        if where == "while working":
            os._exit(9)
        (folder / "sub" / "out").write_text("bytes")
        return {"answer": 42}

    if where == "while hashing":
        die_before(files, "make_receipt")
    elif where == "before the receipt is written":
        die_before(files, "write_text")
    elif where == "before the receipt has its name":
        die_before(Path, "replace")
    elif where == "before the folder is flushed":
        die_before(files, "commit_folder")
    elif where == "before the folder has its name":
        die_before(Path, "rename")
    elif where == "after the folder has its name":
        die_before(files, "flush_folder", lambda path: path == root / "stage")
    elif where == "while the old folder is taken away":
        die_before(files.shutil, "rmtree")
    store.Store(root).run_once("stage", {"source": "abc", "settings": {"n": 1}}, make)
    print("survived")
"""


@pytest.mark.parametrize(
    "where",
    [
        "while working",
        "while hashing",
        "before the receipt is written",
        "before the receipt has its name",
        "before the folder is flushed",
        "before the folder has its name",
        "after the folder has its name",
        "while the old folder is taken away",
    ],
)
def test_a_run_that_is_killed_anywhere_is_continued_by_the_next(tmp_path: Path, where: str) -> None:
    damaged = Store(tmp_path).run_once("stage", INPUTS, Work())
    damage_length(damaged)  # so that there is something old to take away
    with child(DYING, tmp_path, where) as dying:
        out, err = dying.communicate(timeout=PATIENCE_SECONDS)
    assert (dying.returncode, out) == (9, ""), err
    final = tmp_path / "stage" / hash_inputs(INPUTS)
    if final.exists() and where != "while the old folder is taken away":
        assert where == "after the folder has its name"

    work = Work()
    done = Store(tmp_path).run_once("stage", INPUTS, work)

    assert work.times == (0 if where == "after the folder has its name" else 1)
    assert done.path("sub/out").read_text() == "bytes"
    assert done.facts == FACTS
    assert [p.name for p in (tmp_path / "stage").iterdir()] == [hash_inputs(INPUTS)]


FULL = """
    import resource, sys
    from pathlib import Path
    from quant.core import files
    from quant.core.errors import InputError
    from quant.core.store import Store

    def make(folder):
        files.write_text(folder / "big", "x" * 10**6)
        return {}

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    try:
        if sys.argv[3] == "lock":
            with Store(Path(sys.argv[1])).lock():
                pass
        Store(Path(sys.argv[1])).run_once("stage", {}, make)
    except InputError as e:
        print(e)
"""


@pytest.mark.parametrize(
    ("limit", "what", "named"), [(10**5, "once", "big"), (0, "lock", "held-by")]
)
def test_a_full_disk_is_reported_with_the_file(
    tmp_path: Path, limit: int, what: str, named: str
) -> None:
    with child(FULL, tmp_path, str(limit), what, env={"PYTHONDONTWRITEBYTECODE": "1"}) as full:
        out, err = full.communicate(timeout=PATIENCE_SECONDS)
    assert full.returncode == 0, err
    file, _, message = out.partition(": ")
    assert Path(file).name == named
    assert message == "the file grew too large; free some and run again\n"


def test_a_root_that_cannot_be_written_is_reported_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError) as caught, Store(tmp_path / "locked").lock():
        pass
    assert str(caught.value) == f"{tmp_path / 'locked'}: cannot be written (Permission denied)"
