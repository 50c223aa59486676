"""llama.cpp's native tools: where they are, which version they are, and the one door through which they run.

Commands go into a log as they could be typed. A tool dies with the process that started it, so a killed run leaves
nobody writing behind its back.
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

from quant.core.process import die_with_parent, run_program
from quant.errors import ToolError

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
"""llama.cpp of October 2026: explicit tensor types win over heuristics, experts without data keep their entry."""
SETTING = "QUANT_LLAMA_CPP"
BRING_TOOLS = "run `uv sync` in the project's folder, or name your own with --llama-cpp DIR"

DEFINE = "cmake.define."
"""Begins a setting of CMake, as a build of a package is told it."""


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
            raise ToolError(
                f"{self.bin}: llama.cpp: expected version {_dots(OLDEST)} or later, found {first!r}"
            )
        version = Version(tuple(int(n) for n in match.groups()[:3]), match[4])
        if version.number < OLDEST:
            raise ToolError(
                f"{self.bin}: llama.cpp: expected version {_dots(OLDEST)} or later, found {version}"
            )
        return version

    @property
    def built(self) -> dict[str, Any]:
        """How the tools were built, as plain JSON: their compiler, and CMake's settings where the installer wrote them down."""
        compiler = re.search(r"^built with (.+?)\s*$", self._said, re.MULTILINE)
        ours = self.bin.resolve() == (Path(sys.prefix) / "bin").resolve()
        return {
            "compiler": compiler[1] if compiler else None,
            "settings": _settings() if ours else None,
        }

    @cached_property
    def _said(self) -> str:
        return _ask_version(self.path("llama-server"))

    def require(self, *tools: str) -> None:
        """Raise one ToolError that names every tool that is missing, or says that all are too old."""
        missing = [
            f"{self.bin / t}: tool missing; {BRING_TOOLS}"
            for t in tools
            if not os.access(self.bin / t, os.X_OK)
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
        run_program([self.path(tool), *args], cwd=cwd, log=log, meanwhile=meanwhile)


def find_toolchain(folder: str | Path | None = None) -> Toolchain:
    """The toolchain to use: the folder given, else the one that QUANT_LLAMA_CPP names, else this environment's, else PATH's.

    A folder may be a build tree; its ``bin`` is looked into as well. Raises ToolError for a folder that does not exist.
    """
    if named := folder or os.environ.get(SETTING):
        root = Path(named).expanduser().resolve()
        if not root.is_dir():
            raise ToolError(
                f"{root}: llama.cpp: no such folder ({'--llama-cpp' if folder else SETTING})"
            )
        places = [root, root / "bin", root / "build" / "bin"]
    else:
        on_path = shutil.which("llama-server")
        places = [Path(sys.prefix) / "bin", *([Path(on_path).resolve().parent] if on_path else [])]
    return Toolchain(next((p for p in places if (p / "llama-server").exists()), places[0]))


def _ask_version(tool: Path) -> str:
    try:
        asked = subprocess.run(
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
