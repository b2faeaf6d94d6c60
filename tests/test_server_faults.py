"""What a server must survive: load, kills, full disks, signals, nonsense, and clients that are slow or gone."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm.snapshot import open_snapshot
from tests.serving import Served, serving
from tools.load_server import COMPLETIONS, NONSENSE, Client, held, load, pool, truth, until_idle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and sends POSIX signals")
MB = 1 << 20


def connect(port: int, *, buffer: int | None = None) -> socket.socket:
    """buffer: bytes that the system keeps for us unread."""
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(30)
    try:
        connection.connect(("127.0.0.1", port))
    except OSError:
        connection.close()
        raise
    return connection


def head(length: int, path: str = COMPLETIONS) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n".encode()


def exchange(port: int, data: bytes, *, patience: float = 5) -> bytes:
    """Everything that comes back, if anything does within some seconds; then we say that there is nothing more."""
    with connect(port) as connection:
        received = b""
        with suppress(OSError):  # it may have closed before it has read all
            connection.sendall(data)
        connection.settimeout(patience)
        with suppress(OSError):
            received = connection.recv(1 << 16)
        connection.settimeout(5)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(1 << 16):
                received += piece
        return received


def status(received: bytes) -> int:
    """Of the first answer; 0: there is none."""
    return int(received.split(b" ", 2)[1]) if received.startswith(b"HTTP/1.1 ") else 0


def wait_until(what: Any, seconds: float = 20) -> None:
    """Until it is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(server: Served) -> None:
    """It answers, nothing is stuck, and it never said that it has a bug."""
    server.complete("Once upon a time", max_tokens=2)
    wait_until(lambda: server.metric("minillm_rows_busy") == server.metric("minillm_queue") == 0)
    assert server.metric("minillm_bodies_bytes") == 0
    assert not [line for line in server.said if "bug" in line or "Traceback" in line], "".join(server.said)


@pytest.fixture(scope="module")
def small() -> Iterator[Served]:
    """A server with little of everything."""
    with serving("--rows", 2, "--queue", 4, "--budget", 64, "--max-tokens", 4) as server:
        yield server


# --- load ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_answer_depends_on_what_else_is_asked() -> None:
    """A small tools/load_server.py: a fifth of the clients leave early, a tenth of the requests are invalid."""

    async def ask(port: int) -> Any:
        requests = pool(30, seed=1, prompt=400, answer=60)
        answers = await truth(port, requests)
        tally = await load(port, requests, answers, iter(range(200)), clients=16, seed=1)
        return tally, await until_idle(port)

    with serving("--rows", 4, "--queue", 8, "--budget", 256) as server:
        tally, gauges = asyncio.run(ask(server.port))
        assert not tally.faults, tally.faults[:3]
        assert tally.met["answered as alone"] > 100
        assert tally.met["refused, being invalid"] > 5
        assert sum(count for what, count in tally.met.items() if what.startswith("left")) > 10
        assert gauges["queue"] == gauges["rows_busy"] == gauges["bodies_bytes"] == 0
        alive(server)


# --- ends ----------------------------------------------------------------------------------------------------------


def turn(server: Served, name: str, *, resume: bool = False, text: str = " One day") -> tuple[int, Any]:
    body = {"prompt": text, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "session": name, "resume": resume}
    return server.request(COMPLETIONS, body)[:2]


def stage(answer: Any) -> tuple[int, str]:
    """How long the session is now, and what was said last."""
    return answer["usage"]["minillm"]["seen_tokens"], answer["choices"][0]["text"]


@pytest.mark.slow
def test_a_killed_server_has_sessions_whole_or_not_at_all(tmp_path: Path) -> None:
    options = ("--rows", 1, "--budget", 64)  # every turn of one session saves the other, whose row it takes
    with serving(*options) as server:
        stages = dict(stage(turn(server, "a")[1]) for _ in range(90))
    draw, going_on = random.Random(0), 0
    for _ in range(4):
        with serving(*options, "--sessions", tmp_path) as server:
            assert not list(tmp_path.glob("*.tmp")), "what a killed server left behind was not removed"
            for file in tmp_path.glob("*.session"):
                with open_snapshot(file):  # looks at every byte
                    pass
            for name in ("a", "b"):
                code, answer = turn(server, name, resume=True)
                if code == 200:
                    seen, text = stage(answer)
                    assert stages[seen] == text
                    going_on += 1
                else:
                    assert (code, answer["error"]["code"]) == (404, "session_not_found")

            def talk(server: Served = server) -> None:
                with suppress(OSError, http.client.HTTPException, ValueError, AssertionError):  # killed at any point
                    for number in range(30):
                        turn(server, "ab"[number % 2])

            talking = threading.Thread(target=talk)
            talking.start()
            time.sleep(draw.uniform(0.1, 0.6))
            server.process.kill()
            server.process.wait()
            talking.join()
    assert going_on > 2


def test_a_full_disk_costs_no_answer_and_is_told(tmp_path: Path) -> None:
    with serving("--rows", 1, "--budget", 64, "--sessions", tmp_path) as server:
        turn(server, "kept")
        file = tmp_path / "kept.session"
        wait_until(file.exists)
        before = file.read_bytes()
        _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1000, hard))  # no file may be larger
        assert turn(server, "kept", resume=True)[0] == 200
        assert "kept could not be saved" in server.wait_for("could not be saved")
        assert file.read_bytes() == before
        assert list(tmp_path.iterdir()) == [file]
        assert turn(server, "kept", resume=True)[0] == 200, "it is still in its row"
        server.complete("Once upon a time", max_tokens=2)  # which takes the row
        assert "kept is gone" in server.wait_for("is gone")
        assert turn(server, "kept", resume=True)[0] == 404
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert turn(server, "new")[0] == 200
        wait_until((tmp_path / "new.session").exists)
        alive(server)


def stream(server: Served, tokens: int) -> list[str]:
    """Lines of a streamed answer, as far as they come."""
    body = {"prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    with connect(server.port) as connection:
        connection.sendall(head(len(data)) + data)
        with connection.makefile("rb") as file, suppress(OSError):
            return [line.decode().strip() for line in file]
    return []


def test_sigterm_lets_answers_finish_and_sends_those_who_wait_away() -> None:
    with serving("--rows", 2, "--queue", 8, "--budget", 64) as server, ThreadPoolExecutor(8) as threads:
        streams = [threads.submit(stream, server, 700) for _ in range(2)]
        wait_until(lambda: server.metric("minillm_rows_busy") == 2)
        queued = [threads.submit(server.request, COMPLETIONS, {"prompt": "Once"}) for _ in range(4)]
        wait_until(lambda: server.metric("minillm_queue") == 4)
        server.process.send_signal(signal.SIGTERM)
        for each in queued:
            code, answer, headers = each.result()
            assert (code, answer["error"]["type"]) == (503, "server_error")
            assert int(headers["retry-after"]) > 0
        for each in streams:
            lines = [line for line in each.result() if line.startswith("data:")]
            assert lines[-1] == "data: [DONE]"
            assert json.loads(lines[-2].removeprefix("data:"))["usage"]["completion_tokens"] == 700
        assert server.process.wait(20) == 0
        assert any("done" in line for line in server.said)
        with pytest.raises(OSError, match="refused"):
            connect(server.port)


def test_a_second_sigterm_stops_at_once() -> None:
    with serving("--rows", 1, "--budget", 64) as server, ThreadPoolExecutor(1) as threads:
        running = threads.submit(stream, server, 1_000_000)
        wait_until(lambda: server.metric("minillm_rows_busy") == 1)
        with connect(server.port) as slow:  # it says that there is more to come, and would be waited for
            slow.sendall(head(100) + b"{")
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(1)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(10) == 0
        assert running.result()[-1] != "data: [DONE]" or "error" in "".join(running.result())


# --- nonsense ------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([0, -1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -0.0, 1e-320, float("nan"), float("inf")]),
    st.floats(),
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(st.characters(codec=None), max_size=20),  # with halves of characters
    st.recursive(st.none() | NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)),
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["", "minillm-demo", "../../etc/passwd"]),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": ODD})
    ),
    "prompt": st.text(max_size=40) | st.lists(st.integers(-2, 5000), max_size=9) | st.lists(st.text(max_size=9)),
    "stop": st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=6),
    "logit_bias": st.dictionaries(st.integers(-1, 5000).map(str), NUMBERS, max_size=5),
    "session": st.sampled_from(["s", "a/../b", ".hidden", "x" * 65, "\0"]),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": ODD}),
    "response_format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object"])}),
    **dict.fromkeys(("stream", "echo", "ignore_eos", "resume"), st.booleans()),
    **dict.fromkeys(("logprobs", "top_logprobs"), st.booleans() | st.integers(-1, 21)),
    **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"), NUMBERS),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "n", "best_of", "seed", "top_k", "timeout"), NUMBERS),
}
BODIES = st.fixed_dictionaries({}, optional={name: kind | ODD for name, kind in FIELDS.items()})


async def refused_or_answered(port: int, bodies: list[bytes]) -> None:
    client = Client(port)
    for number, body in enumerate(bodies):
        path = (COMPLETIONS, "/v1/chat/completions", "/tokenize")[number % 3]
        code, _, objects = await asyncio.wait_for(client.ask(path, body), 60)
        assert code == 200 or (400 <= code < 500 and "error" in objects[0]), (path, body, code, objects)
        errors = [each["error"] for each in objects if "error" in each]
        assert not [error for error in errors if error["type"] == "server_error"], (path, body, errors)
    client.leave()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(bodies=st.lists(BODIES | ODD, min_size=5, max_size=20))
def test_no_body_makes_the_server_fail(small: Served, bodies: list[Any]) -> None:
    texts = [json.dumps(body).encode("utf-8", "surrogatepass") for body in bodies]
    asyncio.run(refused_or_answered(small.port, texts))


def spoilt(draw: random.Random, text: bytes) -> bytes:
    """With some bytes changed, removed, or doubled."""
    data = bytearray(text)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        data[at : at + draw.randint(0, 3)] = draw.choice(
            (b"", b'"', b"\\", b"[", b"{", b"}", b"-", b"\xff", b"\0", b"\\ud800", b"1e999", b"null", data[:at][-9:])
        )
    return bytes(data)


def test_nine_thousand_spoilt_bodies_make_no_failure_and_leave_nothing_behind(small: Served) -> None:
    draw = random.Random(0)
    good = (
        b'{"prompt": "Once", "max_tokens": 2, "stop": ["a", "b"], "logit_bias": {"7": -100}, "stream": true}',
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 2, "top_p": 2}',
        b'{"prompt": [[1, 2, 3], [4, 5]], "logprobs": 3, "echo": true, "max_tokens": 0, "n": 2, "min_p": -1}',
        *(body for _, body in NONSENSE),
    )

    async def send(count: int) -> None:
        parts = [[spoilt(draw, draw.choice(good)) for _ in range(count // 4)] for _ in range(4)]
        await asyncio.gather(*(refused_or_answered(small.port, part) for part in parts))

    asyncio.run(send(1000))
    before = held(small.process.pid)
    asyncio.run(send(8000))
    alive(small)
    after = held(small.process.pid)
    assert after["bytes"] < before["bytes"] + 8 * MB
    assert after["files"] <= before["files"] + 2


def test_a_thousand_pieces_of_garbage_instead_of_http(small: Served) -> None:
    draw, codes = random.Random(0), set()
    body = b'{"prompt": "Once", "max_tokens": 2}'
    good = head(len(body)) + body
    for number in range(1000):
        data = draw.randbytes(draw.randint(1, 400)) if number % 4 == 0 else spoilt(draw, good)
        codes.add(status(exchange(small.port, data, patience=0.02)))
    assert codes <= {0, 200, 400, 403, 404, 405, 408, 413, 429}, codes
    assert 400 in codes
    assert status(exchange(small.port, good)) == 200  # what was spoilt
    alive(small)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Big: " + b"a" * MB + b"\r\n\r\n", {400, 431}),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X-Many: 1\r\n" * 100_000 + b"\r\n", {400, 431}),
        (b"GET /" + b"a" * MB + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", {400, 414, 431}),
        (head(2).replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n") + b"2\r\n{}\r\n0\r\n\r\n", {400}),
        (head(-1), {400}),
        (head(10**30) + b"{}", {0, 400, 413}),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", {200}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 403}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200, {400}),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", {403}),
    ],
    ids=["header", "headers", "target", "smuggling", "negative", "huge", "websocket", "http2", "tls", "rebinding"],
)
def test_heads_that_are_bombs_or_not_for_us(small: Served, data: bytes, expected: set[int]) -> None:
    before = small.resident()
    assert status(exchange(small.port, data)) in expected
    assert small.resident() < before + 4 * MB
    alive(small)


def test_one_request_cannot_ask_for_more_numbers_than_fit(small: Served) -> None:
    body = {"prompt": [5] * 100_000, "echo": True, "logprobs": 20, "max_tokens": 0}
    code, answer, _ = small.request(COMPLETIONS, body)
    assert (code, answer["error"]["param"]) == (400, "logprobs")
    assert "2,100,000 numbers" in answer["error"]["message"]


def test_pipelined_requests_are_answered_in_order_and_junk_behind_them_is_refused(small: Served) -> None:
    body = b'{"prompt": "Once", "max_tokens": 1}'
    asked = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 200 + head(len(body)) + body + b"\0junk\r\n\r\n" * 9
    received = b""
    with connect(small.port) as connection:
        connection.sendall(asked)
        while piece := connection.recv(1 << 16):  # until the junk has made it close
            received += piece
    assert received.count(b"HTTP/1.1 200") == 201
    assert received.count(b"HTTP/1.1 ") == 202
    assert b"HTTP/1.1 400" in received
    alive(small)


# --- bodies --------------------------------------------------------------------------------------------------------


def test_a_body_of_50_mb_is_refused_without_being_held(small: Served) -> None:
    before = small.resident()
    for chunked in (False, True):
        with connect(small.port) as connection:
            kind = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 50000000"
            connection.sendall(head(0).replace(b"Content-Length: 0", kind))
            piece = b"f4240\r\n" + b"a" * 1_000_000 + b"\r\n" if chunked else b"a" * 1_000_000
            with suppress(OSError):
                for _ in range(50):
                    connection.sendall(piece)
            assert status(connection.recv(1 << 16)) == 413
    assert small.resident() < before + 6 * MB
    alive(small)


def test_many_large_bodies_at_once_are_refused_before_they_fill_the_memory(small: Served) -> None:
    text = json.dumps({"prompt": "a " * 450_000, "max_tokens": 1}).encode()
    before, codes = small.resident(), []
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(small.port)) for _ in range(40)]
        for connection in connections:
            connection.sendall(head(len(text)))
            connection.settimeout(0.2)
            with suppress(OSError):  # whoever was refused may find the door closed
                connection.sendall(text[:-10])
        wait_until(lambda: small.metric("minillm_bodies_bytes") > 3 * MB)
        assert small.metric("minillm_bodies_bytes") <= 4 * MB
        assert small.resident() < before + 48 * MB  # what is in flight passes through buffers
        for connection in connections:  # nobody keeps on, and everybody is told something or let go
            connection.settimeout(0.2)
            with suppress(OSError):
                codes.append(status(connection.recv(1 << 16)))
    assert codes.count(429) > 20, codes
    assert set(codes) <= {429}
    alive(small)


# --- slow clients --------------------------------------------------------------------------------------------------


IMPATIENT = """
import socket
import minillm.server.connection as connection, minillm.server.http as http
connection.SLOW_SENDER = http.IDLE = http.SLOW_READER = 2

class Socket(socket.socket):  # what a listening one is set to, those that it accepts inherit
    def listen(self, *backlog):
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        super().listen(*backlog)

socket.socket = Socket
"""


@pytest.fixture(scope="module")
def impatient() -> Iterator[Served]:
    """It waits 2 s where others wait 30 or 75, and the system keeps 16 KiB for it that are not sent, not megabytes."""
    with serving("--rows", 2, "--queue", 4, "--budget", 64, first=IMPATIENT) as server:
        yield server


def closed(connection: socket.socket) -> bool:
    """Whether the other side has closed it; what it said before is read."""
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def test_a_thousand_idle_and_slow_connections_delay_nobody_and_are_closed(impatient: Served) -> None:
    files = held(impatient.process.pid)["files"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(impatient.port)) for _ in range(1000)]
        bodies = [stack.enter_context(connect(impatient.port)) for _ in range(30)]
        heads = [stack.enter_context(connect(impatient.port)) for _ in range(30)]
        for connection in bodies:
            connection.sendall(head(1000) + b"{")
        begun = time.monotonic()
        while time.monotonic() < begun + 4:
            impatient.complete("Once upon a time", max_tokens=3)
            for connection in (*bodies, *heads):  # a byte now and then
                with suppress(OSError):
                    connection.send(b"G")
            time.sleep(0.1)
        wait_until(lambda: all(closed(connection) for connection in (*idle, *heads)))
        wait_until(lambda: all(closed(connection) for connection in bodies))
    wait_until(lambda: held(impatient.process.pid)["files"] <= files + 2)
    alive(impatient)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [True, False])
def test_who_does_not_read_is_cut_off(impatient: Served, streamed: bool) -> None:
    """Log-probabilities make much to read."""
    files = held(impatient.process.pid)["files"]
    body = {"prompt": "Once", "max_tokens": 1000 if streamed else 500, "ignore_eos": True, "stream": streamed}
    data = json.dumps(body | {"logprobs": 20}).encode()
    with connect(impatient.port, buffer=4096) as connection:
        connection.sendall(head(len(data)) + data)
        wait_until(lambda: impatient.metric("minillm_rows_busy") == 1)
        wait_until(lambda: impatient.metric("minillm_rows_busy") == 0)
        wait_until(lambda: held(impatient.process.pid)["files"] <= files)  # the connection is gone, too
    alive(impatient)
