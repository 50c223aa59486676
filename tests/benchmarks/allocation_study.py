"""What measured sensitivities are worth: files of presets' sizes, by several methods.

``python -m tests.benchmarks.allocation_study OUT`` studies tiny-glm, or the file of ``--base``. It
takes about half an hour on two idle cores, and continues where it was interrupted. It writes
OUT/study.json and prints the table of ``recipes/README.md``. The imatrix and the sensitivities are
measured on other conversations and other code than those by which files are judged.
"""

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from quant.core import files
from quant.core.store import Store
from quant.evaluate import compare, probe, scores
from quant.evaluate.scores import Evaluation
from quant.llama import toolchain
from quant.llama.gguf import pad, read_header
from quant.llama.model_file import ModelFile
from quant.llama.tensors import tensor_class
from quant.llama.types import TYPES
from quant.plan import fit, sensitivity
from quant.plan.allocate import AllocationInputs, allocate_variant
from quant.plan.budgets import SizeTarget
from quant.plan.sensitivity import ProbeResult, Sensitivities
from quant.plan.units import Constraints
from quant.quantize.engine.job import EngineSettings
from tests.benchmarks.study_files import StudyFolder, read_types

PRESETS = ("Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XXS", "IQ1_S")
SIMPLE_TYPES = [
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_S",
    "Q2_K",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_XS",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_0",
]
OURS, GPTQ, PLAIN_GPTQ = "ours", "GPTQ", "plain GPTQ"
METHODS = (
    f"preset {GPTQ}",
    "local error",
    "simple",
    "class means",
    "plain sum",
    OURS,
    "refitted",
    PLAIN_GPTQ,
    GPTQ,
)
SINGLE_TYPES = ("Q8_0", "Q6_K")
"""Types of files with one type: what remains of a divergence when bits are not short."""
WHOLE_VOCABULARY = 1 << 20
"""Tokens kept for judging. Probes keep the 512 most likely, enough to tell them apart."""

Types = Mapping[str, str]
"""By tensor."""


@dataclass(frozen=True)
class StudyOptions:
    """What the command line says."""

    out: Path
    base: Path | None
    threads: int
    chunks: int
    held_chunks: int


def main(options: StudyOptions) -> None:
    """Run the whole study."""
    options.out.mkdir(parents=True, exist_ok=True)
    folder = StudyFolder(
        options.out,
        toolchain.find_toolchain(),
        Store(options.out / "store"),
        options.threads,
        options.base,
    )
    settings = probe.ProbeSettings(
        base=folder.base,
        imatrix=folder.imatrix,
        text=folder.texts[0],
        tools=folder.tools,
        store=folder.store,
        evaluation=compare.EvaluationSettings(512, options.chunks, options.threads, top=512),
        engine=EngineSettings(options.threads),
    )
    with folder.store.lock():
        study = _choose(folder, settings)
        evaluations = _judge(folder, study, settings, options.held_chunks)
    _report(study, evaluations)


@dataclass(frozen=True)
class Study:
    """What was chosen, and what it was chosen by."""

    out: Path
    known: AllocationInputs
    gptq: AllocationInputs
    """The same with GPTQ: remaining errors, and sensitivities from probes made so."""
    refitted: Sensitivities
    types: Mapping[str, Types]
    """By method and preset."""
    paths: Mapping[str, Path]
    """Of the same files."""
    presets: Mapping[str, Path]


def _choose(folder: StudyFolder, settings: probe.ProbeSettings) -> Study:
    """Probe, allocate by every method, and write the files."""
    presets = {p: folder.preset(p) for p in PRESETS}
    sizes = {p: path.stat().st_size for p, path in presets.items()}
    header, errors = folder.base.header, folder.errors
    probes = probe.list_probes(header.tensors, errors)
    coarse = probe.list_probes(header.tensors, errors, ("Q2_K",))
    results = _measure((*probes, *coarse), settings, "probes")
    ours = fit.fit_sensitivities(
        results[: len(probes)], errors, "probes of every tensor at four types"
    )
    covered = frozenset(n for n, by_type in errors.errors.items() if "IQ1_S" in by_type)
    imatrix = read_header(folder.imatrix)
    known = AllocationInputs(
        header.tensors, covered, errors, ours, header.data_start, header, imatrix
    )
    types = _allocate_methods(known, results[len(probes) :], sizes)
    paths = folder.write(types)
    refitted = _refit(known, types, (*paths.values(), *presets.values()), settings)
    types |= _allocate("refitted", replace(known, sensitivities=refitted), sizes)
    paths = folder.write(types)
    gptq = _measure_with_gptq(folder, known, settings)
    compensated = _allocate(GPTQ, gptq, sizes)
    for p, path in presets.items():
        chosen = {n: kind for n, kind in read_types(path).items() if n in errors.errors}
        compensated[f"preset {GPTQ} {p}"] = chosen
    paths |= folder.write(compensated, folder.hessians(gradients=True))
    plain = {f"{PLAIN_GPTQ} {p}": compensated[f"{GPTQ} {p}"] for p in PRESETS}
    paths |= folder.write(plain, folder.hessians(gradients=False))
    return Study(
        out=folder.out,
        known=known,
        gptq=gptq,
        refitted=refitted,
        types={**types, **compensated, **plain},
        paths=paths,
        presets=presets,
    )


def _measure(
    probes: Sequence[sensitivity.Probe], settings: probe.ProbeSettings, name: str
) -> tuple[ProbeResult, ...]:
    print(probe.forecast_probes(probes, settings))
    return probe.measure_probes(
        probes, settings, lambda done, total: print(f"{name}: {done} of {total}", flush=True)
    )


def _allocate(method: str, inputs: AllocationInputs, sizes: Mapping[str, int]) -> dict[str, Types]:
    """Return the types of a file for each preset's size."""
    constraints = Constraints(gate_up_alike=False)
    return {
        f"{method} {preset}": allocate_variant(
            inputs, SizeTarget(size), "x", constraints
        ).solution.types
        for preset, size in sizes.items()
    }


def _allocate_methods(
    known: AllocationInputs, coarse: Sequence[ProbeResult], sizes: Mapping[str, int]
) -> dict[str, Types]:
    """Return types by method and size, of the methods that need no measured file."""
    errors, ours = known.errors, known.sensitivities
    by_class: dict[tuple[str, bool], list[str]] = {}
    for name in ours.scales:
        by_class.setdefault((tensor_class(name), name in ours.additive), []).append(name)
    elements = {t.name: t.elements for t in known.tensors}
    means = {
        n: elements[n] * sum(ours.scales[m] for m in names) / sum(elements[m] for m in names)
        for names in by_class.values()
        for n in names
    }
    single = {
        n: ours.predict_kld({n: "IQ3_S"}, errors) / errors.errors[n]["IQ3_S"].relative_mse
        for n in ours.scales
    }
    methods = {
        "local error": Sensitivities(ours.base, "local error", errors.squares),
        "class means": replace(ours, scales=means),
        "plain sum": replace(ours, scales=single, power=1.0),
        OURS: ours,
    }
    types: dict[str, Types] = {}
    for method, sensitivities in methods.items():
        types |= _allocate(method, replace(known, sensitivities=sensitivities), sizes)
    for preset, size in sizes.items():
        types[f"simple {preset}"] = _allocate_simply(known, coarse, size)
    return types


def _allocate_simply(
    known: AllocationInputs, coarse: Sequence[ProbeResult], size: int
) -> dict[str, str]:
    """Return the baseline's types: scales from single tensors at Q2_K, one price for all bytes.

    Each tensor takes the type with the least ``scale * error + price * bytes``. The price is
    bisected until the file fits, so some of the size stays unused where a step of the price changes
    several tensors.
    """
    errors = known.errors.select_types(SIMPLE_TYPES).errors
    scales = {
        n: m.kld / known.errors.errors[n][k].relative_mse
        for m in coarse
        for n, k in m.probe.types.items()
    }
    elements = {t.name: t.elements for t in known.tensors}
    limit = size - known.compute_fixed_bytes()

    def count_bytes(name: str, kind: str) -> int:
        return pad(TYPES[kind].bytes(elements[name]))

    def choose(price: float) -> dict[str, str]:
        return {
            name: min(
                by_type,
                key=lambda k: scales[name] * by_type[k].relative_mse + price * count_bytes(name, k),
            )
            for name, by_type in errors.items()
        }

    low, high = 1e-14, 1.0
    for _ in range(100):
        middle = math.sqrt(low * high)
        total = sum(count_bytes(n, k) for n, k in choose(middle).items())
        low, high = (middle, high) if total > limit else (low, middle)
    return choose(high)


def _refit(
    known: AllocationInputs,
    types: Mapping[str, Types],
    paths: Sequence[Path],
    settings: probe.ProbeSettings,
) -> Sensitivities:
    """Return our sensitivities, refitted on whole files read on the calibration text."""
    models = [ModelFile.open(p) for p in paths]
    evaluations = compare.evaluate_models(
        settings.base, models, {"text": settings.text}, settings.store, settings.evaluation
    )
    measured = [(types.get(e.file.stem) or read_types(e.file), _mean_kld(e)) for e in evaluations]
    return fit.refit_sensitivities(known.sensitivities, measured, known.errors)


def _measure_with_gptq(
    folder: StudyFolder, known: AllocationInputs, settings: probe.ProbeSettings
) -> AllocationInputs:
    errors = folder.gptq_errors
    settings = replace(settings, hessians=folder.hessians(gradients=True))
    results = _measure(probe.list_probes(known.tensors, errors), settings, "probes, with GPTQ")
    fitted = fit.fit_sensitivities(results, errors, "probes, with GPTQ")
    return replace(known, errors=errors, sensitivities=fitted)


def _judge(
    folder: StudyFolder, study: Study, settings: probe.ProbeSettings, chunks: int
) -> dict[str, Evaluation]:
    """Return the evaluation of every file on the held-out texts, by name."""
    single = {p: folder.preset(p) for p in SINGLE_TYPES}
    paths = (*study.presets.values(), *single.values(), *study.paths.values())
    reading = replace(settings.evaluation, chunks=chunks, top=WHOLE_VOCABULARY)
    held_out, store = folder.texts[1], folder.store
    evaluations = compare.evaluate_models(
        folder.base, [ModelFile.open(p) for p in paths], held_out, store, reading
    )
    quantized = ModelFile.open(single["Q8_0"])
    dequantized = ModelFile.open(folder.dequantized(quantized.path))
    (activations,) = compare.evaluate_models(dequantized, [quantized], held_out, store, reading)
    print(f"the same weights, activations in 8 bits: {_mean_kld(activations):.5f}")
    return {e.file.stem: e for e in evaluations}


def _mean_kld(evaluation: Evaluation) -> float:
    return float(evaluation.overall.kld.mean(dtype=np.float64))


def _report(study: Study, evaluations: Mapping[str, Evaluation]) -> None:
    """Print the tables, and write everything to study.json."""
    kld = {name: _mean_kld(e) for name, e in evaluations.items()}
    _print_table(study, kld)
    print({name: round(kld[f"preset {name}"], 5) for name in SINGLE_TYPES})
    types = {name: study.types.get(name) or read_types(e.file) for name, e in evaluations.items()}
    # With plain Hessians nothing was probed and no error measured: there is no prediction of these.
    order = [name for name in kld if not name.startswith(PLAIN_GPTQ)]
    predicted: dict[str, float] = {}
    for name in order:
        inputs = study.gptq if GPTQ in name else study.known
        predicted[name] = inputs.sensitivities.predict_kld(types[name], inputs.errors)
    refitted = {n: study.refitted.predict_kld(types[n], study.known.errors) for n in order}
    rank = {
        label: float(spearmanr([kld[n] for n in order], [values[n] for n in order]).statistic)
        for label, values in (("ours", predicted), ("refitted", refitted))
    }
    used = {
        name: path.stat().st_size / study.presets[name.split()[-1]].stat().st_size
        for name, path in study.paths.items()
    }
    document: dict[str, Any] = {
        "power": study.known.sensitivities.power,
        "refitted power": study.refitted.power,
        "plain": sorted(study.known.sensitivities.additive),
        "spearman": rank,
        "files": {
            name: {
                **e.json(),
                "predicted": predicted.get(name),
                "refitted": refitted.get(name),
                "of target": used.get(name),
            }
            for name, e in evaluations.items()
        },
    }
    files.write_text(study.out / "study.json", json.dumps(document, indent=1) + "\n")
    for method, p in itertools.product((OURS, GPTQ), PRESETS):
        first, second = (evaluations[f"{m} {p}"].overall for m in ("simple", method))
        gap = scores.estimate_difference(first, second)
        print(f"{method} less simple at {p}: {gap.value:+.5f} ({gap.low:+.5f} to {gap.high:+.5f})")
    print("Spearman of predicted and measured:", rank)
    least = {m: round(min(used[f"{m} {p}"] for p in PRESETS), 4) for m in METHODS}
    print("of their targets:", least)


def _print_table(study: Study, kld: Mapping[str, float]) -> None:
    print(f"| at the bytes of | bytes | preset | {' | '.join(METHODS)} |")
    print(f"|---|---:|---:|{'---:|' * len(METHODS)}")
    for p in PRESETS:
        size, preset = study.presets[p].stat().st_size, kld[f"preset {p}"]
        cells = [f"{kld[f'{m} {p}']:.5f} ({kld[f'{m} {p}'] / preset:.2f})" for m in METHODS]
        print(f"| {p} | {size:,} | {preset:.5f} | {' | '.join(cells)} |")
    means = [
        math.exp(np.mean([math.log(kld[f"{m} {p}"] / kld[f"preset {p}"]) for p in PRESETS]))
        for m in METHODS
    ]
    print(f"| geometric mean | | 1 | {' | '.join(f'{m:.3f}' for m in means)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--base", type=Path, help="a BF16 file of a tiny GLM, instead of the shipped one"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=32, help="of each probe")
    parser.add_argument("--held-chunks", type=int, default=80, help="of each held-out text")
    args = parser.parse_args()
    main(
        StudyOptions(
            out=args.out.resolve(),
            base=args.base and args.base.resolve(),
            threads=args.threads,
            chunks=args.chunks,
            held_chunks=args.held_chunks,
        )
    )
