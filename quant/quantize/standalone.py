"""Quantize a base outside of a build, into the files of a folder: ``quant quantize``."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quant.calibration.hessian_file import Hessians
from quant.calibration.imatrix import read_imatrix
from quant.core import files
from quant.core.errors import InputError, raise_problems
from quant.core.format import to_canonical_json
from quant.core.store import Store
from quant.llama.model_file import ModelFile
from quant.llama.toolchain import find_toolchain
from quant.plan.plan import make_plan
from quant.plan.recipe import Variant
from quant.quantize.engine.job import EngineSettings
from quant.quantize.gptq import REVISION
from quant.quantize.shard import VariantFile
from quant.quantize.variants import QuantizeTarget, WriteRequest, is_written, write_variants


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """A base, the variants to make of it, and the folder for their files."""

    base: Path
    """A BF16 GGUF, in one file."""
    variants: Sequence[Variant]
    out: Path
    """The folder for the files, which are named BASE-VARIANT.gguf."""
    imatrix: Path | None = None
    """The importance matrix; None for types that need none."""
    hessians: Path | None = None
    """Hessians of the base: enables error compensation (GPTQ)."""
    max_size: str | None = None
    """The size of the largest shard, such as ``50G``; None leaves the files whole."""
    settings: EngineSettings = field(default_factory=EngineSettings)
    llama_cpp: Path | None = None
    """The folder of a llama.cpp; None finds the installed one."""

    @property
    def stem(self) -> str:
        """The base's name without ``-BF16``, with which the files' names begin."""
        return self.base.stem.removesuffix("-BF16")


def quantize_model(request: QuantizeRequest) -> tuple[VariantFile, ...]:
    """Quantize a base into all variants, in one pass over its weights.

    A run that was interrupted is continued by the same call. Files that are finished are not
    written again; other files with their names are never overwritten. Beside each variant,
    NAME.gguf.json records the type, the sha256 and the error of every tensor.

    Args:
        request: The base, the variants and the folder.

    Returns:
        The variants in their order.

    Raises:
        InputError: A variant has no rules, a file is in the way, the imatrix or the Hessians are of
            another model, a type cannot be used, or the disk is full.
        CheckError: A file is not as planned.
        ToolError: llama.cpp is missing, or ggml ended the engine's process.

    Example:
        >>> from quant.plan.load import load_variant
        >>> request = QuantizeRequest(
        ...     base=Path("M-BF16.gguf"),
        ...     variants=[load_variant("UD-Q4_K_XL")],
        ...     out=Path("out"),
        ...     imatrix=Path("imatrix.gguf"),
        ... )
        >>> [variant] = quantize_model(request)  # doctest: +SKIP
        >>> variant.paths  # doctest: +SKIP
        (PosixPath('/home/me/out/M-UD-Q4_K_XL.gguf'),)
    """
    if bases := [v.name for v in request.variants if v.is_base]:
        raise InputError(
            f"variant {bases[0]}: expected rules to quantize by, found none; that is "
            f"{request.base} itself"
        )
    base, out = ModelFile.open(request.base.resolve()), request.out.resolve()
    if len(base.paths) > 1 or base.metadata.get("split.count", 1) > 1:
        raise InputError(
            f"{request.base}: expected the whole file, found a shard of one; "
            "`quant merge` puts it together"
        )
    covered: Collection[str] = ()
    if request.imatrix:
        covered = read_imatrix(request.imatrix, base.tensors).covered
    targets = [
        QuantizeTarget(
            make_plan(variant, base.tensors, covered),
            out / f"{request.stem}-{variant.name}.gguf",
            request.max_size,
        )
        for variant in request.variants
    ]
    if request.hessians:
        # The base is hashed for this, which takes minutes: Hessians of another base may have
        # the same shapes, and nothing else would notice them.
        Hessians.open(request.hessians, files.hash_file(request.base))
    identity = _make_identity(request)
    raise_problems(_find_obstacles(targets, identity))
    # Locked: two runs into one folder would write the same partial files.
    work = Store(out / ".quantize")
    write_request = WriteRequest(
        base=base,
        targets=targets,
        identity=identity,
        tools=find_toolchain(request.llama_cpp),
        imatrix=ModelFile.open(request.imatrix.resolve()) if request.imatrix else None,
        hessians=request.hessians.resolve() if request.hessians else None,
        settings=request.settings,
    )
    with work.lock():
        all_facts = write_variants(write_request, work.root)
    files.remove(work.root)
    return tuple(
        VariantFile(
            plan=t.plan,
            file=ModelFile(tuple(t.path.with_name(name) for name in facts["files"])),
            tensor_digests={name: tensor["sha256"] for name, tensor in facts["tensors"].items()},
            errors={name: tensor["error"] for name, tensor in facts["tensors"].items()},
        )
        for t, facts in zip(targets, all_facts, strict=True)
    )


def _find_obstacles(targets: Sequence[QuantizeTarget], identity: str) -> Iterator[str]:
    """Yield every file with a target's name that this request did not write."""
    for t in targets:
        if not is_written(t, identity):
            shards = t.path.parent.glob(f"{t.path.stem}-*-of-*.gguf")
            for path in (*t.path.parent.glob(t.path.name), *shards):
                yield f"{path}: exists already; name another folder or remove it"


def _make_identity(request: QuantizeRequest) -> str:
    """Return what names the inputs: inode, length and time of each file, not its digest.

    A base of hundreds of gigabytes takes minutes to hash. A file that is written to gets another
    time, and an interrupted run begins anew.
    """
    paths = (p for p in (request.base, request.imatrix, request.hessians) if p)
    stats = [p.resolve().stat() for p in paths]
    revision = [REVISION] if request.hessians else []
    return to_canonical_json(
        [*revision, *((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)]
    )
