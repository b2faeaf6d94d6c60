"""Tensor parallelism: several processes that compute one model together, each with a part of it.

A transform of a model that was built from a rank's part of the configuration (shard.py) and filled with its part of the
weights.  Projections to queries, keys and values, gate and up are cut by rows, those back to the stream by columns, so
that what they give is summed over ranks: one sum for attention, one for the feed-forward.  The output projection is cut
by rows and gathered; the embedding is whole on every rank, for it is only looked up, and where its dtype is the model's
it is mapped: one copy for all ranks of a machine, and only the rows that were asked for.

Every rank runs the same program over its own heads, with hash tables, policies and caches of their own; in a server one
of them leads the others through it (server/leader.py).  Evictions follow from positions and keys, so nothing has to be
agreed on, with two exceptions (`Together`).  Ranks of one kind of machine compute the same bits from the same numbers,
which is what keeps copies of a KV head alike.

This is the only module that imports torch.distributed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .cache import MAX_POSITION, CacheRows, KVCache
from .config import ModelConfig
from .errors import ConfigError, RankError
from .eviction import EvictionPolicy
from .fused import FusedLayer
from .model import Layer, Transformer
from .shard import Team, output_rows
from .slots import LayerCache, LayerRows, Span

TIMEOUT = timedelta(seconds=120)  # for a rank that lives and says nothing; a dead one is noticed at once
SECONDS_TO_ASK = 5.0  # that whoever keeps the store has to answer, once something has gone wrong


@contextmanager
def connected(timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """The team of processes that torchrun, or whoever sets its environment variables, has started.

    Raises RankError where they do not find each other, and later, from whatever waits for a rank that is gone.
    """
    with _watching():
        store, rank, ranks = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        if torch.cuda.is_available():
            torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=rank))  # one for each
        kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(kinds, store=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        yield Ranks(rank, ranks, store=PrefixStore("minillm", store))
        with suppress(RuntimeError):  # all was said and done
            dist.barrier()
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks(Team):
    """A team that talks.  All of its processes must call the same methods in the same order."""

    store: Store = field(kw_only=True)
    places: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)  # see sum_
    groups: list[dist.ProcessGroup] = field(default_factory=list, repr=False, compare=False)  # sharers of a KV head

    def part_of(self, config: ModelConfig) -> ModelConfig:
        """As in one process.  The ranks that share a KV head meet, which takes memory, before that is planned."""
        part = super().part_of(config)
        self.gather(torch.zeros(1), 0, self._sharers(part))
        return part

    def join_(self, model: Transformer) -> Transformer:
        """Sum and gather what parts of layers give, and let policies hear what they need of other ranks."""
        for layer in model.model.layers:
            if isinstance(layer, FusedLayer):
                self._sums_(layer.o, layer.down)
            else:
                assert isinstance(layer, Layer)
                self._sums_(layer.self_attn.o_proj, layer.mlp.down_proj)
        self._join_head_(model)
        sharers = self._sharers(model.config)

        def introduce(model: Transformer, inputs: tuple[Tensor, Span, KVCache | CacheRows]) -> None:
            held: list[LayerCache] = []
            for layer in inputs[2].layers:
                held += (layer.whole, *layer.views) if isinstance(layer, LayerRows) else (layer,)
            if must_hear(held[0].policy, sharers):
                for one in held:
                    if not isinstance(one.policy, Together):
                        one.policy = Together(one.policy, self, sharers, model.config.query_group)

        model.register_forward_pre_hook(introduce)
        return model

    def sum_(self, y: Tensor, sharers: dist.ProcessGroup | None = None) -> Tensor:
        """y, to which every rank (or sharer of a KV head) has added its own.

        Always in the same memory: threads of torch's let go of what they were given late, and how much they hold
        meanwhile would depend on the scheduler.
        """
        exchanged = self._place(y, y.numel()).view(y.shape).copy_(y)
        with _watching():
            dist.all_reduce(exchanged, group=sharers)
        return y.copy_(exchanged)

    def sum_alike_(self, y: Tensor) -> Tensor:
        """`sum_`, in which no number's rounding depends on its place in y, nor on how much of y there is.

        So a row of a batch does not feel its neighbours.  gloo sends sums around in a ring that begins at another rank
        for every part of y: of three ranks or more each gets all that belongs to one part instead, adds it up in the
        order of ranks, and tells the others.
        """
        if self.ranks == 2 or y.device.type != "cpu":
            return self.sum_(y)
        width = -(-y.numel() // self.ranks)
        sent, received = self._place(y, 2 * width * self.ranks).view(2, self.ranks, width)
        sent.view(-1)[: y.numel()] = y.flatten()
        with _watching():
            dist.all_to_all_single(received, sent)
            total = received[0]  # [width], of this rank's part
            for other in received[1:]:
                total += other
            dist.all_to_all_single(received, sent.copy_(total))
        return y.copy_(received.view(-1)[: y.numel()].view(y.shape))

    def gather(self, x: Tensor, dim: int, sharers: dist.ProcessGroup | None = None) -> Tensor:
        """What all ranks (or the sharers of a KV head) have, in their order, side by side along a dimension.

        A sum with zeros, for gloo's own gathering allocates as much again in its threads.
        """
        shape = list(x.shape)
        shape[dim] *= dist.get_world_size(sharers)
        found = x.new_zeros(shape)
        found.narrow(dim, dist.get_rank(sharers) * x.shape[dim], x.shape[dim]).copy_(x)
        return self.sum_(found, sharers)

    def agreed(self, facts: Tensor) -> Tensor:
        """What rank 0 says: on all others `facts` is overwritten."""
        with _watching():
            dist.broadcast(facts, 0)
        return facts

    def most(self, number: int) -> int:
        """The largest number that any rank says."""
        return int(self.gather(torch.tensor([number]), 0).max())

    def count(self, cache: KVCache) -> tuple[Tensor, int | None]:
        """As in one process."""
        live, found = super().count(cache)
        oldest = -self.most(-(MAX_POSITION if found is None else found))
        return self.gather(live, 1), None if oldest == MAX_POSITION else oldest

    def shared(self, pieces: Iterator[str]) -> Iterator[str]:
        """Pieces of text that only rank 0 can read, on every rank."""
        while True:
            text = next(pieces, None) if self.rank == 0 else None
            raw = b"" if text is None else text.encode()  # no piece is empty
            length = int(self.agreed(torch.tensor([len(raw)])))
            if length == 0:
                return
            held = torch.frombuffer(bytearray(raw or length), dtype=torch.uint8)  # [bytes]
            yield bytes(self.agreed(held).tolist()).decode()

    def first_to_speak(self) -> bool:
        """Whether no other rank has told the user yet what went wrong: one message is enough.

        The store may be kept by rank 0, and rank 0 be what is gone, or hung: then rank 1 speaks.
        """
        answers: list[int] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(int(self.store.add("spoken", 1)))

        asking = Thread(target=ask, daemon=True)  # whom torch lets wait for ever
        asking.start()
        asking.join(SECONDS_TO_ASK)
        return answers == [1] if answers else self.rank == 1

    def _sums_(self, *parts: nn.Module) -> None:
        """Whatever these layers give is summed over ranks."""
        for part in parts:
            part.register_forward_hook(lambda part, inputs, y: self.sum_alike_(y))  # noqa: ARG005

    def _place(self, y: Tensor, numbers: int) -> Tensor:
        """Room for so many numbers like those of y."""
        place, nbytes = self.places.get(y.device), numbers * y.itemsize
        if place is None or place.nbytes < nbytes:
            place = self.places[y.device] = torch.empty(nbytes, dtype=torch.uint8, device=y.device)
        return place[:nbytes].view(y.dtype)

    def _join_head_(self, model: Transformer) -> None:
        """Let every rank compute the logits of its rows of the vocabulary, and know all of them."""
        config, head, rows = model.config, model.lm_head, output_rows(model.config)
        if rows == config.vocab_size:
            return
        if head is None:  # rows of the embedding, which is whole
            own = model.model.embed_tokens.weight[self.rank * rows :][:rows]  # [V / ranks, hidden]
            head = model.lm_head = nn.Linear(config.hidden_size, rows, bias=False, device="meta")
            head.weight = nn.Parameter(own, requires_grad=False)
        if head.out_features == rows:  # a shared embedding that was quantised for the output is whole
            head.register_forward_hook(lambda head, inputs, y: self.gather(y, -1))  # noqa: ARG005

    def _sharers(self, config: ModelConfig) -> dist.ProcessGroup | None:
        """The ranks that hold the same KV head as this one; None where there is no other."""
        copies = self.ranks // config.whole.num_key_value_heads
        if copies < 2:
            return None
        if len(self.groups) * copies != self.ranks:
            starts = range(0, self.ranks, copies)
            self.groups[:] = [dist.new_group(list(range(at, at + copies)), timeout=TIMEOUT) for at in starts]
        return self.groups[self.rank // copies]


def must_hear(policy: EvictionPolicy, sharers: object) -> bool:
    """Whether a policy decides by what is on other ranks: attention of all heads, or queries of a split group."""
    asks = policy.needs_token or policy.needs_queries or policy.needs_attention
    return policy.mixes_heads or (sharers is not None and asks)


class Together(EvictionPolicy):
    """A policy that is shown what it needs of other ranks, and decides on all of them what it would in one process.

    The queries of a group that is split over ranks are gathered before it sees them, or the weights of their attention;
    for a policy that mixes heads, the weights of the last query in all heads.  It gets the very numbers, in the very
    order, that it would get in one process, so that ranks with the same KV head keep the same tokens.
    """

    def __init__(self, policy: EvictionPolicy, ranks: Ranks, sharers: dist.ProcessGroup | None, group: int) -> None:
        """group: query heads of a KV head in the whole model."""
        self._policy, self._ranks, self._sharers, self._group = policy, ranks, sharers, group
        for flag in ("name", "needs_keys", "needs_attention", "needs_token", "mixes_heads"):
            setattr(self, flag, getattr(policy, flag))

    @property
    def needs_queries(self) -> bool:
        """As the policy says."""
        return self._policy.needs_queries

    def tag_(self, layer: LayerCache, keys: Tensor, due: Tensor) -> dict[str, Tensor]:
        """Keys are here."""
        return self._policy.tag_(layer, keys, due)

    def settle_(self, layer: LayerCache, due: Tensor) -> None:
        """Keys are here."""
        self._policy.settle_(layer, due)

    def observe_queries_(self, layer: LayerCache, queries: Tensor, positions: Tensor) -> None:
        """Show it the queries of the whole group, [B, H, n, D] of all sharers."""
        self._policy.observe_queries_(layer, self._of_group(queries, 1), positions)

    def observe_attention_(self, layer: LayerCache, weights: Tensor, positions: Tensor) -> None:
        """Show it the weights of the whole group, or the last query's in all heads of the model."""
        if self.mixes_heads:
            last = self._ranks.gather(weights[:, :, :, -1:].flatten(1, 2), 1)  # [B, all query heads, 1, S']
            weights, positions = last.unflatten(1, (-1, self._group)), positions[:, -1:]  # [B, all Hkv, G, 1, S']
        else:
            weights = self._of_group(weights, 2)  # [B, Hkv, G, n, S']
        self._policy.observe_attention_(layer, weights, positions)

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:
        """What it gives every slot, having seen the queries of the whole group: [B, Hkv, S]."""
        query = self._of_group(query, 1) if self.needs_token else query  # [B, H, D] of all sharers
        return self._policy.score(layer, query, key, now)

    def _of_group(self, x: Tensor, dim: int) -> Tensor:
        return x if self._sharers is None else self._ranks.gather(x, dim, self._sharers)


@contextmanager
def _watching() -> Iterator[None]:
    """Turn what torch.distributed raises into one line."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"no other process to work with ({error}): start with torchrun") from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
        raise RankError(
            f"another process that computes this model is gone or does not answer ({reason}): see what it said, and "
            "start all of them again"
        ) from error
