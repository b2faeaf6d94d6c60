"""Renders one untrusted Jinja template: a program of its own, run in a child process that can be killed.

Reads one JSON object on stdin (template, variables, max_chars, max_bytes), writes {"text"} or {"error"} on stdout.
Jinja's sandbox keeps a template away from Python; only a process keeps it away from time and memory: "x" * 10**10 is
one call into C that nothing inside the process could stop.  Imports nothing of minillm, so that it starts fast.
The environment is the one `transformers` renders chat templates with (utils/chat_template_utils.py).
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks an answer for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """namespace() without names that Python itself would look up, such as __html__."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    for name in dict(*args, **kwargs):
        _check_name(name)
    return _Namespace(*args, **kwargs)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML characters, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _render(template: str, variables: dict[str, Any], max_chars: int) -> str:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _namespace}
    parts: list[str] = []
    room = max_chars
    for part in environment.from_string(template).generate(variables):
        room -= len(part)
        if room < 0:
            raise jinja2.exceptions.TemplateError(f"its output is longer than {max_chars} characters")
        parts.append(part)
    return "".join(parts)


def _limit_memory(max_bytes: int) -> None:
    # Elsewhere the operating system offers no such limit; there the time limit of the parent has to do.
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def main() -> None:
    """Answers the one request on stdin; every failure of the template is an answer, too."""
    request = json.load(sys.stdin)
    _limit_memory(request["max_bytes"])
    try:
        reply = {"text": _render(request["template"], request["variables"], request["max_chars"])}
    except MemoryError:
        reply = {"error": f"it needs more than {request['max_bytes'] >> 20} MiB of memory"}
    except Exception as error:  # the template is a foreign program: whatever it raises is its own failure
        reply = {"error": f"{type(error).__name__}: {error}"}
    json.dump(reply, sys.stdout)


if __name__ == "__main__":
    main()
