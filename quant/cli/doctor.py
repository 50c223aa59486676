"""Examine the machine: the tools and libraries that the project needs, and which are installed."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from quant.core.errors import ToolError
from quant.llama import toolchain
from quant.llama.toolchain import TOOLS, Toolchain
from quant.llama.types import TYPES

LIBRARIES = (
    "gguf",
    "torch",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "datasets",
    "prefect",
)


@dataclass(frozen=True)
class Finding:
    """One tool, library or kernel, and whether it is usable."""

    ok: bool
    what: str
    version: str
    where: str
    """Its path, or the command that installs it."""

    @property
    def row(self) -> tuple[str, str, str, str]:
        """The finding as a row of a table."""
        return "ok" if self.ok else "MISSING", self.what, self.version, self.where


def examine_machine(llama_cpp: Path | None = None) -> tuple[Finding, ...]:
    """Return a finding for everything that the project needs.

    Args:
        llama_cpp: A folder with your own llama.cpp. None takes the environment's.

    Raises:
        ToolError: The folder does not exist. Everything else that is missing is a finding.
    """
    tools = toolchain.find_toolchain(llama_cpp)
    return (*_tools(tools), _converter(), *_libraries(), _compiler(), *_kernels(tools))


def _tools(tools: Toolchain) -> Iterator[Finding]:
    try:
        version, sound = str(tools.version), True
    except ToolError as e:
        version, sound = "unknown", False
        # Without the program, its own line below says so; this one is for a build whose version
        # cannot be read.
        if (tools.bin / "llama-server").exists():
            yield Finding(False, "llama.cpp", "", str(e))
    for tool in TOOLS:
        here = (tools.bin / tool).exists()
        yield Finding(
            here and sound,
            tool,
            version if here else "",
            str(tools.bin / tool) if here else toolchain.BRING_TOOLS,
        )


def _converter() -> Finding:
    # find_spec does not run the package, which imports torch.
    spec = find_spec("conversion")
    where = str(Path(spec.origin).parent) if spec and spec.origin else toolchain.BRING_TOOLS
    return Finding(spec is not None, "llama.cpp's converter", _version("llama-cpp-python"), where)


def _libraries() -> Iterator[Finding]:
    yield Finding(sys.version_info >= (3, 11), "python", sys.version.split()[0], sys.executable)
    for name in LIBRARIES:
        version = _version(name)
        yield Finding(
            bool(version), name, version, "a Python package" if version else f"uv add {name}"
        )


def _compiler() -> Finding:
    path = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    return Finding(
        path is not None,
        "a C++ compiler",
        "",
        path or "apt-get install g++ (it builds llama.cpp once)",
    )


def _kernels(tools: Toolchain) -> Iterator[Finding]:
    """Yield which kernels quantize each type. ggml's own are the slower fallback."""
    from quant.llama import ggml
    from quant.quantize.kernels import Kernels

    try:
        kernels = Kernels(ggml.load_ggml(ggml.find_library(tools.bin)))
    except ToolError as e:
        # Not a fault: without own kernels ggml's are used, only more slowly.
        yield Finding(True, "kernels", "ggml", f"not tried: {e}")
        return
    if kernels.native.problem:
        yield Finding(True, "kernels", "ggml", kernels.native.problem)
    native = [
        t for t in TYPES.values() if any(kernels.native.has(i, t) for i in kernels.native.sets)
    ]
    # A trial of these types takes seconds each; doctor shall answer at once.
    waiting = [t.name for t in native if kernels.needs_slow_trial(t)]
    served = {t.name: kernels.choice(t) for t in native if t.name not in waiting}
    for by in kernels.native.sets:
        if names := [name for name, s in served.items() if s.source == by]:
            yield Finding(True, "kernels", by, ", ".join(names))
    if waiting:
        yield Finding(True, "kernels", "", f"tried at their first use: {', '.join(waiting)}")
    for name, s in served.items():
        if s.source == "ggml":
            yield Finding(True, f"kernel of {name}", "ggml", s.reason)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
