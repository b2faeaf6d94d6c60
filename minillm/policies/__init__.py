"""The eviction policies by name, one file each."""

from __future__ import annotations

from dataclasses import fields

from ..errors import ConfigError
from ..eviction import EvictionPolicy
from .exact import Exact
from .fastgen import FastGen
from .full import Full
from .h2o import H2O
from .hashevict import HashEvict, HashEvictKey
from .hashevict_plus import HashEvictPlus
from .keydiff import KeyDiff
from .l2 import L2
from .random import Random
from .scissorhands import Scissorhands
from .snapkv import SnapKV
from .tova import Tova
from .window import Window

Option = int | float | str

POLICIES: dict[str, type[EvictionPolicy]] = {
    policy.name: policy
    for policy in (
        *(Full, Window, HashEvict, HashEvictKey, HashEvictPlus),
        *(Random, L2, KeyDiff, Exact),  # neither queries' past nor attention
        *(H2O, Scissorhands, Tova, SnapKV, FastGen),  # attention
    )
}
_SWITCH = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}


def make_policy(name: str, **options: Option | None) -> EvictionPolicy:
    """The policy called `name`; options that are None keep the policy's default, text is read as the option's type.

    Raises ConfigError for an unknown name, for an option the policy does not have, and for a value out of range.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy '{name}'; choose one of {', '.join(POLICIES)}")
    policy = POLICIES[name]
    given = {option: value for option, value in options.items() if value is not None}
    types = {field.name: str(field.type) for field in fields(policy)}  # type: ignore[arg-type]  # all are dataclasses
    if unknown := set(given) - set(types):
        owners = [other for other, kind in POLICIES.items() if unknown <= {f.name for f in fields(kind)}]  # type: ignore[arg-type]
        raise ConfigError(
            f"policy '{name}' has no option {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(types)) if types else 'none'}"
            + (f" (for this one choose --policy {' or '.join(owners)})" if owners else "")
        )
    return policy(**{option: _read(option, value, types[option]) for option, value in given.items()})


def _read(option: str, value: Option, kind: str) -> Option:
    """A value as the type that a policy declares: int, float or bool."""
    try:
        if kind == "bool":
            return _SWITCH[str(value).lower()]
        return int(str(value)) if kind == "int" else float(value)
    except (ValueError, KeyError):
        wanted = {"bool": "true or false", "int": "a whole number"}.get(kind, "a number")
        raise ConfigError(f"policy option {option} must be {wanted}, not {value!r}") from None
