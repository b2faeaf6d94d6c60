"""The lab's questions: what is asked, how it is scored, and that a fork, a batch or a resumed run change nothing."""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from minillm.cli.compare import SAMPLE
from minillm.cli.main import main
from minillm.errors import BudgetError, ConfigError, PromptError
from minillm.lab import compare
from minillm.lab.ask import ask, reader, rouge_l
from minillm.lab.cases import TEXT, Asked, Case, check_tasks, make_cases, read_cases
from minillm.lab.compare import FAMILIES, Contender, Grid, interval
from minillm.lab.store import Store
from minillm.lab.tables import markdown, table, to_csv
from minillm.lab.tasks import EVERY_TASK, STRESS, Prose
from minillm.llm import LLM
from minillm.results import Result

from .conftest import ROOT

MODEL = ROOT / "weights" / "minillm-recall"
POLICIES = ("window", "hashevict", "hashevict-plus", "h2o", "snapkv")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(str(MODEL), context=1)


@pytest.fixture(scope="module")
def prose() -> Prose:
    return Prose.of(SAMPLE)


def quiet(done: int, total: int) -> None:
    assert done <= total


@pytest.mark.parametrize("task", [*EVERY_TASK, TEXT])
def test_contexts_have_exactly_the_length_asked_for(task: str, llm: LLM, prose: Prose) -> None:
    tokenizer = llm.checkpoint.tokenizer
    made = list(make_cases(task, tokenizer, prose, tokens=400, seeds=range(3)))
    assert [len(case.context) for case in made] == [400] * 3
    assert made == list(make_cases(task, tokenizer, prose, tokens=400, seeds=range(3)))
    assert made[0] != made[1]
    for case in made:
        assert case.context[0] == tokenizer.bos_id
        for asked in case.questions:
            assert asked.prompt
            assert all(asked.answers)
            assert tokenizer.decode(asked.prompt).strip()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("task", ["keys", "values", "choice"])
def test_a_batch_of_forks_scores_as_each_question_read_alone(task: str, policy: str, llm: LLM, prose: Prose) -> None:
    made = [
        replace(case, questions=case.questions[:2])
        for case in make_cases(task, llm.checkpoint.tokenizer, prose, tokens=300, seeds=range(3))
    ]
    together = ask(reader(llm, llm.checkpoint.plan(budget=90, policy=policy, context=300, rows=3)), made)
    alone = reader(llm, llm.checkpoint.plan(budget=90, policy=policy, context=300))
    for case, scores in zip(made, together, strict=True):
        for asked, score in zip(case.questions, scores, strict=True):
            assert ask(alone, [Case(case.context, [asked])]) == [[score]]


def test_an_exact_answer_is_what_generation_says(llm: LLM, prose: Prose) -> None:
    """Teacher forcing and the decode loop agree on whether the greedy answer is the right one."""
    tokenizer = llm.checkpoint.tokenizer
    found = []
    for case in make_cases("keys", tokenizer, prose, tokens=300, seeds=range(4)):
        bounded = reader(llm, llm.checkpoint.plan(budget=150, policy="keydiff", context=300))
        scores = ask(bounded, [case])[0]
        for asked, score in list(zip(case.questions, scores, strict=True))[:4]:
            (answer,) = asked.answers
            said = bounded.generate(case.context + asked.prompt, max_tokens=len(answer), temperature=0, ignore_eos=True)
            assert isinstance(said, Result)
            assert (said.token_ids == answer) == bool(score)
            found.append(score)
    assert {0.0, 1.0} >= set(found)


def test_running_text_is_scored_as_score_does(llm: LLM, prose: Prose) -> None:
    (case,) = make_cases(TEXT, llm.checkpoint.tokenizer, prose, tokens=200, seeds=[1])
    bounded = reader(llm, llm.checkpoint.plan(budget=40, policy="window", context=200))
    ((ours,),) = ask(bounded, [case])
    whole, half = bounded.score(case.context), bounded.score(case.context[:101])
    expected = (whole.nats_per_token * 199 - half.nats_per_token * 100) / 99
    assert -ours == pytest.approx(expected, rel=1e-4)


def test_the_embedded_model_remembers_with_the_full_cache_and_random_does_not(llm: LLM, prose: Prose) -> None:
    """What makes the lab able to see: full near 100%, a random choice far from it."""
    grid = Grid(["needle", "keys", "choice", "arithmetic"], [Contender("random")], [0.1], contexts=4, rows=4, seeds=1)
    rows = {row.family: row for row in compare.run(llm, grid, prose, Store(None), quiet)}
    for name, least in (("retrieval", 0.95), ("choice", 0.8), ("arithmetic", 0.8)):
        assert rows[name].full >= least
        assert rows[name].difference < -0.3


def test_pathological_inputs_are_no_riddles_for_the_full_cache(llm: LLM, prose: Prose) -> None:
    """Each is reported by itself and counts in no mean; what a policy loses there is the policy's fault."""
    grid = Grid(check_tasks(list(STRESS)), [Contender("window")], [0.2], contexts=6, rows=6, seeds=1)
    rows = {row.family: row for row in compare.run(llm, grid, prose, Store(None), quiet)}
    assert list(rows) == list(STRESS)
    for row in rows.values():
        assert row.full >= 0.8
        assert row.difference < -0.3


def test_the_mean_is_of_the_papers_families(llm: LLM, prose: Prose) -> None:
    grid = Grid(["needle", "choice", "keys-first", "adversarial", TEXT], [Contender("window")], [0.3], contexts=2)
    *rows, mean = compare.run(llm, replace(grid, tokens=300), prose, Store(None), quiet)
    scored = [row for row in rows if row.family in FAMILIES]
    assert [row.family for row in scored] == ["retrieval", "choice"]
    assert mean.family == "mean"
    assert mean.difference == pytest.approx(fmean(row.difference for row in scored))


def test_tables_say_the_same(llm: LLM, prose: Prose) -> None:
    grid = Grid(["keys", TEXT], [Contender("window"), Contender("random,policy_seed=1")], [0.2, 0.5], contexts=2)
    rows = compare.run(llm, replace(grid, tokens=300), prose, Store(None), quiet)
    plain, page = list(table(rows)), list(markdown(rows))
    assert len(page) == 2 + 1 + 4  # head, full, policies by budgets
    assert len({line.count("|") for line in page}) == 1
    assert [len(line) for line in csv.reader(to_csv(rows))] == [9] * (1 + len(rows))
    for row in rows:
        scale, digits = (1, 3) if row.family == TEXT else (100, 1)
        cell = f"{scale * row.difference:+.{digits}f} ±{scale * row.interval:.{digits}f}"
        assert any(cell in line and row.policy in line for line in plain)
        assert any(cell in line and f"| {row.budget:.0%} | `{row.policy}` |" in line for line in page)


def test_bytes_are_equal_not_slots(llm: LLM, prose: Prose) -> None:
    grid = Grid(["keys"], [Contender("window")], [0.3], contexts=2, rows=2)
    (block,) = compare._blocks(llm, grid, prose)
    made = block.cases()

    def plan(name: str, equal: str) -> tuple[int, int]:
        found = compare._plan(llm, replace(grid, equal=equal), block, made, Contender(name), 0.3, 0)
        return found.slots, found.nbytes

    slots, held = plan("window", "bytes")
    assert slots == plan("window", "slots")[0] == math.floor(0.3 * 1024)
    for name in ("hashevict", "hashevict-plus", "h2o", "scissorhands", "snapkv"):
        fewer, theirs = plan(name, "bytes")
        assert fewer < slots
        assert theirs <= 1.01 * held
        assert plan(name, "slots")[0] == slots


def test_a_killed_run_goes_on_and_ends_the_same(llm: LLM, prose: Prose, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.jsonl"
    grid = Grid(["keys", TEXT], [Contender("window"), Contender("random")], [0.2], contexts=3, rows=2, seeds=2)
    first = compare.run(llm, grid, prose, Store(file), quiet)
    text = file.read_text("utf-8")
    lines = text.splitlines(keepends=True)
    assert len(lines) == 2 * 2 * (1 + 1 + 2)  # tasks, blocks; full, window, two seeds of random
    file.write_text("".join(lines[:5]) + lines[5][:40], "utf-8")  # a kill in the middle of a line
    assert compare.run(llm, grid, prose, Store(file), quiet) == first
    assert sorted(file.read_text("utf-8").splitlines()) == sorted(text.splitlines())
    before = file.stat().st_mtime_ns
    assert compare.run(llm, grid, prose, Store(file), quiet) == first
    assert file.stat().st_mtime_ns == before
    with (tmp_path / "bad.jsonl").open("w") as bad:
        bad.write("nonsense\n")
    with pytest.raises(ConfigError, match="line 1, is not a result"):
        Store(tmp_path / "bad.jsonl")


def test_differences_are_paired_and_clustered_by_context(llm: LLM, prose: Prose) -> None:
    store = Store(None)
    grid = Grid(["keys"], [Contender("random")], [0.2], contexts=3, rows=3, seeds=2)
    (row,) = compare.run(llm, grid, prose, store, quiet)
    full, *runs = store.found.values()
    differences = [fmean(fmean(run[i]) for run in runs) - fmean(full[i]) for i in range(3)]
    assert row.difference == pytest.approx(fmean(differences))
    assert row.contexts == 3
    assert row.questions == 36
    assert row.interval == pytest.approx(interval(differences))


def test_the_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0, 7.0, 11.0, 3.0]
    assert interval(values) == pytest.approx(2.5706 * 3.7238 / math.sqrt(6), rel=2e-3)  # t table, 5 degrees
    assert interval([1.0] * 40) == 0
    assert interval([3.0]) == 0


def test_a_users_own_file(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    lines = [
        {"context": "Code river gold. Code lake silver.", "prompt": " Code river", "answer": "gold"},
        {"context": "Code river gold. Code lake silver.", "prompt": " Code lake", "answer": "silver"},
        {"prompt": "Anna keeps lamp. Anna keeps", "choices": ["drum", "lamp"], "answer": "lamp"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    cases = read_cases(file, llm.checkpoint.tokenizer)
    assert [len(case.questions) for case in cases] == [2, 1]
    decode = llm.checkpoint.tokenizer.decode
    assert decode(cases[0].questions[1].prompt + cases[0].questions[1].answers[0]) == " Code lake silver"
    last = cases[1].questions[0]
    assert (decode(last.answers[0]), decode(last.answers[1]), last.right) == (" drum", " lamp", 1)
    grid = Grid([], [Contender("window")], [0.5], own={"mine": cases})
    (row,) = compare.run(llm, grid, None, Store(None), quiet)
    assert row.questions == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "text 'prompt'"),
        ('{"prompt": "a"}', "'answer' must be text"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "at least two"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "one of the 2 choices"),
        ('{"prompt": "a", "answer": "b", "context": 3}', "'context' must be text"),
        ("", "is empty"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(line, "utf-8")
    with pytest.raises(PromptError, match=message):
        read_cases(file, llm.checkpoint.tokenizer)


def test_cases_must_fit_each_other(llm: LLM) -> None:
    asked = Asked([5], [[6]])
    with pytest.raises(ConfigError, match="same number of questions"):
        ask(llm, [Case([1, 2], [asked]), Case([1, 2], [])])
    with pytest.raises(ConfigError, match="unknown task 'nothing'"):
        check_tasks(["nothing"])
    assert check_tasks(["retrieval", "keys", "text"]) == ["needle", "keys", "values", "hops", "common", "text"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "compare",
        "--model",
        str(MODEL),
        "--task",
        "keys",
        "--task",
        "text",
        "--policy",
        "window",
        "--policy",
        "random",
        "--tokens",
    ]
    command += ["300", "--contexts", "2", "--seeds", "1", "--budget", "0.2,0.5", "-o", str(tmp_path / "out")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "budget 0.2" in shown
    assert "window" in shown
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2
    assert main([*command, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [row["difference"] for row in again["rows"]] == [float(row["difference"]) for row in rows]
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == again["rows"]


def test_plots(tmp_path: Path, llm: LLM, prose: Prose) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the lab extra")
    from minillm.lab.plots import plot

    grid = Grid(["keys", TEXT], [Contender("window")], [0.2, 0.5], contexts=2, rows=2, tokens=300)
    rows = compare.run(llm, grid, prose, Store(None), quiet)
    plot(rows, [tmp_path / "a.png", tmp_path / "a.svg"], "title")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "retrieval" in (tmp_path / "a.svg").read_text("utf-8") or (tmp_path / "a.svg").stat().st_size > 5000
    assert len(list(to_csv(rows))) == 1 + len(rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "nonsense"], "unknown policy"),
        (["--policy", "window,oops"], "not NAME=VALUE"),
        (["--policy", "window,decay=1"], "no option decay"),
        (["--budget", "512MiB"], "fraction"),
        (["--task", "nonsense"], "unknown task"),
        (["--haystack", "/nowhere"], "no haystack"),
        (["--task", "keys", "--task-file", "x.jsonl"], "exclude"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err


def test_inference_mode_leaves_the_cache_usable(llm: LLM, prose: Prose) -> None:
    (case,) = make_cases("keys", llm.checkpoint.tokenizer, prose, tokens=200, seeds=[0])
    bounded = reader(llm, llm.checkpoint.plan(budget=60, context=200))
    ask(bounded, [case])
    assert bounded.generate("Once", max_tokens=3).usage.seen_tokens
    assert not torch.is_inference_mode_enabled()


def test_a_budget_too_small_for_a_policy_is_said_before_anything_is_computed(llm: LLM, prose: Prose) -> None:
    grid = Grid(["choice"], [Contender("window"), Contender("snapkv")], [0.5, 0.02], contexts=2, rows=2)
    store = Store(None)
    with pytest.raises(BudgetError, match=r"'snapkv' cannot be held to 0\.02 of 512 tokens .*leave it out"):
        compare.run(llm, grid, prose, store, quiet)
    assert not store.found


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    assert rouge_l(list("acd"), list("abc")) == pytest.approx(2 / 3)  # a c
    assert rouge_l(list("cba"), list("abc")) == pytest.approx(1 / 3)  # the order counts
    assert rouge_l(list("abcxyz"), list("abc")) == pytest.approx(2 / 3)  # so does what is said besides
    assert rouge_l([], ["a"]) == 0
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge_score comes with lm-eval, of the lab extra")
    theirs, draw = scorer.RougeScorer(["rougeL"]), random.Random(0)
    for _ in range(200):
        said, right = (
            draw.choices(["red", "blue", "green", "black", "white"], k=draw.randint(1, 12)) for _ in range(2)
        )
        found = theirs.score(" ".join(right), " ".join(said))["rougeL"].fmeasure
        assert rouge_l(said, right) == pytest.approx(found)


def test_a_summary_is_scored_by_recall_and_rouge_l(llm: LLM, prose: Prose, monkeypatch: pytest.MonkeyPatch) -> None:
    """All facts in the wrong order: recall alone would be 1."""
    (case,) = make_cases("summary", llm.checkpoint.tokenizer, prose, tokens=300, seeds=[0])
    (asked,) = case.questions
    right = llm.checkpoint.tokenizer.decode(asked.answers[0]).split()
    backwards = " ".join(word for at in range(len(right) - 3, -1, -3) for word in right[at : at + 3])
    plan = llm.checkpoint.plan(policy="full", context=400)
    for text, score in ((" ".join(right), 1.0), (backwards, (1 + 3 / 15) / 2)):
        monkeypatch.setattr("minillm.lab.ask._answers", lambda *_, text=text: [text])
        assert ask(reader(llm, plan), [case]) == [[pytest.approx(score)]]
