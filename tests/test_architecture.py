"""The doors of the code: what only one place may do, what stays pure, and that the stages are the story they tell."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import quant

ROOT = Path(quant.__file__).parent.parent
FILES = {p.relative_to(ROOT).as_posix(): p for d in ("quant", "flows", "calibration") for p in (ROOT / d).rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

PROCESSES = {
    "quant/fetcher.py", "quant/converter.py", "quant/renderer.py", "quant/engine/worker.py", "quant/scorer.py",
    "quant/observer.py", "quant/gradients/program.py",
}  # fmt: skip
"""Programs of their own (``python -m``): they end themselves, and bring what nobody else may."""
PARTS = {"quant/gradients/glm4moe.py"}
"""What only such a program imports."""
DOORS = {  # who imports it, or a part of it   who may (a name that ends in / is a folder)
    "ctypes": {"quant/toolchain.py", "quant/ggml.py", "quant/kernels/library.py", "quant/observer.py"},
    "prefect": {"flows/"},
    "multiprocessing": set(),
    "concurrent.futures.process": set(),
    "pickle": set(),
    "click": {"quant/cli/"},
    "rich": {"quant/cli/"},
    "torch": {"quant/converter.py", "quant/gradients/"},
    "llama_cpp": {"quant/scorer.py"},
    "scipy": {"quant/allocate.py", "quant/sensitivity.py"},
    "transformers": PROCESSES,
    "datasets": {"calibration/"},
    "httpx": set(),
    "openai": {"quant/talk.py"},
    "urllib": set(),
    "http": set(),
    "requests": set(),
    "huggingface_hub": {
        "quant/bridge.py",
        "quant/hub.py",
        "quant/source.py",
        "quant/publish.py",
        "quant/send.py",
        "quant/lock.py",
        "calibration/",
    },
    "socket": {"quant/toolchain.py"},
    "model_signing": {"quant/sign.py"},
    "cryptography": {"quant/sign.py"},
}
NARROW = {  # a door that is open for one name only
    ("quant/card.py", "huggingface_hub"): {"huggingface_hub.ModelCardData"},
    ("quant/convert.py", "huggingface_hub"): {"huggingface_hub.ModelCardData"},
    ("quant/store.py", "socket"): {"socket.gethostname"},
}
PURE = {
    "quant/allocate.py", "quant/folding.py", "quant/ladder.py", "quant/search.py",
    "quant/plan.py", "quant/template.py", "quant/card.py", "quant/ggml_types.py", "quant/errors.py", "quant/footprint.py",
    "quant/card_body.py", "quant/provenance.py", "quant/contract.py", "quant/battery.py", "quant/verdict.py", "quant/report.py",
    "quant/modelfile.py", "quant/anchors.py", "quant/coverage.py", "quant/frontier.py", "quant/pictures.py", "quant/page.py",
    "calibration/packing.py", "calibration/alike.py",
    "calibration/forms.py",
    "quant/engine/chunks.py", "quant/engine/layout.py", "quant/licence.py", "quant/arrangement.py",
    "quant/gradients/shape.py", "quant/gradients/glm4moe.py",
    "quant/feedback/layouts.py", "quant/feedback/formats.py", "quant/feedback/rounding.py", "quant/feedback/descent.py",
}  # fmt: skip
EFFECTS = {
    "os", "io", "shutil", "subprocess", "tempfile", "socket", "time", "random", "ctypes", "httpx", "quant.store", "quant.files",
    "quant.toolchain", "quant.ggml",
}  # fmt: skip
OPENS = {
    "open",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "unlink",
    "mkdir",
    "rename",
    "touch",
    "iterdir",
    "glob",
    "stat",
}
HEAVY = {"torch", "transformers", "prefect", "datasets"}
LATE = {
    *HEAVY,
    "model_signing",
    "cryptography",
    "llama_cpp",
    "scipy",
    "numpy",
    "openai",
    "httpx",
    "huggingface_hub",
    "gguf",
    "safetensors",
}
"""What ``quant --help`` does without."""


@cache
def imports(tree: ast.Module) -> frozenset[str]:
    """Every module, and every name of a module, that is imported anywhere in a file."""
    nodes = list(ast.walk(tree))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {f"{n.module}.{alias.name}" for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    return frozenset(whole | parts)


def uses(tree: ast.Module, module: str) -> set[str]:
    """The names of a module that a file uses: ``module.name``."""
    named = {name for name in imports(tree) if name.startswith(f"{module}.")}
    read = {n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == module}
    return named | {f"{module}.{node.attr}" for node in read}


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def may(file: str, allowed: set[str]) -> bool:
    return any(file == a or (a.endswith("/") and file.startswith(a)) for a in allowed)


@cache
def calls(tree: ast.Module) -> frozenset[str]:
    return frozenset(ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_there_is_code_to_look_at() -> None:
    assert len(FILES) > 30
    assert set(FILES) >= PURE | PROCESSES


@pytest.mark.parametrize("module", DOORS)
def test_only_its_door_opens_to(module: str) -> None:
    for file, tree in TREES.items():
        through = {name for name in imports(tree) if within(name, module)}
        if through and not may(file, DOORS[module]):
            assert (file, module) in NARROW, f"{file} imports {module}"
            assert uses(tree, module) <= NARROW[file, module], file


def test_only_the_toolchain_starts_processes() -> None:
    for file, tree in TREES.items():
        if file != "quant/toolchain.py":
            # A Popen may be spoken of as a type, by who waits for a server.
            assert not {c for c in calls(tree) if c.partition(".")[0] == "subprocess"}, file
            assert not {n for n in imports(tree) if n.startswith("subprocess.")}, file
            assert not {
                u
                for u in uses(tree, "os")
                if u[3:].startswith(("system", "fork", "exec", "spawn", "popen", "posix_spawn"))
            }, file


@pytest.mark.parametrize("file", sorted(PURE))
def test_what_is_pure_touches_nothing(file: str) -> None:
    effects = {name for name in imports(TREES[file]) if any(within(name, e) for e in EFFECTS)}
    assert not effects
    assert not {call for call in calls(TREES[file]) if call.rpartition(".")[2] in OPENS}


def test_only_the_command_line_prints_and_ends_the_process() -> None:
    for file, tree in TREES.items():
        if not file.startswith("quant/cli/") and file not in PROCESSES:
            found = {c for c in calls(tree) if c in ("print", "exit", "quit", "sys.exit", "os._exit", "SystemExit")}
            found |= {u for u in uses(tree, "sys") if u in ("sys.stdout", "sys.stderr")}
            assert not found, file


def test_nobody_imports_the_program_that_brings_upstreams_own_libraries() -> None:
    programs = {"quant.converter"}
    for file, tree in TREES.items():
        assert not {n for n in imports(tree) if any(within(n, p) for p in programs)}, file


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after it ran some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*{{m.partition('.')[0] for m in sys.modules}})"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return set(done.stdout.split())


def test_the_command_line_starts_without_what_it_may_not_need() -> None:
    assert not loaded("import quant.cli") & LATE


def test_no_module_is_heavy_to_import() -> None:
    modules = [
        f.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for f in FILES if not f.startswith("flows/")
    ]
    code = "\n".join(f"import {m}" for m in modules if f"{m.replace('.', '/')}.py" not in PROCESSES | PARTS)
    assert not loaded(code) & HEAVY


VERBS = {"source": "pull", "template": "patch"}
"""Where the stage's verb is not the module's name."""


@pytest.mark.parametrize("stage", quant.STAGES)
def test_every_stage_is_a_module_with_a_verb(stage: str) -> None:
    assert callable(getattr(importlib.import_module(f"quant.{stage}"), VERBS.get(stage, stage)))


def test_a_build_walks_the_stages_in_their_order() -> None:
    [build] = [n for n in TREES["quant/build.py"].body if isinstance(n, ast.FunctionDef) and n.name == "build"]
    done = [n for n in ast.walk(build) if isinstance(n, ast.Call) and ast.unparse(n.func) == "do"]
    stages = [ast.literal_eval(n.args[0]) for n in sorted(done, key=lambda n: (n.lineno, n.col_offset))]
    assert tuple(dict.fromkeys(stages)) == quant.STAGES


def test_every_module_says_what_it_promises() -> None:
    assert not [file for file, tree in TREES.items() if not ast.get_docstring(tree)]
