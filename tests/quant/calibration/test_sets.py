"""Sets are TOML; datasets of the hub are read as they were locked, or refused."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quant.calibration import datasets, sets
from quant.calibration.documents import SETS
from quant.cli.options import quant
from quant.core.errors import CheckError, InputError
from quant.core.format import hash_texts, to_canonical_json
from tests.hub import Hub, running

HEAD = 'name = "mine"\nsummary = "For tests."\n'
SOURCE = '[[source]]\nname = "a"\nkind = "conversation"\nlicense = "MIT"\n'


def a_set(folder: Path, *sources: str, head: str = HEAD) -> str:
    path = folder / "mine.toml"
    path.write_text(head + "\n".join(SOURCE + s for s in sources))
    return str(path)


def line(name: str, question: str = "Hi", **more: Any) -> str:
    expected = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"Hello {name}"},
    ]
    return json.dumps({"id": name, "messages": expected, **more}) + "\n"


def read(name: str) -> list[str]:
    calibration_set, folder = sets.find_set(name)
    return [
        d.id
        for d in datasets.read_documents(
            calibration_set, folder, datasets.read_dataset_lock(calibration_set, folder)
        )
    ]


@pytest.mark.parametrize("name", [p.stem for p in sorted(SETS.glob("*.toml"))])
def test_every_shipped_set_is_valid_and_has_licenses(name: str) -> None:
    calibration_set, _ = sets.find_set(name)
    assert calibration_set.name == name
    assert all(s.license in ("Apache-2.0", "MIT", "CC-BY-4.0") for s in calibration_set.source)
    assert all(s.attribution for s in calibration_set.source if s.repo)


def test_the_release_set_has_its_shares_and_size() -> None:
    calibration_set, _ = sets.find_set("glm")
    shares: dict[str, float] = {}
    for s in calibration_set.source:
        shares[s.kind] = round(shares.get(s.kind, 0) + (s.share or 0), 4)
    assert shares == {
        "conversation": 0.32,
        "coding": 0.3,
        "tools": 0.15,
        "languages": 0.13,
        "mathematics": 0.1,
    }
    assert 1_000_000 <= (calibration_set.tokens or 0) <= 2_000_000


def test_the_embedded_set_has_every_file_of_its_folder() -> None:
    calibration_set, folder = sets.find_set("embedded")
    assert {p for s in calibration_set.source for p in datasets.list_local_files(s, folder)} == set(
        (SETS / "embedded").glob("*.jsonl")
    )


def test_files_beside_a_set_are_its_sources(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(line("one") + line("two"))
    (tmp_path / "y.jsonl").write_text(line("three"))
    assert read(a_set(tmp_path, 'path = "*.jsonl"')) == ["one", "two", "three"]
    assert read(a_set(tmp_path, 'path = "*.jsonl"\nrows = 1')) == ["one"]
    assert read(str(tmp_path / "y.jsonl")) == ["three"]
    assert read(str(tmp_path)) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("sources", "head", "expected"),
    [
        ([], HEAD, "source: missing"),
        (['path = "x"'], HEAD.replace("mine", "../x"), "name: expected letters"),
        (
            ['path = "x"\nrepo = "a/b"\nfiles = ["x"]'],
            HEAD,
            "source[0]: expected one of path and repo, found both",
        ),
        ([""], HEAD, "source[0]: expected one of path and repo, found neither"),
        (['repo = "ab"\nfiles = ["x"]'], HEAD, "source[0].repo: expected OWNER/NAME, found 'ab'"),
        (
            ['repo = "a/b"'],
            HEAD,
            "source[0].files: expected the files of the repo to read, found none",
        ),
        (['path = "x"\nrows = 0'], HEAD, "source[0].rows: expected at least 1, found 0"),
        (['path = "x"', 'path = "y"'], HEAD, "source 'a': expected once, found twice"),
        (['path = "x"\nshare = 0.5'], HEAD, "tokens: missing; shares are fractions of that number"),
        (
            ['path = "x"\nshare = 0.5'],
            HEAD + "tokens = 100\n",
            "shares that add up to 1, because the set has tokens, found 0.5",
        ),
        (
            ['path = "x"'],
            HEAD + "held_out = 0.9\n",
            "held_out: expected a fraction from 0 to 0.5, found 0.9",
        ),
        (['path = "x"\nform = "poem"'], HEAD, "source[0].form"),
        (['path = "x"\nlicence = "MIT"'], HEAD, "licence: unknown key; did you mean 'license'?"),
        (['path = "x"\nlisense = "MIT"'], HEAD, "lisense: unknown key; did you mean 'license'?"),
    ],
)
def test_problems_of_a_set_are_reported(
    tmp_path: Path, sources: list[str], head: str, expected: str
) -> None:
    with pytest.raises(InputError) as caught:
        sets.find_set(a_set(tmp_path, *sources, head=head))
    assert expected in str(caught.value)


def test_the_british_key_of_the_license_is_still_read(tmp_path: Path) -> None:
    name = a_set(tmp_path, 'path = "x"')
    expected = sets.find_set(name)[0]
    path = Path(name)
    path.write_text(path.read_text().replace("license", "licence"))
    assert sets.find_set(name)[0] == expected
    path.write_text(HEAD + SOURCE.replace('license = "MIT"', 'path = "x"'))
    with pytest.raises(InputError, match=r"source\[0\].license: missing"):
        sets.find_set(name)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("embedded", "b024f90ed3d58cb2304e1c59a71b5f69fb9a47bcb21bab06a311b452030942ac"),
        ("glm", "15d785a2e94f6b5c620f9f8a1a3d07b36e01dcfeb0d13034803524fe23e9ffc6"),
    ],
)
def test_the_digests_of_the_shipped_sets_are_those_of_the_first_release(
    name: str, digest: str
) -> None:
    calibration_set, folder = sets.find_set(name)
    inputs = datasets.describe_set_inputs(calibration_set, folder, {})
    assert hash_texts([to_canonical_json(inputs["set"])]) == digest


def test_an_unknown_set_is_reported_with_the_nearest_name() -> None:
    with pytest.raises(
        InputError, match="calibration set 'embeded' is not known: did you mean 'embedded'"
    ):
        sets.find_set("embeded")


def test_a_source_without_files_or_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.jsonl: source a: expected files, found none"):
        read(a_set(tmp_path, 'path = "none.jsonl"'))
    (tmp_path / "x.json").write_text('[{"messages": []}]')
    with pytest.raises(
        InputError, match=r"calibration set mine: source a: expected documents, found none"
    ):
        read(a_set(tmp_path, 'path = "x.json"\nform = "messages"'))


# ---- datasets of the hub

CHAT = 'repo = "org/chat"\nfiles = ["data/*.jsonl"]'


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a dataset, and a client that knows no other."""
    from huggingface_hub import constants

    with running() as served:
        for name, value in {
            "ENDPOINT": served.url,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            served.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for proxy in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(proxy, "*")
        add(served, "one", "two")
        yield served


def add(hub: Hub, *names: str) -> str:
    files = {
        "data/train.jsonl": "".join(map(line, names)).encode(),
        "README.md": b"# Chat",
        "data/x.parquet": b"x",
    }
    return hub.add("org/chat", files)


def lock_set(name: str) -> dict[str, Any]:
    calibration_set, folder = sets.find_set(name)
    datasets.lock_datasets(calibration_set, folder)
    found: dict[str, Any] = json.loads(
        datasets.dataset_lock_path(calibration_set, folder).read_text()
    )
    return found


def test_a_lock_has_commit_files_and_documents(hub: Hub, tmp_path: Path) -> None:
    commit = add(hub, "one", "two", "three")
    one = lock_set(a_set(tmp_path, CHAT))["a"]
    assert (one["repo"], one["revision"], one["rows"]) == ("org/chat", commit, 3)
    assert [f["path"] for f in one["files"]] == ["data/train.jsonl"]
    assert read(str(tmp_path / "mine.toml")) == ["one", "two", "three"]


def test_a_locked_set_is_the_same_when_the_branch_moves_or_the_hub_is_gone(
    hub: Hub, tmp_path: Path
) -> None:
    name = a_set(tmp_path, CHAT)
    lock_set(name)
    add(hub, "other")
    assert read(name) == ["one", "two"]
    before = len(hub.requests)
    assert read(name) == ["one", "two"]
    assert len(hub.requests) == before  # from the cache, without a question


def test_a_dataset_without_a_lock_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"mine.lock.json: missing; a are datasets of the hub.*quant calibration lock mine",
    ):
        read(a_set(tmp_path, CHAT))


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        (
            lambda d: d["a"].update(sha256="0" * 64),
            CheckError,
            "expected 2 documents with the locked sha256 0000",
        ),
        (
            lambda d: d["a"]["files"][0].update(sha256="0" * 64),
            CheckError,
            "data/train.jsonl: expected the locked sha256 0",
        ),
        (
            lambda d: d["a"].update(repo="org/other"),
            InputError,
            "expected a commit of org/chat, found org/other",
        ),
        (lambda d: d["a"].update(revision="main"), InputError, "expected a commit of org/chat"),
        (lambda d: d.clear(), InputError, "expected a commit of org/chat, found nothing"),
        (lambda d: d["a"].pop("rows"), InputError, "expected a lock, found something else"),
    ],
)
def test_content_that_differs_from_the_lock_is_refused(
    hub: Hub, tmp_path: Path, change: Any, error: Any, expected: str
) -> None:
    name = a_set(tmp_path, CHAT)
    data = lock_set(name)
    change(data)
    (tmp_path / "mine.lock.json").write_text(json.dumps(data))
    with pytest.raises(error, match=expected):
        read(name)


def test_a_set_that_changed_since_it_was_locked_is_refused(hub: Hub, tmp_path: Path) -> None:
    lock_set(a_set(tmp_path, CHAT))
    with pytest.raises(CheckError, match="the set has changed since it was locked"):
        read(a_set(tmp_path, CHAT + "\nrows = 1"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('repo = "org/nobody"\nfiles = ["*"]', "org/nobody: not on the hub"),
        (
            'repo = "org/chat"\nfiles = ["*.csv"]',
            r"source a: expected \*.csv, found .*README.md, data/train.jsonl",
        ),
        ('path = "x"', "expected a dataset of the hub to lock, found only files"),
    ],
)
def test_a_set_that_cannot_be_locked_is_reported(
    hub: Hub, tmp_path: Path, source: str, expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        lock_set(a_set(tmp_path, source))
    assert not (tmp_path / "mine.lock.json").exists()


def rows_of(*answers: str | None) -> dict[str, bytes]:
    """A file of conversations with those answers."""
    expected = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": a}] for a in answers
    ]
    return {"data/x.json": json.dumps([{"messages": m} for m in expected]).encode()}


FORMED = 'repo = "org/chat"\nfiles = ["data/x.json"]\nform = "messages"'


def test_a_lock_counts_left_out_rows_by_reason(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/chat", rows_of("Hello", "", "Hello again", None))
    quant.main(["calibration", "lock", a_set(tmp_path, FORMED)], standalone_mode=False)
    assert "a: 2 left out (an empty message: 2)" in capsys.readouterr().err
    lock = json.loads((tmp_path / "mine.lock.json").read_text())["a"]
    assert (lock["rows"], lock["left_out"]) == (2, {"an empty message": 2})
    assert len(read(str(tmp_path / "mine.toml"))) == 2


def test_a_source_with_most_rows_left_out_is_not_locked(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/chat", rows_of("Hello", "", ""))
    with pytest.raises(
        InputError, match=r"source a: .* found 1 that do and 2 that do not \(an empty message: 2\)"
    ):
        lock_set(a_set(tmp_path, FORMED))
    assert not (tmp_path / "mine.lock.json").exists()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    from datasets.arrow_dataset import Dataset

    buffer = io.BytesIO()
    Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


def oasst(
    name: str, parent: str | None, role: str, lang: str, *, deleted: bool = False
) -> dict[str, Any]:
    rank = None if parent is None else 0.0
    more = {
        "user_id": "u",
        "created_date": "2023",
        "review_count": 3,
        "review_result": True,
        "synthetic": False,
    }
    calibration_set = {
        "message_id": name,
        "parent_id": parent,
        "text": f"{role} {name}",
        "role": role,
        "lang": lang,
    }
    return (
        calibration_set
        | {
            "rank": rank,
            "deleted": deleted,
            "message_tree_id": name,
            "tree_state": "ready_for_export",
        }
        | more
    )


def test_the_release_set_is_read_from_files_with_the_columns_of_its_datasets(
    hub: Hub, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    talk = parquet([{"messages": chat, "full_topic": "Greetings"}])
    call = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    expected = (
        ("system", "<tools></tools>"),
        ("human", "Weather?"),
        ("gpt", call),
        ("tool", "sun"),
        ("gpt", "Sun."),
    )
    tool = [{"from": who, "value": what} for who, what in expected]
    hermes = {
        "id": "1",
        "conversations": tool,
        "tools": '[{"name": "weather", "parameters": {}}]',
        "category": "x",
    }
    trees = [oasst(f"{lang}q", None, "prompter", lang) for lang in ("en", "de", "zh")]
    trees += [oasst(f"{lang}a", f"{lang}q", "assistant", lang) for lang in ("en", "de", "zh")]
    trees += [oasst("gone", "enq", "assistant", "en", deleted=True)]
    code = [
        {
            "id": f"{n}",
            "input": "Write f.",
            "output": "def f(): ...",
            "domain": "generic",
            "unit_tests": "[]",
            "average_test_score": score,
        }
        for n, score in enumerate(("1.0", "0.4"))
    ]
    part = "train-00000-of-00001.parquet"
    hub.add("OpenAssistant/oasst2", {f"data/{part}": parquet(trees), "README.md": b"#"})
    subsets = ("everyday-conversations", "systemchats-30k", "self-oss-instruct", "numina-cot-100k")
    hub.add("HuggingFaceTB/smoltalk", {f"data/{name}/{part}": talk for name in subsets})
    hub.add(
        "nvidia/OpenCodeInstruct",
        {f"data/{part}": parquet(code), "data/train-00001-of-00002.parquet": b"not read"},
    )
    names = ("func-calling.json", "glaive-function-calling-5k.json")
    tools = {n: json.dumps([hermes]).encode() for n in names}
    tools["func-calling-singleturn.json"] = (
        b"not read: it repeats the first turns of func-calling.json"
    )
    hub.add("NousResearch/hermes-function-calling-v1", tools)
    shutil.copy(SETS / "glm.toml", tmp_path)
    shutil.copytree(SETS / "embedded", tmp_path / "embedded")
    calibration_set, folder = sets.find_set(str(tmp_path / "glm.toml"))
    lock_set = datasets.lock_datasets(calibration_set, folder)
    found: dict[str, list[Any]] = {s.name: [] for s in calibration_set.source}
    for document in datasets.read_documents(
        calibration_set, folder, datasets.read_dataset_lock(calibration_set, folder)
    ):
        found[document.source].append(document)
    assert {name: len(d) for name, d in found.items() if name != "embedded-coding"} == {
        "oasst2-en": 1,
        "smoltalk-everyday": 1,
        "smoltalk-systems": 1,
        "opencodeinstruct": 1,
        "smoltalk-oss-instruct": 1,
        "hermes-tools": 2,
        "oasst2-languages": 2,
        "smoltalk-mathematics": 1,
    }
    assert {d.language for d in found["oasst2-languages"]} == {"de", "zh"}
    assert found["oasst2-en"][0].messages[-1]["content"] == "assistant ena"
    assert found["hermes-tools"][0].tools and found["hermes-tools"][0].messages[1]["tool_calls"]
    assert [f.path for f in lock_set["opencodeinstruct"].files] == [f"data/{part}"]
