"""What measured sensitivities are worth: files of the sizes of llama-quantize's presets, made by several methods.

``python -m tests.benchmarks.allocation_study OUT`` on tiny-glm, or on the file of ``--base``; about half an hour on two idle
cores, and it continues where it was ended. It writes OUT/study.json and prints the table of ``recipes/README.md``.
Conversations and code that the imatrix and the sensitivities are measured on, and those that files are judged by, are
different documents.
"""

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from quant.build import patched_template, pull_locked
from quant.calibration import hessians
from quant.calibration.documents import Document
from quant.calibration.text import render_document
from quant.chat.template import patch_template
from quant.core import files
from quant.core.format import to_canonical_json
from quant.core.store import Store
from quant.evaluate import compare, error_measurement, probe, scores
from quant.job import load_pinned_model
from quant.llama import toolchain
from quant.llama.convert import convert_checkpoint
from quant.llama.gguf import pad, read_header
from quant.llama.model_file import ModelFile
from quant.llama.tensors import tensor_class
from quant.llama.types import TYPES
from quant.plan import error_table, sensitivity
from quant.plan.budgets import AllocationInputs, SizeTarget, allocate_variant
from quant.plan.error_table import ErrorTable
from quant.plan.fold import fold_types
from quant.plan.plan import make_plan
from quant.plan.sensitivity import Sensitivities
from quant.plan.solver import Constraints
from quant.quantize.engine.job import EngineSettings as Engine
from quant.quantize.variants import QuantizeTarget as Wanted
from quant.quantize.variants import write_variants
from quant.release.metadata import make_file_metadata
from tests.models import corpus

PRESETS = ("Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XXS", "IQ1_S")
SIMPLE_TYPES = (
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
)
OURS, FED_BACK, ALIKE = "ours", "fed back", "tokens alike"
METHODS = (
    f"preset {FED_BACK}",
    "local error",
    "simple",
    "class means",
    "plain sum",
    OURS,
    "refitted",
    ALIKE,
    FED_BACK,
)
PURE = ("Q8_0", "Q6_K")
"""Files of one type: what remains of a divergence when bits are hardly short."""
EVERY_WORD = 1 << 20
"""Of the vocabulary is kept for judging; probes keep the likeliest 512, which is enough to tell them apart."""
SEEDS = {"calibration": 101, "held out": 202}


def main(out: Path, base: Path | None, threads: int, chunks: int, held_chunks: int) -> None:
    """The whole study."""
    out.mkdir(parents=True, exist_ok=True)
    tools, store = toolchain.find_toolchain(), Store(out / "store")
    base = base or _base(out, store, tools)
    calibration, held_out = _texts(out, base)
    matrix = _matrix(out, base, calibration, tools, threads)
    presets = {p: _preset(out, base, matrix, p, tools) for p in PRESETS}
    errors = _errors(out, base, matrix, tools)
    header = read_header(base)
    setting = probe.ProbeSettings(
        base=ModelFile.open(base),
        imatrix=matrix,
        text=calibration,
        tools=tools,
        store=store,
        evaluation=compare.EvaluationSettings(512, chunks, threads, top=512),
        engine=Engine(threads),
    )
    with store.lock():
        probes = probe.list_probes(header.tensors, errors)
        coarse = probe.list_probes(header.tensors, errors, ("Q2_K",))
        print(probe.forecast_probes((*probes, *coarse), setting))
        measured = probe.measure_probes(
            (*probes, *coarse),
            setting,
            lambda done, of: print(f"probes: {done} of {of}", flush=True),
        )
        ours = sensitivity.fit_sensitivities(
            measured[: len(probes)], errors, "probes of every tensor at four types"
        )
        sizes = {p: path.stat().st_size for p, path in presets.items()}
        covered = frozenset(n for n, by_type in errors.errors.items() if "IQ1_S" in by_type)
        known = AllocationInputs(
            header.tensors, covered, errors, ours, header.data_start, header, read_header(matrix)
        )
        chosen = _methods(known, measured[len(probes) :], sizes)
        made = _written(out, base, matrix, chosen, known, tools, threads)
        calibrated = compare.evaluate_files(
            setting.base,
            [*map(ModelFile.open, (*made.values(), *presets.values()))],
            {"text": calibration},
            store,
            setting.evaluation,
        )
        seen = {e.file.stem: _mean(e) for e in calibrated}
        again = _refitted(known, chosen, seen, {p: _types(presets[p]) for p in PRESETS})
        for p, size in sizes.items():
            chosen[f"refitted {p}"] = allocate_variant(
                replace(known, sensitivities=again), SizeTarget(size), "x", "x", _free()
            ).solution.types
        made = _written(out, base, matrix, chosen, known, tools, threads)
        fed = _fed_back(out, known, setting, tools, threads)
        again_chosen = {
            f"{FED_BACK} {p}": allocate_variant(
                fed, SizeTarget(size), "x", "x", _free()
            ).solution.types
            for p, size in sizes.items()
        }
        again_chosen |= {f"preset {FED_BACK} {p}": _quantised(presets[p], known) for p in PRESETS}
        chosen |= again_chosen
        seen_by = {
            how: _moments(out, base, calibration, threads, gradients=how) for how in (True, False)
        }
        made |= _written(out, base, matrix, again_chosen, known, tools, threads, seen_by[True])
        same = {f"{ALIKE} {p}": again_chosen[f"{FED_BACK} {p}"] for p in PRESETS}
        made |= _written(out, base, matrix, same, known, tools, threads, seen_by[False])
        chosen |= same
        pure = {p: _preset(out, base, matrix, p, tools) for p in PURE}
        reading = replace(setting.evaluation, chunks=held_chunks, top=EVERY_WORD)
        whole = [*map(ModelFile.open, (*presets.values(), *pure.values(), *made.values()))]
        judged = compare.evaluate_files(setting.base, whole, held_out, store, reading)
        rounded = ModelFile.open(_rounded(out, pure["Q8_0"], tools))
        (activations,) = compare.evaluate_files(
            rounded, [ModelFile.open(pure["Q8_0"])], held_out, store, reading
        )
    print(f"the same weights, activations in 8 bits: {_mean(activations):.5f}")
    _report(out, known, fed, again, chosen, presets, judged)


def _base(out: Path, store: Store, tools: toolchain.Toolchain) -> Path:
    path = out / "base.gguf"
    if not path.exists():
        model, recipe, locked = load_pinned_model("tiny-glm")
        checkpoint = pull_locked(model, recipe, locked, store)
        template = patched_template(model.template, checkpoint)
        made = convert_checkpoint(
            checkpoint, template.text if template else None, make_file_metadata(model), tools, store
        )
        files.link_or_copy(made.path, path)
    return path


def _texts(out: Path, base: Path) -> tuple[Path, dict[str, Path]]:
    """The files of the calibration side, and of the held-out texts by domain."""
    seen, held_out = texts(read_header(base).metadata["tokenizer.chat_template"])
    for name, parts in {"cal": seen, **held_out}.items():
        files.write_text(out / f"{name}.txt", "\n".join(parts))
    return out / "cal.txt", {name: out / f"{name}.txt" for name in held_out}


def texts(chat_template: str) -> tuple[list[str], dict[str, list[str]]]:
    """The calibration side, and the held-out texts by domain; no conversation is on both sides, and no file of code."""
    template = patch_template(chat_template, None, "tiny-glm")

    def chats(seed: int) -> list[str]:
        found = itertools.islice(corpus.conversations(seed), 500)
        said = (
            Document(str(n), "en", c.thinking, tuple(c.messages), tuple(c.tools))
            for n, c in enumerate(found)
        )
        return list(dict.fromkeys(render_document(document, template) for document in said))

    def code(seed: int, count: int, *, held_out: bool) -> list[str]:
        return list(itertools.islice(corpus.code_pieces(seed, held_out=held_out), count))

    seen = chats(SEEDS["calibration"])
    apart = [chat for chat in chats(SEEDS["held out"]) if chat not in set(seen)]
    mixed = seen + code(SEEDS["calibration"], 120, held_out=False)
    Random(5).shuffle(mixed)
    # Files of Python's library repeat each other here and there.
    other = [
        piece for piece in code(SEEDS["held out"], 90, held_out=True) if piece not in set(mixed)
    ]
    return mixed, {"chat": apart, "code": other}


def _matrix(out: Path, base: Path, text: Path, tools: toolchain.Toolchain, threads: int) -> Path:
    path = out / "imatrix.gguf"
    if not path.exists():
        command: list[str | Path] = [
            "-m",
            base,
            "-f",
            text.name,
            "-o",
            path.name,
            "--chunks",
            "100",
            "--parse-special",
            "--no-ppl",
            "-c",
            "512",
            "-b",
            "512",
            "-ub",
            "512",
            "-t",
            str(threads),
        ]
        tools.run("llama-imatrix", command, cwd=out, log=out / "log")
    return path


def _preset(out: Path, base: Path, matrix: Path, name: str, tools: toolchain.Toolchain) -> Path:
    path = out / f"preset {name}.gguf"
    if not path.exists():
        tools.run(
            "llama-quantize",
            ["--imatrix", matrix.name, base, path.name, name, "1"],
            cwd=out,
            log=out / "log",
        )
    return path


def _errors(out: Path, base: Path, matrix: Path, tools: toolchain.Toolchain) -> ErrorTable:
    path = out / "errors.json"
    if not path.exists():
        error_table.write_error_table(path, error_measurement.measure_errors(base, matrix, tools))
    return error_table.read_error_table(path, files.hash_file(base))


def _free() -> Constraints:
    return Constraints(gate_up_alike=False)


def _methods(
    known: AllocationInputs, coarse: Sequence[sensitivity.ProbeResult], sizes: Mapping[str, int]
) -> dict[str, Mapping[str, str]]:
    """Types by method and size."""
    errors, ours = known.errors, known.sensitivities
    local = Sensitivities(ours.base, "local error", errors.squares)
    by_class: dict[tuple[str, bool], list[str]] = {}
    for name in ours.scales:
        by_class.setdefault((tensor_class(name), name in ours.plain), []).append(name)
    weights = {t.name: t.elements for t in known.tensors}
    means = {
        n: weights[n] * sum(ours.scales[m] for m in names) / sum(weights[m] for m in names)
        for names in by_class.values()
        for n in names
    }
    plain = {
        n: ours.predicted({n: k}, errors) / errors.errors[n][k].share
        for n in ours.scales
        for k in ("IQ3_S",)
    }
    found: dict[str, Mapping[str, str]] = {}
    for preset, size in sizes.items():
        for method, how in {
            "local error": local,
            "class means": replace(ours, scales=means),
            "plain sum": replace(ours, scales=plain, power=1.0),
            OURS: ours,
        }.items():
            made = allocate_variant(
                replace(known, sensitivities=how), SizeTarget(size), "x", "x", _free()
            )
            found[f"{method} {preset}"] = made.solution.types
        found[f"simple {preset}"] = _simple(known, coarse, size)
    return found


def _simple(
    known: AllocationInputs, coarse: Sequence[sensitivity.ProbeResult], size: int
) -> dict[str, str]:
    """The baseline: each tensor alone at Q2_K, its divergence over its error there, and one price for all bytes."""
    errors = known.errors.only(SIMPLE_TYPES).errors
    steep = {
        n: m.kld / known.errors.errors[n][k].share for m in coarse for n, k in m.probe.types.items()
    }
    tensors = {t.name: t for t in known.tensors}
    room = size - known.fixed_bytes()

    def at(price: float) -> tuple[dict[str, str], int]:
        types: dict[str, str] = {}
        for name, by_type in errors.items():
            bits = {k: pad(TYPES[k].bytes(tensors[name].elements)) for k in by_type}
            types[name] = min(
                by_type, key=lambda k: steep[name] * by_type[k].share + price * bits[k]
            )
        return types, sum(pad(TYPES[k].bytes(tensors[n].elements)) for n, k in types.items())

    low, high = 1e-14, 1.0
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if at(middle)[1] > room else (low, middle)
    return at(high)[0]


def _moments(out: Path, base: Path, text: Path, threads: int, *, gradients: bool) -> Path:
    path = out / f"moments by {'gradients' if gradients else 'inputs'}.safetensors"
    if not path.exists():
        hessians.collect_hessians(
            base, text, path, hessians.HessianSettings(threads=threads, gradients=gradients)
        )
    return path


def _fed_back(
    out: Path,
    known: AllocationInputs,
    setting: probe.ProbeSettings,
    tools: toolchain.Toolchain,
    threads: int,
) -> AllocationInputs:
    """What is known when rounding is fed back: the errors that are left, and sensitivities by probes made so."""
    seen = _moments(out, setting.base.path, setting.text, threads, gradients=True)
    path = out / "errors fed back.json"
    if not path.exists():
        error_table.write_error_table(
            path,
            error_measurement.measure_errors(
                setting.base.path, setting.imatrix, tools, hessians=seen
            ),
        )
    errors = error_table.read_error_table(path, known.errors.base)
    measured = probe.measure_probes(
        probe.list_probes(known.tensors, errors),
        replace(setting, hessians=seen),
        lambda done, of: print(f"probes, fed back: {done} of {of}", flush=True),
    )
    return replace(
        known,
        errors=errors,
        sensitivities=sensitivity.fit_sensitivities(measured, errors, "probes, fed back"),
    )


def _quantised(path: Path, known: AllocationInputs) -> dict[str, str]:
    """The types of a file, of the tensors that have a choice."""
    return {name: kind for name, kind in _types(path).items() if name in known.errors.errors}


def _rounded(out: Path, quantised: Path, tools: toolchain.Toolchain) -> Path:
    """The weights of a quantised file as floats: what differs between the two is how activations are rounded."""
    path = out / "rounded.gguf"
    if not path.exists():
        tools.run(
            "llama-quantize",
            ["--allow-requantize", quantised, path.name, "F32", "1"],
            cwd=out,
            log=out / "log",
        )
    return path


def _mean(e: scores.Evaluation) -> float:
    return float(e.overall.kld.mean(dtype=np.float64))


def _refitted(
    known: AllocationInputs,
    chosen: Mapping[str, Mapping[str, str]],
    seen: Mapping[str, float],
    presets: Mapping[str, Mapping[str, str]],
) -> Sensitivities:
    """Ours, mended by every whole file that was measured on the calibration side."""
    whole = [(chosen[name], kld) for name, kld in seen.items() if name in chosen]
    whole += [(presets[p], seen[f"preset {p}"]) for p in PRESETS]
    return sensitivity.refit_sensitivities(known.sensitivities, whole, known.errors)


def _types(path: Path) -> dict[str, str]:
    return {t.name: t.type.name for t in read_header(path).tensors}


def _written(
    out: Path,
    base: Path,
    matrix: Path,
    chosen: Mapping[str, Mapping[str, str]],
    known: AllocationInputs,
    tools: toolchain.Toolchain,
    threads: int,
    seen: Path | None = None,
) -> dict[str, Path]:
    plans = {
        n: make_plan(fold_types("x", "x", types, known.tensors), known.tensors, known.covered)
        for n, types in chosen.items()
    }
    targets = [Wanted(p, out / "made" / f"{name}.gguf") for name, p in plans.items()]
    identity = to_canonical_json(_digests(base, matrix, *([seen] if seen else [])))
    write_variants(
        base, matrix, targets, identity, tools, out / "work", Engine(threads), moments=seen
    )
    return {name: out / "made" / f"{name}.gguf" for name in plans}


def _digests(*paths: Path) -> list[str]:
    return [files.hash_file(p) for p in paths]


def _report(
    out: Path,
    known: AllocationInputs,
    fed: AllocationInputs,
    again: Sensitivities,
    chosen: Mapping[str, Mapping[str, str]],
    presets: Mapping[str, Path],
    judged: Sequence[scores.Evaluation],
) -> None:
    found = {e.file.stem: e for e in judged}
    kld = {name: _mean(e) for name, e in found.items()}
    rows = []
    for p in PRESETS:
        size, preset = presets[p].stat().st_size, kld[f"preset {p}"]
        cells = [f"{kld[f'{m} {p}']:.5f} ({kld[f'{m} {p}'] / preset:.2f})" for m in METHODS]
        rows.append(f"| {p} | {size:,} | {preset:.5f} | {' | '.join(cells)} |")
    means = [
        math.exp(np.mean([math.log(kld[f"{m} {p}"] / kld[f"preset {p}"]) for p in PRESETS]))
        for m in METHODS
    ]
    rows.append(f"| geometric mean | | 1 | {' | '.join(f'{m:.3f}' for m in means)} |")
    print(
        f"| at the bytes of | bytes | preset | {' | '.join(METHODS)} |\n|---|---:|---:|{'---:|' * len(METHODS)}"
    )
    print("\n".join(rows))
    types = {**chosen, **{n: _types(found[n].file) for n in found if n.startswith("preset")}}
    # What tokens that count alike do was neither probed nor measured: of these files nothing is foretold.
    order = [name for name in kld if not name.startswith(ALIKE)]
    predicted = {
        name: by.sensitivities.predicted(types[name], by.errors)
        for name in order
        for by in [fed if FED_BACK in name else known]
    }
    refitted = {name: again.predicted(types[name], known.errors) for name in order}
    print({name: round(kld[f"preset {name}"], 5) for name in PURE})
    rank = {
        label: float(spearmanr([kld[n] for n in order], [how[n] for n in order]).statistic)
        for label, how in (("ours", predicted), ("refitted", refitted))
    }
    used = {
        n: (out / "made" / f"{n}.gguf").stat().st_size / presets[n.split()[-1]].stat().st_size
        for n in chosen
    }
    each = {
        n: {
            **found[n].json(),
            "predicted": predicted.get(n),
            "refitted": refitted.get(n),
            "of target": used.get(n),
        }
        for n in kld
    }
    powers = {"power": known.sensitivities.power, "refitted power": again.power}
    told: dict[str, Any] = {
        **powers,
        "plain": sorted(known.sensitivities.plain),
        "spearman": rank,
        "files": each,
    }
    files.write_text(out / "study.json", json.dumps(told, indent=1) + "\n")
    for method, p in itertools.product((OURS, FED_BACK), PRESETS):
        gap = scores.estimate_difference(
            found[f"simple {p}"].overall, found[f"{method} {p}"].overall
        )
        print(f"{method} less simple at {p}: {gap.value:+.5f} ({gap.low:+.5f} to {gap.high:+.5f})")
    print("Spearman of predicted and measured:", rank)
    print(
        "of their targets:", {m: round(min(used[f"{m} {p}"] for p in PRESETS), 4) for m in METHODS}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--base", type=Path, help="a BF16 file of a tiny GLM, in place of the shipped one"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--held-chunks", type=int, default=80)
    args = parser.parse_args()
    base_file = args.base and args.base.resolve()
    main(args.out.resolve(), base_file, args.threads, args.chunks, args.held_chunks)
