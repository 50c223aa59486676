"""Figures of files as one page that works without network: a table that sorts, domains, and the pictures. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from quant.core.format import human_bytes
from quant.evaluate import charts
from quant.evaluate.figures import figure_words
from quant.llama.tensors import tensor_class

REPORT = "report.html"
FOLDER = "pictures"

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #1f2328; background: #ffffff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
.wide { overflow-x: auto; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #d0d7de; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { cursor: pointer; user-select: none; } th:hover { text-decoration: underline; }
tr:hover td { background: #f6f8fa; }
svg { max-width: 100%; height: auto; margin: 1rem 0; }
.peer td:first-child { color: #bc4c00; }
@media (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #0d1117; } th, td { border-color: #30363d; } tr:hover td { background: #161b22; }
  .peer td:first-child { color: #f0883e; }
}
</style>
"""
ABOUT = """<p>Every file against BF16 on text that was held out. KLD: mean divergence of the probabilities, in nats, ± half of
its 95 % interval; less is better. Top-1: how often both hold the same word for the likeliest. Perplexity of BF16: {ppl:.4g}.
A click on a head sorts; a file's name tells more when the pointer rests on it.</p>"""
TAIL = "</tbody></table></div>"
SORT = """<script>
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const table = head.closest("table"), n = head.cellIndex, up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  const value = row => { const v = row.cells[n].dataset.v; return v === undefined ? row.cells[n].textContent : +v; };
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const x = value(a), y = value(b), c = x < y ? -1 : x > y ? 1 : 0;
    return up === "1" ? c : -c;
  });
  table.tBodies[0].append(...rows);
};
</script>
"""


@dataclass(frozen=True)
class ReportData:
    """One file as the page and the pictures show it."""

    name: str
    bytes: int
    figures: Mapping[str, Any]
    tensors: Mapping[str, str]
    """Every tensor's type."""
    peer: bool = False
    """A file to compare with."""
    is_base: bool = False

    @property
    def errors(self) -> dict[str, float]:
        """By class, in the order in which the picture of bits has them."""
        told, classes = (
            self.figures.get("errors", {}),
            dict.fromkeys(map(tensor_class, self.tensors)),
        )
        return {kind: told[kind] for kind in classes if kind in told}

    @property
    def point(self) -> charts.Point:
        """In the picture of KLD against size."""
        f = self.figures
        return charts.Point(
            self.name,
            self.bytes,
            f["kld_mean"],
            f["kld_mean_low"],
            f["kld_mean_high"],
            peer=self.peer,
        )


def read_report_data(manifest: Mapping[str, Any]) -> list[ReportData]:
    """The files of a release that were measured."""
    return [
        ReportData(
            v["name"],
            v["bytes"],
            v["evaluation"],
            {n: t["type"] for n, t in v["tensors"].items()},
            is_base=not v["recipe"]["rules"],
        )
        for v in manifest["variants"]
        if v.get("evaluation")
    ]


def draw_charts(files: Sequence[ReportData], title: str) -> dict[str, tuple[str, str]]:
    """The pictures by the names of their files: what each shows, and the SVG; without those that would be empty."""
    others = [f for f in files if not f.is_base]
    found = {
        "kld-by-size.svg": (
            f"{title}: KLD against size",
            charts.draw_kld_by_size(
                [f.point for f in others], f"{title}: how near to BF16 for how many bytes"
            ),
        ),
        "bits.svg": (
            f"{title}: bits by class and layer",
            charts.draw_bits(
                {f.name: f.tensors for f in files},
                f"{title}: bits per weight, by class, layers left to right",
            ),
        ),
        "error-by-class.svg": (
            f"{title}: error by class",
            charts.draw_errors(
                {f.name: f.errors for f in others if f.errors},
                f"{title}: squares lost over squares, weighted by the imatrix, by class of tensor",
            ),
        ),
        "kld-by-domain.svg": (
            f"{title}: KLD by domain",
            charts.draw_kld_by_domain(
                {
                    f.name: {d: v["kld_mean"] for d, v in f.figures["domains"].items()}
                    for f in others
                },
                f"{title}: mean KLD by domain",
            ),
        ),
    }
    return {name: (about, svg) for name, (about, svg) in found.items() if svg}


def render_page(
    files: Sequence[ReportData], title: str, base_ppl: float, notes: Sequence[str] = ()
) -> str:
    """The whole page."""
    domains = list(dict.fromkeys(d for f in files for d in f.figures["domains"]))
    parts = [
        HEAD,
        f"<title>{escape(title)}</title></head><body>\n<h1>{escape(title)}</h1>",
        ABOUT.format(ppl=base_ppl),
        *(f"<p>Note: {escape(note)}.</p>" for note in notes),
        *_table(files),
        *(_domains(files, domains) if len(domains) > 1 else ()),
    ]
    parts += (svg for _, svg in draw_charts(files, title).values())
    return "\n".join([*parts, SORT + "</body></html>"]) + "\n"


def _table(files: Sequence[ReportData]) -> Iterator[str]:
    yield _head(("file", "size", "PPL", "KLD", "median", "99 %", "99.9 %", "max", "top-1"))
    for f in files:
        told, words = f.figures, figure_words(f.figures)
        low, high = told["kld_mean_low"], told["kld_mean_high"]
        about = f"{f.bytes:,} bytes; KLD {told['kld_mean']:.4g}, 95 %: {low:.4g} to {high:.4g}"
        cells = [(told["ppl"], words[0]), (told["kld_mean"], words[1])]
        cells += [
            (told[k], f"{told[k]:.3g}") for k in ("kld_median", "kld_p99", "kld_p999", "kld_max")
        ]
        cells += [(told["top1"], words[2])]
        yield _row(f, [(f.bytes, human_bytes(f.bytes)), *cells], about)
    yield TAIL


def _domains(files: Sequence[ReportData], domains: Sequence[str]) -> Iterator[str]:
    """A table of its own, so that the first one fits a screen."""
    yield "<h2>KLD by domain</h2>"
    yield _head(("file", *domains))
    for f in files:
        told = [f.figures["domains"][d] for d in domains]
        yield _row(f, [(t["kld_mean"], figure_words(t)[1]) for t in told])
    yield TAIL


def _head(words: Sequence[str]) -> str:
    return f'<div class="wide"><table><thead><tr>{"".join(f"<th>{escape(w)}</th>" for w in words)}</tr></thead><tbody>'


def _row(file: ReportData, cells: Sequence[tuple[float, str]], about: str = "") -> str:
    kind, tip = ' class="peer"' if file.peer else "", f' title="{escape(about)}"' if about else ""
    told = "".join(f'<td data-v="{value:.10g}">{escape(said)}</td>' for value, said in cells)
    return f"<tr{kind}><td{tip}>{escape(file.name)}</td>{told}</tr>"
