"""How a budget is shared out among the layers: the same total, evenly or not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import BudgetError

SHAPES = ("uniform", "pyramid", "first-layers-full")
FULL_LAYERS = 2  # how many layers `first-layers-full` leaves alone


def layer_slots(shape: str | Sequence[float], slots: int, layers: int, whole: int) -> list[int]:
    """Slots of every layer, `layers * slots` in all, each at least 1.

    uniform: all the same.  pyramid: falling evenly from 1.5 times the mean in the first layer to half of it in the last
    (after PyramidKV, arXiv 2406.02069).  first-layers-full: the first two layers keep all of `whole` and the others
    share the rest.  A sequence: one relative weight per layer.  Worked example: weights 3, 2, 1 and 100 slots on
    average -> 150, 100, 50.  Raises BudgetError for a shape that cannot be.
    """
    total = layers * slots
    if isinstance(shape, str) and "," in shape:
        shape = _weights(shape)
    if shape == "uniform" or layers == 1:
        weights = [1.0] * layers
    elif shape == "pyramid":
        weights = [1.5 - layer / (layers - 1) for layer in range(layers)]
    elif shape == "first-layers-full":
        full = min(FULL_LAYERS, layers - 1)
        left = (total - full * whole) / (layers - full)
        if left < 1:
            raise BudgetError(
                f"first-layers-full needs {full} x {whole:,} slots for the first layers, and a budget of {slots:,} a "
                f"layer gives {total:,} to all {layers}: raise --budget or lower --context"
            )
        weights = [float(whole)] * full + [left] * (layers - full)
        if left > whole:  # the budget holds everything anyway
            weights = [1.0] * layers
    elif isinstance(shape, str):
        raise BudgetError(f"unknown layer budget '{shape}': choose one of {', '.join(SHAPES)}, or one weight per layer")
    else:
        weights = [float(weight) for weight in shape]
    if len(weights) != layers or not all(0 < weight < math.inf for weight in weights):
        raise BudgetError(f"a layer budget needs one positive weight for each of {layers} layers, not {list(weights)}")
    # Rounded so that the sum is exact: what is cut off goes to the layers that lost most.
    shares = [weight / sum(weights) * total for weight in weights]
    found = [max(1, math.floor(share)) for share in shares]
    by_loss = sorted(range(layers), key=lambda layer: found[layer] - shares[layer])
    for layer in by_loss[: max(0, total - sum(found))]:
        found[layer] += 1
    while sum(found) > total:  # weights so uneven that some layer was lifted to 1
        found[found.index(max(found))] -= 1
    return found


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise BudgetError(f"layer budget '{text}' is not a list of numbers such as 3,2,1") from None
