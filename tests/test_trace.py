"""What `trace` says was forgotten, and when, against watching the cache after every single token."""

from __future__ import annotations

import json
import sys
from array import array
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import BudgetError, ContextFullError, PromptError
from minillm.checkpoint import Checkpoint
from minillm.cli.main import main
from minillm.cli.trace import write
from minillm.errors import ConfigError
from minillm.generate import feed
from minillm.lab import trace as lab
from minillm.lab.trace import Eviction, most_tokens, script_json, trace
from minillm.llm import LLM
from minillm.slots import LayerCache

from .every_policy import EVERY_POLICY
from .helpers import tiny_model
from .tiny_checkpoint import write_checkpoint

HOSTILE = "a </script><script>alert(1)</script> <!-- b --> &amp; \u2028\u2029 \x1b[31m \u4f60\u597d \U0001f600\nend"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def double(folder: Path, config: dict[str, Any] | None = None, chunk: int = 16, **options: Any) -> LLM:
    """A tiny model in float64, with `config` changed and the cache's `options`."""
    checkpoint = Checkpoint.open(str(folder))
    checkpoint = replace(checkpoint, dtype=torch.float64, config=replace(checkpoint.config, **(config or {})))
    plan = checkpoint.plan(**options)
    return LLM(checkpoint, tiny_model(checkpoint.config, torch.float64), plan, chunk=chunk)


def text_of(length: int) -> Tensor:
    return torch.randint(290, (length,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


# --- against watching the cache ------------------------------------------------------------------------------------


def seen_by(layer: LayerCache, head: int, now: int) -> set[int]:
    """What the query at `now` sees, in plain Python."""
    found = set()
    for position in layer.positions[0, head].tolist():
        inside = layer.window is None or position > now - layer.window
        if position >= 0 and (inside or (layer.far and position < layer.retention.sinks)):
            found.add(position)
    return found


@torch.inference_mode()
def watched(llm: LLM, tokens: Tensor) -> list[list[list[int]]]:
    """The first query that does not see each token, one token at a time, through the whole life of every head."""
    cache, count = llm.cache, len(tokens)
    cache.reset()
    gone = [[[count] * count for _ in range(layer.positions.shape[1])] for layer in cache.layers]
    for now, _ in enumerate(feed(llm.model, cache, tokens[None], 1)):
        for index, layer in enumerate(cache.layers):
            for head, times in enumerate(gone[index]):
                seen = seen_by(layer, head, now)
                for position in range(now + 1):
                    if position not in seen:
                        times[position] = min(times[position], now)
                    else:
                        assert times[position] == count, "what was forgotten does not come back"
    return gone


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_times_are_exact_for_every_policy(policy: str, folder: Path) -> None:
    entry, tokens = EVERY_POLICY[policy], text_of(90)
    options: dict[str, Any] = {**entry.options, "policy": entry.name, "evict_every": 3}
    llm = double(folder, budget=24, **options)
    found = trace(llm, tokens)
    assert found.gone.tolist() == watched(llm, tokens)
    assert int(found.gone.min()) == 24, "the first eviction is that of the token that finds no slot"


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {"budget": 24, "evict_every": 1}),
        ({}, {"budget": 24, "evict_every": 7, "chunk": 3}),
        ({}, {"budget": 24, "kv_dtype": "int8"}),
        ({}, {"budget": 40, "layer_budget": "3,1", "evict_every": 3}),
        ({}, {"budget": 40, "layer_budget": "3,1"}),
        ({"sliding_windows": (16, None)}, {"budget": 24}),
        ({"sliding_windows": (30, 20)}, {"budget": 24, "sinks": 2, "policy": "random"}),
        ({"max_position_embeddings": 60}, {"budget": 40, "positions": "window", "sinks": 3}),
        ({"max_position_embeddings": 60}, {"budget": 90, "positions": "window", "policy": "l2"}),
        ({}, {"context": 150}),
        ({"sliding_windows": (16, None)}, {"context": 150}),
    ],
    ids=str,
)
def test_times_are_exact_for_every_kind_of_cache(folder: Path, config: dict[str, Any], options: dict[str, Any]) -> None:
    llm, tokens = double(folder, config, **options), text_of(150)
    found = trace(llm, tokens)
    assert found.gone.tolist() == watched(llm, tokens)
    live = [[len(seen_by(layer, head, 149)) for head in range(2)] for layer in llm.cache.layers]
    assert (found.gone == 150).sum(2).tolist() == live
    assert found.usage.kept_tokens == sum(map(sum, live)) / 4


def test_the_full_cache_forgets_nothing(folder: Path) -> None:
    found = trace(double(folder, context=60), text_of(60))
    assert found.gone.unique().tolist() == [60]
    assert found.shares(60).tolist() == [1.0] * 60
    assert found.last_evicted(60, 5) == []


def test_shares_and_the_last_evicted(folder: Path) -> None:
    llm = double(folder, budget=2)
    gone = torch.tensor([[[2, 3, 4, 4], [3, 2, 4, 4]], [[2, 4, 3, 4], [4, 4, 4, 4]]], dtype=torch.int32)
    found = replace(trace(llm, text_of(4)), gone=gone)
    assert found.shares(2).tolist() == [1.0, 1.0]
    assert found.shares(3).tolist() == [0.5, 0.75, 1.0]
    assert found.shares(4).tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found.last_evicted(2, 9) == []
    assert found.last_evicted(3, 9) == [Eviction(0, 2, 2), Eviction(1, 2, 1)]
    assert found.last_evicted(4, 2) == [Eviction(0, 3, 1), Eviction(1, 3, 1)]
    assert found.last_evicted(4, 9)[2] == Eviction(2, 3, 1)


def test_texts_are_the_text_cut_at_tokens(folder: Path) -> None:
    llm = double(folder, budget=24)
    found = trace(llm, llm.encode(HOSTILE, raw=True))
    assert "".join(found.texts) == HOSTILE
    assert (found.texts[0], found.pieces[0]) == ("", "<s>")
    cut = trace(llm, llm.encode("\u4f60", raw=True)[:2])
    assert "".join(cut.texts) == "\ufffd", "a character whose last bytes are missing is said to be"


def test_what_cannot_be_traced_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PromptError, match="nothing to forget"):
        trace(double(folder, budget=24), text_of(1))
    with pytest.raises(ContextFullError, match="never evicts"):
        trace(double(folder, budget=24, policy="full"), text_of(90))
    monkeypatch.setattr(lab, "MOST_TIMES", 4 * 50)
    assert most_tokens(2, 2) == 50
    with pytest.raises(BudgetError, match="51 tokens are more than the 50"):
        trace(double(folder, budget=24), text_of(51))


# --- the page ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The scripts of a page, the names of its elements, and every attribute that a browser could load something by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.links: list[str | None] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data


def times_in(data: dict[str, Any]) -> Tensor:
    times = array("H", b64decode(data["gone"]))
    if sys.byteorder == "big":
        times.byteswap()
    return torch.tensor(times.tolist(), dtype=torch.int32).view(data["layers"], data["kv_heads"], data["tokens"])


def test_the_page_carries_the_trace_and_no_text_gets_out_of_it(folder: Path) -> None:
    llm = double(folder, budget=24)
    found = trace(llm, llm.encode(HOSTILE, raw=True))
    text = found.to_html()
    page = Page(text)
    assert page.tags.count("script") == 2
    assert page.links == []
    assert "@@DATA@@" not in text
    assert not set(page.scripts[0]) & set("<>&\u2028\u2029")
    data = json.loads(page.scripts[0])
    assert "".join(data["texts"]) == HOSTILE
    assert torch.equal(times_in(data), found.gone)
    facts = found.to_dict()
    assert {name: data[name] for name in facts if name not in ("gone", "usage")} == {
        name: json.loads(json.dumps(facts[name])) for name in facts if name not in ("gone", "usage")
    }
    assert data["after"] == len(found.ids)
    assert json.loads(Page(found.to_html(7)).scripts[0])["after"] == 7


def test_the_longest_text_makes_a_page_of_some_megabytes(folder: Path) -> None:
    short = trace(double(folder, budget=24), text_of(50))
    for layers, kv_heads, count, limit in ((8, 4, 5_000, 1_000_000), (25, 8, most_tokens(25, 8), 12_000_000)):
        gone = torch.randint(count + 1, (layers, kv_heads, count), dtype=torch.int32)
        wide = replace(short, ids=[7] * count, texts=["word "] * count, pieces=["word"] * count, gone=gone)
        text = wide.to_html()
        assert len(text) < limit
        assert torch.equal(times_in(json.loads(Page(text).scripts[0])), gone)
    assert most_tokens(4, 2) == most_tokens(25, 8) == 20_000
    assert most_tokens(80, 8) == 6_250


def test_script_json_reads_back_what_was_written() -> None:
    data = {"</script>": ["<!--", "]]>", "&lt;", "\u2028", "\u2029", "\\u003c", '"']}
    text = script_json(data)
    assert json.loads(text) == data
    assert not set(text) & set("<>&\u2028\u2029")


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    write(path, b"old")
    (tmp_path / "link.html").symlink_to(path)

    def full(self: Path, target: Path) -> None:  # noqa: ARG001
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            write(path, b"new")
    assert path.read_bytes() == b"old"
    write(tmp_path / "link.html", b"new")
    assert path.read_bytes() == b"new"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link.html", "page.html"]


# --- the command ---------------------------------------------------------------------------------------------------

STORY = "the dog sat on the mat and the cat sat on the dog\nonce upon a time there was a little girl\n" * 3


@pytest.fixture
def command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, list[str]]]:
    """Run `trace` on a file of `text`: the status, what it printed, and the lines on stderr."""

    def call(text: str, *argv: str) -> tuple[int, str, list[str]]:
        (tmp_path / "text.txt").write_text(text, "utf-8")
        status = main(["trace", str(folder), "--file", str(tmp_path / "text.txt"), *argv])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return call


def test_the_page_and_the_data_from_the_command_line(command: Callable[..., Any], tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    status, out, err = command(STORY, "--budget", "0.3", "-o", str(page), "--json", "--at", "20")
    assert status == 0
    found, data = json.loads(out), json.loads(Page(page.read_text("utf-8")).scripts[0])
    assert out.count("\n") == 1
    assert times_in(data).tolist() == found["gone"]
    assert "".join(found["texts"]) == STORY
    assert (data["after"], data["cache"], data["ids"]) == (20, found["cache"], found["ids"])
    slots, count = found["cache"]["slots"], found["tokens"]
    assert slots == int(0.3 * count)
    assert {sum(time == count for time in head) for layer in found["gone"] for head in layer} <= set(range(slots + 1))
    facts = [line for line in err if "tokens/s" not in line]  # how far it is, on a slow machine
    assert f"wrote {page}" in facts[1]
    assert command(STORY, "--budget", "0.3", "-o", str(page))[1] == f"{page}\n"


def test_the_text_in_the_terminal(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    options = ("--budget", "20", "--policy", "window", "--sinks", "1", "--evict-every", "1", "--text")
    text = "the dog sat on the mat\n" * 5
    _, out, _ = command(text, *options, "--json", "--tokens", "30")
    assert out == ""  # both would print
    status, out, _ = command(text, *options, "--tokens", "30", "--at", "25")
    lines = out.splitlines()
    assert status == 0
    assert lines[0].startswith("after 25 of 30 tokens, held by (2 layers x 2 KV heads): . none")
    above, below = "".join(lines[2:8:2]), "".join(lines[3:8:2])
    assert above.startswith("[<s>]the dog")
    assert len(above) == len(below)
    assert set(below) == {"\u2588", "."}, "a window is the same for every head"
    held = below.split(".")
    assert held[0] == "\u2588" * len("[<s>]"), "the sink stays"
    assert lines[-5].startswith("evicted when token 24 came: 5 '")
    assert lines[-5].endswith("(by 4 of 4, 0% left)")
    assert len([line for line in lines if line.startswith("evicted")]) == 5  # 20 slots held by token 19
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[0;2m" in command(text, *options)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in command(text, *options)[1]
    capsys.readouterr()


def test_hostile_text_reaches_no_terminal(command: Callable[..., Any]) -> None:
    _, out, _ = command(HOSTILE, "--text")
    assert "\\x1b[31m" in out
    assert "\x1b" not in out
    assert "evicted so far: nothing" in out
    lines = out.splitlines()
    at = next(index for index, line in enumerate(lines) if "\u597d" in line)
    assert len(lines[at + 1]) == len(lines[at]) + 3, "wide characters have two shades below them"


@pytest.mark.parametrize(
    ("text", "options", "wanted"),
    [
        ("the dog", (), "say what to make of it"),
        ("the dog", ("--text", "--json"), "leave one of them out"),
        ("the dog", ("--json", "--at", "2"), "--at cannot take effect"),
        ("the dog", ("--text", "--at", "99"), "--at 99 is beyond the end"),
        ("the dog", ("--text", "--model", "other"), "two models were named"),
        ("the dog", ("--text", "--memory", "6GiB"), "does not count the record"),
        ("the dog", ("-o", "/"), "it is a folder"),
        ("the dog", ("-o", "no/such/folder/page.html"), "there is no folder"),
        ("", ("--text",), "nothing to forget"),
        ("the dog " * 40, ("--text", "--budget", "9", "--on-overflow", "error"), "--on-overflow is error"),
    ],
)
def test_mistakes_are_one_line(command: Callable[..., Any], text: str, options: tuple[str, ...], wanted: str) -> None:
    status, out, err = command(text, *options)
    assert status == 2
    assert out == ""
    assert wanted in err[-1]


def test_too_long_a_text_is_refused_with_the_remedy(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "MOST_TOKENS", 12)
    for options in ((), ("--tokens", "13")):
        status, _, err = command(STORY, "--text", "--budget", "9", *options)
        assert status == 2
        assert "longer than the 12 tokens" in err[-1]
        assert "--tokens 12" in err[-1]
    status, out, err = command(STORY, "--json", "--budget", "9", "--tokens", "12")
    assert json.loads(out)["tokens"] == 12
    assert "only the first 12 tokens of the text are taken" in err[0]
