"""What a budget means: the accepted spellings, the slots and bytes they become, and what is refused."""

from __future__ import annotations

import pytest
import torch

from minillm.budget import Budget, CachePlan
from minillm.errors import BudgetError

from .helpers import tiny_config


@pytest.mark.parametrize(
    ("given", "kind", "amount"),
    [
        ("0.3", "fraction", 0.3),
        (0.3, "fraction", 0.3),
        ("1.0", "fraction", 1.0),
        (1.0, "fraction", 1.0),
        ("1", "tokens", 1),
        (1, "tokens", 1),
        ("2048", "tokens", 2048),
        ("512MiB", "bytes", 512 * 2**20),
        ("1.5 GB", "bytes", 1_500_000_000),
        ("64kib", "bytes", 65536),
        ("100B", "bytes", 100),
        (None, "all", 1.0),
    ],
)
def test_spellings(given: str | float | None, kind: str, amount: float) -> None:
    assert Budget.of(given) == Budget(kind, amount)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", ["0", "0.0", "-1", "-0.5", "3.5", "nan", "inf", "", "lots", "12 apples", "0B", "5TiB", 0, 3.5]
)
def test_what_is_no_budget(given: str | float) -> None:
    with pytest.raises(BudgetError, match="fraction in \\(0, 1\\]"):
        Budget.of(given)


@pytest.mark.parametrize(
    ("budget", "slots"), [("0.3", 300), ("1.0", 1000), ("1", 1), ("2048", 2048), (None, 1000), ("0.0001", 1)]
)
def test_slots(budget: str | None, slots: int) -> None:
    plan = CachePlan.of(tiny_config(), budget=budget, whole=1000, dtype=torch.float32)
    assert plan.slots == slots


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("policy", ["window", "hashevict"])
@pytest.mark.parametrize("size", ["4KiB", "50KB", "1MiB"])
def test_bytes_are_a_hard_cap_and_used_up(size: str, policy: str, rows: int) -> None:
    """The cache fits, counts codes and state, and one evict-block of slots more would not have fitted."""
    plan = CachePlan.of(tiny_config(), budget=size, whole=100_000, policy=policy, rows=rows, dtype=torch.float32)
    allowed = int(Budget.of(size).amount)
    assert plan.nbytes <= allowed
    assert plan.allocate(torch.device("cpu")).nbytes == plan.nbytes
    per_slot = plan.nbytes / plan.slots
    assert allowed - plan.nbytes < per_slot + 2 * rows * 2 * 32 * 8  # less than a slot and a free list over all layers


def test_bytes_that_hold_nothing() -> None:
    with pytest.raises(BudgetError, match="holds no token: one takes"):
        CachePlan.of(tiny_config(), budget="10B", whole=100, dtype=torch.float32)


def test_default_policy() -> None:
    for budget, name in ((None, "full"), ("1.0", "full"), ("0.5", "hashevict-plus"), ("64", "hashevict-plus")):
        assert CachePlan.of(tiny_config(), budget=budget, whole=100, dtype=torch.float32).policy.name == name


def test_bytes_are_enough_for_an_uneven_shape_or_the_error_names_the_real_slots() -> None:
    config = tiny_config(num_hidden_layers=4, sliding_windows=(None,) * 4)
    layout = {"whole": 100, "dtype": torch.float32, "policy": "window", "layer_budget": "first-layers-full"}
    enough = CachePlan.of(config, budget=60, **layout).nbytes
    plan = CachePlan.of(config, budget=f"{enough + 4096}B", **layout)
    assert [retention.slots for retention in plan.retentions][:2] == [100, 100]
    assert plan.nbytes <= enough + 4096
    with pytest.raises(BudgetError, match=r"needs 2 x 100 slots for the first layers, and a budget of \d\d a layer"):
        CachePlan.of(config, budget=f"{enough // 2}B", **layout)
