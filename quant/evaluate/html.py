"""The evaluation report: an HTML page with sortable tables and charts, without network. Pure.

The page is ``templates/report.html.jinja``; this module fills it. The charts are those that a
release has as files too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from quant.core.format import human_bytes
from quant.evaluate import charts, class_charts
from quant.evaluate.figures import format_figures, round_figures
from quant.llama.tensors import tensor_class

if TYPE_CHECKING:
    from jinja2 import Template

    from quant.evaluate.request import Comparison

REPORT = "report.html"
PICTURES = "pictures"
"""Folder of a release with its charts."""
COLUMNS = ("file", "size", "PPL", "KLD", "median", "99 %", "99.9 %", "max", "top-1")


@dataclass(frozen=True)
class ReportFile:
    """One file as the report and the charts show it."""

    name: str
    bytes: int
    figures: Mapping[str, Any]
    """As :func:`quant.evaluate.scores.compute_figures`; of a release also ``errors``, by class."""
    tensors: Mapping[str, str]
    """Type of each tensor."""
    peer: bool = False
    """Whether it is only to compare with."""
    is_base: bool = False

    @property
    def errors(self) -> dict[str, float]:
        """Quantization error by tensor class, in the order of the chart of bits."""
        errors = self.figures.get("errors", {})
        classes = dict.fromkeys(map(tensor_class, self.tensors))
        return {kind: errors[kind] for kind in classes if kind in errors}

    @property
    def point(self) -> charts.Point:
        """The file in the chart of KLD against size."""
        return charts.Point(
            name=self.name,
            bytes=self.bytes,
            kld=self.figures["kld_mean"],
            low=self.figures["kld_mean_low"],
            high=self.figures["kld_mean_high"],
            peer=self.peer,
        )


@dataclass(frozen=True)
class Cell:
    """A number in a table: what it is sorted by, and what it shows."""

    value: str
    text: str


@dataclass(frozen=True)
class Row:
    """A file's row in a table."""

    name: str
    cells: tuple[Cell, ...]
    tip: str = ""
    peer: bool = False


@dataclass(frozen=True)
class ReportTable:
    """A table of the report; its first column has the files' names."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    heading: str = ""


def draw_charts(files: Sequence[ReportFile], title: str) -> dict[str, tuple[str, str]]:
    """Return alternative text and SVG of each chart, by its file name. Empty ones are left out."""
    quantized = [f for f in files if not f.is_base]
    pictures = {
        "kld-by-size.svg": (
            "KLD against size",
            charts.draw_kld_by_size(
                [f.point for f in quantized], f"{title}: KLD from BF16, by file size"
            ),
        ),
        "bits.svg": (
            "bits by class and layer",
            class_charts.draw_bits(
                {f.name: f.tensors for f in files},
                f"{title}: bits per weight, by class, layers left to right",
            ),
        ),
        "error-by-class.svg": (
            "error by class",
            class_charts.draw_errors(
                {f.name: f.errors for f in quantized if f.errors},
                f"{title}: quantization error (relative MSE, imatrix-weighted), by tensor class",
            ),
        ),
        "kld-by-domain.svg": (
            "KLD by domain",
            charts.draw_kld_by_domain(
                {
                    f.name: {d: v["kld_mean"] for d, v in f.figures["domains"].items()}
                    for f in quantized
                },
                f"{title}: mean KLD by domain",
            ),
        ),
    }
    return {name: (f"{title}: {about}", svg) for name, (about, svg) in pictures.items() if svg}


def render_report(
    files: Sequence[ReportFile], title: str, base_ppl: float, notes: Sequence[str] = ()
) -> str:
    """Return the whole page.

    Args:
        files: What is shown, in this order.
        title: Heading of the page, and beginning of the charts' titles.
        base_ppl: Perplexity of the base.
        notes: Sentences without their final period.
    """
    domains = list(dict.fromkeys(d for f in files for d in f.figures["domains"]))
    tables = [_make_table(files)]
    if len(domains) > 1:
        tables.append(_make_domain_table(files, domains))
    return _load_template().render(
        title=title,
        base_ppl=f"{base_ppl:.4g}",
        notes=notes,
        tables=tables,
        charts=[svg for _, svg in draw_charts(files, title).values()],
    )


def render_comparison(comparison: "Comparison", note: str = "") -> str:
    """Return the page of files that are no release, as ``quant evaluate --html`` writes it."""
    files = [
        ReportFile(
            name=model.path.name.removesuffix(".gguf").partition("-00001-of-")[0],
            bytes=evaluation.bytes,
            figures=round_figures(evaluation.figures()),
            tensors={t.name: t.type.name for t in model.tensors},
            peer=model.path in comparison.peers,
            is_base=model.path == comparison.base.path,
        )
        for model, evaluation in zip(comparison.files, comparison.evaluations, strict=True)
    ]
    base_ppl = comparison.evaluations[0].figures()["ppl_base"]
    return render_report(files, comparison.base.path.stem, base_ppl, [note] if note else [])


@cache
def _load_template() -> "Template":
    # Imported late: a release's card and checks need the names above, and no template.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("quant.evaluate"),
        # File names and notes are foreign text. The template marks only the charts as safe, whose
        # text core.svg has escaped.
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # A misspelt name is an error, and no empty cell.
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html.jinja")


def _make_table(files: Sequence[ReportFile]) -> ReportTable:
    return ReportTable(COLUMNS, tuple(map(_make_row, files)))


def _make_row(file: ReportFile) -> Row:
    f = file.figures
    ppl, kld, top1 = format_figures(f)
    tip = (
        f"{file.bytes:,} bytes; KLD {f['kld_mean']:.4g},"
        f" 95 %: {f['kld_mean_low']:.4g} to {f['kld_mean_high']:.4g}"
    )
    tails = ((f[k], f"{f[k]:.3g}") for k in ("kld_median", "kld_p99", "kld_p999", "kld_max"))
    cells = (
        (file.bytes, human_bytes(file.bytes)),
        (f["ppl"], ppl),
        (f["kld_mean"], kld),
        *tails,
        (f["top1"], top1),
    )
    return Row(file.name, tuple(_make_cell(value, text) for value, text in cells), tip, file.peer)


def _make_domain_table(files: Sequence[ReportFile], domains: Sequence[str]) -> ReportTable:
    """A table of its own, so that the first one fits a screen."""
    rows = []
    for f in files:
        figures = [f.figures["domains"][d] for d in domains]
        cells = tuple(_make_cell(v["kld_mean"], format_figures(v)[1]) for v in figures)
        rows.append(Row(f.name, cells, peer=f.peer))
    return ReportTable(("file", *domains), tuple(rows), heading="KLD by domain")


def _make_cell(value: float, text: str) -> Cell:
    # The page sorts by this value: by the rounded text, close files would be equal.
    return Cell(f"{value:.10g}", text)
