"""Files of the allocation study, each made once: texts, imatrix, presets, Hessians, variants."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

from quant.build import apply_template_patch, pull_locked
from quant.calibration import hessians
from quant.calibration.documents import Document
from quant.calibration.text import render_document
from quant.chat.template import patch_template
from quant.core import files
from quant.core.format import to_canonical_json
from quant.core.store import Store
from quant.evaluate import error_measurement
from quant.job import load_pinned_model
from quant.llama.convert import convert_checkpoint
from quant.llama.gguf import read_header
from quant.llama.model_file import ModelFile
from quant.llama.toolchain import Toolchain
from quant.plan import error_table
from quant.plan.error_table import ErrorTable
from quant.plan.fold import fold_types
from quant.plan.plan import make_plan
from quant.quantize.engine.job import EngineSettings
from quant.quantize.variants import QuantizeTarget, WriteRequest, write_variants
from quant.release.metadata import make_file_metadata
from tests.models import corpus

SEEDS = {"calibration": 101, "held out": 202}


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study. A file that is there is not made again."""

    out: Path
    tools: Toolchain
    store: Store
    threads: int
    given_base: Path | None = None
    """A BF16 file to study instead of tiny-glm's."""

    @cached_property
    def base(self) -> ModelFile:
        """The BF16 file."""
        path = self.given_base or self.out / "base.gguf"
        if not path.exists():
            model, recipe, locked = load_pinned_model("tiny-glm")
            checkpoint = pull_locked(model, recipe, locked, self.store)
            template = apply_template_patch(model.template, checkpoint)
            converted = convert_checkpoint(
                checkpoint,
                template.text if template else None,
                make_file_metadata(model),
                self.tools,
                self.store,
            )
            files.link_or_copy(converted.path, path)
        return ModelFile.open(path)

    @cached_property
    def texts(self) -> tuple[Path, dict[str, Path]]:
        """The text of the calibration side, and the held-out texts by domain."""
        calibration, held_out = make_texts(self.base.metadata["tokenizer.chat_template"])
        for name, parts in {"cal": calibration, **held_out}.items():
            files.write_text(self.out / f"{name}.txt", "\n".join(parts))
        return self.out / "cal.txt", {name: self.out / f"{name}.txt" for name in held_out}

    @cached_property
    def imatrix(self) -> Path:
        """The imatrix of 100 chunks, by llama-imatrix."""
        path = self.out / "imatrix.gguf"
        if not path.exists():
            options = [
                "--chunks",
                "100",
                "--parse-special",
                "--no-ppl",
                "-c",
                "512",
                "-b",
                "512",
                "-ub",
                "512",
            ]
            arguments: list[str | Path] = ["-m", self.base.path, "-f", self.texts[0].name]
            arguments += ["-o", path.name, *options, "-t", str(self.threads)]
            self._run("llama-imatrix", arguments)
        return path

    @cached_property
    def errors(self) -> ErrorTable:
        """The error of ggml's quantization."""
        return self._measure_errors("errors.json", None)

    @cached_property
    def gptq_errors(self) -> ErrorTable:
        """The error that remains after GPTQ with gradient-weighted Hessians."""
        return self._measure_errors("errors fed back.json", self.hessians(gradients=True))

    def preset(self, name: str) -> Path:
        """Return llama-quantize's file of a type."""
        path = self.out / f"preset {name}.gguf"
        if not path.exists():
            arguments: list[str | Path] = [
                "--imatrix",
                self.imatrix.name,
                self.base.path,
                path.name,
                name,
                "1",
            ]
            self._run("llama-quantize", arguments)
        return path

    def dequantized(self, quantized: Path) -> Path:
        """Return a file's weights as floats: the two differ only in how activations are rounded."""
        path = self.out / "rounded.gguf"
        if not path.exists():
            self._run("llama-quantize", ["--allow-requantize", quantized, path.name, "F32", "1"])
        return path

    def hessians(self, *, gradients: bool) -> Path:
        """Return the Hessians of the calibration text, with tokens weighted by gradients or not."""
        path = self.out / f"moments by {'gradients' if gradients else 'inputs'}.safetensors"
        if not path.exists():
            settings = hessians.HessianSettings(threads=self.threads, gradients=gradients)
            hessians.collect_hessians(self.base.path, self.texts[0], path, settings)
        return path

    def write(
        self, types_by_name: Mapping[str, Mapping[str, str]], hessians: Path | None = None
    ) -> dict[str, Path]:
        """Write quantized files, with GPTQ if there are Hessians.

        Args:
            types_by_name: By the file's name, the type of each tensor that is quantized.
            hessians: For GPTQ; None quantizes as llama-quantize does.
        """
        tensors = self.base.tensors
        covered = frozenset(n for n, e in self.errors.errors.items() if "IQ1_S" in e)
        plans = {
            name: make_plan(fold_types("x", "x", types, tensors), tensors, covered)
            for name, types in types_by_name.items()
        }
        paths = {name: self.out / "made" / f"{name}.gguf" for name in plans}
        inputs = [self.base.path, self.imatrix, *([hessians] if hessians else [])]
        request = WriteRequest(
            base=self.base,
            targets=[QuantizeTarget(plans[name], path) for name, path in paths.items()],
            identity=to_canonical_json([files.hash_file(p) for p in inputs]),
            tools=self.tools,
            imatrix=ModelFile.open(self.imatrix),
            hessians=hessians,
            settings=EngineSettings(self.threads),
        )
        write_variants(request, self.out / "work")
        return paths

    def _measure_errors(self, name: str, hessians: Path | None) -> ErrorTable:
        path = self.out / name
        if not path.exists():
            table = error_measurement.measure_errors(
                self.base.path, self.imatrix, self.tools, hessians=hessians
            )
            error_table.write_error_table(path, table)
        return error_table.read_error_table(path, self.base.digest)

    def _run(self, tool: str, arguments: list[str | Path]) -> None:
        self.tools.run(tool, arguments, cwd=self.out, log=self.out / "log")


def read_types(path: Path) -> dict[str, str]:
    """Return the type of each tensor of a file."""
    return {t.name: t.type.name for t in read_header(path).tensors}


def make_texts(chat_template: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the calibration side, and the held-out texts by domain.

    No conversation is on both sides, and no piece of code.
    """
    template = patch_template(chat_template, None, "tiny-glm")

    def make_chats(seed: int) -> list[str]:
        documents = (
            Document(str(n), "en", c.thinking, tuple(c.messages), tuple(c.tools))
            for n, c in enumerate(itertools.islice(corpus.conversations(seed), 500))
        )
        return list(dict.fromkeys(render_document(d, template) for d in documents))

    def read_code(seed: int, count: int, *, held_out: bool) -> list[str]:
        return list(itertools.islice(corpus.code_pieces(seed, held_out=held_out), count))

    chats = make_chats(SEEDS["calibration"])
    calibration = chats + read_code(SEEDS["calibration"], 120, held_out=False)
    Random(5).shuffle(calibration)
    held_out_chats = [c for c in make_chats(SEEDS["held out"]) if c not in set(chats)]
    # Files of Python's library repeat each other here and there.
    code = read_code(SEEDS["held out"], 90, held_out=True)
    held_out_code = [piece for piece in code if piece not in set(calibration)]
    return calibration, {"chat": held_out_chats, "code": held_out_code}
