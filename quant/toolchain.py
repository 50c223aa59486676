"""llama.cpp's native tools: where they are, which version they are, and the one door through which they run.

Commands go into a log as they could be typed. A tool dies with the process that started it, so a killed run leaves
nobody writing behind its back.
"""

import ctypes
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quant.errors import InputError, ToolError

TOOLS = (
    "llama-quantize", "llama-imatrix", "llama-tokenize", "llama-gguf-split", "llama-server", "llama-perplexity",
    "llama-mtmd-cli",
)  # fmt: skip
OLDEST = (0, 5, 0)
"""llama.cpp of October 2026: explicit tensor types win over heuristics, experts without data keep their entry."""
SETTING = "QUANT_LLAMA_CPP"
BRING_TOOLS = "run `uv sync` in the project's folder, or name your own with --llama-cpp DIR"
LAST_WORDS = 12
"""Lines of a failed tool's log that the error quotes."""

DEFINE = "cmake.define."
"""Begins a setting of CMake, as a build of a package is told it."""

LITTLE_BYTES = 4 * 2**20
"""A disk with less than this is full: tools write in pieces of about this size."""

LOOK_SECONDS = 1.0

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Version:
    """What a build of llama.cpp says of itself."""

    number: tuple[int, ...]
    commit: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.number))} ({self.commit})"


@dataclass(frozen=True)
class Toolchain:
    """A folder with llama.cpp's tools in it."""

    bin: Path

    def path(self, tool: str) -> Path:
        """Where a tool is; raises ToolError with what brings it when it is not there."""
        path = self.bin / tool
        if not os.access(path, os.X_OK):
            raise ToolError(f"{path}: tool missing; {BRING_TOOLS}")
        return path

    @cached_property
    def version(self) -> Version:
        """Version of the whole folder, as its server tells it; raises ToolError when it cannot be read or is too old."""
        said = self._said
        match = re.search(r"version: (\d+)\.(\d+)\.(\d+)\S* \(.*?commit (\w+)\)", said)
        if not match:
            first = (said.strip().splitlines() or ["nothing"])[0]
            raise ToolError(f"{self.bin}: llama.cpp: expected version {_dots(OLDEST)} or later, found {first!r}")
        version = Version(tuple(int(n) for n in match.groups()[:3]), match[4])
        if version.number < OLDEST:
            raise ToolError(f"{self.bin}: llama.cpp: expected version {_dots(OLDEST)} or later, found {version}")
        return version

    @property
    def built(self) -> dict[str, Any]:
        """How the tools were built, as plain JSON: their compiler, and CMake's settings where the installer wrote them down."""
        compiler = re.search(r"^built with (.+?)\s*$", self._said, re.MULTILINE)
        ours = self.bin.resolve() == (Path(sys.prefix) / "bin").resolve()
        return {"compiler": compiler[1] if compiler else None, "settings": _settings() if ours else None}

    @cached_property
    def _said(self) -> str:
        return _ask_version(self.path("llama-server"))

    def require(self, *tools: str) -> None:
        """Raise one ToolError that names every tool that is missing, or says that all are too old."""
        missing = [
            f"{self.bin / t}: tool missing; {BRING_TOOLS}" for t in tools if not os.access(self.bin / t, os.X_OK)
        ]
        if missing:
            raise ToolError(*missing)
        _ = self.version

    def run(
        self,
        tool: str,
        args: Sequence[str | Path],
        *,
        cwd: Path,
        log: Path,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Run one tool to its end; what it says goes to ``log``. Raises ToolError with its last words.

        ``meanwhile`` is called every second while it runs.
        """
        run([self.path(tool), *args], cwd=cwd, log=log, meanwhile=meanwhile)

    @contextmanager
    def serve(
        self, args: Sequence[str | Path], *, port: int, cwd: Path, log: Path
    ) -> Iterator[subprocess.Popen[bytes]]:
        """llama-server on a loopback port while the block runs; nothing that it started outlives the block.

        It is a process group of its own, so an interrupt of the terminal reaches it only through this block's end.
        """
        command = [self.path("llama-server"), *args, "--host", "127.0.0.1", "--port", str(port)]
        with _logged(command, log) as out, _start(command, cwd, out, group=True) as server:
            try:
                yield server
            finally:
                _stop(server, group=True)


def find(folder: str | Path | None = None) -> Toolchain:
    """The toolchain to use: the folder given, else the one that QUANT_LLAMA_CPP names, else this environment's, else PATH's.

    A folder may be a build tree; its ``bin`` is looked into as well. Raises ToolError for a folder that does not exist.
    """
    if named := folder or os.environ.get(SETTING):
        root = Path(named).expanduser().resolve()
        if not root.is_dir():
            raise ToolError(f"{root}: llama.cpp: no such folder ({'--llama-cpp' if folder else SETTING})")
        places = [root, root / "bin", root / "build" / "bin"]
    else:
        on_path = shutil.which("llama-server")
        places = [Path(sys.prefix) / "bin", *([Path(on_path).resolve().parent] if on_path else [])]
    return Toolchain(next((p for p in places if (p / "llama-server").exists()), places[0]))


def run(
    command: Sequence[str | Path], *, cwd: Path, log: Path, env: dict[str, str] | None = None, name: str | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Run one program to its end; raises ToolError that quotes its last words when it does not end well.

    ``meanwhile`` is called every second while it runs.
    """
    with _logged(command, log) as out:
        process = _start(command, cwd, out, env)
        try:
            while (code := _wait(process, LOOK_SECONDS if meanwhile else None)) is None:
                assert meanwhile
                meanwhile()
        finally:
            _stop(process)
    if code and (reason := no_room(cwd)):
        raise InputError(f"{cwd}: {name or Path(command[0]).name} stopped: {reason}; free some and run again")
    if code:
        raise ToolError(f"{name or Path(command[0]).name} {how_it_ended(code)}; its last words:\n{last_words(log)}")


def no_room(folder: Path) -> str | None:
    """Why nothing more can be written in a folder, if that is so: tools seldom say it in words that can be understood."""
    if shutil.disk_usage(folder).free < LITTLE_BYTES:
        return "no space left"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and any(p.stat().st_size >= limit for p in folder.rglob("*") if p.is_file()):
        return f"a file grew too large (the limit here is {limit} bytes)"
    return None


def last_words(log: Path) -> str:
    """The end of a log, indented, for an error message."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-LAST_WORDS:]) or "    (nothing)"


def free_port(wanted: int | None = None) -> int:
    """A loopback port that nobody listens on; raises InputError when the wanted one is taken."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", wanted or 0))
        except (OSError, OverflowError) as e:
            raise InputError(
                f"port {wanted}: expected a free port on 127.0.0.1, found it taken ({e}); give another"
            ) from e
        return int(s.getsockname()[1])


def free_memory() -> int:
    """Bytes of main memory that a new program can have, as the kernel estimates it."""
    said = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(said["MemAvailable"].split()[0]) * 1024


@contextmanager
def _logged(command: Sequence[str | Path], log: Path) -> Iterator[int]:
    """Append the command, as it could be typed, to the log, and give the log to write to."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, f"$ {shlex.join(str(part) for part in command)}\n".encode())
        yield fd
    finally:
        os.close(fd)


def _start(
    command: Sequence[str | Path], cwd: Path, out: int, env: dict[str, str] | None = None, group: bool = False
) -> subprocess.Popen[bytes]:
    """A program that speaks into ``out`` and dies with this process. Raises ToolError when it is none for this machine."""
    try:
        return subprocess.Popen(
            [str(part) for part in command], cwd=cwd, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=env,
            preexec_fn=_die_with_parent, process_group=0 if group else None,
        )  # fmt: skip
    except OSError as e:
        raise ToolError(f"{command[0]}: cannot be started ({e})") from e


def _die_with_parent() -> None:
    """In the child, before it becomes the tool: be killed when the parent dies, even of ``kill -9``."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(process: subprocess.Popen[bytes], group: bool = False) -> None:
    """End a child that still runs: asked first, killed after five seconds; then whatever is left of its group."""
    try:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        if group:  # also when a second interrupt comes while the first is being obeyed
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], seconds: float | None) -> int | None:
    """The exit code of a process, or none when it still runs after so many seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def how_it_ended(code: int) -> str:
    """A return code in words; a signal by its name."""
    if code < 0:
        name = signal.Signals(-code).name
        reason = {"SIGKILL": " (out of memory?)", "SIGXFSZ": " (a file grew too large)"}.get(name, "")
        return f"was ended by {name}{reason}"
    return f"exited with {code}"


def _ask_version(tool: Path) -> str:
    try:
        asked = subprocess.run(
            [tool, "--version"], capture_output=True, text=True, errors="replace", timeout=60, check=False,
            preexec_fn=_die_with_parent,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ToolError(f"{tool}: cannot be started ({e})") from e
    return asked.stderr + asked.stdout


def _settings() -> dict[str, str] | None:
    """What uv told CMake when it built this environment's tools."""
    from importlib import metadata  # the engine's process, which starts often, has no use for it

    try:
        told = metadata.distribution("llama-cpp-python").read_text("uv_build.json")
        found = json.loads(told or "null")["config_settings"]
        return {k.removeprefix(DEFINE): v for k, v in sorted(found.items()) if k.startswith(DEFINE)}
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _dots(number: tuple[int, ...]) -> str:
    return ".".join(map(str, number))
