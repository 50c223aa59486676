"""Train a tiny model of GLM-4.6's architecture, tokenizer and all, and write it as a checkpoint folder.

``python -m tests.models.train_tiny_glm --out DIR`` takes two idle CPU cores about half an hour; nothing is downloaded.
Seed, depth, experts and vocabulary can be others: a second model tells what is true of more than the first.
Two phases: one on everything, which learns to speak, and one on short conversations about few words, in which the model
learns to repeat what it was told. The shipped weights came from an earlier state of this script, phase by phase; the
note beside them says what differed.
What the model learns is in ``tests.models.corpus``; how a conversation looks to it is in GLM-4.6's own chat template.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from tests.models import words
from tests.models.corpus import Conversation, code_pieces, conversations, simple_conversations
from tests.models.tiny_tokenizer import VOCABULARY, Text, TinyTokenizer

CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    # A head this small has eight frequencies only: a lower base leaves more of them that tell neighbours apart.
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    "use_qk_norm": True,
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Schedule:
    """How long to train, and on how much at once; progress runs from 0 to 1."""

    steps: int
    minutes: float = 0
    """Ends the training early where the steps take longer; zero means no limit."""
    chat_tokens: int = 2048
    """Tokens of conversations in one step."""
    code_tokens: int = 768
    """Tokens of source code in one step."""
    warm_up: float = 0.02
    cool_from: float = 0.4
    rough_from: float = 0.7
    """From here on, every other step sees its weights as two bits would leave them."""

    def speed(self, progress: float) -> float:
        """The share of the full learning rates: a short way up, level, then a straight line down to a fiftieth."""
        if progress < self.warm_up:
            return (progress + 0.001) / self.warm_up
        return min(1.0, 0.02 + 0.98 * (1 - progress) / (1 - self.cool_from))


def main() -> None:
    """Train and write, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=500, help="of the first phase")
    parser.add_argument("--simple-steps", type=int, default=2750, help="of the second phase")
    parser.add_argument(
        "--minutes",
        type=float,
        default=0,
        help="stop after this time, with the schedule shortened to fit",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    shape = parser.add_argument_group(
        "the model's shape, where another than the shipped one's is wanted"
    )
    shape.add_argument("--vocabulary", type=int, default=VOCABULARY)
    shape.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    shape.add_argument("--experts", type=int, default=CONFIG["n_routed_experts"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = TinyTokenizer.train(options.seed, options.vocabulary)
    model = build(tokenizer, num_hidden_layers=options.layers, n_routed_experts=options.experts).to(
        options.device
    )
    train(model, tokenizer, Schedule(options.steps, options.minutes), options.seed)
    settle(model, tokenizer, options.simple_steps, options.seed)
    save(model, tokenizer, options.out)


def build(tokenizer: TinyTokenizer, **shape: int) -> Glm4MoeForCausalLM:
    """An untrained model that knows the tokenizer's tokens, of the shipped shape where no other is given.

    Its output matrix starts as a copy of its input matrix: to say again what was read is then half learnt.
    """
    ends = [tokenizer.id(token) for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    config = Glm4MoeConfig(
        **CONFIG | shape, vocab_size=tokenizer.size, eos_token_id=ends, pad_token_id=ends[0]
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    model = Glm4MoeForCausalLM(config)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    return model


def train(
    model: Glm4MoeForCausalLM, tokenizer: TinyTokenizer, schedule: Schedule, seed: int
) -> None:
    """Run the schedule to its end, and say from time to time how it goes."""
    optimizers = optimizers_for(model)
    balance = Balance(model)
    chat, code = (
        chat_batches(tokenizer, seed, schedule.chat_tokens),
        code_batches(tokenizer, seed, schedule.code_tokens),
    )
    began, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["full"] * schedule.speed(progress)
        with rough_weights(model, on=progress > schedule.rough_from and step % 2 == 0):
            losses = [
                learn(model, next(batches), share)
                for batches, share in ((chat, 0.75), (code, 0.25))
            ]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        balance.adjust()
        step += 1
        minutes = (time.monotonic() - began) / 60
        progress = max(step / schedule.steps, minutes / schedule.minutes if schedule.minutes else 0)
        if step % 50 == 0 or progress >= 1:
            shares = balance.shares()
            print(  # noqa: T201 (the one thing it says)
                f"step {step}, {minutes:.1f} min, chat {losses[0]:.3f}, code {losses[1]:.3f}, "
                f"least used expert {min(map(min, shares)):.3f}, most {max(map(max, shares)):.3f}",
                flush=True,
            )


def settle(model: Glm4MoeForCausalLM, tokenizer: TinyTokenizer, steps: int, seed: int) -> None:
    """The second phase: AdamW on simple conversations about few words, with a little code in every fourth step."""
    words.few()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    balance = Balance(model)
    chat = chat_batches(tokenizer, seed + 11, 1536, simple_conversations)
    code = code_batches(tokenizer, seed + 12, 400)
    for step in range(steps):
        progress = step / steps
        speed = 1e-3 * min(1, (step + 1) / 30) * min(1.0, 0.03 + 0.97 * (1 - progress) / 0.55)
        for group in optimizer.param_groups:
            group["lr"] = speed
        loss = learn(model, next(chat), 1.0)
        if step % 4 == 0:
            learn(model, next(code), 0.25)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        balance.adjust()
        if step % 50 == 0:
            print(f"simple step {step}, chat {loss:.3f}", flush=True)  # noqa: T201 (the one thing it says)


def optimizers_for(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embeddings, routers and vectors, of which the last do not decay."""
    inside, around, vectors = list[Tensor](), list[Tensor](), list[Tensor]()
    for name, parameter in model.named_parameters():
        outer = name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight"))
        (vectors if parameter.ndim == 1 else around if outer else inside).append(parameter)
    groups = [
        {"params": around, "full": 3e-3, "weight_decay": 0.1},
        {"params": vectors, "full": 3e-3, "weight_decay": 0.0},
    ]
    return [Muon(inside, full=0.02), torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal before it is applied (https://kellerjordan.github.io/posts/muon); stacked experts too.

    After equal time its loss on conversations was lower than with AdamW alone (0.56 against 0.61 in one trial).
    """

    def __init__(
        self, parameters: list[Tensor], full: float, momentum: float = 0.95, decay: float = 0.1
    ) -> None:
        super().__init__(
            parameters, {"lr": full, "full": full, "momentum": momentum, "decay": decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix by ``lr`` times an orthogonal one."""
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.grad is not None
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                change = orthogonal(parameter.grad.lerp(mean, group["momentum"]))
                rows, columns = parameter.shape[-2:]
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.add_(change, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor, rounds: int = 4) -> Tensor:
    """Nearly the orthogonal matrix next to this one, by Newton and Schulz's iteration in BF16."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = (matrix.mT if tall else matrix).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def learn(model: Glm4MoeForCausalLM, batch: tuple[Tensor, Tensor], share: float) -> float:
    """Add one batch's gradients, and return its mean loss over the weighted tokens."""
    ids, weights = (tensor.to(model.device) for tensor in batch)
    counts = weights[:, 1:] > 0
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[counts]
        logits = model.lm_head(hidden)
    losses = functional.cross_entropy(logits.float(), ids[:, 1:][counts], reduction="none")
    loss = (losses * weights[:, 1:][counts]).sum() / weights[:, 1:].sum()
    (loss * share).backward()  # type: ignore[no-untyped-call]
    return loss.item()


@contextmanager
def rough_weights(model: nn.Module, *, on: bool) -> Iterator[None]:
    """While inside, matrices are rounded to four levels per sixteen weights; gradients fall on the weights restored after."""
    kept = (
        [(p, p.detach().clone()) for p in model.parameters() if p.ndim > 1 and p.numel() > 4096]
        if on
        else []
    )
    for parameter, exact in kept:
        parameter.data.copy_(rounded(exact))
    yield
    for parameter, exact in kept:
        parameter.data.copy_(exact)


def rounded(weights: Tensor, levels: int = 4, block: int = 16) -> Tensor:
    """Each block rounded to evenly spaced levels between its least and its greatest weight."""
    blocks = weights.reshape(-1, block)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (levels - 1)).clamp_min(1e-12)
    return (((blocks - low) / step).round() * step + low).reshape(weights.shape)


class Balance:
    """Keeps all experts in use without a loss term: those used too seldom get a higher correction bias."""

    def __init__(self, model: nn.Module, rate: float = 1e-3) -> None:
        self.gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
        self.counts = [torch.zeros_like(gate.e_score_correction_bias) for gate in self.gates]
        self.recent = [torch.zeros_like(count) for count in self.counts]
        self.rate = rate
        for index, gate in enumerate(self.gates):
            gate.register_forward_hook(
                lambda _, __, output, index=index: self.see(index, output[2])
            )

    def see(self, index: int, experts: Tensor) -> None:
        self.counts[index] += torch.bincount(experts.flatten(), minlength=len(self.counts[index]))

    def adjust(self) -> None:
        for gate, count, recent in zip(self.gates, self.counts, self.recent, strict=True):
            gate.e_score_correction_bias += self.rate * torch.sign(count.mean() - count)
            recent.mul_(0.98).add_(count)
            count.zero_()

    def shares(self) -> list[list[float]]:
        """How much of the recent work each expert of each layer did."""
        return [(recent / recent.sum()).tolist() for recent in self.recent]


def chat_batches(
    tokenizer: TinyTokenizer,
    seed: int,
    tokens: int,
    source: Callable[[int], Iterator[Conversation]] = conversations,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Conversations of about equal length side by side, so that hardly anything is padded."""
    rng = Random(seed + 1)
    stream = source(seed + 2)
    while True:
        pool = sorted((tokenizer.chat(next(stream), rng) for _ in range(400)), key=len)
        batches, batch = [], list[Text]()
        for text in pool:
            if batch and (len(batch) + 1) * len(text) > tokens:
                batches.append(batch)
                batch = []
            batch.append(text)
        batches.append(batch)
        rng.shuffle(batches)
        for batch in batches:
            yield padded(batch)


def code_batches(
    tokenizer: TinyTokenizer, seed: int, tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of source code, each token weighing the same."""
    pieces = code_pieces(seed + 3)
    length = 384
    while True:
        batch = list[Text]()
        while len(batch) < tokens // length:
            text = tokenizer.plain(next(pieces))[: length + 1]
            if len(text) > length // 2:
                batch.append(text)
        yield padded(batch)


def padded(batch: list[Text]) -> tuple[Tensor, Tensor]:
    """Token ids and weights as rectangles; what is padded weighs nothing and nothing before it sees it."""
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    weights = torch.zeros(len(batch), longest)
    for row, text in enumerate(batch):
        ids[row, : len(text)] = torch.tensor(text.ids)
        weights[row, : len(text)] = torch.tensor(text.weights)
    return ids, weights


def save(model: Glm4MoeForCausalLM, tokenizer: TinyTokenizer, folder: Path) -> None:
    """Write weights (BF16, the routers' bias in F32 as on the hub), configurations, tokenizer and template."""
    model.cpu()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config.update(  # type: ignore[no-untyped-call]
        temperature=1.0,
        do_sample=True,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save(folder)


if __name__ == "__main__":
    main()
