"""The command line around the model: help, mistakes, signals, options, text input, and what needs no weights."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import minillm
from minillm.cli import main as cli
from minillm.cli.options import add_cache_options, add_model_options, add_sampling_options, sampling_from_args
from minillm.cli.prompt_text import PIECE_BYTES, add_text_options, decode_utf8, read_text
from minillm.cli.tokens import printable
from minillm.errors import BudgetError, PromptError, SamplingError
from minillm.shard import ALONE

SHELL = [sys.executable, "-m", "minillm"]


def one_line(stderr: str, start: str = "minillm: error: ") -> str:
    assert stderr.startswith(start)
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    return stderr.removeprefix(start)


@pytest.fixture
def fake_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], int]:
    """Runs a function in the place of a command, through the real `main`."""

    def call(body: Callable[[], int]) -> int:
        parser = argparse.ArgumentParser()
        parser.set_defaults(run=lambda _: body())
        monkeypatch.setattr(cli, "build_parser", lambda: parser)
        return cli.main([])

    return call


# --- help and mistakes ---------------------------------------------------------------------------------------------


def test_help_names_every_command_without_importing_torch() -> None:
    code = "import sys; from minillm.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    started = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    print(f"minillm --help: {time.perf_counter() - started:.3f} s")
    text, modules = answer.stdout.rstrip().rsplit("\n", 1)
    assert [line.split()[0] for line in text.splitlines() if line.startswith("    ")] == list(cli.COMMANDS)
    assert "'minillm.cli.generate'" in modules
    for heavy in ("torch", "tokenizers", "sentencepiece", "huggingface_hub", "jinja2"):
        assert f"'{heavy}'" not in modules


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["generat"], "generate"),
        (["tokens", "--modle", "x"], "--modle"),
        (["tokens", "--mod", "x"], "--mod"),
        (["pull"], "MODEL"),
        (["tokens", "x", "--model", "no-such-model"], "no-such-model"),
        (["tokens", "--file", "no-such-file.txt"], "no-such-file.txt"),
        (["tokens", "--file", "."], "folder"),
        (["tokens", "x", "--file", "y"], "leave one"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in one_line(captured.err)


def test_version_and_help_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"minillm {minillm.__version__}\n"
    assert cli.main(["info", "--help"]) == 0


def test_errors_warnings_and_ctrl_c_become_lines_and_statuses(
    fake_command: Callable[[Callable[[], int]], int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(error: BaseException) -> Callable[[], int]:
        def body() -> int:
            raise error

        return body

    def warn() -> int:
        warnings.warn("first\nsecond", stacklevel=1)
        return 0

    assert fake_command(fail(BudgetError("budget 0 is\nnothing"))) == 2
    assert one_line(capsys.readouterr().err) == "budget 0 is nothing\n"
    assert fake_command(lambda: len((tmp_path / "gone").read_bytes())) == 2
    assert one_line(capsys.readouterr().err) == f"{tmp_path / 'gone'}: No such file or directory\n"
    assert fake_command(fail(OSError("disk full"))) == 2
    assert one_line(capsys.readouterr().err) == "disk full\n"
    assert fake_command(fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        fake_command(lambda: 1 // 0)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert fake_command(warn) == 0
    assert one_line(capsys.readouterr().err, "minillm: warning: ") == "first second\n"
    assert warnings.showwarning is before


def process_that_runs(body: str) -> subprocess.Popen[bytes]:
    """A process in which the real `main` runs an expression in the place of a command."""
    code = f"""if True:
        import argparse, sys, time
        from minillm.cli import main as cli
        parser = argparse.ArgumentParser()
        parser.set_defaults(run=lambda _: {body})
        cli.build_parser = lambda: parser
        sys.exit(cli.main([]))
    """
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("body", ["print('short') or 0", "print('long' * 100_000) or 0"])
def test_a_closed_pipe_is_quiet(body: str) -> None:
    with process_that_runs(body) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 141


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_is_quiet() -> None:
    with process_that_runs("print('ready', flush=True) or time.sleep(60)") as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"ready"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 130


def test_output_is_utf8_on_a_terminal_that_is_not() -> None:
    code = "import sys; from minillm.cli.main import _use_utf8; _use_utf8(); print('é€😀', '\\udc80')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert answer.stdout.decode() == "é€😀 \\udc80" + os.linesep


# --- text input ----------------------------------------------------------------------------------------------------


def text_args(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_text_options(parser)
    return parser.parse_args(argv, argparse.Namespace(team=ALONE))


class Dripping(io.RawIOBase):
    """A stream that gives at most `step` bytes at a time, as a pipe may."""

    def __init__(self, data: bytes, step: int) -> None:
        self.data, self.step = data, step

    def read(self, size: int = -1) -> bytes:
        size = min(self.step, size)
        piece, self.data = self.data[:size], self.data[size:]
        return piece


@pytest.mark.parametrize("step", [1, 2, 3, 7, PIECE_BYTES])
def test_decoding_does_not_depend_on_how_the_bytes_arrive(step: int) -> None:
    text = "naïve €uro 😀\r\nline\ttwo"
    assert "".join(decode_utf8(Dripping(text.encode(), step), "x")) == text  # type: ignore[arg-type]
    for bad, offset in ((b"abc\xff", 3), ("é😀".encode() + b"\xe2\x82", 6), (b"a\xf0\x9f\x98b", 1)):
        with pytest.raises(PromptError, match=rf"^x is not UTF-8 \(byte {offset}\)"):
            list(decode_utf8(Dripping(bad, step), "x"))  # type: ignore[arg-type]


def test_text_from_argument_file_and_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "é" * PIECE_BYTES + "\r\nend"
    path = tmp_path / "long.txt"
    path.write_bytes(long.encode())
    assert list(read_text(text_args("a b"))) == ["a b"]
    pieces = list(read_text(text_args("--file", str(path))))
    assert "".join(pieces) == long
    assert max(map(len, pieces)) <= PIECE_BYTES
    for argv in ((), ("-",)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from stdin")))
        assert "".join(read_text(text_args(*argv))) == "from stdin"


def test_text_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PromptError, match="not UTF-8: character 1"):
        read_text(text_args("a\udcff"))
    (tmp_path / "latin1.txt").write_bytes("voilà".encode("latin-1"))
    with pytest.raises(PromptError, match=r"latin1\.txt is not UTF-8 \(byte 4\)"):
        list(read_text(text_args("--file", str(tmp_path / "latin1.txt"))))

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(PromptError, match="no text was given"):
        read_text(text_args())


# --- options -------------------------------------------------------------------------------------------------------


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_model_options(parser)
    add_cache_options(parser)
    add_sampling_options(parser)
    return parser.parse_args(argv)


def test_defaults_of_the_checkpoint_apply_where_nothing_was_given() -> None:
    params = sampling_from_args(parse("--top-p", "0.5", "--seed", "7"), {"temperature": 0.6, "top_p": 0.9, "top_k": 20})
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.6, 0.5, 20, 7)
    assert sampling_from_args(parse(), {}) == minillm.SamplingParams()
    greedy = sampling_from_args(parse("--temperature", "0"), {"temperature": 0.6, "top_p": 0.9})
    assert greedy.temperature == 0


def test_every_sampling_option_arrives() -> None:
    argv = "--temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2"
    argv += " --frequency-penalty 0.3 --logit-bias 4:-1.5 --logit-bias 5:2 --stop a --stop b --stop-token-id 6"
    argv += " --stop-token-id 7 --ignore-eos --min-tokens 1 --max-tokens 9 --logprobs 2 --seed 8"
    assert sampling_from_args(parse(*argv.split()), {}) == minillm.SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={4: -1.5, 5: 2.0},
        seed=8,
        stop=("a", "b"),
        stop_token_ids=(6, 7),
        ignore_eos=True,
        min_tokens=1,
        max_tokens=9,
        logprobs=2,
    )


def test_options_that_cannot_be_or_cannot_take_effect() -> None:
    with pytest.raises(SamplingError, match=r"--top-k and --min-p cannot take effect at temperature 0"):
        sampling_from_args(parse("--top-k", "5", "--min-p", "0.1"), {})
    with pytest.raises(SamplingError, match="temperature -1"):
        sampling_from_args(parse("--temperature", "-1"), {})
    for bad in (("--logit-bias", "5"), ("--logit-bias", "a:1"), ("--chunk", "0"), ("--threads", "-2")):
        with pytest.raises(argparse.ArgumentError, match=bad[0]):
            parse(*bad)
    assert parse().budget is None
    assert parse("--policy", "anything").policy == "anything"  # the registry of policies judges, not the parser


# --- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_folder(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


def test_tokens_prints_ids_and_pieces(tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", str(tokenizer_folder))
    assert cli.main(["tokens", "Once upon\n😀", *model]) == 0
    lines = capsys.readouterr().out.splitlines()
    ids = [int(line.split("\t")[0]) for line in lines]
    assert ids[0] == 1
    assert all(line.split("\t")[1].isprintable() for line in lines)
    assert cli.main(["tokens", "Once upon\n😀", "--no-bos", "--json", *model]) == 0
    answer = capsys.readouterr().out
    assert answer.count("\n") == 1
    assert json.loads(answer)["token_ids"] == ids[1:]
    assert len(json.loads(answer)["pieces"]) == len(ids) - 1


def test_tokens_in_a_pipeline(
    tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["tokens", "-", "--model", str(tokenizer_folder)]
    answer = subprocess.run([*SHELL, *command], capture_output=True, check=True, input=b"Once upon a time", timeout=120)
    assert answer.stderr == b""
    assert [int(line.split(b"\t")[0]) for line in answer.stdout.splitlines()] == [1, 403, 407, 261, 378]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert cli.main(command) == 2
    assert "stdin is not UTF-8 (byte 2)" in one_line(capsys.readouterr().err)


def test_a_piece_stays_on_its_line() -> None:
    assert printable("▁a b\n\t\u2028\udc80é") == "▁a b\\n\\t\\u2028\\udc80é"


def test_pull_of_an_unknown_name_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pull", "mistral-7c"]) == 2
    assert "mistral-7b" in one_line(capsys.readouterr().err)


def test_info_for_people_and_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from minillm.backends import native
    from minillm.loader import cpu_has_bfloat16

    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"]["cpu"]["cores"] == os.cpu_count()
    assert len(facts["devices"]["cuda"]) == torch.cuda.device_count()
    serving = facts["backends"]
    runs = native.missing() is None and cpu_has_bfloat16()
    assert ("native.c" in serving["attention, one token"]) == runs
    assert serving["native.c"] == "runs here" or serving["native.c"].startswith("does not run: ")
    assert all(serving.values())
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"minillm {minillm.__version__}" in " ".join(text.split())
    assert not set("{}[]") & set(text)
