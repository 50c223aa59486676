"""The plan: the first rule that matches decides, and all problems come first."""

import json
import re
import subprocess
from pathlib import Path
from typing import Literal

import pytest

from quant.core.errors import InputError
from quant.llama import toolchain
from quant.llama.gguf import TensorSpec, pad, read_header
from quant.llama.types import TYPES
from quant.plan.plan import (
    CoveragePolicy,
    Plan,
    compute_depths,
    find_coverable,
    find_plan_problems,
    is_moe,
    is_quantizable,
    make_plan,
)
from quant.plan.recipe import Rule, Variant
from tests.gguf_files import Tensor, key, write
from tests.llama_quantize import type_file


def spec(name: str, *shape: int, stored: str = "BF16") -> TensorSpec:
    return TensorSpec(name, shape or (256, 4), TYPES[stored])


def variant(*rules: Rule, file_type: str = "Q4_K_M") -> Variant:
    return Variant("V", "For tests.", file_type, rules)


def rule(tensors: str, wanted: str, **settings: object) -> Rule:
    return Rule(tensors, wanted, "For tests.", **settings)  # type: ignore[arg-type]


TRUNK = tuple(spec(f"blk.{n}.ffn_down.weight", 512, 256) for n in range(12))
MODEL = (spec("token_embd.weight", 256, 100), *TRUNK, spec("output_norm.weight", 256, stored="F32"))
REST = rule(".*", "Q4_K")


def test_the_first_rule_that_matches_decides() -> None:
    planned = make_plan(
        variant(rule(r"token_embd\.weight", "Q6_K"), rule(r"blk\.1\..*", "Q5_K"), REST), MODEL
    )
    types = planned.types()
    assert types["token_embd.weight"] == "Q6_K"
    assert [types[t.name] for t in TRUNK] == ["Q4_K", "Q5_K", *["Q4_K"] * 10]
    assert [t.rule for t in planned.tensors] == [None, 0, 2, 1, *[2] * 10]


def test_a_tensor_that_llama_quantize_never_quantizes_keeps_its_type() -> None:
    assert make_plan(variant(REST), MODEL).types()["output_norm.weight"] == "F32"


def test_a_variant_without_rules_is_the_base_itself() -> None:
    planned = make_plan(variant(), MODEL)
    assert planned.is_base
    assert set(planned.types().values()) == {"BF16", "F32"}
    assert planned.bytes == sum(pad(t.bytes) for t in MODEL)


def test_sizes_add_up_with_the_padding_of_every_tensor() -> None:
    odd = spec("odd.weight", 32, 3)
    planned = make_plan(variant(rule(r"odd\.weight", "Q4_0"), REST), (odd, *MODEL))
    assert planned.tensors[0].bytes == 3 * 18
    assert planned.bytes == 64 + 100 * 144 + 12 * 2 * 256 * 144 + 256 * 4
    weights = 32 * 3 + 100 * 256 + 12 * 512 * 256 + 256
    assert planned.bits_per_weight == 8 * (54 + 100 * 144 + 12 * 2 * 256 * 144 + 1024) / weights
    assert planned.type_bytes() == {"Q4_K": (100 + 12 * 512) * 144, "F32": 1024, "Q4_0": 54}
    assert list(planned.type_bytes()) == ["Q4_K", "F32", "Q4_0"]


def test_a_plan_is_plain_json() -> None:
    planned = make_plan(variant(REST), MODEL)
    document = json.loads(json.dumps(planned.json()))
    assert list(document) == ["name", "bytes", "bpw", "tensors"]
    assert document["bytes"] == planned.bytes
    assert document["tensors"][1] == {
        "name": "token_embd.weight",
        "type": "Q4_K",
        "shape": [256, 100],
        "bytes": 100 * 144,
    }


def test_a_rule_that_matches_nothing_is_a_problem_unless_it_is_optional() -> None:
    useless = r"blk\.\d+\.nothing"
    [problem] = find_plan_problems(variant(rule(useless, "Q4_K"), REST), MODEL, None)
    assert problem == (
        f"variant V: rules[0] ({useless!r}) matches no tensor of this model;"
        " correct it or set `optional = true`"
    )
    assert (
        list(find_plan_problems(variant(rule(useless, "Q4_K", optional=True), REST), MODEL, None))
        == []
    )


def test_a_rule_behind_one_that_matches_everything_is_a_problem() -> None:
    assert (
        len(
            list(
                find_plan_problems(variant(REST, rule(r"token_embd\.weight", "Q6_K")), MODEL, None)
            )
        )
        == 1
    )


def test_a_rule_for_another_kind_of_model_may_match_nothing() -> None:
    experts = (*MODEL, spec("blk.0.ffn_up_exps.weight", 256, 4, 8))
    for only, of_moe in (("moe", experts), ("dense", MODEL)):
        other = MODEL if of_moe is experts else experts
        rules = variant(rule(r"nothing", "Q4_K", only=only), REST)
        assert list(find_plan_problems(rules, other, None)) == []
        assert len(list(find_plan_problems(rules, of_moe, None))) == 1


def test_a_tensor_that_no_rule_matches_is_a_problem() -> None:
    problems = list(find_plan_problems(variant(rule(r"blk\..*", "Q4_K")), MODEL, None))
    assert problems == [
        "variant V: tensor token_embd.weight: expected a rule that matches it, found none"
    ]


def test_a_row_that_does_not_fill_blocks_is_a_problem_unless_a_narrow_type_fits() -> None:
    narrow = (spec("blk.0.attn_k.weight", 96, 4),)
    with pytest.raises(
        InputError,
        match=r"blk.0.attn_k.weight: expected a row that is a multiple of 256 for Q4_K, found 96",
    ):
        make_plan(variant(REST), narrow)
    assert make_plan(variant(rule(".*", "Q4_K", narrow="Q4_0")), narrow).types() == {
        "blk.0.attn_k.weight": "Q4_0"
    }
    assert (
        make_plan(variant(rule(".*", "Q4_K", narrow="Q4_0")), MODEL).types()["token_embd.weight"]
        == "Q4_K"
    )


def test_a_type_that_needs_an_imatrix_is_refused_where_there_is_no_data() -> None:
    rules = variant(rule(".*", "IQ2_XXS"))
    covered = [t.name for t in MODEL]
    assert list(find_plan_problems(rules, MODEL, covered)) == []
    problem = (
        "IQ2_XXS needs imatrix data, found none for this tensor; give it a type that needs none"
    )
    assert list(find_plan_problems(rules, MODEL, covered[1:])) == [
        f"variant V: rules[0]: tensor token_embd.weight: {problem}"
    ]
    assert len(list(find_plan_problems(rules, MODEL, []))) == 13


def test_before_there_is_an_imatrix_the_trunk_counts_as_covered() -> None:
    mtp = (spec("blk.12.nextn.eh_proj.weight"), spec("blk.12.attn_q.weight"))
    assert find_coverable((*MODEL, *mtp)) == {t.name for t in TRUNK}


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(InputError) as caught:
        make_plan(variant(rule(r"nothing", "Q4_K"), rule(r"blk\..*", "IQ1_S")), MODEL, [])
    assert len(caught.value.problems) == 1 + 1 + 12


def test_depth_counts_blocks_of_the_trunk_and_puts_mtp_behind_it() -> None:
    depths = compute_depths(
        (*MODEL, spec("blk.12.nextn.eh_proj.weight"), spec("blk.12.attn_q.weight"))
    )
    assert depths["blk.0.ffn_down.weight"] == 0
    assert depths["blk.6.ffn_down.weight"] == 0.5
    assert depths["blk.11.ffn_down.weight"] < 1
    assert depths["blk.12.attn_q.weight"] == 1
    assert "token_embd.weight" not in depths


def test_a_file_with_nothing_but_an_mtp_block_has_depths() -> None:
    assert compute_depths([spec("blk.92.nextn.eh_proj.weight")])["blk.92.nextn.eh_proj.weight"] >= 1


def test_rules_for_a_part_of_the_trunk_decide_only_there() -> None:
    rules = variant(rule(r"blk\..*", "Q6_K", depth=(0.5, 1.0)), REST)
    types = make_plan(rules, MODEL).types()
    assert [types[t.name] for t in TRUNK] == ["Q4_K"] * 6 + ["Q6_K"] * 6


def test_a_mixture_of_experts_is_recognized_by_its_expert_tensors() -> None:
    assert is_moe((spec("blk.0.ffn_up_exps.weight"),))
    assert not is_moe((spec("blk.0.ffn_up_shexp.weight"), *MODEL))


# Names that llama.cpp's tensor_allows_quantization excludes, with similar ones that it allows.
NAMES = """
    token_embd.weight output.weight output_norm.weight token_embd_norm.weight
    blk.0.attn_norm.weight blk.0.attn_q.weight blk.0.attn_q_norm.weight blk.0.ffn_gate.weight
    blk.0.ffn_gate_inp.weight blk.0.ffn_gate_inp_shexp.weight blk.0.ffn_gate_tid2eid.weight
    blk.0.ffn_up_exps.weight blk.0.ffn_up_exps.bias blk.0.altup_proj.weight
    blk.0.laurel_l.weight per_layer_model_proj.weight per_layer_token_embd.weight
    position_embd.weight token_types.weight v.position_embd.weight blk.0.ssm_conv1d.weight
    blk.0.ssm_conv1d_q.weight blk.0.ssm_in.weight blk.0.shortconv.conv.weight
    blk.0.shortconv.in_proj.weight blk.0.indexer.k_proj.weight blk.0.indexer.q_proj.weight
    blk.0.indexer.proj.weight blk.0.indexer.attn_k.weight blk.0.time_mix_first.weight
    blk.0.time_mix_w0.weight blk.0.time_mix_w1.weight blk.0.time_mix_w2.weight
    blk.0.time_mix_v0.weight blk.0.time_mix_v1.weight blk.0.time_mix_v2.weight
    blk.0.time_mix_a0.weight blk.0.time_mix_a1.weight blk.0.time_mix_a2.weight
    blk.0.time_mix_g1.weight blk.0.time_mix_g2.weight blk.0.time_mix_decay_w1.weight
    blk.0.time_mix_decay_w2.weight blk.0.time_mix_lerp_fused.weight blk.0.time_mix_key.weight
    blk.0.attn_rel_b.weight v.sam.pos_embd.weight v.sam.neck.0.weight v.sam.net_2.weight
    v.blk.0.rel_pos_h.weight v.patch_embd.weight v.patch_merger.weight mm.patch_merger.weight
    a.rvq.codebook.0.weight mm.a.code_embd.weight v.blk.0.attn_out.weight mm.0.weight
    blk.0.nextn.eh_proj.weight blk.0.odd_norm.weight.x.weight blk.0.weight_scale weight
    blk.0.attn_q.weight_in blk.0.token_types.weight xposition_embd.weight
""".split()
SHAPES = [
    (256,),
    (256, 1),
    (256, 2),
    (256, 1, 1),
    (256, 1, 2),
    (256, 2, 2),
    (256, 1, 1, 2),
    (256, 3, 1, 1),
]
LLAMA = (
    key("general.architecture", "llama"),
    key("llama.block_count", 1),
    key("llama.context_length", 32),
    key("llama.embedding_length", 256),
    key("llama.feed_forward_length", 256),
    key("llama.attention.head_count", 4),
    key("llama.attention.layer_norm_rms_epsilon", 1e-5),
    key("tokenizer.ggml.model", "no_vocab"),
)


def dry_run(path: Path, *options: str) -> dict[str, str]:
    """The types that llama-quantize would write, by tensor; nothing is written."""
    tool = toolchain.find_toolchain().path("llama-quantize")
    result = subprocess.run(
        [tool, "--dry-run", *options, path, "Q4_K", "1"], capture_output=True, text=True, check=True
    )
    line = re.compile(
        r"^\[ *\d+/ *\d+\] +(\S+) .*?type = +(\w+)(?:.*-> .*\((\w+)\))?", re.MULTILINE
    )
    return {
        name: (new or old).lower() for name, old, new in line.findall(result.stdout + result.stderr)
    }


@pytest.mark.tools
def test_llama_quantize_keeps_the_tensors_that_we_keep(tmp_path: Path) -> None:
    shaped = [Tensor(f"blk.0.shape_{n}.weight", shape, "BF16") for n, shape in enumerate(SHAPES)]
    path = write(
        tmp_path / "names.gguf", [*(Tensor(n, (256, 2), "BF16") for n in NAMES), *shaped], LLAMA
    )
    written = dry_run(path)
    tensors = read_header(path).tensors
    assert set(written) == {t.name for t in tensors}
    assert {t.name for t in tensors if is_quantizable(t)} == {
        name for name, kind in written.items() if kind != "bf16"
    }


@pytest.mark.tools
def test_llama_quantize_plans_what_we_plan(tmp_path: Path) -> None:
    names = [
        "token_embd.weight",
        "output.weight",
        "output_norm.weight",
        *(f"blk.{n}.ffn_down.weight" for n in range(12)),
    ]
    names += ["blk.1.ffn_downxweight.weight", "blk.1.ffn_down.weight.weight"]
    path = write(tmp_path / "f.gguf", [Tensor(n, (256, 2), "BF16") for n in names], LLAMA)
    rules = variant(
        rule(r"blk\.1\.ffn_down\.weight", "Q6_K"),
        rule(r".*weight\.weight", "Q8_0"),
        rule("output.weight", "Q5_1"),
        REST,
    )
    planned: Plan = make_plan(rules, read_header(path).tensors)
    chosen = {t.tensor.name: t.type.name for t in planned.tensors if t.rule is not None}
    types = tmp_path / "types.txt"
    types.write_text(type_file(chosen))
    assert dry_run(path, "--tensor-type-file", str(types)) == {
        n: t.lower() for n, t in planned.types().items()
    }


def policy(
    otherwise: Literal["raise", "refuse", "report"],
    floor: str = "Q4_K",
    name: str = TRUNK[3].name,
) -> CoveragePolicy:
    return CoveragePolicy({name: "layer 3: expert 5 saw nothing"}, otherwise, floor)


def test_only_a_tensor_with_insufficient_coverage_is_raised_to_the_floor() -> None:
    planned = make_plan(variant(rule(".*", "Q2_K")), MODEL, policy=policy("raise"))
    assert {
        t.tensor.name: (t.type.name, t.raised_from and t.raised_from.name) for t in planned.tensors
    }[TRUNK[3].name] == ("Q4_K", "Q2_K")
    assert {t.type.name for t in planned.tensors if t.tensor.name != TRUNK[3].name} == {
        "Q2_K",
        "F32",
    }


def test_a_tensor_above_the_floor_is_not_raised() -> None:
    assert make_plan(variant(rule(".*", "Q6_K")), MODEL, policy=policy("raise")) == make_plan(
        variant(rule(".*", "Q6_K")), MODEL
    )
    assert not list(find_plan_problems(variant(rule(".*", "Q4_K")), MODEL, None, policy("refuse")))


def test_a_floor_whose_blocks_do_not_fill_the_rows_gives_way_to_a_plain_type() -> None:
    odd = spec("blk.0.odd.weight", 96, 4)
    planned = make_plan(
        variant(rule(".*", "IQ4_NL")), (odd,), policy=policy("raise", name=odd.name)
    )
    assert planned.types() == {odd.name: "Q4_1"}


def test_a_tensor_with_insufficient_coverage_can_be_refused_with_the_reason() -> None:
    [problem] = find_plan_problems(variant(rule(".*", "Q2_K")), MODEL, None, policy("refuse"))
    assert problem.startswith(
        "variant V: rules[0]: tensor blk.3.ffn_down.weight: Q2_K has insufficient imatrix coverage:"
        " layer 3: expert 5"
    )
    assert problem.endswith("give it Q4_K or more, or use more calibration text")


def test_a_type_without_its_imatrix_data_is_raised_or_refused() -> None:
    covered = [t.name for t in TRUNK if t != TRUNK[3]]
    lowest = variant(rule(r"token_embd\.weight", "Q4_K"), rule(".*", "IQ2_XXS"))
    assert make_plan(lowest, MODEL, covered, policy("raise")).types()[TRUNK[3].name] == "Q4_K"
    assert "needs imatrix data, found none" in "".join(
        find_plan_problems(lowest, MODEL, covered, policy("report"))
    )
