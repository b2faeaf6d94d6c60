"""What weights in 8 and 4 bits cost: nats per token, and how often the most likely next token stays the same.

    python tools/weight_quality.py --model weights/minillm-demo --file tinystories.txt [--tokens 20000] [--context 512]

Every scheme reads the same text, in rows of --context tokens from an empty cache, beside the model as it is stored.
`head 4` is int4 with the output projection in 4 bits, too, which is not offered: it shows what its 8 bits are for.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minillm.checkpoint import Checkpoint
from minillm.config import SCHEMES
from minillm.generate import feed
from minillm.model import Transformer
from minillm.quant import GROUP, Bits, Scheme


@dataclass(frozen=True)
class FourBitHead(Scheme):
    """int4 without its exception."""

    def bits(self, module: str, width: int) -> Bits:  # noqa: ARG002
        return 4 if width % GROUP == 0 else 8


def schemes() -> dict[str, Scheme | None]:
    """By the name in the table."""
    return {"as stored": None, **{name: Scheme(name) for name in SCHEMES}, "int4, head 4": FourBitHead("int4")}


@torch.inference_mode()
def log_probabilities(model: Transformer, checkpoint: Checkpoint, rows: Tensor) -> list[Tensor]:
    """For every row [context + 1] the log-probabilities of its tokens but the first: [context, V]."""
    cache = checkpoint.plan(context=rows.shape[1]).allocate(checkpoint.device)
    found = []
    for row in rows:
        cache.reset()
        hidden = torch.cat([hidden for _, hidden in feed(model, cache, row[None, :-1], 256)], 1)  # [1, n, hidden]
        found.append(model.logits(hidden[0]).log_softmax(-1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    stored = Checkpoint.open(args.model, dtype=args.dtype, device="cpu")
    text = args.file.read_text("utf-8")[: 8 * args.tokens]
    ids = torch.tensor(stored.tokenizer.encode(text, bos=True)[: args.tokens], dtype=torch.int32)
    rows = ids[: len(ids) // (args.context + 1) * (args.context + 1)].view(-1, args.context + 1)  # [n, context + 1]
    targets = rows[:, 1:].to(torch.int64)  # [n, context]
    before: list[Tensor] = []
    print(f"{stored.name}, {stored.dtype}, {targets.numel():,} tokens of {args.file.name}")
    print(f"{'weights':<14} {'bytes':>12} {'nats':>8} {'+':>8} {'KL':>9} {'same token':>11}")
    for name, scheme in schemes().items():
        checkpoint = Checkpoint(
            stored.name, stored.folder, stored.config, stored.dtype, stored.device, True, scheme, stored.backend
        )
        found = log_probabilities(checkpoint.load_model(), checkpoint, rows)
        before = before or found
        nats = -torch.stack([log.gather(1, to[:, None]).mean() for log, to in zip(found, targets, strict=True)]).mean()
        base = -torch.stack([log.gather(1, to[:, None]).mean() for log, to in zip(before, targets, strict=True)]).mean()
        pairs = list(zip(before, found, strict=True))
        kl = torch.stack([(a.exp() * (a - b)).sum(1).mean() for a, b in pairs]).mean()
        same = torch.stack([(a.argmax(1) == b.argmax(1)).float().mean() for a, b in pairs]).mean()
        size = checkpoint.weight_bytes()
        print(f"{name:<14} {size:>12,} {nats:>8.4f} {nats - base:>+8.4f} {kl:>9.5f} {same:>10.2%}", flush=True)


if __name__ == "__main__":
    main()
