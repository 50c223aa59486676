"""Compute the importance matrix with llama-imatrix, range by range, until every expert was seen often enough.

The text is read in ranges of chunks. Each is a piece of work of its own in the store, so a run that was killed goes on
with the next one, and several machines can share the work; the sums are added up afterwards. When an expert saw too few
tokens, more of the text is drawn, until all did or the budget ends.
"""

import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quant.calibration import coverage, imatrix_file
from quant.calibration.imatrix_file import ImatrixData
from quant.calibration.text import CalibrationText
from quant.core import files, progress
from quant.core.files import Receipt
from quant.core.store import Store, StoredResult
from quant.errors import CheckError, InputError, raise_problems
from quant.llama.gguf import TensorSpec
from quant.llama.model_file import ModelFile
from quant.llama.toolchain import Toolchain
from quant.plan.plan import CoveragePolicy, find_coverable, is_quantizable
from quant.plan.recipe import CoverageRule, ImatrixRecipe, ModelRecipe
from quant.plan.sizes import TEXT_NAME

log = logging.getLogger(__name__)
SMALL_BASE = "Q8_0"
CHUNKS = re.compile(r"computing over (\d+) chunks, .*n_seq=(\d+)")
FIRST_PASS = re.compile(r"([\d.]+) seconds per pass")


@dataclass(frozen=True)
class Span:
    """A range of chunks."""

    first: int
    count: int


@dataclass(frozen=True)
class ImportanceMatrix:
    """How much each input of each matrix matters, and what was never seen."""

    path: Path
    receipt: Receipt
    counts: Mapping[str, tuple[int, ...]]
    """Tokens that each expert of each matrix saw."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What it was made of, as plain JSON: digests and settings, no paths."""

    @property
    def covered(self) -> frozenset[str]:
        """The tensors that it has data for."""
        return frozenset(name for name, tokens in self.counts.items() if any(tokens))

    def doubt(self, tensors: Collection[TensorSpec], rule: CoverageRule) -> CoveragePolicy:
        """Which tensors of a model it knows too badly by that rule.

        Those of the trunk only: blocks that predict further tokens are never covered, and variants have rules for them.
        """
        reach = find_coverable(tensors)
        wanted = [t.name for t in tensors if t.name in reach and is_quantizable(t)]
        unknown = {name: "no data at all" for name in wanted if name not in self.covered}
        return CoveragePolicy(
            coverage.find_undercovered(self.counts, rule.expert_tokens) | unknown,
            rule.otherwise,
            rule.floor,
        )

    def json(self) -> dict[str, Any]:
        """As a manifest tells it."""
        return asdict(self.receipt) | {
            "made_of": dict(self.origin),
            "coverage": coverage.summarize_coverage(self.counts),
        }


def compute_imatrix(
    base: ModelFile, text: CalibrationText, model: ModelRecipe, tools: Toolchain, store: Store
) -> ImportanceMatrix:
    """The importance matrix of a model over its calibration text.

    Raises ToolError, InputError for a text that is too short, or CheckFailed for a result that knows nothing.
    """
    settings = model.imatrix
    read = make_q8_base(base, tools, store) if settings.base == SMALL_BASE else base
    return compute_covering_imatrix(
        read, text, settings, f"imatrix_{model.title}.gguf", tools, store
    )


def compute_covering_imatrix(
    base: ModelFile,
    text: CalibrationText,
    settings: ImatrixRecipe,
    name: str,
    tools: Toolchain,
    store: Store,
) -> ImportanceMatrix:
    """The same for any GGUF file, called ``name``; the base may be the first shard of several."""
    origin = {
        "base": base.digest,
        "text": text.receipt.sha256,
        "context": settings.context,
        "pass_chunks": settings.pass_chunks,
        "llama.cpp": str(tools.version),
    }
    there = count_chunks(text.tokens, settings.context, text.path)
    wanted = min(settings.chunks or there, there)
    most = min(settings.coverage.budget or there, there)
    parts = [
        (span, _range(base, text, span, settings, origin, tools, store, wanted))
        for span in split_chunks(0, wanted, settings.range_chunks, text.tokens, settings.context)
    ]
    total = imatrix_file.merge_imatrices(
        (imatrix_file.load_imatrix(done.path(PART)) for _, done in parts), settings.context
    )
    while (rest := _more(parts, most, settings, text.tokens)) and coverage.find_undercovered(
        total.counts(), settings.coverage.expert_tokens
    ):
        log.info(
            "imatrix: experts saw too little in %d chunks; %d more are drawn",
            rest.first,
            rest.count,
        )
        parts.append(
            (
                rest,
                _range(base, text, rest, settings, origin, tools, store, rest.first + rest.count),
            )
        )
        total = imatrix_file.merge_imatrices(
            (total, imatrix_file.load_imatrix(parts[-1][1].path(PART))), settings.context
        )
    origin |= {"chunks": sum(span.count for span, _ in parts)}
    inputs = origin | {
        "ranges": [[s.first, s.count, d.receipt(PART).sha256] for s, d in parts],
        "name": name,
    }
    done = store.run_once("imatrix", inputs, lambda partial: _write(total, partial / name))
    counts = {tensor: tuple(tokens) for tensor, tokens in done.facts["counts"].items()}
    return ImportanceMatrix(done.path(name), done.receipt(name), counts, origin)


PART = "part.gguf"


def split_chunks(first: int, last: int, size: int, tokens: int, context: int) -> tuple[Span, ...]:
    """The chunks from ``first`` to before ``last`` in ranges of that size.

    llama-imatrix does not begin at one of the last two chunks of a text (tools/imatrix/imatrix.cpp: compute_imatrix): what
    would begin there is part of the range before.
    """
    latest = (tokens - 1) // context - 2
    starts = [start for start in range(first, last, size) if start == 0 or start <= latest]
    return tuple(Span(a, b - a) for a, b in zip(starts, [*starts[1:], last], strict=False))


def count_chunks(tokens: int, context: int, where: Path) -> int:
    """Chunks in a text; raises InputError for one that is too short to be read at all."""
    if tokens < 2 * context:
        raise InputError(
            f"{where}: expected at least two chunks of {context} tokens, found {tokens} tokens; give it more text,"
            " or a shorter context"
        )
    return tokens // context


def check_span(span: Span, text: CalibrationText, settings: ImatrixRecipe) -> None:
    """Raise InputError for a range that the text does not have, or that llama-imatrix does not begin at."""
    there = count_chunks(text.tokens, settings.context, text.path)
    latest = max((text.tokens - 1) // settings.context - 2, 0)
    if span.first > latest or span.first + span.count > there:
        raise InputError(
            f"{text.name}: range {span.first}:{span.count}: expected chunks of the {there} that the text has, beginning at"
            f" {latest} at the latest, found {span.first} to {span.first + span.count - 1}"
        )


@dataclass
class PassProgress:
    """How far llama-imatrix is, by its own words: it tells how long its first pass took, and then nothing until its end."""

    log: Path
    since: float | None = None
    """When that pass was over."""

    def share(self) -> float:
        """Of the range; what follows the first pass is reckoned, so it is never all of it."""
        said = self.log.read_text(errors="replace")
        if not ((chunks := CHUNKS.search(said)) and (first := FIRST_PASS.search(said))):
            return 0.0
        if self.since is None:
            self.since = time.monotonic()
        passes = -(-int(chunks[1]) // max(int(chunks[2]), 1))
        done = 1 + (time.monotonic() - self.since) / max(float(first[1]), 0.01)
        return min(done / max(passes, 1), 0.99)


def run_llama_imatrix(
    base: Path,
    text: Path,
    settings: ImatrixRecipe,
    tools: Toolchain,
    out: Path,
    span: Span | None = None,
    tell: Callable[[float], None] = progress.report_progress,
) -> None:
    """Write the importance matrix of a GGUF over a text, or over a range of its chunks, at ``out``.

    The folder of ``out`` belongs to this work. ``tell`` hears the share that is done while it runs.
    """
    # The name of the text is written into the file, so it is called by a name that may be published.
    files.link_or_copy(text, out.parent / TEXT_NAME)
    count = span.count if span else settings.chunks
    chunks = ["--chunks", str(count)] if count else []
    begin = ["--chunk", str(span.first)] if span else []
    together = settings.context * min(settings.pass_chunks, count or settings.pass_chunks)
    pace = PassProgress(out.parent / "log")
    tools.run(
        "llama-imatrix",
        [
            "-m",
            base,
            "-f",
            TEXT_NAME,
            "-o",
            out.name,
            "--parse-special",
            "--no-ppl",
            "-c",
            str(settings.context),
            "-b",
            str(together),
            "-ub",
            str(together),
            *begin,
            *chunks,
        ],
        cwd=out.parent,
        log=pace.log,
        meanwhile=lambda: tell(pace.share()),
    )
    files.remove(out.parent / TEXT_NAME)
    if not out.exists():
        raise CheckError(
            f"{out.name}: expected an importance matrix, found none; is the text too short?"
        )


def read_imatrix(path: Path, tensors: Collection[TensorSpec] | None = None) -> ImportanceMatrix:
    """An importance matrix that was computed before. Raises InputError for one that is broken, or of another model."""
    found = imatrix_file.load_imatrix(path)
    if found.legacy:
        raise InputError(
            f"{path}: expected GGUF, found the older .dat; `quant imatrix convert` makes one of it"
        )
    if tensors is not None:
        raise_problems(imatrix_file.find_model_problems(found.sizes(), tensors, str(path)))
    return ImportanceMatrix(path, files.make_receipt(path, path.parent), found.counts())


def make_q8_base(base: ModelFile, tools: Toolchain, store: Store) -> ModelFile:
    """The base in Q8_0: half the bytes to read in every pass."""
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
    done = store.run_once("imatrix-base", inputs, make)
    return ModelFile((done.path(name),), (done.receipt(name),))


def _range(
    base: ModelFile,
    text: CalibrationText,
    span: Span,
    settings: ImatrixRecipe,
    origin: Mapping[str, Any],
    tools: Toolchain,
    store: Store,
    goal: int,
) -> StoredResult:
    """One range, computed now or found; tells how far the work is."""

    def tell(share: float) -> None:
        progress.report_progress((span.first + share * span.count) / goal)

    def make(partial: Path) -> dict[str, Any]:
        run_llama_imatrix(base.path, text.path, settings, tools, partial / PART, span, tell)
        found = imatrix_file.load_imatrix(
            partial / PART
        )  # a tool on a full disk writes half a file and says nothing
        return {
            "matrices": len(found.entries),
            "tokens": max(max(c) for c in found.counts().values()),
        }

    done = store.run_once(
        "imatrix-range", dict(origin) | {"first": span.first, "count": span.count}, make
    )
    tell(1)
    return done


def _more(
    parts: Iterable[tuple[Span, StoredResult]], most: int, settings: ImatrixRecipe, tokens: int
) -> Span | None:
    """The next range of the text within the budget, if there is one."""
    read = max(span.first + span.count for span, _ in parts)
    return next(
        iter(split_chunks(read, most, settings.range_chunks, tokens, settings.context)), None
    )


def _write(matrix: ImatrixData, out: Path) -> dict[str, Any]:
    if not matrix.entries:
        raise CheckError(f"{out.name}: expected data for the model's matrices, found none")
    imatrix_file.save_imatrix(matrix, out)
    return {
        "matrices": len(matrix.entries),
        "counts": {name: list(c) for name, c in matrix.counts().items()},
    }
