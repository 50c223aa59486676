"""Importance matrices as files: read both of llama.cpp's forms, merge them as llama-imatrix does, write GGUF.

For every matrix of a model a file holds the sums of the squared inputs of each column and the tokens that were summed,
both for each expert. GGUF keeps them apart (``NAME.in_sum2``, ``NAME.counts``). The older ``.dat`` keeps one number of
chunks for a matrix and values that are divided by their tokens, so it cannot tell which experts were reached.
"""

import math
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.core import files
from quant.errors import InputError, raise_problems
from quant.llama.gguf import MAGIC, Header, TensorSpec, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUMS, COUNTS = ".in_sum2", ".counts"
CHUNK_TOKENS = 512
"""What llama-imatrix takes for the length of a chunk when it is not told."""
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
"""llama-quantize takes data of another size for these as none at all."""
SHOWN = 5
"""Names of a long list that an error tells."""


@dataclass(frozen=True)
class ImatrixEntry:
    """What is known of one matrix."""

    sums: "NDArray[np.float32]"
    """Squared inputs by column, one expert after the other."""
    counts: "NDArray[np.int64]"
    """Tokens by expert; one number where there are no experts."""


@dataclass(frozen=True)
class ImatrixData:
    """The contents of an importance matrix."""

    entries: Mapping[str, ImatrixEntry]
    """By the tensor that they speak of."""
    datasets: tuple[str, ...]
    """What the texts were called."""
    chunks: int
    chunk_tokens: int
    """Of the text that was read at once; 0 in the older form, which does not say it."""
    legacy: bool = False
    """In the older form: sums are means times chunks, and counts are chunks."""

    def counts(self) -> dict[str, tuple[int, ...]]:
        """Tokens that each expert of each matrix saw, by name."""
        return {
            name: tuple(int(n) for n in self.entries[name].counts) for name in sorted(self.entries)
        }


def load_imatrix(path: Path) -> ImatrixData:
    """The importance matrix in a file of either form. Raises InputError with everything that is wrong with its numbers."""
    try:
        with path.open("rb") as f:
            is_gguf = f.read(4) == MAGIC
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    found = _from_gguf(read_header(path)) if is_gguf else _from_legacy(path)
    raise_problems(_problems(found, path))
    return found


def merge_imatrices(parts: Iterable[ImatrixData], chunk_tokens: int = CHUNK_TOKENS) -> ImatrixData:
    """The sum of several, in their order: to the bit what ``llama-imatrix --in-file A,B,… -c CHUNK_TOKENS`` makes of them.

    Raises InputError with every matrix on which they do not agree.
    """
    sums: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    datasets: list[str] = []
    for n, part in enumerate(parts, 1):
        raise_problems(_disagreements(part, sums, counts, f"part {n}"))
        datasets += part.datasets
        for name, entry in part.entries.items():
            _add(name, entry, chunk_tokens if part.legacy else None, sums, counts)
    most = max((int(c.max()) for c in counts.values()), default=0)
    entries = {name: ImatrixEntry(sums[name], counts[name]) for name in sums}
    return ImatrixData(entries, tuple(datasets), most // chunk_tokens, chunk_tokens)


def save_imatrix(matrix: ImatrixData, path: Path) -> None:
    """Write it as GGUF, in the order and with the keys of llama-imatrix, whole or not at all."""
    import numpy as np
    from gguf import GGUFWriter

    class Writer(GGUFWriter):
        def add_architecture(self) -> None:
            """Say nothing: an importance matrix has none."""

    with files.temp_folder(path) as folder:
        writer = Writer(folder / path.name, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(matrix.datasets))
        writer.add_uint32("imatrix.chunk_count", matrix.chunks)
        writer.add_uint32("imatrix.chunk_size", matrix.chunk_tokens)
        for name in sorted(matrix.entries, key=str.encode):
            entry = matrix.entries[name]
            experts = len(entry.counts)
            # Without the ones at the end of a shape, as ggml writes it.
            shape = (experts, -1) if experts > 1 else (-1,)
            writer.add_tensor(
                name + SUMS, np.ascontiguousarray(entry.sums, np.float32).reshape(shape)
            )
            writer.add_tensor(
                name + COUNTS,
                entry.counts.astype(np.float32).reshape((experts, 1) if experts > 1 else (1,)),
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.replace_atomically(folder / path.name, path)


def find_unknown_tensors(
    matrix: ImatrixData, tensors: Collection[TensorSpec], where: str
) -> Iterator[str]:
    """Everything in which it is not an importance matrix of a model with these tensors."""
    by_name = {t.name: t for t in tensors}
    if unknown := sorted(matrix.entries.keys() - by_name.keys()):
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        yield f"{where}: of another model; it speaks of {', '.join(unknown[:SHOWN])}{more}, which this model lacks"
    for name, entry in sorted(matrix.entries.items()):
        if (tensor := by_name.get(name)) is None or name in EMBEDDINGS:
            continue
        experts = math.prod(tensor.shape[2:])
        if len(entry.sums) != tensor.shape[0] * experts:
            yield (
                f"{where}: {name}: of another model; expected {experts} x {tensor.shape[0]} values, as its rows are long,"
                f" found {len(entry.sums)}"
            )
        elif len(entry.counts) not in (1, experts):
            yield f"{where}: {name}: of another model; expected {experts} experts, found {len(entry.counts)}"


def _from_gguf(header: Header) -> ImatrixData:
    import numpy as np

    where = f"{header.path}: imatrix"
    names = [t.name.removesuffix(SUMS) for t in header.tensors if t.name.endswith(SUMS)]
    lone = {t.name.removesuffix(COUNTS) for t in header.tensors if t.name.endswith(COUNTS)} ^ set(
        names
    )
    raise_problems(
        f"{where}: {name}: expected {SUMS} and {COUNTS}, found only one of them"
        for name in sorted(lone)
    )
    if not names:
        raise InputError(
            f"{header.path}: expected an importance matrix (tensors NAME{SUMS}), found none"
        )
    pairs = [(header.by_name[name + SUMS], header.by_name[name + COUNTS]) for name in names]
    raise_problems(
        f"{where}: {t.name}: expected numbers in F32, found {t.type.name}"
        for pair in pairs
        for t in pair
        if t.type.name != "F32"
    )
    data = np.memmap(header.path, np.uint8, "r")

    def numbers(t: TensorSpec) -> Any:
        start = header.data_start + t.offset
        return data[start : start + t.bytes].view(np.float32)

    entries = {}
    for name, (sums, counts) in zip(names, pairs, strict=True):
        # What is no number stays visible: it is looked for in the sums, and here it becomes a count below zero.
        told = np.nan_to_num(numbers(counts), nan=-1, posinf=-1, neginf=-1)
        entries[name] = ImatrixEntry(numbers(sums), np.rint(told).astype(np.int64))
    known = header.metadata
    datasets = known.get("imatrix.datasets", ())
    return ImatrixData(
        entries,
        tuple(datasets) if isinstance(datasets, list) else (),
        int(known.get("imatrix.chunk_count", 0)),
        int(known.get("imatrix.chunk_size", 0)),
    )


def _from_legacy(path: Path) -> ImatrixData:
    reader = _Legacy(path)
    entries = {}
    for _ in range(reader.number("number of entries", 1)):
        name = reader.text("name of an entry")
        chunks, size = (
            reader.number(f"{name}: chunks"),
            reader.number(f"{name}: number of values", 1),
        )
        entries[name] = ImatrixEntry(reader.floats(size, name), reader.array([chunks]))
    chunks, text = 0, ""
    if not reader.ended:  # what follows was not always written
        chunks = reader.number("chunks")
        text = reader.text("name of the text")
        reader.expect_end()
    return ImatrixData(entries, (text,) if text else (), chunks, 0, legacy=True)


class _Legacy:
    """Walks through a ``.dat`` file; every length is compared with what is left before anything is read."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    @property
    def ended(self) -> bool:
        return self.at == len(self.data)

    def take(self, size: int, what: str) -> bytes:
        if not 0 <= size <= len(self.data) - self.at:
            left = len(self.data) - self.at
            raise InputError(
                f"{self.path}: {what}: expected {size} bytes at byte {self.at}, found {left};"
                " it is no importance matrix, neither GGUF nor .dat, or it was cut short"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, what: str, least: int = 0) -> int:
        found: int = struct.unpack("<i", self.take(4, what))[0]
        if found < least:
            raise InputError(
                f"{self.path}: {what}: expected at least {least}, found {found}; it is no importance matrix"
            )
        return found

    def text(self, what: str) -> str:
        return self.take(self.number(what), what).decode(errors="replace")

    def floats(self, count: int, what: str) -> Any:
        import numpy as np

        return np.frombuffer(self.take(4 * count, what), "<f4")

    def array(self, numbers: list[int]) -> Any:
        import numpy as np

        return np.array(numbers, np.int64)

    def expect_end(self) -> None:
        if not self.ended:
            raise InputError(
                f"{self.path}: expected its end at byte {self.at}, found {len(self.data) - self.at} bytes more"
            )


def _problems(matrix: ImatrixData, path: Path) -> Iterator[str]:
    import numpy as np

    where = f"{path}: imatrix"
    for name, entry in matrix.entries.items():
        if not np.isfinite(entry.sums).all():
            first = int(np.flatnonzero(~np.isfinite(entry.sums))[0])
            yield f"{where}: {name}: expected numbers, found {entry.sums[first]} at value {first}"
        elif (entry.sums < 0).any():
            first = int(np.flatnonzero(entry.sums < 0)[0])
            yield f"{where}: {name}: expected sums of squares, found {entry.sums[first]} at value {first}"
        if (entry.counts < 0).any():
            yield f"{where}: {name}: expected counts of tokens, found one that is below zero or no number"
        if len(entry.sums) % len(entry.counts):
            yield (
                f"{where}: {name}: expected as many values for each of {len(entry.counts)} experts,"
                f" found {len(entry.sums)} values"
            )


def _disagreements(
    part: ImatrixData, sums: Mapping[str, Any], counts: Mapping[str, Any], where: str
) -> Iterator[str]:
    for name, entry in part.entries.items():
        if name in sums and len(entry.sums) != len(sums[name]):
            yield f"{where}: {name}: expected {len(sums[name])} values as in the parts before, found {len(entry.sums)}"
        elif name in counts and not part.legacy and len(counts[name]) not in (1, len(entry.counts)):
            yield f"{where}: {name}: expected {len(counts[name])} experts as in the parts before, found {len(entry.counts)}"


def _add(
    name: str,
    entry: ImatrixEntry,
    legacy_tokens: int | None,
    sums: dict[str, Any],
    counts: dict[str, Any],
) -> None:
    """Add one entry, with the roundings of the tool: single precision, one addition a part."""
    import numpy as np

    if name not in sums:
        sums[name] = np.zeros(len(entry.sums), np.float32)
        counts[name] = np.zeros(len(entry.counts), np.int64)
    if legacy_tokens is not None:
        sums[name] += entry.sums * np.float32(legacy_tokens)
        counts[name] += entry.counts[0] * legacy_tokens
        return
    sums[name] += entry.sums
    if len(counts[name]) == 1 < len(entry.counts):
        counts[name] = np.repeat(counts[name], len(entry.counts))
    counts[name] += entry.counts
