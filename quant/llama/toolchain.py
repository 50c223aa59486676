"""llama.cpp's native tools: where they are, which version they have, and how they are run.

Every command is logged as it could be typed. A tool dies with the process that started it, so a
killed run leaves nobody writing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quant.core.errors import ToolError
from quant.core.process import die_with_parent, run_program

TOOLS = (
    "llama-quantize",
    "llama-imatrix",
    "llama-tokenize",
    "llama-gguf-split",
    "llama-server",
    "llama-perplexity",
    "llama-mtmd-cli",
)
OLDEST = (0, 5, 0)
"""llama.cpp of October 2026. Since then explicit tensor types win over heuristics, and an imatrix
keeps the entry of an expert without data."""
SETTING = "QUANT_LLAMA_CPP"
"""The environment variable that names a folder of tools."""
BRING_TOOLS = "run `uv sync` in the project's folder, or name your own with --llama-cpp DIR"

DEFINE = "cmake.define."
"""Begins a CMake definition among the settings of a package's build."""


@dataclass(frozen=True)
class Version:
    """The version that a build of llama.cpp prints."""

    number: tuple[int, ...]
    commit: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.number))} ({self.commit})"


@dataclass(frozen=True)
class Toolchain:
    """A folder with llama.cpp's tools in it."""

    bin: Path

    def path(self, tool: str) -> Path:
        """Return the path of a tool. Raises ToolError with what brings it if it is missing."""
        path = self.bin / tool
        if not os.access(path, os.X_OK):
            raise ToolError(f"{path}: tool missing; {BRING_TOOLS}")
        return path

    @cached_property
    def version(self) -> Version:
        """The version of the whole folder, as its llama-server prints it.

        Raises:
            ToolError: The version cannot be read, or is too old.
        """
        oldest = ".".join(map(str, OLDEST))
        # Older builds print "version: 6123 (abc)". That does not match, and the error quotes it.
        match = re.search(r"version: (\d+)\.(\d+)\.(\d+)\S* \(.*?commit (\w+)\)", self._output)
        if not match:
            first = (self._output.strip().splitlines() or ["nothing"])[0]
            raise ToolError(
                f"{self.bin}: llama.cpp: expected version {oldest} or later, found {first!r}"
            )
        version = Version(tuple(int(n) for n in match.groups()[:3]), match[4])
        if version.number < OLDEST:
            raise ToolError(
                f"{self.bin}: llama.cpp: expected version {oldest} or later, found {version}"
            )
        return version

    @property
    def build_info(self) -> dict[str, Any]:
        """How the tools were built, as JSON: ``compiler`` and CMake ``settings``.

        Only the installer of this environment wrote its settings down; for other tools they are
        None.
        """
        compiler = re.search(r"^built with (.+?)\s*$", self._output, re.MULTILINE)
        ours = self.bin.resolve() == (Path(sys.prefix) / "bin").resolve()
        return {
            "compiler": compiler[1] if compiler else None,
            "settings": _read_build_settings() if ours else None,
        }

    @cached_property
    def _output(self) -> str:
        """What ``llama-server --version`` prints."""
        return _print_version(self.path("llama-server"))

    def require(self, *tools: str) -> None:
        """Raise ToolError if tools are missing, which it all names, or are too old."""
        missing = [
            f"{self.bin / t}: tool missing; {BRING_TOOLS}"
            for t in tools
            if not os.access(self.bin / t, os.X_OK)
        ]
        if missing:
            raise ToolError(*missing)
        # Last, because it needs llama-server, which may be one of the missing tools.
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
        """Run one tool to its end.

        Args:
            tool: Its name, such as ``llama-imatrix``.
            args: Its arguments.
            cwd: Where it runs.
            log: The command and its output are appended here.
            meanwhile: Called every second while it runs.

        Raises:
            ToolError: The tool is missing or fails. The error quotes the end of the log.
            InputError: The disk is full.
        """
        run_program([self.path(tool), *args], cwd=cwd, log=log, meanwhile=meanwhile)


def find_toolchain(folder: str | Path | None = None) -> Toolchain:
    """Return the toolchain to use.

    The first of these wins: the folder, that of ``QUANT_LLAMA_CPP``, this environment's tools, and
    the tools on ``PATH``. A named folder may also be a source tree, whose ``build/bin`` is used.

    Args:
        folder: The folder that the user named. None takes the others.

    Raises:
        ToolError: The named folder does not exist.
    """
    if named := folder or os.environ.get(SETTING):
        root = Path(named).expanduser().resolve()
        if not root.is_dir():
            raise ToolError(
                f"{root}: llama.cpp: no such folder ({'--llama-cpp' if folder else SETTING})"
            )
        places = [root, root / "bin", root / "build" / "bin"]
    else:
        # Where a link points: the libraries lie beside the real tools (see ggml.find_library).
        on_path = shutil.which("llama-server")
        places = [Path(sys.prefix) / "bin", *([Path(on_path).resolve().parent] if on_path else [])]
    # Where there is no llama-server at all, the first place: the error of a missing tool names it.
    return Toolchain(next((p for p in places if (p / "llama-server").exists()), places[0]))


def _print_version(tool: Path) -> str:
    try:
        process = subprocess.run(
            [tool, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
            preexec_fn=die_with_parent,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ToolError(f"{tool}: cannot be started ({e})") from e
    return process.stderr + process.stdout  # some builds print it on standard error


def _read_build_settings() -> dict[str, str] | None:
    """Return the CMake definitions that uv built this environment's tools with, if noted."""
    from importlib import metadata  # late: the quantizer's process, which starts often, needs none

    try:
        # uv writes it beside the metadata of a wheel that it built, with the settings it passed.
        text = metadata.distribution("llama-cpp-python").read_text("uv_build.json")
        settings = json.loads(text or "null")["config_settings"]
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(settings, dict):
        return None
    return {k.removeprefix(DEFINE): v for k, v in sorted(settings.items()) if k.startswith(DEFINE)}
