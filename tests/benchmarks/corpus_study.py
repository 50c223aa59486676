"""What is a good corpus? ``python -m tests.benchmarks.corpus_study --help`` measures it on the tiny model.

Importance matrices of equally many tokens from different texts; files of two variants made with each; and how far these are
from the BF16 model (mean KL divergence, llama-perplexity) on held-out conversation and on held-out code. Every seed draws
other texts, for calibration and for holding out.
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
from quant.calibration import text as calibrate
from quant.calibration.packing import shuffle_documents
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
"""llama-perplexity writes its log from a thread, and on a busy machine it ends before the last lines are out."""


def main() -> None:
    """Run the study and print its table; every figure goes to the folder as JSON as well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for everything that is made")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=24, help="of calibration, 512 tokens each")
    parser.add_argument(
        "--held-out", type=int, default=16, help="chunks of held-out text of each kind"
    )
    told = parser.parse_args()
    told.folder.mkdir(parents=True, exist_ok=True)
    base = told.folder / "tiny-glm-BF16.gguf"
    if not base.exists():
        convert([("text", TINY_GLM, base)], told.folder)
    found = []
    for seed in range(told.seeds):
        found.append(one_seed(base, told.folder, seed, told.chunks, told.held_out))
        (told.folder / "study.json").write_text(json.dumps(found, indent=1))
    print(table(found))


def one_seed(
    base: Path, folder: Path, seed: int, chunks: int, held_out: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean divergence by variant, corpus and kind of held-out text."""
    room = folder / f"seed-{seed}"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    template = patch_template((TINY_GLM / "chat_template.jinja").read_text(), None, "chat template")
    references = {kind: reference(base, kind, seed, held_out, template, room) for kind in HELD_OUT}
    matrices: dict[str, Path | None] = {}
    for name in CORPORA:
        place = room / name.replace(" ", "-")
        place.mkdir()
        (place / "text").write_text(text(name, seed, chunks * CONTEXT * 6, template, base))
        matrices[name] = place / "imatrix.gguf"
        settings = ImatrixRecipe(context=CONTEXT, chunks=chunks)
        run = imatrix.ImatrixRun(base, place / "text", place / "imatrix.gguf", settings)
        imatrix.run_llama_imatrix(run, toolchain.find_toolchain())
    matrices[WITHOUT] = None
    found: dict[str, dict[str, dict[str, float]]] = {}
    for variant in VARIANTS:
        for name, matrix in matrices.items():
            made = quantised(base, matrix, load_variant(variant), room / "q")
            if made:
                mean = {kind: divergence(made, references[kind], room) for kind in HELD_OUT}
                found.setdefault(variant, {})[name] = mean
                print(seed, variant, name, mean, file=sys.stderr, flush=True)
    return found


def text(corpus_name: str, seed: int, characters: int, template: ChatTemplate, base: Path) -> str:
    """Calibration text of one kind, more than enough of it."""
    makers: dict[str, Iterator[str]] = {
        "conversation": chat(10 + seed, template),
        "code": corpus.code_pieces(10 + seed),
        "mixture": mixed(chat(10 + seed, template), corpus.code_pieces(10 + seed)),
        "embedded set": embedded(seed, template),
        "random tokens": nonsense(seed, base),
    }
    found, length = [], 0
    for piece in makers[corpus_name]:
        found.append(piece)
        length += len(piece)
        if length > characters:
            break
    return "\n".join(found)


def chat(seed: int, template: ChatTemplate) -> Iterator[str]:
    """Conversations such as the tiny model was trained on, as it reads them."""
    for c in corpus.conversations(seed):
        yield render_template(
            template.text, c.messages, tools=c.tools or None, enable_thinking=c.thinking
        )


def mixed(one: Iterator[str], other: Iterator[str]) -> Iterator[str]:
    """From both in turn, about as many letters."""
    length = [0, 0]
    while True:
        which = int(length[0] > length[1])
        piece = next((one, other)[which])
        length[which] += len(piece)
        yield piece


def embedded(seed: int, template: ChatTemplate) -> Iterator[str]:
    """The set that ships with the package, in another order for each seed: the tiny model knows little of it."""
    told, folder = sets.find_set("embedded")
    for document in shuffle_documents(
        replace(told, seed=seed), datasets.read_documents(told, folder, {})
    ):
        yield calibrate.render_document(document, template)


def nonsense(seed: int, base: Path) -> Iterator[str]:
    """Words of the vocabulary, one as likely as another."""
    words = [
        w.replace("Ġ", " ").replace("Ċ", "\n")
        for w in read_header(base).metadata["tokenizer.ggml.tokens"]
    ]
    chance = random.Random(seed)
    while True:
        yield "".join(chance.choice(words) for _ in range(500))


def reference(
    base: Path, kind: str, seed: int, chunks: int, template: ChatTemplate, room: Path
) -> Path:
    """What the BF16 model says of held-out text, for llama-perplexity to compare with."""
    pieces = (
        chat(1000 + seed, template)
        if kind == "chat"
        else corpus.code_pieces(1000 + seed, held_out=True)
    )
    words = room / f"held-out-{kind}.txt"
    words.write_text("\n".join(islice(pieces, 400)))
    reading = room / "reading.gguf"
    if not reading.exists():
        shutil.copyfile(base, reading)
        parse_control_tokens(reading)
    out = room / f"{kind}.kld"
    perplexity("-m", reading, "-f", words, "--kl-divergence-base", out, "--chunks", str(chunks))
    return out


def parse_control_tokens(model: Path) -> None:
    """Let llama-perplexity read special tokens: it takes control tokens in a text for letters, and user's tokens for tokens."""
    from gguf import GGUFReader

    field = GGUFReader(model, "r+").get_field("tokenizer.ggml.token_type")
    assert field is not None
    for n in field.data:
        if field.parts[n][0] == CONTROL:
            field.parts[n][0] = USER_DEFINED


def quantised(base: Path, matrix: Path | None, variant: Variant, room: Path) -> Path | None:
    """A file of a variant; none where it cannot be made without an importance matrix."""
    from quant.errors import InputError

    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    covered = imatrix.read_imatrix(matrix).covered if matrix else ()
    try:
        planned = make_plan(variant, read_header(base).tensors, covered)
    except InputError:
        planned = None
    if planned is None and variant.name == VARIANTS[0]:
        # What the same bits look like without importance: the types that need it give way to the nearest that do not.
        planned = make_plan(plain(variant), read_header(base).tensors, ())
    if planned is None:
        return None
    request = WriteRequest(
        base=ModelFile.open(base),
        targets=[QuantizeTarget(planned, room / "made.gguf")],
        identity="study",
        tools=toolchain.find_toolchain(),
        imatrix=ModelFile.open(matrix) if matrix else None,
    )
    write_variants(request, room / "work")
    return room / "made.gguf"


def plain(variant: Variant) -> Variant:
    """A variant whose types need no importance matrix: IQ2_S and IQ3_S of the experts become Q2_K and Q3_K."""
    stands_in = {"IQ2_S": "Q2_K", "IQ3_S": "Q3_K"}
    return replace(
        variant, rules=tuple(replace(r, type=stands_in.get(r.type, r.type)) for r in variant.rules)
    )


def divergence(model: Path, base: Path, room: Path) -> float:
    """The mean KL divergence from what the BF16 model says."""
    for _ in range(TRIES):
        said = perplexity("-m", model, "--kl-divergence-base", base, "--kl-divergence")
        if match := re.search(r"Mean\s+KLD:\s+([-\d.]+)", said):
            return float(match[1])
    raise AssertionError(said[-2000:])


def perplexity(*arguments: str | Path) -> str:
    """Run llama-perplexity and give what it says."""
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


def table(found: Sequence[Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """The study as a table: means over the seeds with the spread between them, and the ratio to the mixture, seed by seed.

    Held-out texts of two seeds differ more than two corpora do, so the ratios say more than the means.
    """
    lines = [
        "| variant | corpus | chat | code | mean of both | against the mixture |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for variant in VARIANTS:
        for name in (*CORPORA, WITHOUT):
            seeds = [seed[variant] for seed in found if name in seed.get(variant, {})]
            if not seeds:
                lines.append(f"| {variant} | {name} | cannot be made | | | |")
                continue
            kinds = [[seed[name][kind] for seed in seeds] for kind in HELD_OUT]
            both = [statistics.mean(seed[name].values()) for seed in seeds]
            ratios = [
                b / statistics.mean(seed["mixture"].values())
                for b, seed in zip(both, seeds, strict=True)
            ]
            cells = [told(numbers, 4) for numbers in (*kinds, both)] + [told(ratios, 3)]
            lines.append(f"| {variant} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def told(numbers: Sequence[float], digits: int) -> str:
    """The mean of some numbers, and how far they are from each other."""
    spread = statistics.stdev(numbers) if len(numbers) > 1 else 0
    return f"{statistics.mean(numbers):.{digits}f} ± {spread:.{digits}f}"


if __name__ == "__main__":
    main()
