"""``quant doctor``: what is needed, whether it is installed, and how to get it."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from quant.cli import doctor
from quant.cli.doctor import LIBRARIES, Finding, examine_machine
from quant.cli.options import quant
from quant.core.errors import ToolError
from quant.llama.toolchain import BRING_TOOLS, TOOLS, Toolchain
from quant.quantize.kernels.library import load_library

Fake = Callable[..., Toolchain]


def run(tools: Toolchain) -> Result:
    return CliRunner().invoke(quant, ["doctor", "--llama-cpp", str(tools.bin)])


def found(tools: Toolchain) -> dict[str, Finding]:
    return {f.what: f for f in examine_machine(tools.bin)}


def test_a_machine_with_everything_is_fine(fake_tools: Fake) -> None:
    tools = fake_tools()
    findings = found(tools)
    assert all(f.ok for f in findings.values())
    assert set(findings) >= {
        *TOOLS,
        *LIBRARIES,
        "python",
        "a C++ compiler",
        "llama.cpp's converter",
    }
    assert findings["llama-quantize"].row == (
        "ok",
        "llama-quantize",
        "0.5.0 (0c1e570)",
        str(tools.bin / "llama-quantize"),
    )
    assert run(tools).exit_code == 0


def test_the_kernels_of_each_type_are_listed(fake_tools: Fake) -> None:
    rows = [f for f in examine_machine() if f.what == "kernels"]
    if sets := load_library().sets:
        assert (rows[0].ok, rows[0].version) == (True, sets[0])
        assert {"Q4_K", "IQ4_XS"} <= set(rows[0].where.split(", "))
    else:
        assert rows[0].row == ("ok", "kernels", "ggml", load_library().problem)
    assert found(fake_tools())["kernels"].where.startswith("not tried: libggml-base.so: missing")


def test_a_missing_tool_has_its_install_command(fake_tools: Fake) -> None:
    tools = fake_tools(missing=("llama-imatrix",))
    finding = found(tools)["llama-imatrix"]
    assert finding.row == ("MISSING", "llama-imatrix", "", BRING_TOOLS)
    result = run(tools)
    assert result.exit_code == 2
    assert "MISSING" in result.stdout


def test_tools_that_are_too_old_are_refused(fake_tools: Fake) -> None:
    findings = found(fake_tools("version: 0.4.9 (build 1, commit abc)"))
    assert "expected version 0.5.0 or later, found 0.4.9 (abc)" in findings["llama.cpp"].where
    assert not any(findings[tool].ok for tool in TOOLS)


def test_a_missing_server_is_reported_once(fake_tools: Fake) -> None:
    tools = fake_tools(missing=("llama-server",))
    assert [
        f.what for f in examine_machine(tools.bin) if f.what in ("llama.cpp", "llama-server")
    ] == ["llama-server"]


def test_a_missing_library_has_its_install_command(
    fake_tools: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version

    def without_torch(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_torch)
    assert found(fake_tools())["torch"].row == ("MISSING", "torch", "", "uv add torch")


def test_a_missing_compiler_and_converter_have_their_install_commands(
    fake_tools: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    findings = found(fake_tools())
    assert "apt-get install g++" in findings["a C++ compiler"].where
    assert findings["llama.cpp's converter"].where == BRING_TOOLS
    assert not findings["a C++ compiler"].ok
    assert not findings["llama.cpp's converter"].ok


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no such folder"):
        examine_machine(tmp_path / "none")
