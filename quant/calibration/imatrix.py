"""Compute the importance matrix with llama-imatrix, range by range, until every expert is covered.

The text is read in ranges of chunks. Each range is kept in the store, so a run that was killed goes
on with the next one, and several machines can share the work. The sums of the ranges are added up
in order. If an expert saw too few tokens, more of the text is read, up to the recipe's budget.
"""

import logging
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quant.calibration import coverage, imatrix_file
from quant.calibration.imatrix_file import ImatrixData
from quant.calibration.text import CalibrationText
from quant.core import files, progress
from quant.core.errors import CheckError, InputError, raise_problems
from quant.core.files import Receipt
from quant.core.store import Store, StoredResult
from quant.llama.gguf import TensorSpec
from quant.llama.model_file import ModelFile
from quant.llama.toolchain import Toolchain
from quant.plan.plan import CoveragePolicy, find_coverable, is_quantizable
from quant.plan.recipe import CoverageRule, ImatrixRecipe, ModelRecipe
from quant.plan.sizes import TEXT_NAME

log = logging.getLogger(__name__)
SMALL_BASE = "Q8_0"
PART = "part.gguf"
# Lines of llama-imatrix (tools/imatrix/imatrix.cpp: compute_imatrix).
CHUNKS = re.compile(r"computing over (\d+) chunks, .*n_seq=(\d+)")
FIRST_PASS = re.compile(r"([\d.]+) seconds per pass")


@dataclass(frozen=True)
class Span:
    """A range of chunks."""

    first: int
    count: int

    @property
    def end(self) -> int:
        """The chunk after the last one."""
        return self.first + self.count


@dataclass(frozen=True)
class ImportanceMatrix:
    """An importance matrix on disk: which tensors it covers, and what it was computed from."""

    path: Path
    receipt: Receipt
    counts: Mapping[str, tuple[int, ...]]
    """Tokens that each expert of each matrix saw."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Digests and settings that it was computed from, as plain JSON without paths."""

    @property
    def covered(self) -> frozenset[str]:
        """Names of the tensors that it has data for."""
        return frozenset(name for name, tokens in self.counts.items() if any(tokens))

    def make_coverage_policy(
        self, tensors: Collection[TensorSpec], rule: CoverageRule
    ) -> CoveragePolicy:
        """Find the tensors of a model with insufficient coverage.

        Blocks that predict further tokens (MTP) are left out: no text covers them, and variants
        have rules of their own for them.

        Args:
            tensors: The tensors of the model.
            rule: Tokens that every expert needs, and what happens to tensors without them.
        """
        coverable = find_coverable(tensors)
        names = [t.name for t in tensors if t.name in coverable and is_quantizable(t)]
        without_data = {name: "no data at all" for name in names if name not in self.covered}
        return CoveragePolicy(
            coverage.find_undercovered(self.counts, rule.expert_tokens) | without_data,
            rule.otherwise,
            rule.floor,
        )

    def json(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return asdict(self.receipt) | {
            "made_of": dict(self.origin),
            "coverage": coverage.summarize_coverage(self.counts),
        }


# ---- computing


def compute_imatrix(
    base: ModelFile, text: CalibrationText, model: ModelRecipe, tools: Toolchain, store: Store
) -> ImportanceMatrix:
    """Compute the importance matrix of a model over its calibration text.

    Args:
        base: The BF16 model.
        text: Its calibration text.
        model: The recipe. ``imatrix.base = "Q8_0"`` reads the text with a Q8_0 copy of the base.
        tools: For llama-imatrix and llama-quantize.
        store: Keeps each range and the result.

    Raises:
        ToolError: A tool fails.
        InputError: The text is too short.
        CheckError: The result has no data.
    """
    settings = model.imatrix
    reader = make_q8_base(base, tools, store) if settings.base == SMALL_BASE else base
    name = f"imatrix_{model.title}.gguf"
    return compute_covering_imatrix(reader, text, settings, name, tools, store)


def compute_covering_imatrix(
    base: ModelFile,
    text: CalibrationText,
    settings: ImatrixRecipe,
    name: str,
    tools: Toolchain,
    store: Store,
) -> ImportanceMatrix:
    """Compute an importance matrix, and read more text until every expert is covered.

    Args:
        base: Any GGUF model, whole or sharded.
        text: The text.
        settings: Context, chunks, range and pass sizes, and the coverage rule.
        name: File name of the result.
        tools: For llama-imatrix.
        store: Keeps each range and the result.

    Raises:
        ToolError, InputError, CheckError: As :func:`compute_imatrix`.
    """
    origin = {
        "base": base.digest,
        "text": text.receipt.sha256,
        "context": settings.context,
        # The batch size decides the order of floating-point additions, and so the last bits.
        "pass_chunks": settings.pass_chunks,
        "llama.cpp": str(tools.version),
    }
    available = count_chunks(text.tokens, settings.context, text.path)
    goal = min(settings.chunks or available, available)
    budget = min(settings.coverage.budget or available, available)
    worker = _RangeWorker(base, text, settings, origin, tools, store)
    parts = [
        (span, worker.compute(span, goal))
        for span in split_chunks(
            0, goal, size=settings.range_chunks, tokens=text.tokens, context=settings.context
        )
    ]
    total = imatrix_file.merge_imatrices(
        (imatrix_file.load_imatrix(result.path(PART)) for _, result in parts), settings.context
    )
    while (rest := _find_next_span(parts, budget, settings, text.tokens)) and (
        coverage.find_undercovered(total.counts(), settings.coverage.expert_tokens)
    ):
        log.info(
            "imatrix: %d chunks do not cover every expert; reading %d more", rest.first, rest.count
        )
        result = worker.compute(rest, rest.end)
        parts.append((rest, result))
        part = imatrix_file.load_imatrix(result.path(PART))
        total = imatrix_file.merge_imatrices((total, part), settings.context)
    origin |= {"chunks": sum(span.count for span, _ in parts)}
    inputs = origin | {
        "ranges": [[s.first, s.count, r.receipt(PART).sha256] for s, r in parts],
        "name": name,
    }
    result = store.run_once("imatrix", inputs, lambda partial: _save(total, partial / name))
    counts = {tensor: tuple(tokens) for tensor, tokens in result.facts["counts"].items()}
    return ImportanceMatrix(result.path(name), result.receipt(name), counts, origin)


def make_q8_base(base: ModelFile, tools: Toolchain, store: Store) -> ModelFile:
    """Quantize the base to Q8_0: half the bytes to stream in every pass."""
    name = f"{base.path.stem.removesuffix('-BF16')}-{SMALL_BASE}.gguf"

    def make(partial: Path) -> dict[str, Any]:
        tools.run("llama-quantize", [base.path, name, SMALL_BASE], cwd=partial, log=partial / "log")
        return {"type": SMALL_BASE}

    inputs = {
        "base": base.digest,
        "type": SMALL_BASE,
        "llama.cpp": str(tools.version),
        "name": name,
    }
    result = store.run_once("imatrix-base", inputs, make)
    return ModelFile((result.path(name),), (result.receipt(name),))


@dataclass(frozen=True)
class _RangeWorker:
    """Computes ranges of one text with one model, or takes them from the store."""

    base: ModelFile
    text: CalibrationText
    settings: ImatrixRecipe
    origin: Mapping[str, Any]
    tools: Toolchain
    store: Store

    def compute(self, span: Span, goal: int) -> StoredResult:
        """Compute a range. Progress is reported as a fraction of ``goal`` chunks."""

        def report(fraction: float) -> None:
            progress.report_progress((span.first + fraction * span.count) / goal)

        def make(partial: Path) -> dict[str, Any]:
            run = ImatrixRun(
                base=self.base.path,
                text=self.text.path,
                out=partial / PART,
                settings=self.settings,
                span=span,
            )
            run_llama_imatrix(run, self.tools, report)
            # Loading checks the file: on a full disk llama-imatrix writes half of it and exits 0.
            part = imatrix_file.load_imatrix(partial / PART)
            return {
                "matrices": len(part.entries),
                "tokens": max(max(c) for c in part.counts().values()),
            }

        inputs = {**self.origin, "first": span.first, "count": span.count}
        result = self.store.run_once("imatrix-range", inputs, make)
        report(1)
        return result


def _find_next_span(
    parts: Sequence[tuple[Span, StoredResult]], budget: int, settings: ImatrixRecipe, tokens: int
) -> Span | None:
    """Return the next range of the text within the budget, or None."""
    read = max(span.end for span, _ in parts)
    spans = split_chunks(
        read, budget, size=settings.range_chunks, tokens=tokens, context=settings.context
    )
    return next(iter(spans), None)


def _save(matrix: ImatrixData, out: Path) -> dict[str, Any]:
    if not matrix.entries:
        raise CheckError(f"{out.name}: expected data for the model's matrices, found none")
    imatrix_file.save_imatrix(matrix, out)
    return {
        "matrices": len(matrix.entries),
        "counts": {name: list(c) for name, c in matrix.counts().items()},
    }


# ---- ranges of chunks


def split_chunks(
    first: int, last: int, *, size: int, tokens: int, context: int
) -> tuple[Span, ...]:
    """Split the chunks from ``first`` to before ``last`` into ranges.

    llama-imatrix refuses to begin at one of the last two chunks of a text
    (tools/imatrix/imatrix.cpp: compute_imatrix). They become part of the range before.

    Args:
        first: First chunk.
        last: The chunk after the last one.
        size: Chunks in a range.
        tokens: Tokens of the whole text.
        context: Tokens in a chunk.
    """
    # It requires (start + 2) * context < tokens, unless it begins at 0.
    latest = (tokens - 1) // context - 2
    starts = [start for start in range(first, last, size) if start == 0 or start <= latest]
    return tuple(Span(a, b - a) for a, b in zip(starts, [*starts[1:], last], strict=False))


def count_chunks(tokens: int, context: int, where: Path) -> int:
    """Return the number of whole chunks in a text. Raise InputError for fewer than two."""
    if tokens < 2 * context:
        raise InputError(
            f"{where}: expected at least two chunks of {context} tokens, found {tokens} tokens;"
            " give it more text, or a shorter context"
        )
    return tokens // context


def check_span(span: Span, text: CalibrationText, settings: ImatrixRecipe) -> None:
    """Raise InputError for a range outside of the text, or where llama-imatrix cannot begin."""
    available = count_chunks(text.tokens, settings.context, text.path)
    latest = max((text.tokens - 1) // settings.context - 2, 0)
    if span.first > latest or span.end > available:
        raise InputError(
            f"{text.name}: range {span.first}:{span.count}: expected chunks of the {available} that"
            f" the text has, beginning at {latest} at the latest, found {span.first} to"
            f" {span.end - 1}"
        )


# ---- llama-imatrix


@dataclass(frozen=True)
class ImatrixRun:
    """One call of llama-imatrix."""

    base: Path
    """The model: a GGUF file, or the first shard of several."""
    text: Path
    out: Path
    """The file to write. Its folder belongs to this run."""
    settings: ImatrixRecipe
    span: Span | None = None
    """Chunks to read. None reads ``settings.chunks`` from the beginning."""


def run_llama_imatrix(
    run: ImatrixRun,
    tools: Toolchain,
    report: Callable[[float], None] = progress.report_progress,
) -> None:
    """Compute an importance matrix in one go with llama-imatrix.

    Args:
        run: Model, text, range and result.
        tools: For llama-imatrix.
        report: Called with the fraction that is done, about once a second.

    Raises:
        ToolError: llama-imatrix fails.
        CheckError: It wrote nothing.
    """
    folder, settings = run.out.parent, run.settings
    # llama-imatrix writes the name of the text into the file, so the text gets one that says
    # nothing about this machine.
    files.link_or_copy(run.text, folder / TEXT_NAME)
    count = run.span.count if run.span else settings.chunks
    # A batch of several chunks streams the weights through memory once for all of them.
    batch = settings.context * min(settings.pass_chunks, count or settings.pass_chunks)
    arguments: list[str | Path] = ["-m", run.base, "-f", TEXT_NAME, "-o", run.out.name]
    # The text has the template's control tokens written out: without --parse-special they would be
    # read as plain characters. The perplexity is not used, and costs a softmax over the vocabulary.
    arguments += ["--parse-special", "--no-ppl", "-c", str(settings.context)]
    # -ub too: llama.cpp splits a batch into micro-batches, of 512 tokens by default.
    arguments += ["-b", str(batch), "-ub", str(batch)]
    arguments += ["--chunk", str(run.span.first)] if run.span else []
    arguments += ["--chunks", str(count)] if count else []
    passes = PassProgress(folder / "log")
    tools.run(
        "llama-imatrix",
        arguments,
        cwd=folder,
        log=passes.log,
        meanwhile=lambda: report(passes.estimate_fraction()),
    )
    files.remove(folder / TEXT_NAME)
    if not run.out.exists():
        raise CheckError(
            f"{run.out.name}: expected an importance matrix, found none; is the text too short?"
        )


@dataclass
class PassProgress:
    """Progress of llama-imatrix by its log.

    It logs the duration of its first pass, and then nothing until its end; so the fraction after
    the first pass is an estimate.
    """

    log: Path
    first_pass_ended: float | None = None
    """Monotonic time, in seconds."""

    def estimate_fraction(self) -> float:
        """Return the fraction of the range that is done, at most 0.99."""
        lines = self.log.read_text(errors="replace")
        if not ((chunks := CHUNKS.search(lines)) and (first_pass := FIRST_PASS.search(lines))):
            return 0.0
        if self.first_pass_ended is None:
            self.first_pass_ended = time.monotonic()
        passes = -(-int(chunks[1]) // max(int(chunks[2]), 1))
        elapsed = time.monotonic() - self.first_pass_ended
        done = 1 + elapsed / max(float(first_pass[1]), 0.01)
        return min(done / max(passes, 1), 0.99)


def read_imatrix(path: Path, tensors: Collection[TensorSpec] | None = None) -> ImportanceMatrix:
    """Read an importance matrix that was computed before.

    Args:
        path: The GGUF file.
        tensors: Tensors of the model that it has to belong to. None accepts any model.

    Raises:
        InputError: The file is broken, in the older form, or belongs to another model.
    """
    data = imatrix_file.load_imatrix(path)
    if data.legacy:
        raise InputError(
            f"{path}: expected GGUF, found the older .dat; `quant imatrix convert` converts it"
        )
    if tensors is not None:
        raise_problems(imatrix_file.find_model_problems(data.sizes(), tensors, str(path)))
    return ImportanceMatrix(path, files.make_receipt(path, path.parent), data.counts())
