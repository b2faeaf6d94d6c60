"""A server in several processes answers as one in one process does, and all of them end together."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minillm.cli.main import main
from minillm.hub import EMBEDDED
from minillm.llm import LLM

from .ranks import start
from .serving import Served, serving

OPTIONS = ("--rows", 3, "--budget", 64, "--chunk", 16, "--dtype", "float32", "--memory", "500MiB")
IDLE = 3  # seconds that they wait for one who says nothing
START = f"""
import sys
from datetime import timedelta
from torch.distributed import distributed_c10d
from minillm.cli.main import main
from minillm.server.leader import Follower, Leader

def hasty(act):
    def acts(self):
        distributed_c10d._set_pg_timeout(timedelta(seconds={IDLE}))
        act(self)
    return acts

Follower.run, Leader.here = hasty(Follower.run), hasty(Leader.here)
sys.exit(main())
"""
ONCE = "Once upon a time there was a little dog. He liked to play in the park with his friends."
ENDLESS: dict[str, Any] = {"max_tokens": 1_000_000, "ignore_eos": True}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": ONCE, "max_tokens": 60, "temperature": 0, "seed": 1},
    "drawn": {"prompt": ONCE, "max_tokens": 60, "temperature": 0.9, "seed": 3, "n": 3},
    "told": {"prompt": "The dog", "max_tokens": 8, "temperature": 0.9, "top_p": 0.8, "seed": 4, "logprobs": 2},
    "echoed": {"prompt": ONCE, "max_tokens": 1, "temperature": 0, "seed": 2, "echo": True, "logprobs": 1},
    "several": {"prompt": [ONCE, "The cat was"], "max_tokens": 20, "seed": 5, "stop": ["."]},
}


class Together:
    """A server, and the processes that it is."""

    def __init__(self, ranks: int, *options: object) -> None:
        with socket.socket() as free:  # of which one process alone may take hold
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ("serve", "--port", str(port), *map(str, (*OPTIONS, *options)))
        self.processes = start(ranks, START, *words)
        self.served = Served(self.processes[0])

    def end(self, seconds: float = 20) -> tuple[list[int], list[str]]:
        """Status and stderr of each, once all have ended."""
        found = [process.wait(seconds) for process in self.processes]
        self.served.close()
        return found, ["".join(self.served.said), *(_read(process) for process in self.processes[1:])]


def _read(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.read()


@contextmanager
def together(ranks: int, *options: object) -> Iterator[Together]:
    """Nobody is left behind."""
    group = Together(ranks, *options)
    try:
        group.served.find()
        yield group
    finally:
        for process in group.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[Served]:
    with serving(*OPTIONS) as served:
        yield served


@pytest.fixture(scope="module")
def pair() -> Iterator[Together]:
    with together(2) as group:
        yield group


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, stored in 8 bits: quantised as a whole, and not part by part."""
    folder = tmp_path_factory.mktemp("models") / "small"
    assert main(["quantize", EMBEDDED, "-o", str(folder), "--weights", "int8"]) == 0
    return folder


@pytest.fixture(scope="module")
def four(small: Path) -> Iterator[Together]:
    """Two processes hold the same KV head, and the policy mixes all heads."""
    with together(4, "--model", small, "--weights", "int8-a16", "--policy", "tova") as group:
        yield group


def told(answer: dict[str, Any]) -> Any:
    """What an answer says, but for numbers that rounding changes."""
    choices = [(one["text"], one["finish_reason"]) for one in answer["choices"]]
    tokens = [one["logprobs"] and one["logprobs"]["tokens"] for one in answer["choices"]]
    return choices, tokens, answer["usage"]


def logprobs(answer: dict[str, Any]) -> list[float]:
    lists = [one["logprobs"]["token_logprobs"] for one in answer["choices"] if one["logprobs"]]
    return [number for numbers in lists for number in numbers if number is not None]


@contextmanager
def streaming(served: Served, **asked: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a streamed completion, until this is left."""
    body = json.dumps({"prompt": ONCE, "stream": True, **asked}).encode()
    request = urllib.request.Request(f"{served.url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = (line.decode().removeprefix("data: ") for line in answer if line.startswith(b"data: {"))
        yield (json.loads(line) for line in lines)


def text_of(events: Iterator[dict[str, Any]]) -> str:
    return "".join(choice["text"] for event in events for choice in event.get("choices", ()))


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_answers_are_those_of_one_process(alone: Served, pair: Together, asked: dict[str, Any]) -> None:
    one, two = alone.complete(**asked), pair.served.complete(**asked)
    assert told(one) == told(two)
    assert logprobs(one) == pytest.approx(logprobs(two), abs=1e-3)


def test_a_chat_and_its_session(alone: Served, pair: Together) -> None:
    """A session stays in its row while others come and go."""
    found = []
    for served in (alone, pair.served):
        said = []
        for number, text in enumerate(("Once there was a cat.", "The cat was sad.", "Then it saw a bird.")):
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 30, "seed": 1, "session": "cat"}
            status, answer, _ = served.request("/v1/chat/completions", body | {"resume": number > 0})
            assert status == 200, answer
            said.append((answer["choices"][0]["message"]["content"], answer["usage"]["minillm"]))
            served.complete(**ASKED["several"])
        _, remembered, _ = served.request("/v1/sessions/cat")
        shares = remembered.pop("remembered")  # of the heads that are in rank 0
        assert len(shares) > 50
        found.append((said, remembered, served.request("/v1/sessions/cat", method="DELETE")[1]))
    assert found[0] == found[1]


def test_neighbours_change_no_bit(pair: Together, four: Together) -> None:
    for group, tokens in ((four, 4), (pair, 40)):
        asked = [
            {"prompt": ONCE[at:], "max_tokens": tokens + 2 * at, "temperature": 0.9, "seed": at, "logprobs": 1}
            for at in range(4)
        ]
        before = [group.served.complete(**one) for one in asked]
        with ThreadPoolExecutor(len(asked)) as clients:
            meanwhile = list(clients.map(lambda one, group=group: group.served.complete(**one), asked))
        for one, other in zip(before, meanwhile, strict=True):
            assert [choice["text"] for choice in one["choices"]] == [choice["text"] for choice in other["choices"]]
            assert logprobs(one) == logprobs(other)


def test_a_stream_and_a_client_that_leaves(pair: Together) -> None:
    served, whole = pair.served, pair.served.complete(**ASKED["greedy"])
    with streaming(served, max_tokens=60, temperature=0) as events:
        assert text_of(events) == whole["choices"][0]["text"]
    with streaming(served, **ENDLESS) as events:
        assert next(events)
    end = time.monotonic() + 20
    while served.metric("minillm_rows_busy") > 0:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert told(served.complete(**ASKED["drawn"]))[0] != told(whole)[0]
    assert served.complete(**ASKED["greedy"])["choices"] == whole["choices"]


def test_a_beginning_is_restored(alone: Served, pair: Together) -> None:
    """One kept beginning, given up for a second one."""
    found = []
    for served in (alone, pair.served):
        answers = [
            served.complete(f"{tale} {name} said:", max_tokens=20, temperature=0, seed=6)
            for tale in ("Lily had a red ball and a big blue boat. " * 2, "Tom and Sam went to the sea with mom. " * 2)
            for name in ("Sue", "Ben", "Max", "Sue")
        ]
        found.append([told(answer) for answer in answers])
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
        assert all(cached[at] >= 16 for at in (2, 3, 6, 7)), cached
        assert [choice["text"] for choice in answers[0]["choices"]] == [
            choice["text"] for choice in answers[3]["choices"]
        ]
    assert found[0] == found[1]


def test_others_wait_for_as_long_as_nobody_asks(pair: Together) -> None:
    time.sleep(IDLE + 1.5)
    assert pair.served.complete(**ASKED["told"])["choices"]
    assert all(process.poll() is None for process in pair.processes)


def test_a_policy_hears_of_all_heads_and_weights_may_be_small(four: Together, small: Path) -> None:
    llm = LLM.load(str(small), budget=64, chunk=16, dtype="float32", policy="tova", weights="int8-a16")
    for sampling in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 7}):
        result = llm.generate(ONCE, max_tokens=46, **sampling)
        answer = four.served.complete(ONCE, max_tokens=46, **sampling)
        assert answer["choices"][0]["text"] == result.text
        counted = answer["usage"]["minillm"]
        assert (counted["seen_tokens"], counted["evicted_tokens"]) == (
            result.usage.seen_tokens,
            result.usage.evicted_tokens,
        )
        assert counted["oldest_kept"] == result.usage.oldest_kept


def test_a_signal_to_all_lets_what_runs_finish(pair: Together) -> None:
    with streaming(pair.served, max_tokens=60, ignore_eos=True) as events:
        assert next(events)
        for process in pair.processes:
            process.send_signal(signal.SIGTERM)
        *_, last = events
    assert last["choices"][0]["finish_reason"] == "length"
    statuses, said = pair.end()
    assert statuses == [0, 0]
    assert "minillm: done" in said[0]
    assert said[1] == ""


def test_a_follower_that_dies_ends_all_and_a_client_hears_of_it(four: Together) -> None:
    with streaming(four.served, **ENDLESS) as events:
        assert next(events)
        four.processes[2].kill()
        *_, last = events
    assert last["error"]["code"] is None
    assert "one of its processes is gone" in last["error"]["message"]
    require_one_message(four, dead=2)


@pytest.mark.parametrize("dead", [0, 1], ids=["leader", "follower"])
def test_a_process_that_dies_while_nobody_asks_ends_the_others(dead: int) -> None:
    with together(2) as group:
        group.processes[dead].kill()
        require_one_message(group, dead=dead)


def test_a_follower_that_hangs_ends_the_server() -> None:
    with together(2) as group:
        time.sleep(IDLE)  # they have met since
        group.processes[1].send_signal(signal.SIGSTOP)
        assert group.processes[0].wait(30) == 2
        group.served.close()
    said = "".join(group.served.said)
    assert said.count("error: another process that computes this model is gone or does not answer") == 1
    assert "Traceback" not in said


def test_an_answer_whose_end_nobody_counts_is_an_error() -> None:
    """The others are gone when it is over, and only its usage has to be asked for."""
    gone = "from minillm.errors import RankError\nfrom minillm.shard import Team\n"
    gone += "def count(self, cache):\n    raise RankError('all are gone')\nTeam.count = count"
    with serving(*OPTIONS, first=gone) as served:
        status, answer, _ = served.request("/v1/completions", {"prompt": ONCE, "max_tokens": 4}, seconds=10)
        assert (status, answer["error"]["type"]) == (503, "server_error")
        assert served.process.wait(10) == 2
    assert served.said[-1] == "minillm: error: all are gone\n"


def require_one_message(group: Together, *, dead: int) -> None:
    """Soon, and with status 2."""
    statuses, said = group.end(10)
    assert statuses == [-signal.SIGKILL if rank == dead else 2 for rank in range(len(statuses))]
    assert "".join(said).count("error: another process that computes this model is gone") == 1
    assert "Traceback" not in "".join(said)
