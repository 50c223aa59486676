"""Whether the disks hold what a build will write: asked before it begins, so that it does not end on a full one."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from quant import inventory
from quant.footprint import disk_bytes
from quant.plan import plan
from quant.recipe import Model, Variant


def room_problems(model: Model, variants: Sequence[Variant], work: Path, out: Path) -> Iterator[str]:
    """The folders whose disk is too small; what stands in ``work`` already is not needed again.

    Nothing is said of a model whose recipe does not tell its numbers.
    """
    if not model.architecture:
        return
    tensors = inventory.numbers(model.architecture).tensors()
    plans = [plan(v, tensors) for v in variants]
    needed = disk_bytes(tensors, plans, model)
    if problem := _too_little(work, needed - _held(work), "--work"):
        yield problem
    release = sum(p.bytes for p in plans)
    if _standing(work).stat().st_dev != _standing(out).stat().st_dev and (
        problem := _too_little(out, release, "--out")
    ):
        yield problem


def _too_little(folder: Path, needed: int, option: str) -> str | None:
    free = shutil.disk_usage(_standing(folder)).free
    if needed <= free:
        return None
    return (
        f"{folder}: expected {needed:,} bytes free for what this build will write, found {free:,};"
        f" free some, name another folder with {option}, or build fewer variants"
    )


def _held(folder: Path) -> int:
    """Bytes of disk that a folder takes; a file of two names counts once."""
    found = {(s.st_dev, s.st_ino): s.st_blocks * 512 for p in folder.rglob("*") if p.is_file() for s in [p.stat()]}
    return sum(found.values())


def _standing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(p for p in (folder, *folder.parents) if p.is_dir())
