"""Typed look-up in a JSON object, and the refusal that names what is wrong with a value.

A `Kind` is a function of (value, its name) that gives what the value means, or raises the ApiError that names it.  This
knows no endpoint.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Kind = Callable[[Any, str], T]

MOST = 2**63 - 1  # what 64 bits hold: no field takes a larger whole number


@dataclass(eq=False)
class ApiError(Exception):
    """A refusal in the form that OpenAI's clients understand."""

    status: int  # HTTP's
    message: str
    kind: str = "invalid_request_error"  # OpenAI's "type"
    param: str | None = None  # the field to blame
    code: str | None = None  # a word for programs
    retry_after: int | None = None  # seconds
    final: bool = False  # whatever the status: another try would end in the same way

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer, or of the last event of a stream."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Clients try again by themselves unless told not to, and what a request says does not change by that."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.final or (400 <= self.status < 500 and self.status not in (408, 409, 429)):
            headers["x-should-retry"] = "false"
        return headers


def wrong(name: str, value: object, expected: str, *, param: str | None = None) -> ApiError:
    """Name what is wrong; long values are cut, deep ones are not shown, so that no message grows with the request."""
    if isinstance(value, (list, dict)):
        shown = "a list" if isinstance(value, list) else "an object"
    else:
        shown = json.dumps(value[:60] if isinstance(value, str) else value)
    shown = "missing or null" if value is None else shown if len(shown) <= 60 else shown[:57] + "..."
    return ApiError(400, f"{name or 'the request'} is {shown}; it must be {expected}", param=param or name or None)


def flag(value: Any, name: str) -> bool:
    """true or false, and no number."""
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def number(value: Any, name: str) -> float:
    """Finite, and no bool; the comparison is false for NaN, and exact for whole numbers of any size."""
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise wrong(name, value, "a finite number")
    return float(value)


def whole(low: int = -MOST - 1, high: int = MOST) -> Kind[int]:
    """A whole number, also one written as 1.0; no bool."""
    limits = f"from {low} to {high}" if high < MOST else f"from {low} up" if low >= 0 else "of at most 64 bits"

    def whole(value: Any, name: str) -> int:
        integral = type(value) is int or (isinstance(value, float) and value.is_integer())
        if not integral or not low <= value <= high:
            raise wrong(name, value, f"a whole number {limits}")
        return int(value)

    return whole


def text(value: Any, name: str) -> str:
    """Text that UTF-8 can carry: JSON can also write half of a character, such as "\\ud83d"."""
    if not isinstance(value, str):
        raise wrong(name, value, "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start : error.start + 1]
        raise ApiError(400, f"{name} holds half a character, {half!a}: send whole ones", param=name) from None
    return value


def measure(value: str | list[Any] | dict[str, Any], name: str, least: int, most: int, units: str) -> None:
    """Raise unless it has so many units."""
    if not least <= len(value) <= most:
        limits = f"{least} to {most}" if most < MOST else f"at least {least}"
        raise ApiError(400, f"{name} has {len(value)} {units}; give {limits}", param=name)


def listing(kind: Kind[T], least: int, most: int) -> Kind[tuple[T, ...]]:
    """A list of `least` to `most` entries of one kind."""

    def listing(value: Any, name: str) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise wrong(name, value, "a list")
        measure(value, name, least, most, "entries")
        return tuple([kind(entry, f"{name}[{i}]") for i, entry in enumerate(value)])

    return listing


class Fields:
    """A JSON object, read field by field: null counts as absent.  Itself a kind of value."""

    def __init__(self, value: Any, name: str = "") -> None:
        if not isinstance(value, dict):
            raise wrong(name, value, "a JSON object")
        self.raw, self._prefix = value, name and f"{name}."

    def get(self, key: str, kind: Kind[T]) -> T | None:
        """A field; None where it is not there."""
        value = self.raw.get(key)
        return None if value is None else kind(value, self._prefix + key)

    def need(self, key: str, kind: Kind[T]) -> T:
        """A field without a default: null is passed on, to be refused as what it is not."""
        return kind(self.raw.get(key), self._prefix + key)

    def refuse(self, key: str, harmless: list[Any], why: str) -> None:
        """Raise if a field asks for something that is not done here."""
        value, name = self.raw.get(key), self._prefix + key
        if value is not None and value not in harmless:
            raise ApiError(400, f"{name} is not supported: {why}; leave it out", param=name)
