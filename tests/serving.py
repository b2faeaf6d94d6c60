"""A real server in a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Served:
    """Where it listens, and what it has said on stderr."""

    process: subprocess.Popen[str]
    url: str = ""
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)

    def find(self) -> Served:
        """Wait until it says where it listens."""
        found = re.search(r"http://[^/\s]+", self.wait_for("http://"))
        assert found
        self.url = found[0]
        return self

    def close(self) -> None:
        """The process has ended: hear what it said last."""
        self._listener.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def request(
        self, path: str, body: Any = None, *, method: str | None = None, key: str | None = None, seconds: float = 120
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, what the answer says (as JSON where it is that, else text), headers in lower case."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        asked = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=seconds) as answer:
                status, text, got = answer.status, answer.read().decode(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                status, text, got = error.code, error.read().decode(), error.headers
        lower = {name.lower(): value for name, value in got.items()}
        return status, json.loads(text) if "json" in lower.get("content-type", "") else text, lower

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """The answer to /v1/completions, which has to be one."""
        status, answer, _ = self.request("/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, answer
        found: dict[str, Any] = answer
        return found

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        _, text, _ = self.request("/metrics")
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))

    def resident(self) -> int:
        """Bytes of memory that it holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024

    def wait_for(self, what: str, seconds: float = 60) -> str:
        """The first line on stderr that holds this text."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.said):
                if what in line:
                    return line
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"{what!r} was not said, but: {''.join(self.said)}")


@contextmanager
def serving(*arguments: object, env: dict[str, str] | None = None, first: str = "") -> Iterator[Served]:
    """`minillm serve` on a free port with these options, until it is left; then it is told to end, and has to.

    env: what to add to the environment.  first: Python to run in the process before that, such as to change a constant.
    """
    start = f"import sys\n{first}\nfrom minillm.cli.main import main\nsys.exit(main())"
    command = [sys.executable, "-c", start, "serve", "--port", "0", "--threads", "1", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **(env or {})})
    served = Served(process)
    try:
        yield served.find()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError("the server did not end on SIGTERM") from None
        served.close()
