"""A load test of `minillm serve`: many clients at once, of which some leave early and some talk nonsense.

    python tools/load_server.py [--rows 8] [--clients 64] [--requests 5000] [--seconds 300] [--seed 0]

Every request is drawn from a pool of --pool different ones: prompts of 1 to 1,500 tokens, answers of 1 to 200, greedy
and sampled with a seed, streamed and whole, completions and chats.  First a server of its own, with the same --rows,
answers all of them one at a time: these answers are the truth.  Then --clients clients ask a second server at random; a
fifth of them leave, while they are queued, while the prompt is read, or in the middle of the answer, and a tenth of the
requests are invalid.  Who is told 429 comes back after Retry-After.

Promises: every answer is the one that was given alone, token for token; no 5xx, and no refusal but of what is invalid;
memory, threads and open files are afterwards what they were before, which is looked at when every request of the pool
has been answered once and --warm-up more: oneDNN keeps what it compiled for each length of a prompt, and the C library
some room for the most that there is at a time.  Exit status 1 if one is broken.  The last line is
the report as JSON.  Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]

LOST = 120.0  # seconds without an answer, after which it counts as lost
WORDS = ("a", "big", "cat", "and", "the", "little", "dog", "saw", "Lily", "play", "in", "her", "garden", "one", "day")
SYSTEM = "You are a kind storyteller for small children. " + "Tell of animals who are friends and share. " * 60
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NONSENSE: tuple[tuple[str, bytes], ...] = (
    (CHAT, b"{"),
    (CHAT, b'{"messages": []}'),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud83d"}]}'),
    (CHAT, b'{"messages": [{"role": "robot", "content": "hello"}], "max_tokens": 3}'),
    (CHAT, b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    (COMPLETIONS, b'{"prompt": [-1]}'),
    (COMPLETIONS, b'{"prompt": "once", "max_tokens": -1}'),
    (COMPLETIONS, b'{"prompt": "once", "temperature": "hot"}'),
    (COMPLETIONS, b'{"prompt": "once", "n": 1000000}'),
    (COMPLETIONS, b'{"prompt": "once", "seed": 1e999}'),
    (COMPLETIONS, b'{"prompt": "once", "model": "another"}'),
    (COMPLETIONS, b"\xff\xfe\x00"),
    ("/v1/nothing", b"{}"),
)


@dataclass
class Tally:
    """What the clients met.  first, gaps: seconds until the first piece of a streamed answer, and between two."""

    met: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


class LeftError(Exception):
    """The client leaves; the text says where the answer was."""


def pool(size: int, seed: int, *, prompt: int = 1500, answer: int = 200) -> list[tuple[str, Json]]:
    """Different requests, as pairs of a path and a body; lengths are spread evenly over their logarithm.

    prompt, answer: most tokens of each (some prompts of a chat are longer, and begin alike).
    """
    return [_request(random.Random(f"{seed}/{number}"), prompt, answer) for number in range(size)]


def _request(draw: random.Random, prompt: int, answer: int) -> tuple[str, Json]:
    text = " ".join(draw.choices(WORDS, k=round((0.8 * prompt) ** draw.random())))
    body: Json = {"max_tokens": round(answer ** draw.random()), "stream": draw.random() < 0.6}
    body |= {"temperature": 0.0, "seed": draw.getrandbits(40)}
    if draw.random() < 0.5:
        body |= {"temperature": draw.uniform(0.5, 1.5), "top_p": draw.choice((0.9, 1.0))}
    if draw.random() < 0.2:
        body |= {"repetition_penalty": 1.2, "stop": [" Tom", "\n"]}
    if draw.random() < 0.1:
        body["n"] = 2
    body["ignore_eos"] = draw.random() < 0.5
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if draw.random() < 0.4:
        system = [{"role": "system", "content": SYSTEM}] if draw.random() < 0.3 else []
        logprobs = {"logprobs": True, "top_logprobs": 2} if draw.random() < 0.2 else {}
        return CHAT, {"messages": [*system, {"role": "user", "content": text}], **body, **logprobs}
    if draw.random() < 0.2:
        body |= {"logprobs": 2, "echo": draw.random() < 0.5}
    ids = [draw.randrange(10, 4000) for _ in range(round(prompt ** draw.random()))]
    return COMPLETIONS, {"prompt": ids if draw.random() < 0.3 else text, **body}


def said(objects: list[Json]) -> Json:
    """What an answer says, of one object or of many chunks: texts, reasons, log-probabilities, and usage."""
    choices: dict[int, Json] = {}
    for each in objects:
        for choice in each["choices"]:
            found = choices.setdefault(choice["index"], {"text": "", "reason": None})
            part = choice.get("message") or choice.get("delta") or choice
            found["text"] += part.get("content") or part.get("text") or ""
            found["reason"] = choice["finish_reason"] or found["reason"]
            for name, entries in (choice["logprobs"] or {}).items():
                found[name] = found.get(name, []) + (entries or [])
    usage = {name: value for name, value in objects[-1]["usage"].items() if name != "prompt_tokens_details"}
    if len(choices) > 1:
        usage["minillm"] = None  # describes one answer of several
    return {"choices": choices, "usage": usage}


class Client:
    """One connection, opened again whenever it was closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(
        self, path: str, body: bytes, *, events: float = float("inf"), tally: Tally | None = None
    ) -> tuple[int, Mapping[str, str], list[Json]]:
        """Status, headers, and the objects that came.  events: leave after so many."""
        if self._writer is None or self._writer.is_closing() or self._reader is None or self._reader.at_eof():
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
        reader, begun = self._reader, time.perf_counter()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        status = int((await reader.readline()).split()[1])
        lines = (await reader.readuntil(b"\r\n\r\n") if status else b"").decode().splitlines()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        objects: list[Json] = []
        latest, finished, where = 0.0, False, "while it was queued"
        async for line in self._lines(headers):
            if line.startswith(":"):
                where = "while the prompt was read" if "reading" in line else where
                events -= "reading" in line
            elif line == "data: [DONE]":
                finished = True
            elif line:
                objects.append(json.loads(line.removeprefix("data: ")))
                where, now = "in the middle of the answer", time.perf_counter()
                events -= 1
                if tally is not None and line.startswith("data: ") and _tells(objects[-1]):
                    (tally.gaps if latest else tally.first).append(now - (latest or begun))
                    latest = now
            if events <= 0 and not finished:
                raise LeftError(where)
        if "event-stream" in headers.get("content-type", "") and not finished:
            raise EOFError("a stream ended before its end")
        if headers.get("connection") == "close":
            self.leave()
        return status, headers, objects

    async def _lines(self, headers: Mapping[str, str]) -> AsyncIterator[str]:
        reader = self._reader
        assert reader is not None
        if "content-length" in headers:
            yield (await reader.readexactly(int(headers["content-length"]))).decode()
            return
        while size := int(await reader.readuntil(b"\r\n"), 16):
            for line in (await reader.readexactly(size + 2)).decode().splitlines():  # the server cuts between events
                yield line
        await reader.readuntil(b"\r\n")

    def leave(self, *, abruptly: bool = False) -> None:
        """Close the connection, or let it break."""
        if self._writer is not None:
            self._writer.transport.abort() if abruptly else self._writer.close()
        self._reader = self._writer = None


def _tells(event: Json) -> bool:
    """Whether there is text in a chunk."""
    return any(choice.get("text") or choice.get("delta", {}).get("content") for choice in event.get("choices", ()))


async def truth(port: int, requests: list[tuple[str, Json]]) -> list[Json]:
    """The answer to each request when nothing else is asked, never streamed."""
    client, answers = Client(port), []
    for path, body in requests:
        alone = {name: value for name, value in body.items() if name != "stream_options"} | {"stream": False}
        status, _, objects = await client.ask(path, json.dumps(alone).encode())
        if status != 200:
            raise SystemExit(f"the request {json.dumps(body)[:200]} was refused: {objects}")
        answers.append(said(objects))
    client.leave()
    return answers


async def load(
    port: int, requests: list[tuple[str, Json]], answers: list[Json], numbers: Iterator[int], *, clients: int, seed: int
) -> Tally:
    """Ask as many requests as there are numbers, by so many clients at a time.

    A number is where its request is drawn from; a negative one, -1 - n, is the n-th of the pool, asked to the end.
    """
    tally = Tally()

    async def client() -> None:
        connection = Client(port)
        for number in numbers:
            draw = random.Random(f"{seed}/ask/{number}")
            try:
                known = -1 - number if number < 0 else None
                await _one(connection, requests, answers, draw, tally, known)
            except (OSError, EOFError, ValueError, IndexError) as error:
                tally.faults.append(f"request {number}: {error!r}")
                connection.leave()
        connection.leave()

    await asyncio.gather(*(client() for _ in range(clients)))
    return tally


async def _one(
    connection: Client,
    requests: list[tuple[str, Json]],
    answers: list[Json],
    draw: random.Random,
    tally: Tally,
    known: int | None,
) -> None:
    kind = draw.random() if known is None else 1.0
    if kind < 0.1:
        path, nonsense = draw.choice(NONSENSE)
        status, _, objects = await connection.ask(path, nonsense)
        tally.met["refused, being invalid"] += 1
        if not 400 <= status < 429 or "error" not in objects[0]:
            tally.faults.append(f"{nonsense[:100]!r} was answered {status}: {objects}")
        return None
    number = draw.randrange(len(requests)) if known is None else known
    path, body = requests[number]
    seconds = events = float("inf")
    if kind < 0.2:
        seconds = draw.expovariate(1.0)
    elif kind < 0.3:
        events = draw.randint(1, 20)
    while True:
        try:
            asking = connection.ask(path, json.dumps(body).encode(), events=events, tally=tally)
            status, headers, objects = await asyncio.wait_for(asking, min(seconds, LOST))
        except (LeftError, asyncio.TimeoutError) as error:
            if seconds >= LOST and not isinstance(error, LeftError):
                tally.faults.append(f"request {number} of the pool was not answered within {LOST:g} s")
            tally.met[f"left {error}" if str(error) else "left at a moment by the clock"] += 1
            return connection.leave(abruptly=draw.random() < 0.5)
        if status != 429:
            break
        tally.met["told to come back (429)"] += 1
        await asyncio.sleep(float(headers["retry-after"]))
    if status != 200 or any("error" in each for each in objects):
        tally.faults.append(f"request {number} of the pool was answered {status}: {objects[-1]}")
    elif said(objects) != answers[number]:
        tally.met["answers that differ"] += 1
        tally.faults.append(f"request {number} of the pool: {said(objects)} instead of {answers[number]}"[:1000])
    else:
        tally.met["answered as alone"] += 1
        tally.met["tokens of those"] += objects[-1]["usage"]["completion_tokens"]
    return None


@asynccontextmanager
async def served(*options: object) -> AsyncIterator[tuple[int, int, list[str]]]:
    """A server with these options, on loopback: its port, its process, and what it says."""
    command = (sys.executable, "-m", "minillm", "serve", "--port", "0", *map(str, options))
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    lines: list[str] = []
    assert process.stderr is not None
    found = None
    while found is None:
        line = (await process.stderr.readline()).decode()
        if not line:
            raise SystemExit(f"the server did not start: {''.join(lines)}")
        lines.append(line)
        found = re.search(r"http://[^/]*:(\d+)", line)

    async def listen() -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            lines.append(line.decode())

    listening = asyncio.create_task(listen())
    try:
        yield int(found[1]), process.pid, lines
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 60)
        except asyncio.TimeoutError:
            process.kill()
            raise SystemExit("the server did not end within 60 s of SIGTERM") from None
        await listening


def held(process: int) -> Json:
    """Bytes that a process holds, its threads, and its open files."""
    text = Path(f"/proc/{process}/status").read_text("utf-8")
    size, threads = (int(re.findall(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[0]) for name in ("VmRSS", "Threads"))
    return {"bytes": size * 1024, "threads": threads, "files": len(list(Path(f"/proc/{process}/fd").iterdir()))}


def percentiles(seconds: list[float]) -> Json:
    """Of times: the middle, and what 1 in 20 and 1 in 100 exceed, in ms."""
    ordered = sorted(seconds) or [0.0]
    return {f"p{p}_ms": round(1e3 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 2) for p in (50, 95, 99)}


async def until_idle(port: int) -> dict[str, float]:
    """Wait until nothing waits or runs any more, at most 10 s; the gauges then."""
    for _ in range(100):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        found = {name: float(value) for name, value in re.findall(r"^minillm_(\w+) (\S+)$", text, re.MULTILINE)}
        if not any(found[name] for name in ("queue", "rows_busy", "bodies_bytes")):
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.5)  # then it hands freed memory back
    return found


async def measure(args: argparse.Namespace) -> Json:
    """The whole test; returns the report, with what was broken as "faults"."""
    options = ("--rows", args.rows, "--queue", args.queue, "--budget", args.budget, "--threads", args.threads)
    options += ("--model", args.model) if args.model else ()
    requests, begun = pool(args.pool, args.seed), time.perf_counter()
    async with served(*options) as (port, _, _):
        answers = await truth(port, requests)
    print(f"{args.pool} answers drawn alone in {time.perf_counter() - begun:.0f} s", flush=True)
    async with served(*options) as (port, process, lines):
        how = {"clients": args.clients, "seed": args.seed}
        warm = await load(port, requests, answers, iter(range(-args.pool, args.warm_up)), **how)
        start, before, begun = await until_idle(port), held(process), time.perf_counter()

        def numbers() -> Iterator[int]:
            nonlocal asked
            while asked < args.requests and time.perf_counter() - begun < args.seconds:
                asked += 1
                if asked % 500 == 0:
                    print(f"{asked:>7,} requests  {held(process)['bytes'] / 1e6:.1f} MB", flush=True)
                yield args.warm_up + asked

        asked = 0
        tally = await load(port, requests, answers, numbers(), **how)
        seconds, end, after = time.perf_counter() - begun, await until_idle(port), held(process)
    faults = [*warm.faults, *tally.faults]
    for name, more in (("threads", 0), ("files", 2)):
        if after[name] > before[name] + more:
            faults.append(f"{name}: {before[name]} before, {after[name]} after")
    if abs(after["bytes"] / before["bytes"] - 1) > 0.02:
        faults.append(f"memory went from {before['bytes']:,} to {after['bytes']:,} bytes")
    faults += [f"{name} is {end[name]:g} at the end" for name in ("queue", "rows_busy", "bodies_bytes") if end[name]]
    faults += [f"the server said: {line.strip()}" for line in lines if "bug" in line or "Traceback" in line]
    counted = {name: end[name] - start[name] for name in ("prompt_tokens_total", "restored_tokens_total")}
    drawn = end["completion_tokens_total"] - start["completion_tokens_total"]
    return {
        "requests": asked,
        "seconds": round(seconds, 1),
        "met": dict(sorted(tally.met.items())),
        "first_token": percentiles(tally.first),
        "between_tokens": percentiles(tally.gaps),
        "drawn_tokens": int(drawn),
        "drawn_tokens_per_second": round(drawn / seconds, 1),
        "read_tokens_per_second": round(counted["prompt_tokens_total"] / seconds, 1),
        "restored_tokens": int(counted["restored_tokens_total"]),
        "before": before,
        "after": after,
        "faults": faults,
    }


def main() -> int:
    """Parse the options, test, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=300, help="no request begins after that (default: 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=400, help="different requests (default: 400)")
    parser.add_argument("--warm-up", type=int, default=600, help="requests before, beside the pool (default: 600)")
    parser.add_argument("--queue", type=int, default=48, help="too short for all clients (default: 48)")
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--budget", default="256")
    parser.add_argument("--threads", type=int, default=1)
    report = asyncio.run(measure(parser.parse_args()))
    print(f"{report['requests']:,} requests in {report['seconds']} s:")
    for what, count in report["met"].items():
        print(f"{count:>9,} {what}")
    for what in ("first_token", "between_tokens"):
        print(f"{what.replace('_', ' ')}: " + ", ".join(f"{p[:-3]} {ms} ms" for p, ms in report[what].items()))
    print(
        f"{report['drawn_tokens_per_second']} tokens drawn and {report['read_tokens_per_second']} read per second; "
        f"{report['before']['bytes'] / 1e6:.1f} MB before, {report['after']['bytes'] / 1e6:.1f} MB after"
    )
    print("\n".join(f"BROKEN: {fault}" for fault in report["faults"][:20]) or "every promise was kept")
    print(json.dumps(report))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
