"""tools/reproduce.py: every experiment in its quick form, what it keeps read back, a second run that asks nothing."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

import pytest
import torch

from minillm.cli.compare import SAMPLE
from minillm.errors import PromptError
from minillm.lab import compare
from minillm.lab.tasks import STRESS, Prose
from minillm.llm import LLM

from .conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import reproduce

GRIDS = {  # families, budgets, policies
    "main": ({"retrieval", "choice", "arithmetic", "summary", "text", "mean"}, 1, 4),
    "curve": ({"retrieval", "choice", "text", "mean"}, 2, 3),
    "bits": ({"retrieval", "choice", "text", "mean"}, 1, 4),
    "nearest": ({"retrieval", "choice", "mean"}, 1, 6),
    "stress": (set(STRESS), 1, 7),
    "sizes": ({"retrieval", "choice", "text", "mean"}, 1, 4),
}
MEASURED = ("nearest/codes", "diagnose/30%", "speed")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where everything is kept, and what was printed, by `all --quick` in a process of its own."""
    folder = tmp_path_factory.mktemp("reproduce")
    command = [sys.executable, str(ROOT / "tools" / "reproduce.py"), "all", "--quick", "--threads", "1"]
    done = subprocess.run([*command, "--output", str(folder)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if not re.match(r"minillm: .* left$|minillm: no plots", line)]
    assert said == [], "progress and nothing else on stderr"
    return folder, done.stdout


def records(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", GRIDS)
def test_a_grid_is_whole_and_its_files_agree(experiment: str, quick: tuple[Path, str]) -> None:
    folder, shown = quick[0] / experiment, quick[1]
    families, budgets, policies = GRIDS[experiment]
    rows = records(folder / "table.csv")
    assert {row["family"] for row in rows} == families
    assert len(rows) == len(families) * budgets * policies
    part = shown.split(f"\n{experiment}\n")[1]
    page = (folder / "table.md").read_text("utf-8").splitlines()
    for row in rows:
        score, full, difference, interval = (float(row[name]) for name in ("score", "full", "difference", "interval"))
        assert score - full == pytest.approx(difference, abs=1e-9)
        assert interval >= 0
        if row["family"] == "text":
            assert -6 < full < -1, "nats per token"
            continue
        assert full >= 0.8, "the full cache knows what is asked"
        assert 0 <= score <= 1
        cell = f"{100 * difference:+.1f} ±{100 * interval:.1f}"
        assert cell in part
        name = row["policy"].split(", ")[0]  # in `sizes` the model stands beside it
        assert any(cell in line and f"| {float(row['budget']):.0%} | `{name}` |" in line for line in page)
    whole = json.loads((folder / "table.json").read_text("utf-8"))
    assert [[str(value) for value in row.values()] for row in whole] == [list(row.values()) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", MEASURED)
def test_measures_are_numbers_and_printed_as_they_are_kept(experiment: str, quick: tuple[Path, str]) -> None:
    folder, shown = quick[0] / experiment, quick[1]
    assert (folder / "table.txt").read_text("utf-8") in shown
    assert json.loads((folder / "table.json").read_text("utf-8"))
    rows = records(folder / "table.csv")
    numbers = [{name: float(value) for name, value in list(row.items())[1:]} for row in rows]
    assert all(math.isfinite(value) for row in numbers for value in row.values())
    labels = [next(iter(row.values())) for row in rows]
    by_label = dict(zip(labels, numbers, strict=True))
    if experiment == "speed":
        assert labels == ["full", *compare.POLICY_LIST]
        assert all(value > 0 for row in numbers for value in row.values())
        assert (by_label["window"]["prefill_ratio"], by_label["window"]["decode_ratio"]) == (1, 1)
    elif experiment == "nearest/codes":
        assert by_label["q . k"]["correlation"] == pytest.approx(1, abs=1e-6)
        assert {(row["variant"], row["bits"]) for row in rows} >= {("plain", "16"), ("centred", "64")}
    else:
        assert {"random", "window", "hashevict", "hashevict-plus"} < set(labels)
        assert all(row["least"] <= row["lost"] + 1e-6 for row in numbers)
        assert by_label["random"]["won"] == 0


@pytest.mark.slow
def test_every_experiment_is_drawn(quick: tuple[Path, str]) -> None:
    pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib, of the lab extra")
    for experiment in (*GRIDS, *MEASURED):
        folder = quick[0] / experiment
        assert (folder / "plot.png").read_bytes()[:4] == b"\x89PNG"
        assert ElementTree.parse(folder / "plot.svg").getroot().tag.endswith("svg")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", GRIDS)
def test_a_second_run_asks_nothing(
    experiment: str, quick: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*_: object) -> NoReturn:
        raise AssertionError("this is known already")

    monkeypatch.setattr(compare, "ask", asked)
    if experiment == "nearest":
        monkeypatch.setattr(reproduce.Bench, "keep", lambda *_: None)
    kept = {file: file.read_bytes() for file in (quick[0] / experiment).iterdir() if file.suffix in {".jsonl", ".csv"}}
    assert len(kept) == 2
    assert reproduce.main([experiment, "--quick", "--threads", "1", "--output", str(quick[0])]) == 0
    assert capsys.readouterr().out.rstrip("\n") in quick[1]
    assert {file: file.read_bytes() for file in kept} == kept


def test_several_models_have_tables_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo model cannot answer: its full cache must not be taken for the other's."""
    monkeypatch.setattr(reproduce.Bench, "few", ("keys",))
    models = ["--model", "minillm-recall", "--model", "minillm-demo", "--contexts", "1"]
    assert reproduce.main(["sizes", "--quick", *models, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^full, itself +([\d.]+)", shown, re.MULTILINE) == ["100.0", "0.0"]
    rows = records(tmp_path / "sizes" / "table.csv")
    assert len(rows) == 2 * 2 * 4
    assert {row["policy"].split(", ")[1] for row in rows} == {"minillm-recall", "minillm-demo"}
    page = (tmp_path / "sizes" / "table.md").read_text("utf-8")
    assert page.count("`full`, itself") == 2


def test_the_sample_is_long_enough_for_every_experiment() -> None:
    """Of 1,024 tokens, as diagnose reads; speed may read it twice."""
    llm = LLM.load("minillm-recall", context=1)
    bench = reproduce.Bench(reproduce.parse(["all"]), Prose.of(SAMPLE), {"it": llm})
    once, twice = bench.text(1024), bench.text(2112, repeated=True)
    assert (len(once), len(twice)) == (1024, 2112)
    assert torch.equal(once, twice[:1024])
    with pytest.raises(PromptError, match="of 2,112 that are needed"):
        bench.text(2112)


@pytest.mark.slow
def test_without_matplotlib_everything_but_the_plots_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert reproduce.main(["diagnose", "--quick", "--output", str(tmp_path)]) == 0
    assert [file.name for file in sorted((tmp_path / "diagnose" / "30%").iterdir())] == [
        "table.csv",
        "table.json",
        "table.txt",
    ]
    assert "no plots, for they need matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["main", "--contexts", "0"], "must be a whole number of at least 1"),
        (["main", "--model", "a", "--model", "b"], "main takes one --model; several are for sizes"),
        (["main", "--model", "./nowhere"], "nowhere does not exist"),
        (["main", "--haystack", "/nowhere"], "no haystack at"),
        (["diagnose", "--haystack", "{short}"], "give a longer --haystack"),
        (["main", "--quick", "--output", "{file}"], "short.txt is a file; name a folder"),
        (["main", "--quick", "--output", "{file}/deeper"], "cannot keep results in"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("\n".join(f"This is sentence number {n}." for n in range(20)), "utf-8")
    words = [word.format(short=short, file=short) for word in words]
    try:
        status = reproduce.main(words)
    except SystemExit as stop:  # argparse
        status = int(stop.code or 0)
    assert status == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert "Traceback" not in error
