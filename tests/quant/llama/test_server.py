"""llama-server runs while a block does: started, awaited, watched, and stopped with its children."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.core.errors import InputError, ToolError
from quant.core.process import find_free_port
from quant.llama.server import ServerSettings, serve_model
from quant.llama.toolchain import Toolchain
from tests.processes import lives, wait_for, written_pid

Fake = Callable[..., Toolchain]

HEALTHY = """
    import http.server, sys

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    print(*sys.argv[1:], flush=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
CHILD = "sleep 300 & echo $! > {0}/child; "


@pytest.fixture
def healthy(tmp_path: Path) -> str:
    """Return a script for llama-server that prints its arguments and answers every GET."""
    program = tmp_path / "healthy.py"
    program.write_text(textwrap.dedent(HEALTHY))
    return f'exec {sys.executable} {program} "$@"'


def settings(folder: Path, *arguments: str | Path, **limits: float | str) -> ServerSettings:
    return ServerSettings(arguments, folder / "log", **limits)  # type: ignore[arg-type]  # a test's shorthand


def test_a_loaded_server_runs_on_loopback_while_the_block_does(
    fake_tools: Fake, healthy: str, tmp_path: Path
) -> None:
    port = find_free_port()
    tools, asked = fake_tools(llama_server=healthy), settings(tmp_path, "-m", "x.gguf", port=port)
    with serve_model(tools, asked) as server:
        assert (server.port, server.process.poll()) == (port, None)
        assert server.client.is_ready()
        server.check_alive()
    assert server.process.returncode == -signal.SIGTERM
    log = asked.log.read_text().splitlines()
    assert log[0].endswith(f"llama-server -m x.gguf --host 127.0.0.1 --port {port}")
    assert log[1] == f"-m x.gguf --host 127.0.0.1 --port {port}"


def test_a_server_takes_a_free_port_unless_one_is_named(
    fake_tools: Fake, healthy: str, tmp_path: Path
) -> None:
    tools = fake_tools(llama_server=healthy)
    with (
        serve_model(tools, settings(tmp_path)) as one,
        serve_model(tools, settings(tmp_path)) as two,
    ):
        assert one.port != two.port


def test_a_server_is_stopped_with_its_children_if_the_block_fails(
    fake_tools: Fake, healthy: str, tmp_path: Path
) -> None:
    tools = fake_tools(llama_server=CHILD.format(tmp_path) + healthy)
    with (
        pytest.raises(ValueError, match="inside"),
        serve_model(tools, settings(tmp_path)) as server,
    ):
        raise ValueError("inside")
    assert server.process.returncode is not None
    wait_for(lambda: not lives(written_pid(tmp_path / "child")))


def test_a_server_that_never_loads_is_stopped_at_the_deadline(
    fake_tools: Fake, tmp_path: Path
) -> None:
    tools = fake_tools(llama_server="trap '' TERM; echo loading; while :; do sleep 0.05; done")
    with (
        pytest.raises(ToolError) as refused,
        serve_model(tools, settings(tmp_path, load_seconds=1)),
    ):
        pass
    assert str(refused.value).startswith(
        "llama-server: expected it to be ready within 1 s, found it still loading; end of the log:"
    )
    assert "    loading" in str(refused.value)


def test_a_server_that_ends_before_it_is_ready_is_an_error_with_its_log(
    fake_tools: Fake, tmp_path: Path
) -> None:
    tools = fake_tools(llama_server="echo 'no such model'; exit 7")
    with (
        pytest.raises(
            ToolError, match=r"^llama-server exited with 7; end of the log:\n"
        ) as refused,
        serve_model(tools, settings(tmp_path)),
    ):
        pass
    assert "    no such model" in str(refused.value)


def test_a_server_that_the_kernel_kills_reports_the_memory_that_it_needed(
    fake_tools: Fake, healthy: str, tmp_path: Path
) -> None:
    asked = settings(tmp_path, memory_needed="weights of 1.00 GB")
    with serve_model(fake_tools(llama_server=healthy), asked) as server:
        os.kill(server.process.pid, signal.SIGKILL)
        expected = (
            r"^llama-server was ended by SIGKILL \(out of memory\?\); it needed weights of 1.00 GB,"
            r" and \d+\.\d\d GB are free now; end of the log:\n"
        )
        with pytest.raises(ToolError, match=expected):
            server.explain_failed_request()


def test_a_server_that_is_no_program_is_a_tool_error(fake_tools: Fake, tmp_path: Path) -> None:
    tools = fake_tools()
    (tools.bin / "llama-server").write_bytes(b"\x7fELF of another machine")
    with (
        pytest.raises(ToolError, match=r"llama-server: cannot be started"),
        serve_model(tools, settings(tmp_path)),
    ):
        pass


def test_a_port_that_is_taken_is_refused_before_the_server_starts(
    fake_tools: Fake, healthy: str, tmp_path: Path
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        asked = settings(tmp_path, port=listener.getsockname()[1])
        with (
            pytest.raises(InputError, match=f"port {asked.port}: expected a free port"),
            serve_model(fake_tools(llama_server=healthy), asked),
        ):
            pass
    assert not asked.log.exists()


PARENT = """
    import sys
    from pathlib import Path
    from quant.llama.server import ServerSettings, serve_model
    from quant.llama.toolchain import Toolchain

    with serve_model(Toolchain(Path(sys.argv[1])), ServerSettings((), Path(sys.argv[2]) / "log")):
        pass
"""


def test_a_server_dies_with_a_parent_that_is_killed(fake_tools: Fake, tmp_path: Path) -> None:
    loop = f"echo $$ > {tmp_path}/pid; trap '' TERM; while :; do sleep 0.05; done"
    tools = fake_tools(llama_server=loop)
    command = [sys.executable, "-c", textwrap.dedent(PARENT), str(tools.bin), str(tmp_path)]
    with subprocess.Popen(command) as parent:
        pid = written_pid(tmp_path / "pid")
        assert lives(pid)
        parent.kill()
    wait_for(lambda: not lives(pid))
