"""A trained model as a Hugging Face-style folder with a model card, for tools/train.py."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from train_text import BOS, EOS, HELD_OUT

from minillm.cache import KVCache
from minillm.config import ModelConfig
from minillm.eviction import Retention
from minillm.generate import generate
from minillm.loader import save_checkpoint
from minillm.model import Transformer
from minillm.policies.full import Full
from minillm.sampling import Sampler, SamplingParams

SAMPLING = {"temperature": 0.7, "top_p": 0.95}
PROMPT = "Once upon a time"
CARD = """---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A small English language model in the shape of Llama, trained from nothing by minillm's `tools/train.py`.

| | |
|---|---|
| parameters | {parameters:,} |
| shape | {shape} |
| vocabulary | {vocabulary} |
| trained context | {context} tokens |
| weights | bfloat16 |
| trained on | {seen:,} tokens, {passes:.1f} passes over the mixture |
| time | {hours:.2f} hours on {hardware} |

## Data

{about_data}

One pass has {pass_tokens:,} tokens. The last {held_out:.0%} of the documents of every source were held out.

| held-out text | nats per token | bits per byte |
|---|---|---|
{losses}

## Command

```
python tools/train.py {command}
```

## A sample

Prompt "{prompt}", temperature {temperature}, top-p {top_p}, seed 0, as it came:

{sample}

## Limits

It knows little beyond how its training texts sound: it contradicts itself, states no fact that can be relied on,
follows no instructions, and can repeat phrases it was trained on. It is here to be watched while its memory is bounded,
not to be used.
"""


@dataclass(frozen=True)
class Facts:
    """What the model card says about a run and cannot be read off the model."""

    command: str
    about_data: str
    hardware: str
    tied: bool
    seconds: float
    seen: int
    pass_tokens: int
    losses: dict[str, tuple[float, float]]  # held-out source -> nats per token, bytes per token


def export(folder: Path, model: Transformer, config: ModelConfig, tokenizer: Tokenizer, facts: Facts) -> None:
    """Write the files that transformers and minillm read, and README.md, the model card."""
    save_checkpoint(folder, model, config, dtype=torch.bfloat16)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = config.eos_token_ids[0]
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "do_sample": True, **SAMPLING},
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "add_bos_token": True,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "README.md").write_text(card(folder.name, model, config, tokenizer, facts), "utf-8")


def card(name: str, model: Transformer, config: ModelConfig, tokenizer: Tokenizer, facts: Facts) -> str:
    """The model card, with the numbers of this run."""
    shape = (
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} query heads "
        f"over {config.num_key_value_heads} KV heads of {config.head_dim}, feed-forward {config.intermediate_size}"
    )
    losses = "\n".join(
        f"| {source} | {nats:.3f} | {nats / length / math.log(2):.3f} |"
        for source, (nats, length) in facts.losses.items()
    )
    return CARD.format(
        name=name,
        parameters=sum(weight.numel() for weight in model.parameters()),
        shape=shape,
        vocabulary=f"{config.vocab_size:,} byte-level BPE tokens"
        + (", embedding and output tied" if facts.tied else ""),
        context=config.max_position_embeddings,
        seen=facts.seen,
        passes=facts.seen / facts.pass_tokens,
        hours=facts.seconds / 3600,
        hardware=facts.hardware,
        about_data=facts.about_data,
        pass_tokens=facts.pass_tokens,
        held_out=HELD_OUT,
        losses=losses,
        command=facts.command,
        prompt=PROMPT,
        sample=sample(model, config, tokenizer),
        **SAMPLING,
    )


def sample(model: Transformer, config: ModelConfig, tokenizer: Tokenizer) -> str:
    """What the model says after the prompt with everything in the cache, as a quotation."""
    ids = tokenizer.encode(PROMPT).ids
    device = model.model.norm.weight.device
    cache = KVCache(config, Full(), Retention.of(config.max_position_embeddings), device=device)
    limit = min(256, config.max_position_embeddings - len(ids))
    sampler = Sampler(
        SamplingParams(**SAMPLING, seed=0), config.vocab_size, config.vocab_size, config.eos_token_ids, device
    )
    answer = [drawn.token_id for drawn in generate(model, cache, torch.tensor(ids), sampler, max_tokens=limit)]
    text = tokenizer.decode(ids + answer)
    return "\n>\n".join(f"> {line}" for line in text.splitlines())


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
