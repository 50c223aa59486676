"""Importance matrix (imatrix) files: the format, reading, merging, writing.

For each weight matrix a file has the sum of the squared inputs of every column, and the number of
tokens in that sum, both by expert. In GGUF these are two F32 tensors, ``NAME.in_sum2`` and
``NAME.counts``. :mod:`quant.calibration.imatrix_dat` reads the older `.dat` form.

This module is the only place that knows the GGUF form and what is wrong with a file. The engine
(:mod:`quant.quantize.engine.weights`) reads columns with ``pread``, one chunk at a time, and asks
the checks here; so nothing heavy is imported before a whole file is loaded or written.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.calibration.imatrix_dat import read_dat
from quant.core import files
from quant.core.errors import InputError, raise_problems
from quant.llama.gguf import MAGIC, Header, TensorSpec, read_header
from quant.llama.tensors import EMBEDDINGS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUMS, COUNTS = ".in_sum2", ".counts"
CHUNK_TOKENS = 512
"""The chunk length that llama-imatrix assumes without ``-c``."""
MAX_NAMES = 5
"""Names of a long list that an error shows."""


@dataclass(frozen=True)
class EntryTensors:
    """The two GGUF tensors that hold the data of one weight matrix."""

    sums: TensorSpec
    counts: TensorSpec

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of sums, and the number of counts."""
        return self.sums.elements, self.counts.elements


@dataclass(frozen=True)
class ImatrixEntry:
    """The data of one weight matrix."""

    sums: "NDArray[np.float32]"
    """Squared inputs by column, one expert after the other."""
    counts: "NDArray[np.int64]"
    """Tokens by expert; one number without experts."""


@dataclass(frozen=True)
class ImatrixData:
    """The contents of an importance matrix."""

    entries: Mapping[str, ImatrixEntry]
    """By name of the weight matrix."""
    datasets: tuple[str, ...]
    """Names of the texts."""
    chunks: int
    chunk_tokens: int
    """Tokens in a chunk; 0 in the older form, which does not have it."""
    legacy: bool = False
    """Whether it comes from a `.dat` file: sums are means times chunks, and counts are chunks."""

    def counts(self) -> dict[str, tuple[int, ...]]:
        """Return the tokens that each expert of each matrix saw, by name."""
        return {
            name: tuple(int(n) for n in self.entries[name].counts) for name in sorted(self.entries)
        }

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the number of sums and of counts of each matrix, by name."""
        return {name: (len(e.sums), len(e.counts)) for name, e in self.entries.items()}


# ---- the format


def list_entries(header: Header) -> dict[str, EntryTensors]:
    """Return the weight matrices that a GGUF imatrix has data for, in file order."""
    by_name = header.by_name
    return {
        name: EntryTensors(sums, by_name[name + COUNTS])
        for sums in header.tensors
        if sums.name.endswith(SUMS) and (name := sums.name.removesuffix(SUMS)) + COUNTS in by_name
    }


def find_format_problems(header: Header) -> Iterator[str]:
    """Yield everything in which a GGUF file does not have the form of an imatrix."""
    where = f"{header.path}: imatrix"
    with_sums, with_counts = (
        {t.name.removesuffix(suffix) for t in header.tensors if t.name.endswith(suffix)}
        for suffix in (SUMS, COUNTS)
    )
    for name in sorted(with_sums ^ with_counts):
        yield f"{where}: {name}: expected {SUMS} and {COUNTS}, found only one of them"
    if not with_sums | with_counts:
        yield (
            f"{header.path}: expected an importance matrix (tensors NAME{SUMS} and NAME{COUNTS}),"
            " found none"
        )
    for name, entry in list_entries(header).items():
        for t in (entry.sums, entry.counts):
            if t.type.name != "F32":
                yield f"{where}: {t.name}: expected numbers in F32, found {t.type.name}"
        values, experts = entry.sizes
        if values % experts:
            yield (
                f"{where}: {name}: expected as many values for each of {experts} experts, found"
                f" {values} values"
            )


def find_model_problems(
    sizes: Mapping[str, tuple[int, int]], tensors: Collection[TensorSpec], where: str
) -> Iterator[str]:
    """Yield everything in which an imatrix does not belong to a model.

    Args:
        sizes: The number of sums and of counts, by name of the weight matrix.
        tensors: The tensors of the model.
        where: Begin of each problem.
    """
    by_name = {t.name: t for t in tensors}
    if unknown := sorted(sizes.keys() - by_name.keys()):
        more = f" and {len(unknown) - MAX_NAMES} more" if len(unknown) > MAX_NAMES else ""
        yield (
            f"{where}: of another model; it has data for {', '.join(unknown[:MAX_NAMES])}{more},"
            " which this model lacks"
        )
    for name, (values, counts) in sorted(sizes.items()):
        # llama-quantize ignores data of another size for the embeddings, so it is no error here.
        if (tensor := by_name.get(name)) is None or name in EMBEDDINGS:
            continue
        experts = math.prod(tensor.shape[2:])
        if values != tensor.shape[0] * experts:
            yield (
                f"{where}: {name}: of another model; expected {experts} x {tensor.shape[0]} values,"
                f" one for each column, found {values}"
            )
        # One count for all experts is what a .dat has, also after its conversion to GGUF.
        elif counts not in (1, experts):
            yield f"{where}: {name}: of another model; expected {experts} experts, found {counts}"


def find_sum_problem(values: "NDArray[np.float32]", first: int = 0) -> str | None:
    """Return what is wrong with some sums of squares, or None.

    Args:
        values: Consecutive sums of one weight matrix.
        first: Position of the first of them, for the message.
    """
    import numpy as np

    for is_bad, expected in (
        (~np.isfinite(values), "finite numbers"),
        (values < 0, "sums of squares"),
    ):
        if is_bad.any():
            at = int(is_bad.argmax())
            return f"expected {expected}, found {values[at]} at value {first + at}"
    return None


def find_count_problem(values: "NDArray[Any]") -> str | None:
    """Return what is wrong with the token counts of one weight matrix, or None."""
    import numpy as np

    if (np.isfinite(values) & (values >= 0)).all():
        return None
    return "expected counts of tokens, found one that is negative, NaN or infinite"


# ---- whole files


def load_imatrix(path: Path) -> ImatrixData:
    """Load an importance matrix of either form.

    Raises:
        InputError: The file cannot be read, is no importance matrix, or has values that no sum or
            count can have. Every problem is listed.
    """
    try:
        with path.open("rb") as f:
            is_gguf = f.read(4) == MAGIC
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    matrix = _from_gguf(read_header(path)) if is_gguf else _from_dat(path)
    raise_problems(_find_value_problems(matrix, path))
    return matrix


def save_imatrix(matrix: ImatrixData, path: Path) -> None:
    """Write GGUF with the order and keys of llama-imatrix. The file appears whole or not at all."""
    import numpy as np
    from gguf import GGUFWriter

    class Writer(GGUFWriter):
        def add_architecture(self) -> None:
            """Add nothing: an importance matrix has no architecture."""

    with files.temp_folder(path) as folder:
        writer = Writer(folder / path.name, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(matrix.datasets))
        writer.add_uint32("imatrix.chunk_count", matrix.chunks)
        writer.add_uint32("imatrix.chunk_size", matrix.chunk_tokens)
        # By bytes, as std::map orders names. ggml drops trailing dimensions of one, so a matrix
        # without experts has one dimension.
        for name in sorted(matrix.entries, key=str.encode):
            entry = matrix.entries[name]
            experts = len(entry.counts)
            sums = np.ascontiguousarray(entry.sums, np.float32)
            counts = entry.counts.astype(np.float32)
            writer.add_tensor(name + SUMS, sums.reshape((experts, -1) if experts > 1 else (-1,)))
            writer.add_tensor(name + COUNTS, counts.reshape((experts, 1) if experts > 1 else (1,)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.replace_atomically(folder / path.name, path)


def _from_gguf(header: Header) -> ImatrixData:
    import numpy as np

    raise_problems(find_format_problems(header))
    data = np.memmap(header.path, np.uint8, "r")

    def view(t: TensorSpec) -> Any:
        start = header.data_start + t.offset
        return data[start : start + t.bytes].view(np.float32)

    entries = {}
    for name, tensors in list_entries(header).items():
        # NaN and infinity have no integer. They become -1, which the check of counts refuses.
        counts = np.nan_to_num(view(tensors.counts), nan=-1, posinf=-1, neginf=-1)
        entries[name] = ImatrixEntry(view(tensors.sums), np.rint(counts).astype(np.int64))
    datasets = header.metadata.get("imatrix.datasets", ())
    return ImatrixData(
        entries,
        tuple(datasets) if isinstance(datasets, list) else (),
        int(header.metadata.get("imatrix.chunk_count", 0)),
        int(header.metadata.get("imatrix.chunk_size", 0)),
    )


def _from_dat(path: Path) -> ImatrixData:
    import numpy as np

    dat = read_dat(path)
    entries = {
        name: ImatrixEntry(values, np.array([chunks], np.int64))
        for name, (chunks, values) in dat.entries.items()
    }
    datasets = (dat.dataset,) if dat.dataset else ()
    return ImatrixData(entries, datasets, dat.chunks, chunk_tokens=0, legacy=True)


def _find_value_problems(matrix: ImatrixData, path: Path) -> Iterator[str]:
    for name, entry in matrix.entries.items():
        for problem in (find_sum_problem(entry.sums), find_count_problem(entry.counts)):
            if problem:
                yield f"{path}: imatrix: {name}: {problem}"


# ---- merging


def merge_imatrices(parts: Iterable[ImatrixData], chunk_tokens: int = CHUNK_TOKENS) -> ImatrixData:
    """Add up importance matrices, bit for bit as ``llama-imatrix --in-file A,B,... -c TOKENS``.

    Args:
        parts: The matrices, in the order of addition. Another order has other rounding errors.
        chunk_tokens: Tokens in a chunk. A `.dat` part counts chunks, so it is scaled by this.

    Raises:
        InputError: Two parts have different sizes for a weight matrix. Every one is listed.
    """
    sums: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    datasets: list[str] = []
    for n, part in enumerate(parts, 1):
        raise_problems(_find_disagreements(part, sums, counts, f"part {n}"))
        datasets += part.datasets
        for name, entry in part.entries.items():
            _add_entry(name, entry, chunk_tokens if part.legacy else None, sums, counts)
    most = max((int(c.max()) for c in counts.values()), default=0)
    entries = {name: ImatrixEntry(sums[name], counts[name]) for name in sums}
    # llama-imatrix does not add up the parts' chunk counts either: it takes the largest token
    # count.
    return ImatrixData(entries, tuple(datasets), most // chunk_tokens, chunk_tokens)


def _find_disagreements(
    part: ImatrixData, sums: Mapping[str, Any], counts: Mapping[str, Any], where: str
) -> Iterator[str]:
    for name, entry in part.entries.items():
        if name in sums and len(entry.sums) != len(sums[name]):
            yield (
                f"{where}: {name}: expected {len(sums[name])} values as in the parts before, found"
                f" {len(entry.sums)}"
            )
        elif name in counts and not part.legacy and len(counts[name]) not in (1, len(entry.counts)):
            yield (
                f"{where}: {name}: expected {len(counts[name])} experts as in the parts before,"
                f" found {len(entry.counts)}"
            )


def _add_entry(
    name: str,
    entry: ImatrixEntry,
    legacy_tokens: int | None,
    sums: dict[str, Any],
    counts: dict[str, Any],
) -> None:
    """Add one entry in single precision, one addition per part, as llama-imatrix rounds."""
    import numpy as np

    if name not in sums:
        sums[name] = np.zeros(len(entry.sums), np.float32)
        counts[name] = np.zeros(len(entry.counts), np.int64)
    if legacy_tokens is not None:
        sums[name] += entry.sums * np.float32(legacy_tokens)
        counts[name] += entry.counts[0] * legacy_tokens
        return
    sums[name] += entry.sums
    # A `.dat` part before this one had one count for all experts.
    if len(counts[name]) == 1 < len(entry.counts):
        counts[name] = np.repeat(counts[name], len(entry.counts))
    counts[name] += entry.counts
