"""The smoke test with a real server: what passes, what is caught by which name, and that nothing stays behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.chat.file_checks import FILE_CHECKS
from quant.chat.gguf_patch import KEY, write_with_template
from quant.chat.report import TRANSCRIPT
from quant.chat.scenarios import merge_scenarios
from quant.chat.smoke import (
    SmokeSettings,
    SmokeTestError,
    SmokeTestRequest,
    run_smoke_test,
    smoke_test,
)
from quant.chat.template import patch_template
from quant.chat.verdict import ANSWERS, SmokeResult, SmokeRun, judge_run
from quant.core.errors import InputError, ToolError
from quant.core.store import Store
from quant.llama import toolchain
from quant.llama.gguf import read_header
from quant.llama.model_file import ModelFile
from quant.llama.toolchain import Toolchain
from quant.plan.load import RECIPES, load_model, load_template_patch
from quant.plan.recipe import Waiver
from quant.plan.sizes import kv_cache_bytes
from quant.quantize.shard import merge_shards, split_file
from tests.gguf_files import LLAMA, key, write
from tests.models.conversion import convert
from tests.models.twins import write_twin
from tests.processes import PATIENCE_SECONDS, lives, wait_for, written_pid

Fake = Callable[..., Toolchain]
MODEL, _ = load_model("tiny-glm")
TINY = RECIPES / "models" / "tiny-glm"
SCENARIOS = merge_scenarios(MODEL)
NAMES = [
    s.name for s in SCENARIOS.scenarios if s.name.startswith("conversation") or s.name == "stop"
]
tools_needed = pytest.mark.tools


def make_settings(path: Path, *only: str, **changes: Any) -> SmokeSettings:
    scenarios = merge_scenarios(MODEL, only) if only else SCENARIOS
    return replace(
        SmokeSettings(ModelFile.open(path), scenarios, MODEL.max_answer, MODEL.ollama.stop),
        **changes,
    )


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny model as its release has it."""
    folder = tmp_path_factory.mktemp("smoke")
    shutil.copytree(TINY, folder / "tiny")
    template = folder / "tiny" / "chat_template.jinja"
    template.write_text(
        patch_template(template.read_text(), load_template_patch("glm-4.6"), "tiny").text
    )
    convert([("text", folder / "tiny", folder / "tiny-glm-BF16.gguf")], folder)
    return folder / "tiny-glm-BF16.gguf"


@pytest.fixture(scope="module")
def record(bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> SmokeRun:
    """What it says."""
    return run_smoke_test(
        make_settings(bf16), toolchain.find_toolchain(), tmp_path_factory.mktemp("record")
    )


def serving(path: Path) -> list[int]:
    """The processes, other than this one's command lines, that were told of a file."""
    processes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"llama-server" in command[0] and str(path).encode() in command:
                processes.append(int(entry.name))
    return processes


@tools_needed
def test_the_tiny_models_bf16_file_passes_every_check(record: SmokeRun, bf16: Path) -> None:
    verdict = judge_run(record)
    assert verdict.faults == ()
    assert all(s.passed for s in verdict.scenarios)
    names = [*FILE_CHECKS, *(s.name for s in SCENARIOS.scenarios)]
    assert [s.name for s in verdict.scenarios if s.kind == "protocol"] == names
    assert len(record.answers) > 20
    assert serving(bf16) == []


@tools_needed
def test_the_cache_grows_from_turn_to_turn(record: SmokeRun) -> None:
    for mode in ("on", "off"):
        cached = [
            e.cached_tokens
            for e in record.transcript
            if e.scenario == f"conversation, thinking {mode}"
        ]
        assert cached == sorted(set(cached)) and cached[-1] > 50


# ---- five defects, one at a time


def with_template(source: Path, out: Path, change: Callable[[str], str]) -> None:
    header = read_header(source)
    text = header.metadata[KEY]
    assert change(text) != text
    write_with_template(header, change(text), out)


def no_generation_prompt(source: Path, out: Path) -> None:
    with_template(
        source,
        out,
        lambda text: text.replace("{%- if add_generation_prompt -%}", "{%- if false -%}"),
    )


def another_tool_format(source: Path, out: Path) -> None:
    """Calls as JSON inside the tag, which is how Hermes was taught."""

    def change(text: str) -> str:
        start, end = (
            text.index("{{ '\\n<tool_call>' + tc.name }}"),
            text.index("</tool_call>{% endfor %}"),
        )
        call = "{{ '\\n<tool_call>\\n' + ({'name': tc.name, 'arguments': tc.arguments} | tojson) + '\\n' }}"
        return text[:start] + call + text[end:]

    with_template(source, out, change)


def with_bytes(source: Path, out: Path, find: bytes, put: bytes) -> None:
    raw = source.read_bytes()
    assert raw.count(find) == 1 and len(find) == len(put)
    out.write_bytes(raw.replace(find, put))


def no_end(source: Path, out: Path) -> None:
    with_bytes(source, out, b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.xos_token_id")


def split_token(source: Path, out: Path) -> None:
    length = (8).to_bytes(8, "little")
    with_bytes(source, out, length + b"<|user|>", length + b"<|usr_|>")


def zero_layer(source: Path, out: Path) -> None:
    header, raw = read_header(source), bytearray(source.read_bytes())
    for t in header.tensors:
        if t.name.startswith("blk.2."):
            start = header.data_start + t.offset
            raw[start : start + t.bytes] = bytes(t.bytes)
    out.write_bytes(raw)


DEFECTS: dict[str, tuple[Callable[[Path, Path], None], str, str]] = {
    # what is wrong                what does it              caught as            with the words
    "no generation prompt": (
        no_generation_prompt,
        "generation prompt",
        "the rendered prompt has no generation prompt",
    ),
    "no end of turn": (no_end, "end of turn", "tokenizer.ggml.eos_token_id: missing"),
    "a token in pieces": (split_token, "special tokens", "<|user|>: expected one token"),
    "another family's tools": (
        another_tool_format,
        "tool format",
        "<arg_key>, </arg_key>, <arg_value>",
    ),
    "a layer of zeros": (zero_layer, "weights", "tensor blk.2.attn_norm.weight: expected"),
}


@tools_needed
@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_caught_by_its_check(
    defect: str, bf16: Path, record: SmokeRun, tmp_path: Path
) -> None:
    plant, name, words = DEFECTS[defect]
    path = tmp_path / "tiny-glm-BF16.gguf"
    plant(bf16, path)
    verdict = judge_run(
        run_smoke_test(make_settings(path), toolchain.find_toolchain(), tmp_path), 1.0, record
    )
    assert not verdict.passed
    [caught] = [s for s in verdict.scenarios if s.name == name]
    assert not caught.passed and words in caught.detail
    assert serving(path) == []
    if defect == "a layer of zeros":  # and, without a look at the bytes, by what it no longer knows
        [answers] = [s for s in verdict.scenarios if s.name == ANSWERS]
        assert not answers.passed


@tools_needed
def test_the_unpatched_template_fails_at_the_raw_history(bf16: Path, tmp_path: Path) -> None:
    original = (TINY / "chat_template.jinja").read_text()
    with_template(bf16, tmp_path / "f.gguf", lambda _: original)
    verdict = judge_run(
        run_smoke_test(
            make_settings(tmp_path / "f.gguf", "tool call, numbers"),
            toolchain.find_toolchain(),
            tmp_path,
        )
    )
    assert {s.name for s in verdict.scenarios if s.kind == "protocol" and not s.passed} == {
        "raw history, thinking on",
        "raw history, thinking off",
    }


@tools_needed
def test_tensors_can_be_kept_on_another_device_and_that_is_recorded(
    bf16: Path, tmp_path: Path
) -> None:
    moved = make_settings(bf16, "stop", override_tensors=(".ffn_.*_exps.=CPU",))
    verdict = judge_run(run_smoke_test(moved, toolchain.find_toolchain(), tmp_path))
    assert verdict.passed
    assert verdict.json()["server"][-2:] == ["-ot", ".ffn_.*_exps.=CPU"]
    assert "-ot '.ffn_.*_exps.=CPU'" in (tmp_path / "server.log").read_text().splitlines()[0]


# ---- the stage: what it keeps, what it leaves, and what it compares


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A set of one scenario, because the stage and not the model is scenarios."""
    path = tmp_path / "few.toml"
    path.write_text(
        'name = "few"\nsummary = "One."\n[[scenarios]]\nname = "stop"\nwhy = "Quick."\nstop = "5"\n'
        '[[scenarios.turns]]\nsay = "Count from 1 to 9."\nexpect = "4"\n'
    )
    return path


@tools_needed
def test_the_stage_stores_the_record_and_computes_the_result_anew(
    bf16: Path, few: Path, tmp_path: Path
) -> None:
    model, store, tools = (
        replace(MODEL, scenarios=str(few)),
        Store(tmp_path / "work"),
        toolchain.find_toolchain(),
    )
    original = ModelFile.open(bf16)
    verdict = smoke_test(SmokeTestRequest(ModelFile.open(bf16), 1.0, original, model, tools, store))
    assert verdict.passed
    [kept] = (tmp_path / "work" / "smoke").iterdir()
    assert (kept / TRANSCRIPT).read_text().startswith("# tiny-glm-BF16.gguf: passed")
    before = (kept / "server.log").stat().st_mtime_ns
    assert (
        smoke_test(SmokeTestRequest(ModelFile.open(bf16), 1.0, original, model, tools, store))
        == verdict
    )
    assert [kept] == list((tmp_path / "work" / "smoke").iterdir())
    assert (kept / "server.log").stat().st_mtime_ns == before


@tools_needed
def test_a_variant_is_compared_with_the_answers_of_bf16(
    bf16: Path, few: Path, tmp_path: Path
) -> None:
    model, store, tools = (
        replace(MODEL, scenarios=str(few)),
        Store(tmp_path / "work"),
        toolchain.find_toolchain(),
    )
    original, path = ModelFile.open(bf16), tmp_path / "zeros.gguf"
    zero_layer(bf16, path)
    lenient = replace(model, waivers=tuple(Waiver(n, "for tests") for n in (*FILE_CHECKS, *NAMES)))
    with pytest.raises(
        SmokeTestError,
        match=r"answers: \d of 10 right answers that the BF16 file gives; 9 are needed",
    ) as caught:
        smoke_test(SmokeTestRequest(ModelFile.open(path), 0.9, original, lenient, tools, store))
    text = Path(caught.value.problems[-1].partition("transcript: ")[2]).read_text()
    assert text.startswith("# zeros.gguf: FAILED") and "9 are needed" in text
    assert smoke_test(
        SmokeTestRequest(ModelFile.open(path), 0.0, original, lenient, tools, store)
    ).passed


@tools_needed
def test_a_file_that_fails_leaves_a_transcript_and_names_it(
    bf16: Path, few: Path, tmp_path: Path
) -> None:
    model, store, tools = (
        replace(MODEL, scenarios=str(few)),
        Store(tmp_path / "work"),
        toolchain.find_toolchain(),
    )
    path = tmp_path / "f.gguf"
    no_generation_prompt(bf16, path)
    with pytest.raises(SmokeTestError) as caught:
        smoke_test(
            SmokeTestRequest(ModelFile.open(path), 1.0, ModelFile.open(bf16), model, tools, store)
        )
    assert isinstance(caught.value.result, SmokeResult) and not caught.value.result.passed
    assert any(
        p.startswith("f.gguf: generation prompt: the rendered prompt has no")
        for p in caught.value.problems
    )
    where = Path(caught.value.problems[-1].removeprefix("f.gguf: transcript: "))
    text = where.read_text()
    assert (
        text.startswith("# f.gguf: FAILED")
        and "Count from 1 to 9." in text
        and "## End of the server's log" in text
    )
    waived = replace(
        model,
        waivers=tuple(
            Waiver(s.name, "for tests") for s in caught.value.result.scenarios if not s.passed
        ),
    )
    assert smoke_test(
        SmokeTestRequest(ModelFile.open(path), 0.0, ModelFile.open(path), waived, tools, store)
    ).passed


@tools_needed
def test_shards_answer_as_the_merged_file_does(bf16: Path, tmp_path: Path) -> None:
    split_file(bf16, "3M", toolchain.find_toolchain(), tmp_path / "tiny-glm-BF16")
    first = min(tmp_path.glob("*-00001-of-*.gguf"))
    sharded = run_smoke_test(make_settings(first, "stop"), toolchain.find_toolchain(), tmp_path)
    assert judge_run(sharded).passed
    merge_shards(first, tmp_path / "merged" / "M.gguf", toolchain.find_toolchain())
    assert (
        run_smoke_test(
            make_settings(tmp_path / "merged" / "M.gguf", "stop"),
            toolchain.find_toolchain(),
            tmp_path,
        ).transcript
        == sharded.transcript
    )
    min(tmp_path.glob("*-00003-of-*.gguf")).unlink()
    with pytest.raises(
        InputError, match=r"-00003-of-00\d+\.gguf: missing; expected \d shards beside"
    ):
        run_smoke_test(make_settings(first, "stop"), toolchain.find_toolchain(), tmp_path)


@tools_needed
def test_a_model_with_a_vision_projector_gets_an_image(tmp_path: Path) -> None:
    folder = write_twin(tmp_path / "twin", "Glm4vForConditionalGeneration")
    convert(
        [("text", folder, tmp_path / "twin.gguf"), ("vision", folder, tmp_path / "mmproj.gguf")],
        tmp_path,
    )
    seeing, _ = load_model("glm-4.6v-flash")
    scenarios = merge_scenarios(seeing, ["a picture"], has_vision=True)
    asked = SmokeSettings(
        ModelFile.open(tmp_path / "twin.gguf"), scenarios, 8, (), tmp_path / "mmproj.gguf"
    )
    record = run_smoke_test(asked, toolchain.find_toolchain(), tmp_path)
    [picture] = [o for o in record.checks if o.name == "a picture"]
    # Its weights are random, so it may say anything; that it was shown the picture is what its prompt's length tells.
    assert not picture.detail.startswith("HTTP") and "could not be used" not in picture.detail
    [shown] = scenarios.scenarios
    blind = replace(asked, scenarios=replace(scenarios, scenarios=(replace(shown, picture=False),)))
    without = (
        run_smoke_test(blind, toolchain.find_toolchain(), tmp_path).transcript[0].prompt_tokens
    )
    assert record.transcript[0].prompt_tokens >= without + 16  # 112 x 112 points are 16 tokens
    assert (tmp_path / "server.log").read_text().count("mmproj") > 0


# ---- nothing stays behind


@tools_needed
def test_an_interrupted_smoke_test_leaves_no_server(bf16: Path) -> None:
    command = [sys.executable, "-c", "from quant.cli import main; main()", "smoke", str(bf16)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        wait_for(lambda: serving(bf16) or run.poll() is not None)
        assert serving(bf16)
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=PATIENCE_SECONDS)
    assert run.returncode == 3
    assert error.strip() == "interrupted; run the same command again to continue"
    assert serving(bf16) == []


@tools_needed
def test_a_server_that_is_killed_during_a_request_is_reported_as_killed(
    bf16: Path, tmp_path: Path
) -> None:
    path, log = tmp_path / "tiny-glm-BF16.gguf", tmp_path / "server.log"
    os.link(bf16, path)

    def kill() -> None:
        wait_for(lambda: log.exists() and "processing task" in log.read_text(errors="replace"))
        os.kill(serving(path)[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(
        ToolError,
        match=r"llama-server was ended by SIGKILL \(out of memory\?\); it needed weights of 0.02 GB",
    ):
        run_smoke_test(make_settings(path), toolchain.find_toolchain(), tmp_path)
    killer.join()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokens = ["<|endoftext|>", "<|user|>"]
    ends = [key("tokenizer.ggml.eos_token_id", 0), key("tokenizer.ggml.eot_token_id", 1)]
    keys = [k for k in LLAMA if k.name != "tokenizer.ggml.tokens"]
    return write(tmp_path / "f.gguf", keys=[*keys, key("tokenizer.ggml.tokens", tokens), *ends])


CHILD = "sleep 300 & echo $! > {0}/child; echo $$ > {0}/pid; "


def test_a_server_that_never_becomes_ready_is_ended_with_its_children(
    fake_tools: Fake, model: Path, tmp_path: Path
) -> None:
    tools = fake_tools(
        llama_server=CHILD.format(tmp_path)
        + "trap '' TERM; echo loading; while :; do sleep 0.05; done"
    )
    with pytest.raises(ToolError) as caught:
        run_smoke_test(make_settings(model), tools, tmp_path, start_seconds=1)
    assert str(caught.value).startswith(
        "llama-server: expected it to be ready within 1 s, found it still loading; end of"
    )
    assert "    loading" in str(caught.value)
    wait_for(
        lambda: (
            not lives(written_pid(tmp_path / "pid")) and not lives(written_pid(tmp_path / "child"))
        )
    )


def test_a_server_that_dies_ends_its_children_and_its_log_is_quoted(
    fake_tools: Fake, model: Path, tmp_path: Path
) -> None:
    tools = fake_tools(llama_server=CHILD.format(tmp_path) + "echo 'the sky fell down'; exit 7")
    with pytest.raises(ToolError) as caught:
        run_smoke_test(make_settings(model), tools, tmp_path)
    assert "llama-server exited with 7; end of the log:\n" in str(caught.value)
    assert "    the sky fell down" in str(caught.value)
    wait_for(lambda: not lives(written_pid(tmp_path / "child")))


def test_a_killed_server_is_reported_with_the_memory_that_it_needed(
    fake_tools: Fake, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ToolError,
        match=r"ended by SIGKILL \(out of memory\?\); it needed weights of 0\.00 GB and a cache of",
    ):
        run_smoke_test(make_settings(model), fake_tools(llama_server="kill -9 $$"), tmp_path)


def test_a_later_shard_is_refused(fake_tools: Fake, tmp_path: Path) -> None:
    path = write(
        tmp_path / "m-00002-of-00003.gguf", keys=[*LLAMA, key("split.no", 1), key("split.count", 3)]
    )
    with pytest.raises(
        InputError, match="expected the first shard, by which the others are found, found number 2"
    ):
        run_smoke_test(make_settings(path), fake_tools(), tmp_path)


def test_a_port_in_use_is_refused(fake_tools: Fake, model: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: expected a free port"):
            run_smoke_test(make_settings(model, port=port), fake_tools(), tmp_path)


def test_the_kv_cache_is_computed_from_the_files_metadata(tmp_path: Path) -> None:
    numbers = {
        "block_count": 4,
        "embedding_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }
    keys = [key("general.architecture", "x"), *(key(f"x.{k}", v) for k, v in numbers.items())]
    assert (
        kv_cache_bytes(read_header(write(tmp_path / "a.gguf", keys=keys)), 10)
        == 10 * 4 * 2 * (64 + 64) * 2
    )
    latent = [*keys, key("x.attention.kv_lora_rank", 512), key("x.rope.dimension_count", 64)]
    assert (
        kv_cache_bytes(read_header(write(tmp_path / "b.gguf", keys=latent)), 10) == 10 * 4 * 576 * 2
    )
    assert kv_cache_bytes(read_header(write(tmp_path / "c.gguf", keys=keys[:1])), 10) == 0


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [
        sys.executable,
        "-c",
        "from quant.cli import main; main()",
        "smoke",
        *map(str, arguments),
    ]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@tools_needed
def test_the_command_writes_transcript_junit_json_and_log(bf16: Path, tmp_path: Path) -> None:
    done = command(bf16, "--scenario", "stop", "--json", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict == json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "transcript.md",
        "junit.xml",
        "verdict.json",
        "server.log",
    }
    assert verdict["passed"] and verdict["file"] == "tiny-glm-BF16.gguf"


@tools_needed
def test_the_command_prints_prompt_answer_and_the_end_of_the_log_of_a_failure(
    bf16: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny-glm-UD-TQ1_0.gguf"
    no_generation_prompt(bf16, path)
    done = command(path, "--scenario", "stop", "--reference", bf16)
    assert done.returncode == 1
    assert (
        "generation prompt protocol FAILED: the rendered prompt has no generation prompt"
        in " ".join(done.stdout.split())
    )
    assert "end of the server's log:\n    " in done.stderr
    waived = command(
        path,
        "--scenario",
        "stop",
        "--waive",
        "generation prompt",
        "--waive",
        "stop",
        "--answers",
        "0",
    )
    assert "waived: waived for this run" in waived.stdout


def test_a_wrong_name_of_a_scenario_or_a_waiver_is_refused(model: Path) -> None:
    for option in ("--scenario", "--waive"):
        done = command(model, option, "streem")
        assert done.returncode == 2
        assert (
            done.stderr.startswith("error: ")
            and "'streem'" in done.stderr
            and "Traceback" not in done.stderr
        )
