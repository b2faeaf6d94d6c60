"""Train a small Llama on text files with this package's own network, and export it as a Hugging Face-style folder.

    python tools/train.py runs/demo --data stories.txt@12 --data books/ --keep-mb 12 --minutes 70 --export weights/minillm-demo

A run lives in its folder: recipe.json (what was asked for), tokenizer.json, checkpoint.safetensors (weights, optimiser and
progress in one file, replaced atomically) and log.jsonl.  `--resume` takes it up where the last checkpoint left it: batches
are a pure function of (seed, step), so with --steps the run ends bit for bit as if it had never been interrupted.

How it learns a lot in one CPU hour: bfloat16 gradients of float32 master weights; Muon for the matrices and AdamW for the
rest; at the start an embedding of RMS 0.14 and projections into the residual stream at a fifth of the usual scale, so that
the identity of a token dominates the stream (attention to earlier tokens is then learned at once instead of after thousands of steps).
On a CPU every worker thread has its own rows and runs on one core: threads that meet at a barrier in every operator stop
dead when another process takes one of the cores.

This file knows nothing of budgets and eviction: training attends to everything.  Whoever mixes in other data writes another
`batch(step)`; nothing else here looks at text.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F

from minillm.cache import KVCache, LayerCache, Span
from minillm.config import ModelConfig
from minillm.errors import CheckpointError, ConfigError, MinillmError
from minillm.eviction import Retention
from minillm.generate import generate
from minillm.loader import save_checkpoint
from minillm.model import Transformer
from minillm.policies.full import Full
from minillm.sampling import Sampler, SamplingParams

BOS, EOS = "<s>", "</s>"
BREAK = re.compile(r"<\|endoftext\|>|^#+ .*$|^-{3,}$", re.MULTILINE)  # where one document ends: a separator or a heading
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "…": "...", "_": None, "*": None})
SHORTEST = 100  # characters: anything shorter is a title or a remnant
HELD_OUT = 0.05  # of the documents of every source
HELD_OUT_ROWS = 64  # at most, per source, when measuring
DECAY = 0.5  # the share of the run in which the learning rate falls to zero
WARM_UP = 20  # steps
RATES = {"muon": 0.02, "embedding": 0.01, "head": 0.003, "norm": 0.005}
SAMPLING = {"temperature": 0.7, "top_p": 0.95}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run does; written to recipe.json, and a resumed run must ask for the same."""

    data: tuple[str, ...]
    keep_mb: float
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    context: int
    tied: bool
    batch: int
    seed: int
    minutes: float
    steps: int

    def config(self, vocab_size: int, bos: int, eos: int) -> ModelConfig:
        """The Llama of this shape."""
        if self.hidden % self.heads or self.heads % self.kv_heads or self.hidden // self.heads % 2:
            raise ConfigError(
                f"--hidden {self.hidden}, --heads {self.heads} and --kv-heads {self.kv_heads} do not divide evenly (and "
                f"hidden / heads must be even); try 256, 8 and 4"
            )
        return ModelConfig.from_hf(
            {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "vocab_size": vocab_size, "hidden_size": self.hidden, "intermediate_size": self.intermediate,
                "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads, "head_dim": self.hidden // self.heads,
                "max_position_embeddings": self.context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
                "tie_word_embeddings": self.tied, "bos_token_id": bos, "eos_token_id": eos,
            }
        )  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The documents of one --data argument, the last of them held out."""

    name: str
    times: int
    train: list[str]
    held_out: list[str]


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, or of every .txt and .md file below a folder, without typographic frills."""
    files = sorted(f for f in path.rglob("*") if f.suffix in {".txt", ".md"}) if path.is_dir() else [path]
    if not files or not path.exists():
        raise ConfigError(f"--data {path}: no text there; give a text file or a folder with .txt or .md files")
    documents = []
    for file in files:
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"--data {file} is not UTF-8 (byte {error.start}); convert it first") from None
        for part in BREAK.split(text):
            lines = (" ".join(line.split()) for line in part.translate(PLAIN).splitlines())
            document = "\n".join(line for line in lines if line)
            if len(document) >= SHORTEST:
                documents.append(document)
    return documents


def simplest(documents: list[str], model: Sequence[str], megabytes: float) -> list[str]:
    """The documents, in their order, whose words are on average the least surprising after reading `model`.

    Simple language is learned soonest.  The measure is the mean of -log frequency of a document's words in `model`.
    """
    words = re.compile(r"[a-z']+")
    counts = Counter(word for text in model for word in words.findall(text.lower()))
    total = counts.total() + 1

    def surprise(document: str) -> float:
        found = words.findall(document.lower())
        return sum(-math.log((counts[word] + 0.1) / total) for word in found) / max(len(found), 1)

    room, kept = megabytes * 1e6, set()
    for index in sorted(range(len(documents)), key=lambda index: surprise(documents[index])):
        room -= len(documents[index].encode())
        if room < 0:
            break
        kept.add(index)
    return [document for index, document in enumerate(documents) if index in kept]


def read_sources(recipe: Recipe) -> list[Source]:
    """Read every `PATH[@TIMES]`; all but the first are cut to the `keep_mb` megabytes that read most like the first."""
    sources: list[Source] = []
    for argument in recipe.data:
        path, _, times = argument.partition("@")
        if times and not (times.isdigit() and int(times) > 0):
            raise ConfigError(f"--data {argument}: after @ stands how often to repeat it, a whole number from 1")
        documents = read_documents(Path(path))
        if sources and recipe.keep_mb:
            documents = simplest(documents, sources[0].train, recipe.keep_mb)
        held = max(1, round(len(documents) * HELD_OUT))
        if len(documents) <= held:
            raise ConfigError(
                f"--data {path} has {len(documents)} documents of {SHORTEST} characters or more; at least 2 are needed, "
                f"one of them to measure on: split it with headings ('# ...') or lines of <|endoftext|>"
            )
        sources.append(Source(Path(path).stem, int(times or 1), documents[:-held], documents[-held:]))
    return sources


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE: every text can be written in it, and digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[Tensor]:
    """Each document as int32 ids: BOS, its tokens, EOS."""
    eos = tokenizer.token_to_id(EOS)
    return [torch.tensor([*each.ids, eos], dtype=torch.int32) for each in tokenizer.encode_batch(documents)]


class PackedText:
    """Rows of `context + 1` tokens cut from shuffled documents that follow one another; every epoch shuffles anew.

    Stateless to the outside: row n is the same whenever it is asked for.
    """

    def __init__(self, documents: list[Tensor], context: int, seed: int) -> None:
        self.documents, self.context, self.seed = documents, context, seed
        self.tokens = sum(len(document) for document in documents)
        self.rows = (self.tokens - 1) // context
        if not self.rows:
            raise ConfigError(f"the text has {self.tokens:,} tokens, less than one row of --context {context} + 1")
        self._epoch, self._stream = -1, torch.empty(0)

    def row(self, index: int) -> Tensor:
        """Row `index`, counted through all epochs: [context + 1] int64."""
        epoch, index = divmod(index, self.rows)
        if epoch != self._epoch:
            order = list(range(len(self.documents)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._epoch, self._stream = epoch, torch.cat([self.documents[at] for at in order])  # [tokens]
        start = index * self.context
        return self._stream[start : start + self.context + 1].long()  # [context + 1]

    def batch(self, step: int, rows: int) -> Tensor:
        """The rows of a step: [rows, context + 1] int64."""
        return torch.stack([self.row(step * rows + index) for index in range(rows)])  # [rows, context + 1]


def causal(cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:  # noqa: ARG001
    """Attention for training, in the place of the bounded one: q [B, H, T, D] over all of k, v [B, Hkv, T, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))  # [B, H, T, D]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, D]


def initialise_(model: Transformer) -> None:
    """Embedding RMS 0.14, matrices 1/sqrt(fan in), the two projections back into the stream a fifth of that."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            continue
        if name == "lm_head.weight":
            torch.nn.init.zeros_(weight)
        else:
            scale = 0.14 if "embed_tokens" in name else weight.shape[1] ** -0.5
            torch.nn.init.normal_(weight, std=scale / 5 if name.endswith(("o_proj.weight", "down_proj.weight")) else scale)


def make_optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024: momentum, orthogonalised) for the matrices of the layers, AdamW for everything else."""
    groups: dict[str, list[Tensor]] = {kind: [] for kind in RATES}
    for name, weight in model.named_parameters():
        kind = "norm" if weight.ndim == 1 else "embedding" if "embed" in name else "head" if "lm_head" in name else "muon"
        groups[kind].append(weight)
    rest = [{"params": groups[kind], "lr": RATES[kind]} for kind in ("embedding", "head", "norm")]
    return [
        torch.optim.Muon(groups["muon"], lr=RATES["muon"], weight_decay=0.1),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Trainer:
    """Master weights in float32, a bfloat16 copy that computes gradients, and the optimisers."""

    def __init__(self, recipe: Recipe, config: ModelConfig, device: torch.device, workers: int) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.config, self.device = recipe, config, device
        self.model = Transformer(config)
        initialise_(self.model)
        self.model.to(device)
        self.fast = copy.deepcopy(self.model).bfloat16()
        for layer in self.fast.model.layers:
            layer.self_attn.attend = causal
        self.optimizers = make_optimizers(self.model)
        self.unused = KVCache(config, Full(), Retention(slots=1, sinks=0, recent=0, evict_every=1))
        self.workers, self.pool = workers, ThreadPoolExecutor(workers)
        self.micro = recipe.batch if device.type == "cuda" else max(1, min(recipe.batch // workers, 1024 // recipe.context))
        self.step, self.seconds = 0, 0.0

    def loss(self, rows: Tensor) -> Tensor:
        """Summed nats of predicting rows [B, T + 1] from their beginnings."""
        tokens, targets = rows[:, :-1], rows[:, 1:]  # [B, T]
        host = torch.arange(tokens.shape[1])[None]  # [1, T]
        span = Span(host.to(self.device), host, (0,), tokens.shape[1])
        logits = self.fast.logits(self.fast(tokens, span, self.unused))  # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def _gradients(self, rows: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        loss = self.loss(rows.to(self.device))
        return loss.item(), torch.autograd.grad(loss / (self.recipe.batch * self.recipe.context), list(self.fast.parameters()))

    @torch.no_grad()
    def _refresh(self) -> None:
        for copied, weight in zip(self.fast.parameters(), self.model.parameters(), strict=True):
            copied.copy_(weight)

    def train_step(self, rows: Tensor, rate: float) -> float:
        """One update from rows [batch, context + 1] at `rate` times the full learning rates; returns nats per token."""
        self._refresh()
        weights, total = list(self.model.parameters()), 0.0
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        for loss, gradients in self.pool.map(self._gradients, rows.split(self.micro)):  # in order: sums repeat exactly
            total += loss
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad += gradient  # type: ignore[operator]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("full_lr", group["lr"])
                group["lr"] = group["full_lr"] * rate
            optimizer.step()
        self.step += 1
        return total / (rows.shape[0] * (rows.shape[1] - 1))

    @torch.no_grad()
    def measure(self, documents: list[Tensor]) -> tuple[float, int]:
        """Nats per token over the first rows of held-out documents, and how many tokens that were."""
        self._refresh()
        stream = torch.cat(documents).long()[: HELD_OUT_ROWS * self.recipe.context + 1]  # [n]
        rows = [stream[at : at + self.recipe.context + 1][None] for at in range(0, len(stream) - 1, self.recipe.context)]
        return sum(self.pool.map(self._nats, rows)) / (len(stream) - 1), len(stream) - 1

    def _nats(self, rows: Tensor) -> float:
        with torch.no_grad():
            return self.loss(rows.to(self.device)).item()

    def save(self, file: Path) -> None:
        """Write the whole state beside `file`, then put it in its place."""
        tensors = {f"model.{name}": weight.detach().contiguous() for name, weight in self.model.named_parameters()}
        for which, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{which}.{index}.{key}": value.contiguous() for key, value in state.items()}
        temporary = file.with_suffix(".tmp")
        progress = {"step": str(self.step), "seconds": repr(self.seconds)}
        safetensors.torch.save_file(tensors, temporary, metadata=progress)
        temporary.replace(file)

    @torch.no_grad()
    def restore(self, file: Path) -> None:
        """Take up the state of `file`, exactly."""
        if not file.exists():
            raise CheckpointError(f"--resume: there is no {file} to go on from; start without --resume")
        with safe_open(file, "pt") as stored:
            progress = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        for name, weight in self.model.named_parameters():
            weight.copy_(tensors.pop(f"model.{name}"))
        for which, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                owner, index, key = name.split(".")
                if int(owner) == which:
                    state.setdefault(int(index), {})[key] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.step, self.seconds = int(progress["step"]), float(progress["seconds"])


@dataclass
class Run:
    """One training run in its folder."""

    folder: Path
    recipe: Recipe
    tokenizer: Tokenizer
    trainer: Trainer
    rows: PackedText
    held_out: dict[str, list[Tensor]]
    bytes_per_token: dict[str, float]
    command: str
    about_data: str

    def fraction(self) -> float:
        """How much of the run is done, by steps or else by time."""
        trainer, recipe = self.trainer, self.recipe
        return trainer.step / recipe.steps if recipe.steps else trainer.seconds / (60 * recipe.minutes)

    def go(self, export: Path, every: float) -> None:
        """Train to the end; a checkpoint and an export every `every` minutes, at the end, and when interrupted."""
        trainer, recipe = self.trainer, self.recipe
        began, before, saved = time.monotonic(), trainer.seconds, time.monotonic()
        smooth, first_step = 0.0, trainer.step
        try:
            while (done := self.fraction()) < 1:
                rate = min(1.0, (trainer.step + 1) / WARM_UP, (1 - done) / DECAY)
                loss = trainer.train_step(self.rows.batch(trainer.step, recipe.batch), rate)
                trainer.seconds = before + time.monotonic() - began
                smooth = loss if trainer.step == first_step + 1 else 0.95 * smooth + 0.05 * loss
                if trainer.step % 10 == 0:
                    speed = (trainer.step - first_step) * recipe.batch * recipe.context / (trainer.seconds - before)
                    left = trainer.seconds * (1 - done) / done / 60 if done else 0.0
                    self.log(step=trainer.step, loss=round(smooth, 4), tokens_per_second=round(speed), minutes_left=round(left, 1))
                if time.monotonic() - saved > 60 * every and self.fraction() < 1:
                    self.checkpoint(export)
                    saved = time.monotonic()
        finally:
            self.checkpoint(export)

    def log(self, **facts: float) -> None:
        """One line on stderr, and in log.jsonl."""
        print("  ".join(f"{key} {value}" for key, value in facts.items()), file=sys.stderr, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def checkpoint(self, export: Path) -> None:
        """Save the state, measure on held-out text, export."""
        self.trainer.save(self.folder / "checkpoint.safetensors")
        losses = {}
        for name, documents in self.held_out.items():
            losses[name], _ = self.trainer.measure(documents)
            bits = losses[name] / self.bytes_per_token[name] / math.log(2)
            self.log(**{f"held-out {name}: nats_per_token": round(losses[name], 4), "bits_per_byte": round(bits, 4)})
        self.export(export, losses)

    def export(self, folder: Path, losses: dict[str, float]) -> None:
        """Write everything that transformers and minillm need, and the model card."""
        config = self.trainer.config
        save_checkpoint(folder, self.trainer.model, config, dtype=torch.bfloat16)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "generation_config.json", {
            "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_ids[0], "do_sample": True, **SAMPLING,
        })  # fmt: skip
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "add_bos_token": True,
            "model_max_length": self.recipe.context, "clean_up_tokenization_spaces": False,
        })  # fmt: skip
        (folder / "README.md").write_text(self.card(folder.name, losses), "utf-8")

    def card(self, name: str, losses: dict[str, float]) -> str:
        """The model card, with the numbers of this run."""
        trainer, config, recipe = self.trainer, self.trainer.config, self.recipe
        parameters = sum(weight.numel() for weight in trainer.model.parameters())
        tokens = trainer.step * recipe.batch * recipe.context
        table = "\n".join(
            f"| {source} | {loss:.3f} | {loss / self.bytes_per_token[source] / math.log(2):.3f} |"
            for source, loss in losses.items()
        )
        device = "one GPU" if trainer.device.type == "cuda" else f"{trainer.workers} CPU threads"
        return f"""---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A small English language model in the shape of Llama, trained from nothing by minillm's `tools/train.py`.

| | |
|---|---|
| parameters | {parameters:,} |
| shape | {config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} query heads over \
{config.num_key_value_heads} KV heads of {config.head_dim}, feed-forward {config.intermediate_size} |
| vocabulary | {config.vocab_size} byte-level BPE tokens{", embedding and output tied" if recipe.tied else ""} |
| trained context | {recipe.context} tokens |
| weights | bfloat16 |
| trained on | {tokens:,} tokens ({tokens / self.rows.tokens:.1f} passes over the mixture) |
| time | {trainer.seconds / 3600:.2f} hours on {device} |

## Data

{self.about_data}

One pass of the mixture has {self.rows.tokens:,} tokens. The last {HELD_OUT:.0%} of the documents of every source were held out.

| held-out text | nats per token | bits per byte |
|---|---|---|
{table}

## Command

```
python tools/train.py {self.command}
```

## A sample

Prompt "Once upon a time", temperature {SAMPLING["temperature"]}, top-p {SAMPLING["top_p"]}, seed 0, as it came:

{self.sample("Once upon a time")}

## Limits

It knows little beyond how simple stories sound: it contradicts itself, states no facts that can be relied on, follows no instructions, and can
repeat phrases of its training text. It is here to be watched while its memory is bounded, not to be used.
"""

    def sample(self, prompt: str) -> str:
        """What the model says after `prompt`, as a quotation."""
        model, config = self.trainer.model, self.trainer.config
        ids = self.tokenizer.encode(prompt).ids
        cache = KVCache(config, Full(), Retention.of(self.recipe.context), device=self.trainer.device)
        limit = min(256, self.recipe.context - len(ids))
        sampler = Sampler(
            SamplingParams(**SAMPLING, seed=0), config.vocab_size, config.vocab_size, config.eos_token_ids, self.trainer.device
        )
        samples = generate(model, cache, torch.tensor(ids), sampler, max_tokens=limit)
        text = self.tokenizer.decode([*ids, *(sample.token_id for sample in samples)])
        return "\n".join(f"> {line}" for line in text.splitlines() for line in (line, ""))


def write_json(file: Path, content: dict[str, object]) -> None:
    """Two-space JSON with a final newline."""
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def prepare(arguments: argparse.Namespace, recipe: Recipe) -> Run:
    """Read the text, train or load the tokenizer, build or restore the trainer."""
    folder: Path = arguments.run
    asked = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}
    if arguments.resume:
        file = folder / "recipe.json"
        if not file.exists():
            raise CheckpointError(f"--resume: {folder} holds no run; start it without --resume")
        before = json.loads(file.read_text("utf-8"))
        if changed := [f"{key} ({before.get(key)} -> {asked[key]})" for key in asked if before.get(key) != asked[key]]:
            raise ConfigError(f"--resume: the run was started with other options: {', '.join(changed)}; repeat the old ones")
    elif (folder / "checkpoint.safetensors").exists():
        raise ConfigError(f"{folder} already holds a run; add --resume to go on with it, or name another folder")
    recipe.config(recipe.vocab, 0, 1)  # a wrong shape is better known before the text is read
    sources = read_sources(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.tokenizer or arguments.resume:
        file = arguments.tokenizer or folder / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(f"there is no tokenizer {file}; leave --tokenizer out to train one")
        tokenizer = Tokenizer.from_file(str(file))
        if None in (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)):
            raise ConfigError(f"the tokenizer {file} has no {BOS} and {EOS}; use one that this program trained")
    else:
        tokenizer = train_tokenizer((text for source in sources for text in source.train * source.times), recipe.vocab)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "recipe.json", asked)

    documents = [ids for source in sources for ids in encode(tokenizer, source.train) * source.times]
    rows = PackedText(documents, recipe.context, recipe.seed)
    held_out = {source.name: encode(tokenizer, source.held_out) for source in sources}
    ratio = {
        source.name: sum(len(text.encode()) for text in source.held_out) / sum(map(len, held_out[source.name]))
        for source in sources
    }
    config = recipe.config(tokenizer.get_vocab_size(), tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS))
    trainer = Trainer(recipe, config, pick_device(arguments.device), arguments.threads)
    if arguments.resume:
        trainer.restore(folder / "checkpoint.safetensors")
    return Run(folder, recipe, tokenizer, trainer, rows, held_out, ratio, arguments.command, arguments.about_data)


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("train.py", description="Train a small Llama on text files and export it.")
    add = parser.add_argument
    add("run", type=Path, help="folder of the run: checkpoint, tokenizer, log")
    add("--data", action="append", required=True, metavar="PATH[@TIMES]", help="text file or folder; repeatable; TIMES per pass")
    add("--keep-mb", type=float, default=0.0, help="of every --data but the first keep the megabytes that read most like the first")
    add("--export", type=Path, help="folder of the finished model (default: RUN/export)")
    add("--tokenizer", type=Path, help="a tokenizer.json made by this program (default: train one)")
    add("--vocab", type=int, default=4096, help="tokens of the tokenizer to train")
    for option, default in (("hidden", 256), ("layers", 5), ("heads", 8), ("kv-heads", 4), ("intermediate", 640)):
        add(f"--{option}", type=int, default=default)
    add("--context", type=int, default=512, help="tokens of a training row")
    add("--batch", type=int, default=16, help="rows per update")
    add("--tied", action="store_true", help="use the embedding as output projection")
    add("--minutes", type=float, default=60.0, help="training time; the learning rate follows it")
    add("--steps", type=int, default=0, help="train this many updates instead of --minutes")
    add("--every", type=float, default=5.0, help="minutes between checkpoints")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on from the last checkpoint of RUN")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=int, default=2, help="CPU workers")
    add("--about-data", default="The texts given with `--data`.", help="origin and licences, for the model card")
    arguments = parser.parse_args(argv)
    for option in ("vocab", "hidden", "layers", "heads", "kv_heads", "intermediate", "context", "batch", "threads"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1")
    if arguments.vocab < 258:
        parser.error(f"--vocab {arguments.vocab} must be at least 258: the 256 bytes, {BOS} and {EOS}")
    if arguments.minutes <= 0 or arguments.every <= 0 or arguments.steps < 0:
        parser.error("--minutes and --every must be above 0, --steps not below")
    arguments.command = " ".join(sys.argv[1:] if argv is None else argv)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Train, export, and return the exit status: 0 done, 2 a mistake of the user, 130 interrupted (and saved)."""
    arguments = parse(argv)
    recipe = Recipe(
        tuple(arguments.data), arguments.keep_mb, arguments.vocab, arguments.hidden, arguments.layers, arguments.heads,
        arguments.kv_heads, arguments.intermediate, arguments.context, arguments.tied, arguments.batch, arguments.seed,
        arguments.minutes, arguments.steps,
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        run = prepare(arguments, recipe)
        run.go(arguments.export or arguments.run / "export", arguments.every)
    except MinillmError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; go on with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
