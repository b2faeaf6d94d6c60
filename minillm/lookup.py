"""Typed look-up in a config.json: what is missing or of the wrong kind is said with the key and its value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError


class Reader:
    """Typed look-up in a config.json: null counts as absent, and every complaint names the key and its value."""

    def __init__(self, raw: Mapping[str, Any], within: str = "") -> None:
        self.raw, self.within = raw, within

    def error(self, key: str, expected: str) -> ConfigError:
        return ConfigError(f"config.json: {self.within}{key} is {self.raw.get(key)!r}; expected {expected}")

    def value(self, key: str, default: object, expected: str) -> Any:
        value = self.raw.get(key)
        if value is None and default is None:
            raise ConfigError(f"config.json: {self.within}{key} is missing; expected {expected}")
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.value(key, default, "a positive integer")
        if type(value) is not int or value <= 0:
            raise self.error(key, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default, "a positive number")
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.error(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.value(key, default, "true or false")
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value
