"""Free main memory, asked in one place."""

from pathlib import Path


def measure_free_memory() -> int:
    """Return the bytes of main memory that a new program can have, as the kernel estimates it.

    ``MemAvailable`` counts the page cache that can be dropped; ``MemFree`` does not, and is close
    to nothing on a machine that has read a large model.
    """
    lines = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(dict(lines)["MemAvailable"].split()[0]) * 1024
