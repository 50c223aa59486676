"""A Prefect of its own for the tests of the flows: server, worker and deployments, and none of it outlives them."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
UP_SECONDS = 300
"""A server makes its database first."""
STOP_SECONDS = 15


class Prefect:
    """A server on a loopback port, a worker, and what is said to them."""

    def __init__(self, home: Path, proxy: str) -> None:
        self.home = home
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "PREFECT_HOME": str(home / ".prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "NO_PROXY": "127.0.0.1,localhost",
            **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy),
            **{
                name: value
                for name, value in os.environ.items()
                if name.startswith(("QUANT_", "PYTHON"))
            },
        }
        self.api = httpx.Client(base_url=self.env["PREFECT_API_URL"], trust_env=False, timeout=30)
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *args: str) -> None:
        """Let a command run until the end of the tests; what it says goes to a file in the home."""
        with (self.home / f"{args[0]}.log").open("wb") as log:
            process = subprocess.Popen(
                [_prefect(), *args],
                cwd=ROOT,
                env=self.env,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.started.append(process)

    def say(self, *args: str, seconds: float = 120) -> tuple[int, str]:
        """Exit code and output of a command."""
        done = subprocess.run(
            [_prefect(), *args],
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        return done.returncode, done.stdout

    def run(self, *args: str, seconds: float = 900) -> tuple[int, str, str]:
        """``prefect deployment run``: exit code, output, and the id of the flow run."""
        code, output = self.say("deployment", "run", *args, seconds=seconds)
        match = re.search(r"UUID: ([0-9a-f-]{36})", output)
        return code, output, match[1] if match else ""

    def ask(self, kind: str, **filters: Any) -> list[dict[str, Any]]:
        """Everything of a kind that fits: ``ask("artifacts", flow_runs=…)``."""
        answer = self.api.post(f"/{kind}/filter", json=filters)
        answer.raise_for_status()
        return list(answer.json())

    def of_run(self, kind: str, run: str) -> list[dict[str, Any]]:
        """Everything of a kind that a flow run left."""
        return self.ask(kind, flow_runs={"id": {"any_": [run]}})

    def state(self, run: str) -> dict[str, Any]:
        """The state of a flow run."""
        return dict(self.api.get(f"/flow_runs/{run}").json()["state"])

    def running(self, word: str = "") -> dict[int, str]:
        """Processes that were started by this Prefect and have that word in their command line."""
        commands = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"PREFECT_HOME={self.env['PREFECT_HOME']}".encode() in (
                    path / "environ"
                ).read_bytes().split(b"\0"):
                    command = (
                        (path / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
                    if word in command:
                        commands[int(path.name)] = command
        return commands

    def stop(self) -> None:
        """End everything: the worker before the server, and by force whatever does not go."""
        for process in reversed(self.started):
            for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
                process.send_signal(signum)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
                    break
        self.api.close()
        until(lambda: not self.kill(), STOP_SECONDS, "the end of every process")

    def kill(self) -> dict[int, str]:
        """Kill what is left, and say what it was; a killed process takes a moment to go."""
        left = self.running()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left


def until(true: Callable[[], T], seconds: float, what: str) -> T:
    """Wait for something, and fail with its name when it does not come."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} seconds"
        time.sleep(0.2)
    return value


@pytest.fixture(scope="session")
def outside() -> Iterator[tuple[str, list[str]]]:
    """A proxy that lets nothing through: its address, and the requests that wanted to leave the machine."""
    wanted: list[str] = []

    class Wall(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            wanted.append(self.rfile.readline(65536).decode(errors="replace").strip())
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Wall)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", wanted
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def prefect(
    tmp_path_factory: pytest.TempPathFactory, outside: tuple[str, list[str]]
) -> Iterator[Prefect]:
    """A Prefect with a worker and the deployments of ``prefect.yaml``."""
    prefect = Prefect(tmp_path_factory.mktemp("prefect"), outside[0])
    try:
        prefect.start("server", "start", "--port", str(prefect.port), "--no-ui")
        until(lambda: _healthy(prefect), UP_SECONDS, "the server")
        prefect.start("worker", "start", "--pool", "quant", "--type", "process")
        until(lambda: prefect.ask("work_pools"), 60, "the worker's pool")
        code, output = prefect.say("--no-prompt", "deploy", "--all")
        assert code == 0, output
        yield prefect
    finally:
        prefect.stop()


def _healthy(prefect: Prefect) -> bool:
    assert prefect.started[0].poll() is None, (prefect.home / "server.log").read_text()
    try:
        return prefect.api.get("/health").is_success
    except httpx.TransportError:
        return False


def _prefect() -> Path:
    return Path(sys.executable).with_name("prefect")
