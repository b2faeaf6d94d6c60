"""The training step of tools/train.py: a recipe, a model that starts well, its optimisers, and an exact checkpoint.

How it learns a lot in an hour of CPU time: bfloat16 gradients of float32 master weights; Muon for the matrices and
AdamW for the rest; and a start at which the identity of a token dominates the residual stream (embedding RMS 0.14,
projections into the stream at a fifth of the usual scale), so that looking back at earlier tokens is learned early.
What is measured and exported is a running mean of the weights, in which step t counts about as t^3: the learning rate
can then stay constant, and the run may end, or go on, at any moment.

On a CPU every worker thread takes its own rows and computes on one core: threads that meet at a barrier inside every
operator stand still as soon as another process takes one of the cores (measured: 10 to 30 times slower).

Training attends to everything; this file knows nothing of text, of files other than its checkpoint, or of budgets.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from minillm.cache import KVCache
from minillm.config import ModelConfig
from minillm.errors import CheckpointError, ConfigError
from minillm.eviction import Retention
from minillm.model import Transformer
from minillm.policies.full import Full
from minillm.slots import LayerCache, Span

HELD_OUT_ROWS = 64  # at most, per source, when measuring
MICRO_TOKENS = 1024  # that a CPU worker computes at a time: its activations then stay in the caches
RATES = {"muon": 0.02, "embedding": 0.01, "head": 0.003, "norm": 0.005}  # learning rates after the warm-up
WARM_UP = 20  # steps


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes; written to recipe.json, and a resumed run must ask for the same."""

    data: list[str]
    keep_mb: float
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    context: int
    tasks: float
    tied: bool
    batch: int
    seed: int

    def config(self, vocab_size: int, bos: int, eos: int) -> ModelConfig:
        """The Llama of this shape.  Raises ConfigError where it does not divide evenly."""
        if self.hidden % self.heads or self.heads % self.kv_heads or self.hidden // self.heads % 2:
            raise ConfigError(
                f"--hidden {self.hidden}, --heads {self.heads} and --kv-heads {self.kv_heads} do not divide evenly "
                f"(and hidden / heads must be even); try 256, 8 and 4"
            )
        raw = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "bos_token_id": bos,
            "eos_token_id": eos,
        }
        return ModelConfig.from_hf(raw)


def causal(cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, span: Span, q_far: Tensor | None) -> Tensor:  # noqa: ARG001
    """Attention for training, in the place of the bounded one: q [B, H, T, D] over all earlier k, v [B, Hkv, T, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))  # [B, H, T, D]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, D]


def initialise_(model: Transformer) -> None:
    """Embedding RMS 0.14, matrices 1 / sqrt(fan in), projections back into the stream a fifth of that, head zero."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            continue
        scale = 0.14 if "embed_tokens" in name else weight.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= 5
        torch.nn.init.normal_(weight, std=scale)
    if model.lm_head is not None:
        torch.nn.init.zeros_(model.lm_head.weight)


def make_optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024: orthogonalised momentum) for the matrices of the layers, AdamW for everything else."""
    groups: dict[str, list[Tensor]] = {kind: [] for kind in RATES}
    for name, weight in model.named_parameters():
        kind = "head" if "lm_head" in name else "embedding" if "embed_tokens" in name else "muon"
        groups["norm" if weight.ndim == 1 else kind].append(weight)
    rest = [{"params": groups[kind], "lr": RATES[kind]} for kind in ("embedding", "head", "norm")]
    return [
        torch.optim.Muon(groups["muon"], lr=RATES["muon"], weight_decay=0.1),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Trainer:
    """Master weights in float32 and their running mean, a bfloat16 copy that computes gradients, and the optimisers."""

    def __init__(self, recipe: Recipe, config: ModelConfig, device: torch.device, workers: int) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.config, self.device = recipe, config, device
        self.model = Transformer(config)
        initialise_(self.model)
        self.model.to(device)
        self.mean = copy.deepcopy(self.model)
        self.fast = copy.deepcopy(self.model).bfloat16()
        for layer in self.fast.model.layers:
            layer.self_attn.attend = causal
        self.optimizers = make_optimizers(self.model)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.unused = KVCache(config, Full(), Retention(slots=1, sinks=0, recent=0, evict_every=1))
        self.pool = ThreadPoolExecutor(workers)
        self.workers = workers
        self.step, self.seconds = 0, 0.0

    def loss(self, rows: Tensor) -> Tensor:
        """Summed nats of predicting every token of rows [B, T + 1] but the first."""
        tokens, targets = rows[:, :-1], rows[:, 1:]  # [B, T]
        host = torch.arange(tokens.shape[1])[None]  # [1, T]
        span = Span(host.to(self.device), host, (0,), tokens.shape[1])
        logits = self.fast.logits(self.fast(tokens, span, self.unused))  # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def train_step(self, rows: Tensor) -> float:
        """One update from rows [B, T + 1], of any shape; returns nats per token before it."""
        length = rows.shape[1] - 1
        on_cpu = max(1, min(rows.shape[0] // self.workers, MICRO_TOKENS // length))
        micro = on_cpu if self.device.type == "cpu" else rows.shape[0]
        count = rows.shape[0] * length
        self._load_fast(self.model)
        weights, total = list(self.model.parameters()), 0.0
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        for loss, gradients in self.pool.map(
            lambda part: self._gradients(part, count), rows.split(micro)
        ):  # in order: sums repeat exactly
            total += loss
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad += gradient
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (self.step + 1) / WARM_UP)
            optimizer.step()
        self.step += 1
        self._average()
        return total / count

    @torch.no_grad()
    def measure(self, documents: list[Tensor]) -> float:
        """Nats per token of the mean weights over the first rows of held-out documents, every row on its own."""
        self._load_fast(self.mean)
        context = self.recipe.context
        stream = torch.cat(documents).long()[: HELD_OUT_ROWS * context + 1]  # [n]
        rows = [stream[None, at : at + context + 1] for at in range(0, len(stream) - 1, context)]
        return sum(self.pool.map(self._nats, rows)) / (len(stream) - 1)

    @torch.no_grad()
    def _load_fast(self, model: Transformer) -> None:
        for copied, weight in zip(self.fast.parameters(), model.parameters(), strict=True):
            copied.copy_(weight)

    @torch.no_grad()
    def _average(self) -> None:
        """Polynomial-decay averaging (Shamir & Zhang 2013, section 4, eta = 3): step t weighs t (t + 1) (t + 2)."""
        for mean, weight in zip(self.mean.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(weight, 4 / (self.step + 3))

    def _gradients(self, rows: Tensor, count: int) -> tuple[float, tuple[Tensor, ...]]:
        loss = self.loss(rows.to(self.device))
        mean = loss / count
        return loss.item(), torch.autograd.grad(mean, list(self.fast.parameters()))

    @torch.no_grad()
    def _nats(self, rows: Tensor) -> float:
        return self.loss(rows.to(self.device)).item()

    def save(self, file: Path) -> None:
        """Write the whole state beside `file`, then put it in its place."""
        tensors = {}
        for kind, model in (("model", self.model), ("mean", self.mean)):
            tensors |= {f"{kind}.{name}": weight.detach().contiguous() for name, weight in model.named_parameters()}
        for which, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{which}.{index}.{key}": value.contiguous() for key, value in state.items()}
        temporary = file.with_suffix(".tmp")
        safetensors.torch.save_file(tensors, temporary, {"step": str(self.step), "seconds": repr(self.seconds)})
        temporary.replace(file)

    @torch.no_grad()
    def restore(self, file: Path) -> None:
        """Take up the state that `save` wrote, exactly.  Raises CheckpointError if there is none."""
        if not file.exists():
            raise CheckpointError(f"--resume: there is no {file} to go on from; start without --resume")
        with safe_open(file, "pt") as stored:
            progress = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (not a mapping)
        for kind, model in (("model", self.model), ("mean", self.mean)):
            for name, weight in model.named_parameters():
                weight.copy_(tensors.pop(f"{kind}.{name}"))
        for which, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                owner, index, key = name.split(".")
                if int(owner) == which:
                    state.setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.step, self.seconds = int(progress["step"]), float(progress["seconds"])
