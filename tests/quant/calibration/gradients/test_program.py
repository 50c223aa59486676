"""The forward and backward pass, compared with llama.cpp, and with the effect of small errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant.calibration.gradients.glm4moe import apply_rms_norm
from quant.calibration.gradients.program import ModelPass, ModelWeights
from quant.calibration.hessian_sums import HessianSums
from quant.calibration.hessians import HessianSettings, collect_hessians
from quant.core import child, memory
from quant.core.errors import InputError, ToolError
from quant.llama.tensors import OUTPUT, TOKEN_EMBEDDING
from quant.llama.toolchain import find_toolchain
from tests.quant.quantize.engine.models import replace_weight, write_base

pytestmark = pytest.mark.tools
Tiny = tuple[Path, Path, Path]
CONTEXT, CHUNKS, WHOLE_VOCABULARY = 128, 3, 1 << 20
MATRICES = {
    OUTPUT: (1, 256),
    TOKEN_EMBEDDING: (1, 256),
    "blk.0.ffn_down.weight": (1, 512),
    "blk.1.attn_v.weight": (1, 256),
    "blk.2.attn_output.weight": (1, 256),
    "blk.2.ffn_up_exps.weight": (8, 256),
    "blk.3.ffn_down_exps.weight": (8, 256),
    "blk.3.ffn_gate_shexp.weight": (1, 256),
}


@pytest.fixture(scope="module")
def exact(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in F32: llama.cpp does not round the inputs of its products."""
    folder = tmp_path_factory.mktemp("exact")
    find_toolchain().run(
        "llama-quantize", [tiny[0], "f32.gguf", "F32", "1"], cwd=folder, log=folder / "log"
    )
    return folder / "f32.gguf"


def log_probabilities(model: ModelPass, outputs: NDArray[np.float32]) -> Tensor:
    """Return log probabilities of all tokens from outputs of the last block."""
    x = apply_rms_norm(
        model.shape, torch.from_numpy(np.array(outputs)), model.weights.read("output_norm.weight")
    )
    return (x.double() @ model.weights.read(OUTPUT).double().T).log_softmax(-1)


def test_the_forward_pass_predicts_what_llama_cpp_predicts(
    tiny: Tiny, exact: Path, tmp_path: Path
) -> None:
    part = {"model": str(exact), "text": str(tiny[2]), "folder": str(tmp_path)}
    job = {
        "context": CONTEXT,
        "threads": 1,
        "chunks": CHUNKS,
        "top": WHOLE_VOCABULARY,
        "parts": [part],
    }
    child.run_child("quant.evaluate.scorer", job, folder=tmp_path, name="reading the text")
    model = ModelPass(
        ModelWeights(tiny[0]), HessianSums({}), np.load(tmp_path / "tokens.npy"), tmp_path, 2
    )
    model.run_forward()
    for n, expected in enumerate(np.load(tmp_path / "said.npy")):
        off = np.abs(
            log_probabilities(model, model.inputs[-1, n, CONTEXT // 2 : -1]).numpy() - expected
        )
        # llama.cpp keeps keys and values in 16 bits.
        assert off.max() < 1e-2 and off.mean() < 1e-3


class NoisyWeights(ModelWeights):
    """Weights with Gaussian noise of one variance in one of the tensors."""

    def __init__(self, first: Path, name: str, size: float) -> None:
        super().__init__(first)
        self.metadata = use_all_experts(self).metadata
        stored = super().rows(name, range(1 << 20))
        self.name, self.size = name, size * float(stored.square().mean().sqrt())
        self.noise = self.size * torch.randn(
            stored.shape, generator=torch.Generator().manual_seed(5)
        )

    def rows(self, name: str, wanted: range | NDArray[np.int32]) -> Tensor:
        written = super().rows(name, wanted)
        if name != self.name:
            return written
        return written + (
            self.noise[wanted.start : wanted.stop]
            if isinstance(wanted, range)
            else self.noise[wanted]
        )


def use_all_experts(weights: ModelWeights) -> ModelWeights:
    """Let every token use all experts, so that noise does not change the choice."""
    experts = weights.metadata["glm4moe.expert_count"]
    weights.metadata = {**weights.metadata, "glm4moe.expert_used_count": experts}
    return weights


def test_hessians_predict_the_divergence_that_small_errors_cause(
    tiny: Tiny, tmp_path: Path
) -> None:
    """In chunks of one token, where errors of one token do not add to those of another.

    Noise of variance v causes a divergence of v / 2 · Σ |g|² |x|², the trace of the Hessian.
    """
    vocabulary = len(ModelWeights(tiny[0]).read(TOKEN_EMBEDDING))
    tokens = np.random.default_rng(3).integers(0, vocabulary, (1000, 1)).astype(np.int32)
    model = ModelPass(
        use_all_experts(ModelWeights(tiny[0])), HessianSums(MATRICES), tokens, tmp_path, 2
    )
    model.run_forward()
    model.run_output()
    model.run_backward()
    before = log_probabilities(model, model.inputs[-1, :, 0])
    for name, products in model.sums.products.items():
        (tmp_path / name).mkdir()
        noisy = NoisyWeights(tiny[0], name, 3e-3)
        other = ModelPass(noisy, HessianSums({}), tokens, tmp_path / name, 2)
        other.run_forward()
        divergence = (
            before.exp() * (before - log_probabilities(other, other.inputs[-1, :, 0]))
        ).sum()
        predicted = noisy.size**2 / 2 * float(np.trace(products.sum(0)))
        assert 0.8 < float(divergence) / predicted < 1.25, name


def test_the_sums_do_not_depend_on_threads_and_have_the_rows_of_llama_cpp(
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    base, _, text = tiny
    results = [
        collect_hessians(base, text, tmp_path / str(n), HessianSettings(CONTEXT, CHUNKS, threads=n))
        for n in (1, 3)
    ]
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()
    assert results[0].about["gradients"] == 1
    plain = collect_hessians(
        base, text, tmp_path / "plain", HessianSettings(CONTEXT, CHUNKS, gradients=False)
    )
    assert "gradients" not in plain.about
    assert results[0].counts.keys() == plain.counts.keys() | {TOKEN_EMBEDDING}
    for name, counts in plain.counts.items():
        # The effective sample size is at most the number of rows. llama.cpp rounds inputs, so some
        # tokens go to other experts.
        assert (results[0].counts[name] <= counts + 9).all(), name
        assert results[0].counts[name].sum() > 0.05 * counts.sum(), name
    weighed, alike = (m.read_mean("blk.0.attn_q.weight") for m in (results[0], plain))
    assert weighed is not None and alike is not None
    assert np.array_equal(weighed, weighed.T)
    # Weights have a mean of one, and RMSNorm gives all inputs of a block about the same length.
    assert 0.5 < np.trace(weighed) / np.trace(alike) < 2
    assert not np.allclose(weighed, alike, rtol=0.05)


def test_an_expert_with_larger_weights_keeps_a_larger_hessian() -> None:
    sums = HessianSums({"e.weight": (2, 4)})
    x = np.eye(4, dtype=np.float32)
    sums.add("e.weight", 0, x, np.full(4, 3, np.float32))
    sums.add("e.weight", 1, x, np.full(4, 1, np.float32))
    for _ in range(2):
        assert np.array_equal(sums.tensors()["e.weight"], np.stack([1.5 * x, 0.5 * x]))
        assert [*sums.tensors()["e.weight.counts"]] == [4, 4]


def test_the_effective_sample_size_of_one_dominant_row_is_about_one() -> None:
    sums = HessianSums({"a.weight": (1, 4)})
    rows = np.random.default_rng(1).standard_normal((100, 4)).astype(np.float32)
    weights = np.where(np.arange(100) == 7, np.float32(1000), np.float32(1))
    sums.add("a.weight", 0, rows, weights)
    written = sums.tensors()
    assert [*written["a.weight.counts"]] == [1]
    expected = (rows.T * weights) @ rows / weights.mean() / 100
    assert np.allclose(written["a.weight"], expected, rtol=1e-5)


def test_a_model_without_a_backward_pass_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    _, quantised, text = tiny
    with pytest.raises(
        InputError,
        match=r"llama\.gguf: general\.architecture: expected glm4moe, found llama; with --no-grad",
    ):
        collect_hessians(
            write_base(tmp_path / "llama.gguf"),
            text,
            tmp_path / "m",
            HessianSettings(gradients=True),
        )
    with pytest.raises(
        InputError,
        match=r"q\.gguf: .*: expected BF16, F16, F32, found Q6_K, and so 39 tensors; with",
    ):
        collect_hessians(
            quantised, text, tmp_path / "m", HessianSettings(CONTEXT, 1, gradients=True)
        )
    assert [p.name for p in tmp_path.iterdir()] == ["llama.gguf"]


def test_a_model_with_nan_is_refused_and_leaves_no_file(tiny: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    base.write_bytes(tiny[0].read_bytes())
    replace_weight(base, "blk.3.attn_v.weight", 7, 0x7FC0)
    with pytest.raises(
        ToolError,
        match=r"output\.weight: its outputs are NaN or infinite: the model is broken",
    ):
        collect_hessians(base, tiny[2], tmp_path / "m", HessianSettings(CONTEXT, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["base.gguf"]


def test_too_little_memory_for_the_backward_pass_is_refused_before_it_begins(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums, the largest block or the output in F32, and a thread's four logit arrays and product."""
    attention, routing, norms = (
        256 * (256 + 128 + 128 + 256) + 256 + 128 + 128 + 64 + 64,
        8 * 256 + 8,
        2 * 256,
    )
    words, block = 4096, (8 + 1) * 3 * 256**2 + attention + routing + norms
    needed = 4 * 256**2 + 4 * max(words * 256, block) + 4 * (4 * CONTEXT * words + 256**2)
    for free, refused in ((needed - 1, True), (2 * needed, False)):
        monkeypatch.setattr(memory, "measure_free_memory", lambda free=free: free)
        if refused:
            with pytest.raises(
                InputError, match=f"expected {needed:,} bytes of memory, found {free:,} free"
            ):
                collect_hessians(
                    tiny[0],
                    tiny[2],
                    tmp_path / "m",
                    HessianSettings(CONTEXT, 1, only="output.weight"),
                )
        else:
            collect_hessians(
                tiny[0], tiny[2], tmp_path / "m", HessianSettings(CONTEXT, 1, only="output.weight")
            )
