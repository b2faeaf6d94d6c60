"""What the README tells people to type works: every command and every snippet is run, or at least understood."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.cli.main import COMMANDS, build_parser, main

from .conftest import ROOT
from .serving import serving

README = (ROOT / "README.md").read_text("utf-8")


def blocks(mark: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks that follow `<!-- mark -->`."""
    return re.findall(rf"<!-- {re.escape(mark)} -->\n```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def commands(mark: str) -> list[str]:
    return [line for language, text in blocks(mark) if language == "bash" for line in text.splitlines() if line.strip()]


@pytest.mark.filterwarnings("default:the sequence is now longer")  # shown to users: the demo knows 512 tokens
@pytest.mark.parametrize("line", commands("readme: run"))
def test_commands_run(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello.\n/stats\n"))  # for chat
    words = shlex.split(line, comments=True)
    assert words[0] == "minillm"
    assert main(words[1:]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", commands("readme: needs the hub"))
def test_commands_for_the_hub_are_understood(line: str) -> None:
    assert build_parser().parse_args(shlex.split(line, comments=True)[1:]).run


def test_snippets_run(tmp_path: Path) -> None:
    snippets = [text for language, text in blocks("readme: run") if language == "python"]
    assert snippets
    for text in snippets:
        done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "kept_tokens=" in done.stdout


def test_the_server_answers_as_the_readme_says(tmp_path: Path) -> None:
    (start,) = commands("readme: serve")
    questions = commands("readme: ask the server")
    snippets = [text for language, text in blocks("readme: ask the server") if language == "python"]
    assert questions
    assert snippets
    words = shlex.split(start)
    assert words[:2] == ["minillm", "serve"]
    words[words.index("--sessions") + 1] = str(tmp_path / "sessions")
    with serving(*words[2:]) as served:
        for line in questions:
            asked = shlex.split(line.replace("http://127.0.0.1:8000", served.url))
            if shutil.which(asked[0]) is None:
                print(f"not run, {asked[0]} is not installed: {line}")
                continue
            done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 0, done.stderr
            assert "error" not in done.stdout
            assert len(done.stdout) > 20
        for text in snippets:
            text = text.replace("http://127.0.0.1:8000", served.url)
            done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert "completion_tokens=40" in done.stdout


@pytest.mark.parametrize("line", commands("readme: several processes"))
def test_commands_run_in_several_processes(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] == "torchrun"
    command, quiet = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone"],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    done = subprocess.run([*command, *words[1:]], cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20


def test_no_block_is_left_out_and_every_command_is_shown() -> None:
    marks = ("readme: run", "readme: needs the hub", "readme: serve", "readme: ask the server", "ci: main", "ci: test")
    marks += ("readme: several processes",)
    marked = sum(len(blocks(mark)) for mark in marks)
    assert marked == README.count("```") // 2
    shown = {shlex.split(line)[1] for mark in marks[:3] for line in commands(mark)}
    assert shown == set(COMMANDS)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / Path(target)).exists(), target
