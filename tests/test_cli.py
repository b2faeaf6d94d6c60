"""The commands as users type them: `main(argv)` in this process, and real processes where signals and pipes matter."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minillm import LLM
from minillm.cli.main import main
from minillm.conversation import Conversation

from .tiny_checkpoint import write_checkpoint

PROMPT = "the dog sat on the mat"
USAGE = {"prompt_tokens", "completion_tokens", "seen_tokens", "kept_tokens", "evicted_tokens"}
USAGE |= {"kept_range", "kept_by_layer", "oldest_kept"}
CACHE = {"slots", "layer_slots", "bytes", "policy", "policy_options", "budget", "context", "sinks", "recent"}
CACHE |= {"evict_every", "kv_dtype", "positions", "on_overflow"}
TIMINGS = {"first_token_s", "generation_s", "prompt_tokens_per_s", "generation_tokens_per_s"}
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and terminals")

Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "talker", template=True)


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line that must succeed: stdout and stderr."""

    def call(*argv: object) -> tuple[str, str]:
        assert main([str(word) for word in argv]) == 0
        out, err = capsys.readouterr()
        return out, err

    return call


# --- generate ------------------------------------------------------------------------------------------------------


def test_the_prompt_comes_from_argument_stdin_and_file(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--model", tiny, "--max-tokens", 12, "--ignore-eos")
    answer, _ = run("generate", PROMPT, *options)
    assert answer.endswith("\n")
    assert answer.removesuffix("\n") == LLM.load(str(tiny)).generate(PROMPT, max_tokens=12, ignore_eos=True).text
    for argv in (("-",), ()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
        assert run("generate", *argv, *options)[0] == answer
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert run("generate", "--file", tmp_path / "prompt.txt", *options)[0] == answer


def test_one_line_of_facts_before_and_one_after(run: Run, tiny: Path) -> None:
    options = ("--model", tiny, "--max-tokens", 30, "--ignore-eos", "--budget", 16)
    _, err = run("generate", PROMPT, *options)
    before, after = err.splitlines()
    cache = json.loads(run("generate", PROMPT, *options, "--json")[0])["cache"]
    assert re.search(r"budget 16 tokens = 16 slots, [\d.]+ KiB; policy hashevict", before)
    for name in ("sinks", "recent"):
        assert f"{name} {cache[name]}" in before
    seen = re.search(
        r"(\d+) prompt \+ 30 new tokens; seen (\d+), kept ([\d.]+), evicted ([\d.]+)(?:, oldest kept \d+)?;", after
    )
    assert seen is not None
    prompt, entered, kept, evicted = map(float, seen.groups())
    assert entered == prompt + 29, "the last token drawn is never fed"
    assert kept + evicted == entered
    assert kept <= 16
    for fact in (
        r"prompt [\d,]+ tok/s",
        r"generation [\d,.]+ tok/s",
        r"first token \d+\.\d+ s",
        r"memory planned [\d.]+ [MG]iB, peak [\d.]+ [MG]iB",
    ):
        assert re.search(fact, after)


def test_json_is_one_object_with_the_documented_fields(run: Run, tiny: Path) -> None:
    out, _ = run("generate", PROMPT, "--model", tiny, "--max-tokens", 5, "--ignore-eos", "--json", "--seed", 7)
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result.keys() == {"text", "token_ids", "finish_reason", "usage", "cache", "timings", "seed", "memory"}
    assert result["usage"].keys() == USAGE
    assert result["cache"].keys() == CACHE
    assert result["timings"].keys() == TIMINGS
    assert (result["finish_reason"], result["seed"]) == ("length", 7)
    assert len(result["token_ids"]) == result["usage"]["completion_tokens"] == 5
    assert result["text"] == run("generate", PROMPT, "--model", tiny, "--max-tokens", 5, "--ignore-eos")[0][:-1]


@pytest.mark.parametrize(
    ("budget", "slots"), [("0.3", 12), ("64", 64), ("1", 1), ("1.0", 40), (None, 40), ("20", 20), ("0.01", 1)]
)
def test_budgets_become_slots(budget: str | None, slots: int, run: Run, tiny: Path) -> None:
    """A context of 40 tokens; what is named in tokens is allocated as named, and `plan` says the same."""
    options = ["--model", tiny, "--context", 40, "--json", *(() if budget is None else ("--budget", budget))]
    count = len(json.loads(run("tokens", PROMPT, "--model", tiny, "--json")[0])["token_ids"])
    out, _ = run("generate", PROMPT, *options, "--max-tokens", 40 - count, "--ignore-eos")
    result = json.loads(out)
    assert result["cache"]["slots"] == slots
    assert result["cache"] == json.loads(run("plan", *options)[0])["cache"]
    assert result["usage"]["seen_tokens"] == 39
    assert result["usage"]["kept_tokens"] <= slots
    assert result["usage"]["kept_tokens"] + result["usage"]["evicted_tokens"] == 39
    assert result["cache"]["policy"] == ("full" if budget in (None, "1.0") else "hashevict-plus")
    if budget != "64":  # more than the context
        assert json.loads(run("plan", *options)[0])["cache"] == result["cache"]


def test_a_budget_in_bytes_is_used_and_not_exceeded(run: Run, tiny: Path) -> None:
    options = ("--model", tiny, "--context", 400, "--budget", "40KiB", "--json")
    result = json.loads(run("generate", PROMPT, *options, "--max-tokens", 390, "--ignore-eos")[0])
    assert 36 * 1024 < result["cache"]["bytes"] <= 40 * 1024
    assert result["usage"]["evicted_tokens"] > 0
    assert json.loads(run("plan", *options)[0])["cache"] == result["cache"]


@pytest.mark.parametrize("policy", ["full", "window", "hashevict", "hashevict-key"])
def test_every_policy_answers(policy: str, run: Run, tiny: Path) -> None:
    size = () if policy == "full" else ("--budget", 12)
    out, err = run("generate", PROMPT, "--model", tiny, "--policy", policy, *size, "--max-tokens", 20, "--json")
    assert json.loads(out)["cache"]["policy"] == policy
    assert f"policy {policy}" in err


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(run: Run, stories: Path) -> None:
    options = ("--model", stories, "--max-tokens", 40)
    text = run("generate", "", *options)[0]
    assert "little girl" in text
    result = json.loads(run("generate", "", *options, "--stop", "zzz", "--stop", "tle gi", "--json")[0])
    assert result["text"] == text.partition("tle gi")[0]
    assert result["finish_reason"] == "stop"


def test_a_seed_repeats_and_no_seed_is_reported(run: Run, tiny: Path) -> None:
    def draw(*seed: object) -> dict[str, Any]:
        options = ("--model", tiny, "--temperature", 1, "--max-tokens", 20, "--ignore-eos", "--json")
        result: dict[str, Any] = json.loads(run("generate", PROMPT, *options, *seed)[0])
        return result

    free = draw()
    assert draw("--seed", free["seed"])["token_ids"] == free["token_ids"]
    assert draw("--seed", free["seed"] + 1)["token_ids"] != free["token_ids"]


def test_logprobs(run: Run, tiny: Path) -> None:
    out, _ = run("generate", PROMPT, "--model", tiny, "--max-tokens", 4, "--ignore-eos", "--logprobs", 3, "--json")
    result = json.loads(out)
    for token_id, entry in zip(result["token_ids"], result["logprobs"], strict=True):
        assert entry["token_id"] == token_id == entry["top"][0][0], "greedy takes the most likely"
        assert len(entry["top"]) == 3
        assert 0 > entry["logprob"] == entry["top"][0][1] >= entry["top"][1][1]


def test_golden_text_of_a_trained_model(run: Run, stories: Path) -> None:
    golden = json.loads((stories.parent / "golden.json").read_text())["stories260K"][0]
    assert golden["prompt"] == ""
    wanted = golden["greedy_ids"]
    options = ("--model", stories, "--max-tokens", len(wanted), "--ignore-eos")
    result = json.loads(run("generate", "", *options, "--json")[0])
    assert result["token_ids"] == wanted
    assert result["usage"]["prompt_tokens"] == 1, "BOS"
    assert run("generate", "", *options)[0] == result["text"] + "\n"


# --- score, tokens -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_score_of_the_stories(run: Run, stories: Path, shared_data: Path) -> None:
    text = shared_data / "text" / "tinystories.txt"
    cut = ("--separator", "<|endoftext|>", "--context", 512, "--rows", 200)
    score = json.loads(run("score", "--model", stories, "--file", text, *cut, "--json")[0])
    assert score.keys() == {"tokens", "nats_per_token", "perplexity", "usage", "cache", "memory"}
    assert score["usage"].keys() == USAGE
    assert score["cache"].keys() == CACHE
    assert score["tokens"] == 200 * 512
    print(f"score of stories260K: {score['nats_per_token']:.4f} nats per token")
    assert score["nats_per_token"] == pytest.approx(1.4166, abs=0.002)


def test_score_is_the_mean_of_the_prompts_logprobs(run: Run, tiny: Path) -> None:
    text = PROMPT * 6
    for budget in ((), ("--budget", 16)):
        llm = LLM.load(str(tiny), budget=16 if budget else None, context=200)
        result = llm.generate(text, max_tokens=1, prompt_logprobs=0)
        assert result.prompt_logprobs is not None
        scored = [entry.logprob for entry in result.prompt_logprobs if entry is not None]
        out, err = run("score", text, "--model", tiny, *budget, "--json")
        score = json.loads(out)
        assert score["tokens"] == len(scored)
        assert score["nats_per_token"] == pytest.approx(-sum(scored) / len(scored), abs=1e-5)
        assert (score["usage"]["evicted_tokens"] > 0) == bool(budget)
        assert err.splitlines()[0].startswith(f"minillm: {tiny}")


def test_score_for_people(run: Run, tiny: Path) -> None:
    out, err = run("score", "the dog|the cat", "--model", tiny, "--separator", "|")
    assert re.fullmatch(r"\d+\.\d{4} nats per token, perplexity [\d.]+, \d+ tokens\n", out)
    assert "seen" in err


def test_tokens_shows_what_generate_feeds(run: Run, tiny: Path) -> None:
    result = json.loads(run("tokens", PROMPT, "--model", tiny, "--json")[0])
    assert result["token_ids"] == LLM.load(str(tiny)).encode(PROMPT).tolist()
    assert result["pieces"][0] == "<s>"


# --- chat ----------------------------------------------------------------------------------------------------------


def pipe(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation_lives_in_one_cache(run: Run, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM.load(str(talker), budget=32)
    conversation = Conversation(llm, system="be brief")
    wanted = [conversation.send(line, max_tokens=9, ignore_eos=True).finish() for line in ("the dog", "the cat")]
    pipe(monkeypatch, "the dog", "", "the cat", "/quit", "never read")
    options = ("--max-tokens", 9, "--ignore-eos", "--budget", 32, "--system", "be brief", "--json")
    out, _ = run("chat", "--model", talker, *options)
    first, second = (json.loads(line) for line in out.splitlines())
    assert [first["token_ids"], second["token_ids"]] == [result.token_ids for result in wanted]
    template = llm.checkpoint.template
    assert template is not None
    turn = template.render_turn({"role": "user", "content": "the cat"}, system="be brief")
    new = len(llm.checkpoint.tokenizer.encode(turn, bos=False))
    assert second["usage"]["prompt_tokens"] == new + 1, "the new turn, and the last token drawn before it"
    assert second["usage"]["seen_tokens"] == first["usage"]["seen_tokens"] + new + 1 + 8
    assert second["cache"] == first["cache"]
    assert second["usage"]["kept_tokens"] <= 32


def test_the_commands_of_a_chat(run: Run, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, "/stats", "the dog", "/stats", "/reset", "/stats", "/unknown", "the dog")
    out, err = run("chat", "--model", talker, "--max-tokens", 5, "--ignore-eos")
    first, second = out.splitlines()
    assert first == second, "after /reset everything begins again"
    lines = err.splitlines()
    states = [line for line in lines if "policy full" in line][1:]
    assert ["seen 0, kept 0, evicted 0" in state for state in states] == [True, False, True]
    assert any(line == "minillm: the conversation is forgotten" for line in lines)
    assert any(line.startswith("minillm: unknown command /unknown: /reset") for line in lines)


# --- signals and pipes ---------------------------------------------------------------------------------------------


@pytest.fixture
def endless(stories: Path) -> list[str]:
    """Options of an answer that does not end by itself."""
    return ["--model", str(stories), "--ignore-eos", "--max-tokens", "1000000", "--budget", "64", "--threads", "1"]


def start(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "minillm", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


@POSIX
def test_ctrl_c_keeps_what_was_printed(endless: list[str]) -> None:
    with start("generate", "", *endless) as process:
        assert process.stdout is not None
        begun = process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    text = (begun + out).decode()
    assert text.lstrip().startswith("Once upon a time, there was a little")
    assert text.endswith("\n")
    assert b"Traceback" not in err
    assert err.decode().splitlines()[-1].startswith("minillm: interrupted; 1 prompt + ")


@POSIX
@pytest.mark.parametrize("after", ["torch/__init__", "numpy/__init__", "minillm/loader"])
def test_ctrl_c_while_loading(after: str, endless: list[str]) -> None:
    """Wherever it comes: `-v` tells on stderr when the module of that name is imported."""
    command = [sys.executable, "-v", "-m", "minillm", "generate", "", *endless]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert any(after.encode() in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == b""
    assert b"Traceback" not in err


@POSIX
def test_a_closed_pipe_is_quiet(endless: list[str]) -> None:
    with start("generate", "", *endless) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        process.stdout = None
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 141
    assert len(err.splitlines()) <= 2, "the line of facts, and perhaps the warning about the trained length"
    assert b"Traceback" not in err


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    import pty

    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def read_until(terminal: int, wanted: str, key: bytes = b"", seconds: float = 60) -> str:
    """What a program writes on a terminal, up to and with `wanted`; `key` is pressed now, and after every silent second
    (a signal that comes just before the line editor waits for keys is noticed with the next one).
    """
    os.write(terminal, key)
    shown, deadline = b"", time.monotonic() + seconds
    while wanted.encode() not in shown:
        assert time.monotonic() < deadline, shown.decode(errors="replace")
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096)
        else:
            os.write(terminal, key)
    return shown.decode(errors="replace")


@POSIX
def test_ctrl_c_stops_the_answer_and_not_the_chat(endless: list[str], terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    process = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, termios, sys; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
         "from minillm.cli.main import main; sys.exit(main(sys.argv[1:]))", "chat", *endless],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        read_until(ours, "> ")
        os.write(ours, b"Once upon a time\n")
        read_until(ours, "little")
        os.write(ours, b"\x03")
        assert "new tokens; seen" in " ".join(read_until(ours, "> ").split())
        os.write(ours, b"The dog\n")
        read_until(ours, ".")
        os.write(ours, b"\x03")
        read_until(ours, "> ")
        read_until(ours, "/quit or Ctrl-D ends", key=b"\x03")  # at the prompt
        assert process.poll() is None
        os.write(ours, b"/quit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
