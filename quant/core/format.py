"""Numbers as people read them."""

UNITS = (("kB", 10**3), ("MB", 10**6), ("GB", 10**9))


def human_bytes(size: int) -> str:
    """A size for people: 135.2 GB, 2.7 MB; units are powers of 1000, as disks and hubs count."""
    unit, factor = next((u for u in UNITS if size < 999.95 * u[1]), UNITS[-1])
    return f"{size / factor:.1f} {unit}"
