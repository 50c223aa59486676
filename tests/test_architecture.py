"""The architecture: packages in one order, doors that only one module opens, what stays pure, and one of each.

Every rule is a function from source trees to problems, so that each is also shown to fail on a planted fault.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import quant

ROOT = Path(quant.__file__).parent.parent

ORDER = (
    "core",
    "hub",
    "llama",
    "plan",
    "chat",
    "calibration",
    "quantize",
    "evaluate",
    "release",
    "job",
    "build",
    "rebuild",
    "cli",
)  # a package imports only those before it; flows/ imports quant, and nothing imports flows
MAX_COLUMNS = 100
FLAT_FILES = 8
"""Files that may lie flat in quant/."""

PROGRAMS = {
    "quant/hub/downloader.py",
    "quant/llama/converter.py",
    "quant/chat/sandbox.py",
    "quant/quantize/engine/worker.py",
    "quant/evaluate/scorer.py",
    "quant/calibration/hessian_collector.py",
    "quant/calibration/gradients/program.py",
}
"""Programs of their own (``python -m``). They may import what nobody else may."""
ENDS_ITSELF = {"quant/core/child.py"}
"""The one module that ends a process, besides the command line."""
PROGRAM_PARTS = {"quant/calibration/gradients/glm4moe.py"}
"""What only such a program imports."""

DOORS = {  # a module          who may import it, or a part of it (a name that ends in / is a folder)
    "ctypes": {
        "quant/core/process.py",
        "quant/llama/ggml.py",
        "quant/llama/ggml_graph.py",
        "quant/quantize/kernels/library.py",
    },
    "subprocess": {
        "quant/core/process.py",
        "quant/llama/toolchain.py",
        "quant/llama/server.py",
    },
    "multiprocessing": set(),
    "concurrent.futures.process": set(),
    "pickle": set(),
    "prefect": {"flows/"},
    "click": {"quant/cli/"},
    "rich": {"quant/cli/"},
    "torch": {"quant/llama/converter.py", "quant/calibration/gradients/"},
    "llama_cpp": {"quant/llama/model.py"},
    "scipy": {"quant/plan/solver.py", "quant/plan/fit.py"},
    "transformers": PROGRAMS,
    "datasets": {"quant/calibration/"},
    "openai": {"quant/llama/chat_client.py"},
    "huggingface_hub": {"quant/hub/", "quant/calibration/", "quant/release/"},
    "httpx": set(),
    "requests": set(),
    "urllib": set(),
    "http": set(),
    "socket": {"quant/core/process.py", "quant/core/store.py"},
    "model_signing": {"quant/release/sign.py"},
    "cryptography": {"quant/release/sign.py"},
}
STARTS_PROCESSES = {"quant/core/process.py", "quant/llama/toolchain.py"}
PURE = {
    "quant/core/errors.py",
    "quant/core/format.py",
    "quant/core/svg.py",
    "quant/llama/types.py",
    "quant/llama/tensors.py",
    "quant/plan/recipe.py",
    "quant/plan/plan.py",
    "quant/plan/sizes.py",
    "quant/plan/fold.py",
    "quant/plan/format.py",
    "quant/plan/units.py",
    "quant/plan/allocate.py",
    "quant/plan/fit.py",
    "quant/plan/priors.py",
    "quant/plan/solver.py",
    "quant/plan/budgets.py",
    "quant/plan/search.py",
    "quant/plan/inventory/",
    "quant/chat/template.py",
    "quant/chat/rules.py",
    "quant/chat/messages.py",
    "quant/chat/conversations.py",
    "quant/chat/renderings.py",
    "quant/chat/reply_checks.py",
    "quant/chat/schema.py",
    "quant/chat/patch_hints.py",
    "quant/chat/verdict.py",
    "quant/chat/report.py",
    "quant/calibration/packing.py",
    "quant/calibration/dedupe.py",
    "quant/calibration/forms.py",
    "quant/calibration/coverage.py",
    "quant/calibration/gradients/shape.py",
    "quant/calibration/gradients/glm4moe.py",
    "quant/quantize/engine/chunks.py",
    "quant/quantize/engine/layout.py",
    "quant/quantize/gptq/layouts.py",
    "quant/quantize/gptq/formats.py",
    "quant/quantize/gptq/rounding.py",
    "quant/quantize/gptq/descent.py",
    "quant/evaluate/pareto.py",
    "quant/evaluate/charts.py",
    "quant/evaluate/class_charts.py",
    "quant/evaluate/figures.py",
    "quant/evaluate/scores.py",
    "quant/evaluate/html.py",
    "quant/release/card.py",
    "quant/release/provenance.py",
    "quant/release/modelfile.py",
    "quant/release/license.py",
}
"""Modules that decide and do nothing: they open, start and ask nothing."""
EFFECTS = {
    "os",
    "io",
    "shutil",
    "subprocess",
    "tempfile",
    "socket",
    "time",
    "random",
    "ctypes",
    "httpx",
    "quant.core.store",
    "quant.core.files",
    "quant.core.process",
    "quant.llama.toolchain",
    "quant.llama.ggml",
    "quant.llama.ggml_graph",
}
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
ONE_PLACE = {  # a pattern of source text: the one module that has it
    r"blk\\\.(\(|\\d)": "quant/llama/tensors.py",
    r"disk_usage|statvfs|posix_fallocate": "quant/core/disk.py",
    "MemAvailable": "quant/core/memory.py",
}
"""Patterns of source text, each of which belongs to one module."""
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
    "jsonschema",
}
"""What ``import quant`` and ``quant --help`` do without."""

Trees = Mapping[str, ast.Module]


def sources(*folders: str) -> dict[str, str]:
    return {
        p.relative_to(ROOT).as_posix(): p.read_text()
        for d in folders
        for p in (ROOT / d).rglob("*.py")
    }


SOURCES = sources("quant", "flows")
TREES: Trees = {name: ast.parse(text) for name, text in SOURCES.items()}


@cache
def imports(tree: ast.Module) -> frozenset[str]:
    """Every module, and every name of a module, that is imported anywhere in a file."""
    nodes = list(ast.walk(tree))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names = {
        f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names
    }
    return frozenset(modules | names)


@cache
def calls(tree: ast.Module) -> frozenset[str]:
    return frozenset(
        ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)
    )


def attributes(tree: ast.Module, module: str) -> set[str]:
    """The names of a module that a file uses: ``module.name``."""
    named = {name for name in imports(tree) if name.startswith(f"{module}.")}
    read = {
        n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == module
    }
    return named | {f"{module}.{node.attr}" for node in read}


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def listed(file: str, allowed: set[str]) -> bool:
    return any(file == a or (a.endswith("/") and file.startswith(a)) for a in allowed)


def package_of(module: str) -> str:
    """``quant.core.files`` and ``quant/core/files.py`` belong to ``core``."""
    parts = re.split(r"[./]", module.removesuffix(".py"))
    return parts[1] if len(parts) > 1 else ""


def upward_imports(trees: Trees) -> Iterator[str]:
    for file, tree in trees.items():
        for name in imports(tree):
            if within(name, "flows") and not file.startswith("flows/"):
                yield f"{file} imports {name}: flows/ is on top of everything"
            if (
                not file.startswith("quant/")
                or not within(name, "quant")
                or package_of(name) not in ORDER
            ):
                continue
            own = package_of(file)
            if own in ORDER and ORDER.index(package_of(name)) > ORDER.index(own):
                yield f"{file} imports {name}: {own} comes before {package_of(name)}"


def circles(trees: Trees) -> Iterator[str]:
    """Yield every group of modules that import one another, wherever the import stands."""
    names = {f.removesuffix(".py").removesuffix("/__init__").replace("/", "."): f for f in trees}
    graph = {
        module: {
            target
            for name in imports(trees[file])
            for target in (name, name.rpartition(".")[0])
            if target in names and target != module
        }
        for module, file in names.items()
    }
    for module in graph:
        reached, todo = set[str](), [*graph[module]]
        while todo:
            if (target := todo.pop()) not in reached:
                reached.add(target)
                todo += graph[target]
        if module in reached:
            yield f"{module} is imported by what it imports"


def open_doors(trees: Trees, module: str, allowed: set[str]) -> Iterator[str]:
    for file, tree in trees.items():
        if any(within(name, module) for name in imports(tree)) and not listed(file, allowed):
            yield f"{file} imports {module}"


def started_processes(trees: Trees) -> Iterator[str]:
    for file, tree in trees.items():
        if file in STARTS_PROCESSES:
            continue
        # A Popen may be named as a type, by who waits for a server.
        yield from (f"{file}: {c}" for c in calls(tree) if c.partition(".")[0] == "subprocess")
        yield from (f"{file}: {n}" for n in imports(tree) if n.startswith("subprocess."))
        starts = ("system", "fork", "exec", "spawn", "popen", "posix_spawn")
        yield from (f"{file}: {u}" for u in attributes(tree, "os") if u[3:].startswith(starts))


def effects(trees: Trees, pure: set[str]) -> Iterator[str]:
    for file, tree in trees.items():
        if listed(file, pure):
            yield from (
                f"{file} imports {n}" for n in imports(tree) if any(within(n, e) for e in EFFECTS)
            )
            yield from (f"{file} calls {c}" for c in calls(tree) if c.rpartition(".")[2] in OPENS)


def printing(trees: Trees) -> Iterator[str]:
    for file, tree in trees.items():
        if not file.startswith("quant/cli/") and file not in ENDS_ITSELF:
            ends = ("print", "exit", "quit", "sys.exit", "os._exit", "SystemExit")
            yield from (f"{file} calls {c}" for c in calls(tree) if c in ends)
            streams = ("sys.stdout", "sys.stderr")
            yield from (f"{file} uses {u}" for u in attributes(tree, "sys") if u in streams)


def second_places(texts: Mapping[str, str]) -> Iterator[str]:
    for pattern, home in ONE_PLACE.items():
        for file, text in texts.items():
            if file != home and re.search(pattern, text):
                yield f"{file} has {pattern}, which {home} has"


def formatter_skips(texts: Mapping[str, str]) -> Iterator[str]:
    skip = "# fmt: " + "skip"
    yield from (f"{file} has {skip}" for file, text in texts.items() if skip in text)


def long_lines(texts: Mapping[str, str]) -> Iterator[str]:
    for file, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > MAX_COLUMNS:
                yield f"{file}:{number} has {len(line)} columns"


def double_names(trees: Trees) -> Iterator[str]:
    """A class name stands once, a public function's name at most three times."""
    nodes = [(file, n) for file, tree in trees.items() for n in ast.walk(tree)]
    classes = Counter(n.name for _, n in nodes if isinstance(n, ast.ClassDef))
    yield from (f"class {name} stands {n} times" for name, n in classes.items() if n > 1)
    functions = Counter(
        n.name
        for tree in trees.values()
        for n in tree.body
        if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")
    )
    yield from (f"function {name} stands {n} times" for name, n in functions.items() if n > 3)


PARTICIPLES = re.compile(
    r"(Hear|Tak|Held|Hold|Mad|Found|Told|Said|Tri|Shown|Sent|Don|Built|Beat|Want)(e?d|en|e|ing)?"
)


def participle_classes(trees: Trees) -> Iterator[str]:
    for file, tree in trees.items():
        names = (n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
        for name in names:
            last = re.findall(r"[A-Z][a-z0-9]*", name)[-1]
            if PARTICIPLES.fullmatch(last) or (
                last.endswith("ed") and last not in ("Need", "Seed", "Speed")
            ):
                yield f"{file}: class {name} is named by a participle"


def test_there_is_code_to_look_at() -> None:
    assert len(SOURCES) > 100
    assert set(SOURCES) >= PROGRAMS | PROGRAM_PARTS
    assert all(any(listed(file, {p}) for file in SOURCES) for p in PURE)
    assert all(any(package_of(file) == p for file in SOURCES) for p in ORDER)


def test_a_package_imports_only_those_before_it() -> None:
    assert not list(upward_imports(TREES))


def test_no_module_imports_in_a_circle() -> None:
    # The package itself only names its modules, and imports them when a name is used.
    assert not list(circles({f: t for f, t in TREES.items() if not f.endswith("__init__.py")}))


def test_few_files_lie_flat() -> None:
    assert len(list((ROOT / "quant").glob("*.py"))) <= FLAT_FILES


@pytest.mark.parametrize("module", DOORS)
def test_only_its_door_imports(module: str) -> None:
    assert not list(open_doors(TREES, module, DOORS[module]))


def test_only_the_door_to_processes_starts_one() -> None:
    assert not list(started_processes(TREES))


def test_pure_modules_have_no_effects() -> None:
    assert not list(effects(TREES, PURE))


def test_only_the_command_line_prints_and_ends_the_process() -> None:
    assert not list(printing(TREES))


def test_what_belongs_to_one_module_stands_nowhere_else() -> None:
    assert not list(second_places(SOURCES))


def test_the_formatter_is_never_skipped() -> None:
    assert not list(formatter_skips(sources("quant", "flows", "tests")))


def test_lines_fit_the_page() -> None:
    assert not list(long_lines(SOURCES))


def test_one_name_is_one_thing() -> None:
    assert not list(double_names({f: t for f, t in TREES.items() if f.startswith("quant/")}))


def test_classes_are_nouns() -> None:
    assert not list(participle_classes(TREES))


PLANTED = {
    "an upward import": lambda: upward_imports(
        {"quant/core/files.py": ast.parse("def f():\n    from quant.llama import gguf")}
    ),
    "flows below the top": lambda: upward_imports(
        {"quant/build.py": ast.parse("import flows.quantize")}
    ),
    "a second block regex": lambda: second_places(
        {"quant/plan/plan.py": r'BLOCK = re.compile(r"blk\.(\d+)\.")'}
    ),
    "a second look at the free disk": lambda: second_places(
        {"quant/plan/plan.py": "shutil.disk_usage(folder).free"}
    ),
    "a skipped format": lambda: formatter_skips({"quant/plan/plan.py": "x = 1  # fmt: " + "skip"}),
    "a circle": lambda: circles(
        {"a.py": ast.parse("import b"), "b.py": ast.parse("def f():\n    from a import x")}
    ),
    "a long line": lambda: long_lines({"quant/plan/plan.py": "#" * 101}),
    "a door": lambda: open_doors(
        {"quant/plan/plan.py": ast.parse("from prefect import flow")}, "prefect", DOORS["prefect"]
    ),
    "a process": lambda: started_processes({"quant/plan/plan.py": ast.parse("os.system('ls')")}),
    "an effect": lambda: effects({"quant/plan/plan.py": ast.parse("path.read_text()")}, PURE),
    "a print": lambda: printing({"quant/plan/plan.py": ast.parse("print(1)")}),
    "a class twice": lambda: double_names(
        {"a.py": ast.parse("class A: ..."), "b.py": ast.parse("class A: ...")}
    ),
    "a participle": lambda: participle_classes({"a.py": ast.parse("class Taken: ...")}),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_reported(fault: str) -> None:
    assert list(PLANTED[fault]())


def test_nobody_imports_the_program_that_brings_upstreams_own_libraries() -> None:
    for file, tree in TREES.items():
        assert not {n for n in imports(tree) if within(n, "quant.llama.converter")}, file


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after it ran some code."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys; print(*{{m.partition('.')[0] for m in sys.modules}})",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return set(done.stdout.split())


def test_the_command_line_starts_without_what_it_may_not_need() -> None:
    assert not loaded("import quant.cli") & LATE


def test_no_module_is_heavy_to_import() -> None:
    modules = [
        f.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for f in SOURCES
        if not f.startswith("flows/") and f not in PROGRAMS | PROGRAM_PARTS
    ]
    assert not loaded("\n".join(f"import {m}" for m in modules)) & HEAVY


@pytest.mark.parametrize("stage", quant.STAGES)
def test_every_stage_names_a_function(stage: str) -> None:
    module, _, verb = quant.STAGES[stage].partition(":")
    assert callable(getattr(importlib.import_module(module), verb))


def test_a_build_runs_the_stages_in_their_order() -> None:
    nodes = ast.walk(TREES["quant/build.py"])
    runs = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "self.run"]
    runs.sort(key=lambda n: (n.lineno, n.col_offset))
    assert tuple(dict.fromkeys(ast.literal_eval(n.args[0]) for n in runs)) == tuple(quant.STAGES)


def test_every_module_has_a_docstring() -> None:
    assert not [file for file, tree in TREES.items() if not ast.get_docstring(tree)]
