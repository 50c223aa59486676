"""Native tools: failures are quoted, versions are checked, and no tool outlives a killed parent."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.core.errors import InputError, ToolError
from quant.core.process import LOG_TAIL_LINES, find_free_port, read_log_tail, run_program
from quant.llama import toolchain
from quant.llama.toolchain import BRING_TOOLS, DEFINE, OLDEST, TOOLS, Toolchain, find_toolchain
from tests.processes import lives, wait_for, written_pid

Fake = Callable[..., Toolchain]


def test_a_tool_runs_in_its_folder_and_prints_into_the_log(
    fake_tools: Fake, tmp_path: Path
) -> None:
    tools = fake_tools(llama_quantize='pwd; echo "$@"; echo complaint >&2')
    log = tmp_path / "log"
    tools.run("llama-quantize", ["in file.gguf", Path("out"), "it's"], cwd=tmp_path, log=log)
    command, *output = log.read_text().splitlines()
    assert command == f"$ {tools.bin}/llama-quantize 'in file.gguf' out 'it'\"'\"'s'"
    assert output == [str(tmp_path), "in file.gguf out it's", "complaint"]


def test_the_command_in_the_log_can_be_typed_again(fake_tools: Fake, tmp_path: Path) -> None:
    tools = fake_tools(llama_quantize='printf "<%s>" "$@"')
    log = tmp_path / "log"
    arguments = ["a b", "*", "$HOME", "", "ü", "new\nline"]
    tools.run("llama-quantize", arguments, cwd=tmp_path, log=log)
    text = log.read_text()
    again = subprocess.run(
        ["sh", "-c", text.removeprefix("$ ").rpartition("<a b>")[0]], capture_output=True, text=True
    )
    assert text.endswith(again.stdout)
    assert again.stdout == "".join(f"<{a}>" for a in arguments)


def test_a_log_is_appended_to(fake_tools: Fake, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(2):
        fake_tools(llama_quantize="echo printed").run("llama-quantize", [], cwd=tmp_path, log=log)
    assert log.read_text().count("printed") == 2


def test_a_failing_tool_is_quoted(fake_tools: Fake, tmp_path: Path) -> None:
    tools = fake_tools(llama_quantize="echo 'failed to open model'; echo; exit 3")
    with pytest.raises(ToolError) as caught:
        tools.run("llama-quantize", ["x"], cwd=tmp_path, log=tmp_path / "log")
    command = f"    $ {tools.bin}/llama-quantize x"
    assert str(caught.value) == (
        f"llama-quantize exited with 3; end of the log:\n{command}\n    failed to open model"
    )


def test_an_error_calls_a_program_by_the_name_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"^the converter exited with 1; end of the log:"):
        run_program(
            ["/bin/sh", "-c", "exit 1"], cwd=tmp_path, log=tmp_path / "log", name="the converter"
        )


def test_only_the_last_lines_of_a_log_are_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"".join(f"line {n}\n\n".encode() for n in range(100)) + b"\xff broken\n")
    words = read_log_tail(log).splitlines()
    assert len(words) == LOG_TAIL_LINES
    assert words[0] == "    line 89"
    assert words[-1] == "    \ufffd broken"
    log.write_text("\n \n")
    assert read_log_tail(log) == "    (nothing)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SIGKILL", "was ended by SIGKILL (out of memory?)"),
        ("SIGXFSZ", "was ended by SIGXFSZ (a file grew too large)"),
        ("SIGABRT", "was ended by SIGABRT;"),
    ],
)
def test_the_signal_that_ended_a_tool_is_named(
    fake_tools: Fake, tmp_path: Path, name: str, message: str
) -> None:
    tools = fake_tools(llama_quantize=f"ulimit -c 0; kill -{int(getattr(signal, name))} $$")
    with pytest.raises(ToolError) as caught:
        tools.run("llama-quantize", [], cwd=tmp_path, log=tmp_path / "log")
    assert message in str(caught.value)


def test_a_tool_that_is_no_program_is_a_tool_error(fake_tools: Fake, tmp_path: Path) -> None:
    tools = fake_tools()
    (tools.bin / "llama-quantize").write_bytes(b"\x7fELF of another machine")
    with pytest.raises(ToolError, match=r"llama-quantize: cannot be started"):
        tools.run("llama-quantize", [], cwd=tmp_path, log=tmp_path / "log")
    (tools.bin / "llama-server").write_bytes(b"\x7fELF of another machine")
    with pytest.raises(ToolError, match=r"llama-server: cannot be started"):
        _ = tools.version


def test_the_error_of_a_missing_tool_says_what_brings_it(fake_tools: Fake, tmp_path: Path) -> None:
    tools = fake_tools(missing=("llama-imatrix",))
    with pytest.raises(ToolError) as caught:
        tools.run("llama-imatrix", [], cwd=tmp_path, log=tmp_path / "log")
    assert str(caught.value) == f"{tools.bin / 'llama-imatrix'}: tool missing; {BRING_TOOLS}"


def test_a_tool_that_may_not_be_run_counts_as_missing(fake_tools: Fake) -> None:
    tools = fake_tools()
    (tools.bin / "llama-imatrix").chmod(0o644)
    with pytest.raises(ToolError, match="tool missing"):
        tools.path("llama-imatrix")


def test_all_missing_tools_are_named_at_once(fake_tools: Fake) -> None:
    tools = fake_tools(missing=("llama-imatrix", "llama-server"))
    with pytest.raises(ToolError) as caught:
        tools.require(*TOOLS)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("output", "number", "commit"),
    [
        ("version: 0.5.0-dev (build 1, commit 0c1e570)", (0, 5, 0), "0c1e570"),
        ("version: 0.5.0 (build 12345, commit abcdef0)", (0, 5, 0), "abcdef0"),
        (
            "ggml: found a device\nversion: 1.12.3-rc1 (build 2, commit 123)\nbuilt with x",
            (1, 12, 3),
            "123",
        ),
    ],
)
def test_a_version_is_read(
    fake_tools: Fake, output: str, number: tuple[int, ...], commit: str
) -> None:
    version = fake_tools(output).version
    assert (version.number, version.commit) == (number, commit)
    assert str(version) == f"{'.'.join(map(str, number))} ({commit})"


def test_a_version_may_be_printed_on_standard_error(fake_tools: Fake) -> None:
    tools = fake_tools(llama_server="echo 'version: 0.5.1 (build 1, commit abc)' >&2")
    assert tools.version.number == (0, 5, 1)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("version: 6123 (abc)", "found 'version: 6123 (abc)'"),
        ("version: 0.4.9 (build 1, commit abc)", "found 0.4.9 (abc)"),
        ("version: 0.4.99 (build 99999, commit abc)", "found 0.4.99 (abc)"),
        ("version: unknown", "found 'version: unknown'"),
        ("garbage", "found 'garbage'"),
        ("", "found 'nothing'"),
    ],
)
def test_a_version_that_is_too_old_or_cannot_be_read_is_refused(
    fake_tools: Fake, output: str, message: str
) -> None:
    tools = fake_tools(output)
    with pytest.raises(ToolError) as caught:
        tools.require("llama-quantize")
    oldest = ".".join(map(str, OLDEST))
    assert (
        str(caught.value)
        == f"{tools.bin}: llama.cpp: expected version {oldest} or later, {message}"
    )


def test_a_version_that_is_no_utf8_is_refused(fake_tools: Fake) -> None:
    with pytest.raises(ToolError, match="expected version"):
        _ = fake_tools(llama_server=r"printf '\377\376'").version


def test_the_version_is_asked_for_once(fake_tools: Fake, tmp_path: Path) -> None:
    tools = fake_tools(
        llama_server=f"echo asked >> {tmp_path}/asked; echo 'version: 0.5.0 (build 1, commit a)'"
    )
    tools.require("llama-quantize")
    tools.require("llama-imatrix")
    assert (tmp_path / "asked").read_text() == "asked\n"


def test_a_named_folder_wins_over_the_setting_and_that_over_the_environment(
    fake_tools: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, other = fake_tools().bin, tmp_path / "other"
    shutil.copytree(named, other)
    monkeypatch.delenv(toolchain.SETTING, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "no-environment"))
    monkeypatch.setenv("PATH", str(named), prepend=os.pathsep)
    assert find_toolchain().bin == named
    monkeypatch.setenv(toolchain.SETTING, str(other))
    assert find_toolchain().bin == other
    assert find_toolchain(named).bin == named


def test_a_build_tree_is_looked_into(fake_tools: Fake, tmp_path: Path) -> None:
    tree = tmp_path / "llama.cpp" / "build" / "bin"
    shutil.copytree(fake_tools().bin, tree)
    assert find_toolchain(tmp_path / "llama.cpp").bin == tree
    assert find_toolchain(tmp_path / "llama.cpp" / "build").bin == tree


def test_a_missing_folder_is_refused_with_the_option_that_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ToolError, match=r"/none: llama.cpp: no such folder \(--llama-cpp\)"):
        find_toolchain(tmp_path / "none")
    monkeypatch.setenv(toolchain.SETTING, str(tmp_path / "none"))
    with pytest.raises(ToolError, match=r"/none: llama.cpp: no such folder \(QUANT_LLAMA_CPP\)"):
        find_toolchain()


def test_a_free_port_is_free_and_a_taken_one_is_refused() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        taken = s.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {taken}: expected a free port on 127.0.0.1"):
            find_free_port(taken)
        assert find_free_port() != taken
    assert find_free_port(taken) == taken


def test_a_port_beyond_all_ports_is_refused() -> None:
    with pytest.raises(InputError, match="port 70000"):
        find_free_port(70000)


PARENT = """
    import sys
    from pathlib import Path
    from quant.llama.toolchain import Toolchain

    tools, folder = Toolchain(Path(sys.argv[1])), Path(sys.argv[2])
    tools.run("llama-quantize", [], cwd=folder, log=folder / "log")
"""


def test_a_tool_dies_with_a_parent_that_is_killed(fake_tools: Fake, tmp_path: Path) -> None:
    loop = f"echo $$ > {tmp_path}/pid; trap '' TERM; while :; do sleep 0.05; done"
    tools = fake_tools(llama_quantize=loop)
    command = [sys.executable, "-c", textwrap.dedent(PARENT), str(tools.bin), str(tmp_path)]
    with subprocess.Popen(command) as parent:
        pid = written_pid(tmp_path / "pid")
        assert lives(pid)
        parent.kill()
    wait_for(lambda: not lives(pid))


def test_a_tool_is_ended_when_the_run_is_interrupted(fake_tools: Fake, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # The tool itself interrupts its parent, a moment after it has begun.
    tools = fake_tools(
        llama_quantize=f"echo $$ > {tmp_path}/pid; sleep 0.2; kill -ALRM $PPID; exec sleep 60"
    )
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            tools.run("llama-quantize", [], cwd=tmp_path, log=tmp_path / "log")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not lives(written_pid(tmp_path / "pid"))


@pytest.mark.tools
def test_the_tools_of_this_environment_are_complete_and_new_enough() -> None:
    find_toolchain().require(*TOOLS)


def test_the_tools_of_this_environment_were_built_with_the_projects_settings() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    settings = project["tool"]["uv"]["config-settings-package"]["llama-cpp-python"]
    build_info = Toolchain(Path(sys.prefix) / "bin").build_info
    assert build_info["settings"] == {
        k.removeprefix(DEFINE): v for k, v in settings.items() if k.startswith(DEFINE)
    }
    assert build_info["compiler"] and "built with" not in build_info["compiler"]


def test_other_tools_have_a_compiler_and_no_settings(
    fake_tools: Fake,
) -> None:
    tools = fake_tools(
        llama_server="echo 'version: 0.5.0 (build 1, commit abc)'; echo 'built with Clang 19 for Linux'"
    )
    assert tools.build_info == {"compiler": "Clang 19 for Linux", "settings": None}
    assert (
        fake_tools(llama_server="echo 'version: 0.5.0 (commit abc)'").build_info["compiler"] is None
    )
