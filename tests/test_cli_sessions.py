"""Sessions as users have them: `generate --session FILE`, and /save, /load and /pin in `chat`, in real processes."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minillm import LLM, SamplingParams
from minillm.cli.main import main
from minillm.conversation import Conversation

from .tiny_checkpoint import write_checkpoint

TEXTS = ("the dog sat on the mat", "and the cat sat on the dog", "once upon a time")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "talker", template=True)


def command(model: Path, *words: object) -> list[str]:
    options = ["--model", str(model), "--budget", "40", "--threads", "1", "--ignore-eos", "--max-tokens", "12"]
    return [sys.executable, "-m", "minillm", str(words[0]), *options, *map(str, words[1:])]


def run(model: Path, *words: object, text: str | None = None, status: int = 0) -> tuple[str, str]:
    """A process of its own: stdout and stderr."""
    done = subprocess.run(command(model, *words), input=text, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def test_generate_goes_on_with_a_session(tiny: Path, tmp_path: Path) -> None:
    """Three processes, the last of them without a text, say what one session says; the sampling is remembered."""
    file = tmp_path / "story.session"
    found = []
    for words in ((TEXTS[0], "--temperature", 1, "--seed", 3, "--repetition-penalty", 1.2), (TEXTS[1],), ("",)):
        out, err = run(tiny, "generate", *words, "--session", file, "--json")
        found.append(json.loads(out))
        assert f"saved to {file}" in err
    assert re.search(rf"session {file} goes on behind \d+ tokens", err)
    rules = SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.2, ignore_eos=True, max_tokens=12)
    session = LLM.load(str(tiny), budget=40).session(rules)
    expected = [session.generate(prompt).finish() for prompt in (*TEXTS[:2], None)]
    assert [result["token_ids"] for result in found] == [result.token_ids for result in expected]
    assert [result["text"] for result in found] == [result.text for result in expected]
    assert found[-1]["usage"]["seen_tokens"] == expected[-1].usage.seen_tokens > 40
    assert [path.name for path in tmp_path.iterdir()] == ["story.session"]


def test_only_the_new_turn_is_fed(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, found = tmp_path / "talk.session", []
    for words in ((TEXTS[0], "--system", "be kind", "--pin-system"), *TEXTS[1:]):
        words = (words,) if isinstance(words, str) else words
        assert main(command(talker, "generate", *words, "--session", file, "--json")[3:]) == 0
        found.append(json.loads(capsys.readouterr().out))
    talk = Conversation(LLM.load(str(talker), budget=40), system="be kind", pin_system=True)
    expected = [talk.send(text, ignore_eos=True, max_tokens=12).finish() for text in TEXTS]
    assert [result["token_ids"] for result in found] == [result.token_ids for result in expected]
    assert found[2]["usage"]["prompt_tokens"] == expected[2].usage.prompt_tokens < 30


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--budget", "41"), r"slots 40 \(here 41\)"),
        (("--policy", "window"), r"policy hashevict-plus \(here window\)"),
        (("--chunk", "32"), r"chunk 256 \(here 32\)"),
        (("--dtype", "bfloat16"), r"dtype float32 \(here bfloat16\)"),
        (("--system", "be rude"), "began with another system message"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_file_stays(
    words: tuple[str, ...], says: str, talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.session"
    assert main(command(talker, "generate", "hello", "--system", "be kind", "--session", file)[3:]) == 0
    before = file.read_bytes()
    assert main(command(talker, "generate", "hello", "--session", file, *words)[3:]) == 2
    assert re.search(says, capsys.readouterr().err)
    assert file.read_bytes() == before


def test_a_place_that_cannot_be_written_is_refused_at_once(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tmp_path, tmp_path / "none" / "a.session"):
        assert main(command(tiny, "generate", "hello", "--session", file)[3:]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "no file that could be written" in err
    assert main(command(tiny, "generate", "hello", "--pin-system")[3:]) == 2
    assert "add --session" in capsys.readouterr().err


@POSIX
def test_ctrl_c_saves_what_there_is(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest then follows as if nothing had happened."""
    file = tmp_path / "a.session"
    words = command(tiny, "generate", TEXTS[0], "--session", file, "--max-tokens", "1000000")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        begun = process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"interrupted; " in err
    assert b"Traceback" not in err
    session = LLM.load(str(tiny), budget=40).session(ignore_eos=True)
    drawn = len(begun + out)
    whole = session.generate(TEXTS[0], max_tokens=drawn).finish().token_ids
    assert main(command(tiny, "generate", "", "--session", file, "--json")[3:]) == 0
    saved = json.loads(capsys.readouterr().out)
    start = saved["usage"]["seen_tokens"] - 11 - (session.seen - drawn + 1)
    assert 10 < start < drawn
    assert saved["token_ids"] == whole[start : start + 12]


def test_chat_saves_and_loads(talker: Path, tmp_path: Path) -> None:
    """One conversation, or the same one in two processes."""
    file = tmp_path / "talk.session"
    options = ("chat", "--system", "be kind", "--pin-system")
    whole = run(talker, *options, text="\n".join([TEXTS[0], f"/pin {TEXTS[1]}", TEXTS[2], "/stats"]))
    first = run(talker, *options, text="\n".join([TEXTS[0], f"/pin {TEXTS[1]}", f"/save {file}"]))
    second = run(talker, "chat", text="\n".join(["something else", f"/load {file}", TEXTS[2], "/stats"]))
    assert re.search(rf"saved to {file}, [\d.]+ KiB; seen \d+", first[1])
    assert f"goes on from {file}" in second[1]
    assert whole[1].splitlines()[-1] == second[1].splitlines()[-1]
    answers = whole[0].splitlines(), first[0].splitlines(), second[0].splitlines()
    assert answers[1] + answers[2][len(answers[2]) - (len(answers[0]) - len(answers[1])) :] == answers[0]


def test_chat_names_what_goes_wrong_and_goes_on(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = f"{tmp_path}/none/a"
    lines = [f"/save {file}", TEXTS[0], f"/save {file}", f"/load {file}", "/save", "/pin", "/pin " + "dog " * 60]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(command(talker, "chat")[3:]) == 0
    out, err = capsys.readouterr()
    for says in (
        "nothing to save: the session has not begun",
        "cannot be written: No such file or directory",
        "no such file; name a saved session",
        "unknown command /save:",
        "unknown command /pin:",
        "pinned tokens do not fit",
    ):
        assert says in err
    assert out.strip()
