"""Run llama-server: start it, wait until its model is loaded, notice its death, stop it."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quant.core.errors import ToolError
from quant.core.memory import measure_free_memory
from quant.core.process import (
    describe_exit,
    find_free_port,
    open_log,
    quote_log_tail,
    start_process,
    stop_process,
)
from quant.llama.chat_client import ChatClient, connect
from quant.llama.toolchain import Toolchain

POLL_SECONDS = 0.05
DYING_SECONDS = 0.5
"""A dying server closes its sockets this long before the kernel reports its end."""


@dataclass(frozen=True)
class ServerSettings:
    """How a server is started, and how long its answers may take."""

    arguments: tuple[str | Path, ...]
    """Of llama-server, without ``--host`` and ``--port``."""
    log: Path
    """The server's output is appended here; the server runs in the log's folder."""
    port: int | None = None
    """A loopback port. None takes a free one."""
    load_seconds: float = 120
    """Time to load the model."""
    answer_seconds: float = 60
    """Timeout of one request."""
    max_answer: int = 1
    """Tokens of one answer."""
    memory_needed: str = ""
    """What the server needs memory for, in words. It is quoted if the kernel kills the server."""


@dataclass(frozen=True)
class LlamaServer:
    """A running llama-server and a client that is connected to it."""

    process: subprocess.Popen[bytes]
    port: int
    client: ChatClient
    settings: ServerSettings

    def check_alive(self, patience: float = 0) -> None:
        """Raise ToolError if the server has ended, or ends within ``patience`` seconds."""
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(patience)
            raise ToolError(_describe_end(code, self.settings))

    def explain_failed_request(self) -> None:
        """Raise ToolError if a request failed because the server is dying."""
        self.check_alive(DYING_SECONDS)


@contextmanager
def serve_model(tools: Toolchain, settings: ServerSettings) -> Iterator[LlamaServer]:
    """Run llama-server on a loopback port while the block runs, its model loaded.

    The server is a process group of its own: an interrupt of the terminal reaches it only through
    the end of this block, and nothing that it started outlives the block.

    Args:
        tools: The toolchain whose llama-server is started.
        settings: Its arguments and limits.

    Yields:
        The server, once it answers that the model is loaded.

    Raises:
        InputError: The port is taken.
        ToolError: The server cannot be started, ends, or has not loaded the model in time. The
            error quotes the end of its log.
    """
    # Another program can take the port before llama-server binds it. The server then ends, and
    # _wait_until_loaded raises with its log.
    port, log = find_free_port(settings.port), settings.log
    address = ("--host", "127.0.0.1", "--port", str(port))
    command = [tools.path("llama-server"), *settings.arguments, *address]
    with (
        open_log(command, log) as out,
        start_process(command, log.parent, out, group=True) as process,
    ):
        try:
            with connect(port, settings.answer_seconds, settings.max_answer) as client:
                server = LlamaServer(process, port, client, settings)
                _wait_until_loaded(server)
                yield server
        finally:
            stop_process(process, group=True)


def _wait_until_loaded(server: LlamaServer) -> None:
    # /health answers 503 while the model is loading, and before that nobody listens.
    seconds = server.settings.load_seconds
    deadline = time.monotonic() + seconds
    while not server.client.is_ready():
        server.check_alive()
        if time.monotonic() > deadline:
            raise ToolError(
                f"llama-server: expected it to be ready within {seconds:.0f} s,"
                f" found it still loading{quote_log_tail(server.settings.log)}"
            )
        time.sleep(POLL_SECONDS)


def _describe_end(code: int, settings: ServerSettings) -> str:
    """Return how a server ended, and what it needed if the kernel killed it for memory."""
    ending, needed = describe_exit(code), ""
    if "SIGKILL" in ending and settings.memory_needed:
        free = measure_free_memory() / 1e9
        needed = f"; it needed {settings.memory_needed}, and {free:.2f} GB are free now"
    return f"llama-server {ending}{needed}{quote_log_tail(settings.log)}"
