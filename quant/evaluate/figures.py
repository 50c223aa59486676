"""Figures as a release publishes them: digits, text, and what two machines may differ by. Pure."""

from collections.abc import Mapping
from math import floor, log10
from typing import Any

DIGITS = {"ppl": 4, "ppl_base": 4, "top1": 4}
"""Significant digits of a figure; 3 of all others.

More digits would differ between CPUs; these rarely do.
"""


def format_figures(figures: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Return perplexity, KLD with half of its 95 % interval, and top-1 agreement, for a table.

    Args:
        figures: Of :func:`quant.evaluate.scores.compute_figures`; None, for a file that was not
            measured, gives dashes.
    """
    if not figures:
        return "-", "-", "-"
    # A bootstrap interval is not symmetric. A table has room for one number: half of its width.
    spread = (figures["kld_mean_high"] - figures["kld_mean_low"]) / 2
    kld = f"{format_decimal(figures['kld_mean'])} ± {format_decimal(spread, 2)}"
    return (
        f"{figures['ppl']:.4g}",
        kld if figures["kld_mean"] else "0",
        f"{100 * figures['top1']:.1f} %",
    )


def format_decimal(value: float, digits: int = 3) -> str:
    """Return a number with that many significant digits and no exponent; 0 if not positive."""
    # Without an exponent, because columns are compared by eye: 2e-05 looks larger than 0.001.
    return f"{value:.{max(digits - 1 - floor(log10(value)), 0)}f}" if value > 0 else "0"


def round_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures with the digits that are published, those of domains too."""
    return {
        k: round_figures(v) if isinstance(v, Mapping) else round_figure(v, DIGITS.get(k, 3))
        for k, v in figures.items()
    }


def round_figure(value: Any, digits: int = 3) -> Any:
    """Return a float with that many significant digits, and anything else as it is."""
    # Not round(), which counts digits after the point: a KLD of 0.000123 would become 0.
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def figures_close(known: Mapping[str, Any], actual: Mapping[str, Any]) -> bool:
    """Return whether two machines can have measured these figures of the same file.

    Sums are added in another order on another CPU, which moves logits in their last bits. The
    limits allow for that and for little else: mean KLD may differ by the larger half of the known
    interval, or by 5 % if that is more; perplexity by 1 %; top-1 by 0.01.
    """
    spread = max(
        known["kld_mean_high"] - known["kld_mean"], known["kld_mean"] - known["kld_mean_low"]
    )
    # The floor of 1e-5 nats was chosen: near a KLD of 0 the two other limits vanish.
    return bool(
        abs(actual["kld_mean"] - known["kld_mean"]) <= max(spread, known["kld_mean"] / 20, 1e-5)
        and abs(actual["ppl"] - known["ppl"]) <= known["ppl"] / 100
        and abs(actual["top1"] - known["top1"]) <= 0.01
    )
