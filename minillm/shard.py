"""Which part of a model one of several processes holds: numbers and names alone.

A process of `ranks` has a configuration of its own, in which heads and the feed-forward's width are those that it
computes; model, cache and plan are built from it as from any other.  What a process has to know of the others is here
(`Shard`); how they talk is parallel.py's business.

Worked example, 8 query and 2 KV heads on 4 ranks: rank 2 has query heads 4 and 5 and KV head 1, of which rank 3 holds a
copy; its group of 4 query heads is split over the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from .cache import KVCache
    from .config import ModelConfig
    from .model import Transformer

CUT_ROWS = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"})  # of a matrix [N, K]
CUT_COLUMNS = frozenset({"o_proj", "down_proj"})
GROUP = 32  # columns that share a scale at 4 bits, see quant.py


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `ranks` of the model `whole`."""

    rank: int
    ranks: int
    whole: ModelConfig


@dataclass(frozen=True)
class Team:
    """The processes that compute a model together, seen from one of them.

    This one talks to nobody: it is a process on its own, or plans for a rank.  parallel.py has the one that talks.
    """

    rank: int = 0
    ranks: int = 1

    def part_of(self, config: ModelConfig) -> ModelConfig:
        """The configuration of this rank's part; raises ConfigError for a shape that cannot be divided."""
        return config if self.ranks == 1 else divided(config, self.rank, self.ranks)

    def join_(self, model: Transformer) -> Transformer:
        """Make a loaded part work with the others."""
        return model

    def agreed(self, facts: Tensor) -> Tensor:
        """What the first rank says."""
        return facts

    def most(self, number: int) -> int:
        """The largest number that any rank says."""
        return number

    def count(self, cache: KVCache) -> tuple[Tensor, int | None]:
        """`live` of a cache in the KV heads of all ranks, [L, all Hkv] (a copy counts again), and `oldest` in them."""
        return cache.live(), cache.oldest()

    def shared(self, pieces: Iterator[str]) -> Iterator[str]:
        """Text that only the first rank can read."""
        return pieces


ALONE = Team()


def divided(config: ModelConfig, rank: int, ranks: int) -> ModelConfig:
    """Part `rank` of a model.  Where there are fewer KV heads than ranks, several ranks hold the same one."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    complaint = _complaint(config, ranks)
    if complaint is not None:
        possible = [f"{number}" for number in range(2, heads + 1) if _complaint(config, number) is None]
        remedy = f"start {' or '.join(possible)} processes" if possible else "this model runs in one process only"
        raise ConfigError(f"{complaint}: {remedy}")
    return replace(
        config,
        num_attention_heads=heads // ranks,
        num_key_value_heads=max(1, kv_heads // ranks),
        intermediate_size=config.intermediate_size // ranks,
        shard=Shard(rank, ranks, config),
    )


def output_rows(config: ModelConfig) -> int:
    """Rows of the output projection that are computed here: all of them, where they cannot be divided."""
    ranks = 1 if config.shard is None else config.shard.ranks
    return config.vocab_size if config.vocab_size % ranks else config.vocab_size // ranks


def require_groups(config: ModelConfig, scheme: str) -> None:
    """Raise ConfigError where a rank's columns of a 4-bit matrix would begin or end within a group."""
    if config.shard is None or scheme != "int4":
        return
    for what, whole, mine in (
        ("attention's output", config.whole.num_attention_heads, config.num_attention_heads),
        ("the feed-forward", config.whole.intermediate_size, config.intermediate_size),
    ):
        unit = config.head_dim if what.startswith("attention") else 1
        if whole * unit % GROUP == 0 and mine * unit % GROUP:
            raise ConfigError(
                f"int4 has a scale for every {GROUP} columns, and {what} of {whole * unit} columns on "
                f"{config.shard.ranks} ranks gives each {mine * unit}: use fewer processes, or --weights int8"
            )


def cut(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(dimension, start, stop) of this rank's part of a tensor of the checkpoint; None where it takes all of it.

    Codes and scales are cut as the weight that they stand for; the one scale of a row is everybody's.
    """
    if config.shard is None:
        return None
    _, _, module = name.rpartition(".")[0].rpartition(".")
    dim, rank, whole = 0 if module in CUT_ROWS else 1, config.shard.rank, config.whole
    if module not in CUT_ROWS | CUT_COLUMNS or dim >= len(shape) or shape[dim] == 1:
        return None
    first, count, units = rank, 1, config.shard.ranks
    if module in ("k_proj", "v_proj"):
        first, count, units = config.first_kv_head, config.num_key_value_heads, whole.num_key_value_heads
    elif module == "lm_head" and output_rows(config) == config.vocab_size:
        return None
    return dim, shape[dim] * first // units, shape[dim] * (first + count) // units


def is_added_once(config: ModelConfig, name: str) -> bool:
    """Whether a tensor is the bias of a sum over ranks, which the first rank alone adds; it is 0 on this one."""
    module, _, leaf = name.rpartition(".")
    summed = leaf == "bias" and module.rpartition(".")[2] in CUT_COLUMNS
    return summed and config.shard is not None and config.shard.rank > 0


def _complaint(config: ModelConfig, ranks: int) -> str | None:
    """Why a model cannot be divided among so many ranks."""
    kv_heads = config.num_key_value_heads
    for what, number in (
        ("query heads", config.num_attention_heads),
        ("feed-forward channels", config.intermediate_size),
    ):
        if number % ranks:
            return f"{number} {what} cannot be divided among {ranks} ranks"
    if kv_heads % ranks and ranks % kv_heads:
        return f"{kv_heads} KV heads can be neither divided among {ranks} ranks nor copied equally often"
    return None
