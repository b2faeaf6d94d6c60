"""The eviction policies by name, one file each."""

from __future__ import annotations

from dataclasses import fields

from ..errors import ConfigError
from ..eviction import EvictionPolicy
from .full import Full
from .hashevict import HashEvict, HashEvictKey
from .window import Window

POLICIES: dict[str, type[EvictionPolicy]] = {policy.name: policy for policy in (Full, Window, HashEvict, HashEvictKey)}


def make_policy(name: str, **options: int | None) -> EvictionPolicy:
    """The policy called `name`; options that are None keep the policy's default.

    Raises ConfigError for an unknown name, for an option the policy does not have, and for a value out of range.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy '{name}'; choose one of {', '.join(POLICIES)}")
    policy = POLICIES[name]
    given = {option: value for option, value in options.items() if value is not None}
    known = {field.name for field in fields(policy)}  # type: ignore[arg-type]  # every policy is a dataclass
    if unknown := set(given) - known:
        raise ConfigError(
            f"policy '{name}' has no option {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(known)) if known else 'none'}"
        )
    return policy(**given)
