"""What is a good corpus? ``python -m tests.benchmarks.corpus_study --help`` measures it on the tiny model.

It computes importance matrices of equally many tokens from different texts, quantizes two variants with
each, and measures the mean KL divergence from the BF16 model (llama-perplexity) on held-out
conversation and code. Every seed draws other texts, for calibration and for evaluation.
"""

import argparse
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from quant.calibration import datasets, imatrix, sets
from quant.calibration.packing import shuffle_documents
from quant.calibration.text import render_document
from quant.chat.template import ChatTemplate, patch_template, render_template
from quant.llama import toolchain
from quant.llama.gguf import read_header
from quant.llama.model_file import ModelFile
from quant.plan.load import load_variant
from quant.plan.plan import make_plan
from quant.plan.recipe import ImatrixRecipe, Variant
from quant.quantize.variants import QuantizeTarget, WriteRequest, write_variants
from tests.models import corpus
from tests.models.conversion import convert
from tests.models.twins import TINY_GLM

CONTEXT = 512
CORPORA = ("conversation", "code", "mixture", "embedded set", "random tokens")
VARIANTS = ("UD-Q2_K_XL", "UD-IQ1_S")
WITHOUT = "none"
HELD_OUT = ("chat", "code")
CONTROL, USER_DEFINED = 3, 4
TRIES = 10
"""llama-perplexity logs from a thread, and on a busy machine it ends before the last lines are written."""


def main() -> None:
    """Run the study, write every figure to the folder as JSON, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for all files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=24, help="of calibration, 512 tokens each")
    parser.add_argument(
        "--held-out", type=int, default=16, help="chunks of held-out text of each kind"
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    base = options.folder / "tiny-glm-BF16.gguf"
    if not base.exists():
        convert([("text", TINY_GLM, base)], options.folder)
    results = []
    for seed in range(options.seeds):
        results.append(run_seed(base, options.folder, seed, options.chunks, options.held_out))
        (options.folder / "study.json").write_text(json.dumps(results, indent=1))
    print(table(results))


def run_seed(
    base: Path, folder: Path, seed: int, chunks: int, held_out: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the mean divergence by variant, corpus and kind of held-out text."""
    workdir = folder / f"seed-{seed}"
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir()
    template = patch_template((TINY_GLM / "chat_template.jinja").read_text(), None, "chat template")
    references = {
        kind: reference(base, kind, seed, held_out, template, workdir) for kind in HELD_OUT
    }
    matrices: dict[str, Path | None] = {}
    for name in CORPORA:
        place = workdir / name.replace(" ", "-")
        place.mkdir()
        (place / "text").write_text(text(name, seed, chunks * CONTEXT * 6, template, base))
        matrices[name] = place / "imatrix.gguf"
        settings = ImatrixRecipe(context=CONTEXT, chunks=chunks)
        run = imatrix.ImatrixRun(base, place / "text", place / "imatrix.gguf", settings)
        imatrix.run_llama_imatrix(run, toolchain.find_toolchain())
    matrices[WITHOUT] = None
    results: dict[str, dict[str, dict[str, float]]] = {}
    for variant in VARIANTS:
        for name, matrix in matrices.items():
            model = quantize(base, matrix, load_variant(variant), workdir / "q")
            if model:
                mean = {kind: divergence(model, references[kind], workdir) for kind in HELD_OUT}
                results.setdefault(variant, {})[name] = mean
                print(seed, variant, name, mean, file=sys.stderr, flush=True)
    return results


def text(corpus_name: str, seed: int, characters: int, template: ChatTemplate, base: Path) -> str:
    """Return more than enough calibration text of one kind."""
    makers: dict[str, Iterator[str]] = {
        "conversation": chat(10 + seed, template),
        "code": corpus.code_pieces(10 + seed),
        "mixture": mixed(chat(10 + seed, template), corpus.code_pieces(10 + seed)),
        "embedded set": embedded(seed, template),
        "random tokens": nonsense(seed, base),
    }
    results, length = [], 0
    for piece in makers[corpus_name]:
        results.append(piece)
        length += len(piece)
        if length > characters:
            break
    return "\n".join(results)


def chat(seed: int, template: ChatTemplate) -> Iterator[str]:
    """Yield conversations of the kind that the tiny model was trained on, in its chat format."""
    for c in corpus.conversations(seed):
        yield render_template(
            template.text, c.messages, tools=c.tools or None, enable_thinking=c.thinking
        )


def mixed(one: Iterator[str], other: Iterator[str]) -> Iterator[str]:
    """Yield from both in turn, about equally many characters."""
    length = [0, 0]
    while True:
        which = int(length[0] > length[1])
        piece = next((one, other)[which])
        length[which] += len(piece)
        yield piece


def embedded(seed: int, template: ChatTemplate) -> Iterator[str]:
    """Yield the shipped set in another order for each seed. The tiny model was not trained on it."""
    calibration_set, folder = sets.find_set("embedded")
    for document in shuffle_documents(
        replace(calibration_set, seed=seed),
        datasets.read_documents(calibration_set, folder, {}),
    ):
        yield render_document(document, template)


def nonsense(seed: int, base: Path) -> Iterator[str]:
    """Yield tokens of the vocabulary, all equally likely."""
    words = [
        w.replace("Ġ", " ").replace("Ċ", "\n")
        for w in read_header(base).metadata["tokenizer.ggml.tokens"]
    ]
    chance = random.Random(seed)
    while True:
        yield "".join(chance.choice(words) for _ in range(500))


def reference(
    base: Path, kind: str, seed: int, chunks: int, template: ChatTemplate, workdir: Path
) -> Path:
    """Write the predictions of the BF16 model on held-out text, as llama-perplexity's base file."""
    pieces = (
        chat(1000 + seed, template)
        if kind == "chat"
        else corpus.code_pieces(1000 + seed, held_out=True)
    )
    words = workdir / f"held-out-{kind}.txt"
    words.write_text("\n".join(islice(pieces, 400)))
    reading = workdir / "reading.gguf"
    if not reading.exists():
        shutil.copyfile(base, reading)
        parse_control_tokens(reading)
    out = workdir / f"{kind}.kld"
    perplexity("-m", reading, "-f", words, "--kl-divergence-base", out, "--chunks", str(chunks))
    return out


def parse_control_tokens(model: Path) -> None:
    """Mark control tokens as user-defined: llama-perplexity parses only those in a text."""
    from gguf import GGUFReader

    field = GGUFReader(model, "r+").get_field("tokenizer.ggml.token_type")
    assert field is not None
    for n in field.data:
        if field.parts[n][0] == CONTROL:
            field.parts[n][0] = USER_DEFINED


def quantize(base: Path, matrix: Path | None, variant: Variant, workdir: Path) -> Path | None:
    """Quantize a variant. Return None if it cannot be made without an importance matrix."""
    from quant.core.errors import InputError

    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir()
    covered = imatrix.read_imatrix(matrix).covered if matrix else ()
    try:
        planned = make_plan(variant, read_header(base).tensors, covered)
    except InputError:
        planned = None
    if planned is None and variant.name == VARIANTS[0]:
        # About the same bits without importance: types that need it are replaced by the nearest
        # that do not.
        planned = make_plan(plain(variant), read_header(base).tensors, ())
    if planned is None:
        return None
    request = WriteRequest(
        base=ModelFile.open(base),
        targets=[QuantizeTarget(planned, workdir / "made.gguf")],
        identity="study",
        tools=toolchain.find_toolchain(),
        imatrix=ModelFile.open(matrix) if matrix else None,
    )
    write_variants(request, workdir / "work")
    return workdir / "made.gguf"


def plain(variant: Variant) -> Variant:
    """Replace IQ2_S and IQ3_S of the experts by Q2_K and Q3_K, which need no importance matrix."""
    stands_in = {"IQ2_S": "Q2_K", "IQ3_S": "Q3_K"}
    return replace(
        variant, rules=tuple(replace(r, type=stands_in.get(r.type, r.type)) for r in variant.rules)
    )


def divergence(model: Path, base: Path, workdir: Path) -> float:
    """Return the mean KL divergence from the BF16 model."""
    for _ in range(TRIES):
        output = perplexity("-m", model, "--kl-divergence-base", base, "--kl-divergence")
        if match := re.search(r"Mean\s+KLD:\s+([-\d.]+)", output):
            return float(match[1])
    raise AssertionError(output[-2000:])


def perplexity(*arguments: str | Path) -> str:
    """Run llama-perplexity and return its log."""
    command: list[str | Path] = [
        toolchain.find_toolchain().path("llama-perplexity"),
        *arguments,
        "-c",
        str(CONTEXT),
        "-b",
        "2048",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def table(results: Sequence[Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """Return a table: means and standard deviations over the seeds, and the ratio to the mixture.

    The ratio is computed seed by seed: held-out texts of two seeds differ more than two corpora do.
    """
    lines = [
        "| variant | corpus | chat | code | mean of both | relative to the mixture |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for variant in VARIANTS:
        for name in (*CORPORA, WITHOUT):
            seeds = [seed[variant] for seed in results if name in seed.get(variant, {})]
            if not seeds:
                lines.append(f"| {variant} | {name} | cannot be made | | | |")
                continue
            kinds = [[seed[name][kind] for seed in seeds] for kind in HELD_OUT]
            both = [statistics.mean(seed[name].values()) for seed in seeds]
            ratios = [
                b / statistics.mean(seed["mixture"].values())
                for b, seed in zip(both, seeds, strict=True)
            ]
            cells = [format_mean(numbers, 4) for numbers in (*kinds, both)] + [
                format_mean(ratios, 3)
            ]
            lines.append(f"| {variant} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_mean(numbers: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation."""
    spread = statistics.stdev(numbers) if len(numbers) > 1 else 0
    return f"{statistics.mean(numbers):.{digits}f} ± {spread:.{digits}f}"


if __name__ == "__main__":
    main()
