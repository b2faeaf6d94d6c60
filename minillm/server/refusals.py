"""What the server says to a request that it cannot serve, or not now, for reasons of its own."""

from __future__ import annotations

from .fields import ApiError


def shutting_down() -> ApiError:
    """Another server may be there soon."""
    return ApiError(503, "the server is shutting down", "server_error", retry_after=5)


def too_late() -> ApiError:
    """As long as was asked for, or allowed."""
    return ApiError(408, "the time for this request is over", code="timeout", final=True)


def broken() -> ApiError:
    """A bug."""
    return ApiError(500, "the server failed, which is a bug of minillm: see its log", "server_error")


def lost() -> ApiError:
    """A process that computes the model, too."""
    return ApiError(503, "the server ends: one of its processes is gone or does not answer", "server_error")


def no_session(name: str) -> ApiError:
    """Unknown, expired or deleted."""
    message = f"there is no session {name!r}: it has expired, was deleted, or never was; begin a new one"
    return ApiError(404, message, "not_found_error", "session", "session_not_found")


def busy_session(name: str) -> ApiError:
    """An answer is still being drawn in it."""
    message = f"session {name!r} is still answering: wait for the end of that, or use another session"
    return ApiError(409, message, "conflict_error", "session", "session_busy", retry_after=1)
