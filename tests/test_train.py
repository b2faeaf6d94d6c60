"""tools/train.py: it learns, it resumes exactly, what it exports is read alike by transformers and by us."""

from __future__ import annotations

import copy
import json
import math
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minillm.cache import KVCache
from minillm.eviction import Retention
from minillm.generate import feed
from minillm.lab.tasks import Prose
from minillm.loader import load_model, read_config, read_generation_defaults
from minillm.model import Transformer
from minillm.policies.full import Full
from minillm.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import train
import train_core
import train_tasks
import train_text
from train_export import SAMPLING

SHAPE = ["--vocab=320", "--hidden=32", "--layers=2", "--heads=2", "--kv-heads=1", "--intermediate=48"]
SHAPE += ["--context=32", "--batch=8"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 300 little stories."""
    draw = random.Random(0)
    stories = []
    for _ in range(300):
        who, what = draw.choice(["Tom", "Anna", "The cat", "A bird"]), draw.choice(["ball", "hat", "red box", "spoon"])
        where = draw.choice(["in the garden", "under the bed", "by the river"])
        stories.append(
            f"{who} had a {what}. One day the {what} was gone. {who} looked {where}, and there it was, "
            f"{draw.randint(1, 9)} steps from home. {who} was happy to have the {what} again."
        )
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(stories), "utf-8")
    return file


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 60 steps."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert train.main([str(run), "--data", str(text), *SHAPE, "--steps", "60"]) == 0
    return run


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_loss_falls_on_text_it_never_saw(trained: Path) -> None:
    training = [line["loss"] for line in log_of(trained) if "held_out" not in line]
    assert len(training) == 6
    assert training == sorted(training, reverse=True)
    (measured,) = [line for line in log_of(trained) if "held_out" in line]
    assert measured["loss"] < 0.5 * math.log(320)  # uniform guessing is log(320) = 5.77 nats


@pytest.mark.parametrize("threads", ["1", "2"])
def test_interrupted_run_ends_as_an_uninterrupted_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    arguments = ["--data", str(text), *SHAPE, "--steps", "12", "--threads", threads]
    assert train.main([str(tmp_path / "whole"), *arguments]) == 0

    step = train_core.Trainer.train_step

    def interrupted(self: train_core.Trainer, rows: Tensor) -> float:
        if self.step == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, rows)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(train_core.Trainer, "train_step", interrupted)
        assert train.main([str(tmp_path / "parts"), *arguments]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert log_of(tmp_path / "parts")[-1]["step"] == 5
    assert train.main([str(tmp_path / "parts"), *arguments, "--resume"]) == 0

    whole, parts = (load_file(tmp_path / run / "checkpoint.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert log_of(tmp_path / "whole")[-1] == log_of(tmp_path / "parts")[-1]


def test_export_means_the_same_to_transformers(trained: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = trained / "export"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config, tokenizer = read_config(folder), Tokenizer.from_folder(folder)
    ours = load_model(folder, config, dtype=torch.float32, device=torch.device("cpu"))

    ids = tokenizer.encode("Anna had a hat: 4 caf\u00e9s, \U0001f600.", bos=True)
    assert ids == their_tokenizer("Anna had a hat: 4 caf\u00e9s, \U0001f600.").input_ids
    assert ids[0] == tokenizer.bos_id == config.bos_token_id
    assert config.eos_token_ids == (their_tokenizer.eos_token_id,)
    assert tokenizer.decode(ids) == their_tokenizer.decode(ids, skip_special_tokens=True)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]  # [T, V]
    torch.testing.assert_close(logits(ours, ids), expected, atol=1e-4, rtol=0)
    assert read_generation_defaults(folder) == SAMPLING


def test_training_attention_is_that_of_the_engine(trained: Path) -> None:
    folder = trained / "export"
    model = load_model(folder, read_config(folder), dtype=torch.float64, device=torch.device("cpu"))
    ids = list(range(3, 27))
    expected = logits(model, ids)
    training = copy.deepcopy(model)
    for layer in training.model.layers:
        layer.self_attn.attend = train_core.causal
    torch.testing.assert_close(logits(training, ids), expected, atol=1e-12, rtol=0)


def logits(model: Transformer, ids: list[int]) -> Tensor:
    """[T, V], through the engine's own path."""
    cache = KVCache(model.config, Full(), Retention.of(64), dtype=model.model.norm.weight.dtype)
    with torch.inference_mode():
        return model.logits(torch.cat([hidden for _, hidden in feed(model, cache, torch.tensor([ids]), 64)], dim=1)[0])


def test_what_is_exported_is_the_mean_of_all_steps() -> None:
    recipe = train_core.Recipe([], 0.0, 40, 16, 1, 2, 1, 24, 8, 0.0, tied=True, batch=2, seed=0)
    trainer = train_core.Trainer(recipe, recipe.config(40, 0, 1), torch.device("cpu"), 1)
    rows = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    total = torch.zeros_like(trainer.model.model.norm.weight)
    for step in range(1, 11):
        trainer.train_step(rows)
        total += trainer.model.model.norm.weight.detach() * step * (step + 1) * (step + 2)
    share = sum(step * (step + 1) * (step + 2) for step in range(1, 11))
    torch.testing.assert_close(trainer.mean.model.norm.weight.detach(), total / share)


@pytest.fixture(scope="module")
def two_rows(text: Path) -> tuple[train_tasks.TaskRows, train_tasks.TaskRows]:
    """The same rows with questions, made twice."""
    (source,) = train_text.read_sources([str(text)], 0)
    tokenizer = train_text.train_tokenizer([*source.train, *train_tasks.WITH_TASKS], 600)
    recipe = train_core.Recipe([], 0.0, 600, 16, 1, 2, 1, 24, 512, 0.5, tied=True, batch=4, seed=3)
    documents, prose = train_text.encode(tokenizer, source.train), Prose("\n".join(source.train))
    one, other = (train_tasks.TaskRows(documents, tokenizer, prose, recipe) for _ in range(2))
    return one, other


@pytest.mark.parametrize("step", [0, train_tasks.GROW, 20 * train_tasks.GROW])
def test_rows_with_questions_follow_from_the_step_and_hold_their_answers(
    two_rows: tuple[train_tasks.TaskRows, train_tasks.TaskRows], step: int
) -> None:
    rows, others = two_rows
    tokenizer, batch = rows.tokenizer, rows.batch(step, 4)
    assert torch.equal(batch, others.batch(step, 4))
    assert not torch.equal(batch, rows.batch(step + 1, 4))
    count, length = batch.shape[0], batch.shape[1] - 1
    assert count * length == 4 * 512
    assert length == train_tasks.SHORTEST or step > 0
    asked = [tokenizer.decode(row.tolist()) for row in batch[count // 2 :]]
    assert all(any(word in row for word in ("Code", "Box", "Word", "keeps", "first")) for row in asked)
    assert not any("Code" in tokenizer.decode(row.tolist()) for row in batch[: count // 2])
    if step == 0:  # bare codes: what is asked was said before, with the same value
        facts = asked[0].split("Code ")[1:]
        told: dict[str, str] = {}
        for fact in facts[:4]:
            key, value = fact.split(".")[0].split()
            assert told.setdefault(key, value) == value


def test_a_run_with_questions_learns_and_resumes_exactly(text: Path, tmp_path: Path) -> None:
    shape = [*SHAPE, "--context=128", "--batch=2", "--tasks=0.5", "--data", str(text)]
    assert train.main([str(tmp_path / "whole"), *shape, "--steps", "6"]) == 0
    assert train.main([str(tmp_path / "parts"), *shape, "--steps", "3"]) == 0
    assert train.main([str(tmp_path / "parts"), *shape, "--steps", "6", "--resume"]) == 0
    whole, parts = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_card_says_what_happened(trained: Path) -> None:
    card = (trained / "export" / "README.md").read_text("utf-8")
    parameters = sum(tensor.numel() for tensor in load_file(trained / "export" / "model.safetensors").values())
    assert f"| {parameters:,} |" in card
    assert f"{60 * 8 * 32:,} tokens" in card
    assert f"| stories | {log_of(trained)[-1]['loss']:.3f} |" in card
    assert "--data" in card
    assert "> Once upon a time" in card


def test_every_token_is_predicted_once_a_pass_and_the_order_changes() -> None:
    documents = [torch.arange(start, start + 10, dtype=torch.int32) for start in range(0, 90, 10)]
    packed = train_text.PackedText(documents, context=8, seed=1)
    assert packed.rows == 11  # 90 tokens: 89 predictions, 11 rows of 8, one left over
    first, again, second = packed.batch(0, 11), packed.batch(0, 11), packed.batch(1, 11)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    predicted = first[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted) == 88
    assert torch.equal(first[1:, 0], first[:-1, -1])  # rows share a border
    assert torch.equal(torch.cat([packed.batch(step, 4) for step in range(3)])[:11], first)  # however it is cut


def test_held_out_documents_are_not_trained_on(text: Path) -> None:
    (source,) = train_text.read_sources([f"{text}@3"], 0.0)
    assert (len(source.train), len(source.held_out), source.times) == (285, 15, 3)
    assert source.train + source.held_out == train_text.read_documents(text)


def test_simplest_keeps_what_reads_like_the_first(text: Path) -> None:
    stories = train_text.read_documents(text)
    learned = "Epistemological considerations notwithstanding, jurisprudence presupposes categorical imperatives. " * 2
    assert train_text.simplest([learned, stories[0], learned], stories, len(stories[0]) / 1e6) == [stories[0]]
    assert train_text.simplest([learned, stories[0]], stories, 1.0) == [learned, stories[0]]


def test_markdown_is_cut_at_headings_and_stripped(tmp_path: Path) -> None:
    body = "\u201cIt\u2019s _late_,\u201d she said \u2014 and left\u2026 " * 4
    (tmp_path / "book.md").write_text(f"# Title: X\n\n## I\n\n{body}\n\n\n{body}\n\n### II\n\n{body}", "utf-8")
    plain = ('"It\'s late," she said -- and left... ' * 4).strip()
    assert train_text.read_documents(tmp_path) == [f"{plain}\n{plain}", plain]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "nowhere"], "no text there"),
        (["--data", "{empty}"], "no text there"),
        (["--data", "{latin}"], "not UTF-8 (byte 3)"),
        (["--data", "{single}"], "has 1 documents"),
        (["--data", "{text}@0"], "at least once"),
        (["--data", "{text}", "--data", "{text}"], "rename one of them"),
        (["--data", "{text}", "--heads", "3"], "do not divide evenly"),
        (["--data", "{text}", "--context", "100000"], "less than one row"),
        (["--data", "{text}", "--tokenizer", "nothing.json"], "no tokenizer nothing.json"),
        (["--data", "{text}", "--resume"], "holds no run"),
    ],
)
def test_mistakes_are_one_clear_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    places = {"text": text, "empty": tmp_path / "empty", "latin": tmp_path / "a.txt", "single": tmp_path / "b.txt"}
    places["empty"].mkdir()
    places["latin"].write_bytes(b"caf\xe9")
    places["single"].write_text("word " * 40, "utf-8")
    run = tmp_path / "run"
    assert train.main([str(run), *SHAPE, *(word.format(**places) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not run.exists()


def test_a_run_is_neither_overwritten_nor_resumed_with_other_options(
    trained: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(trained), "--data", str(text), *SHAPE]
    assert train.main([*arguments, "--steps", "60"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert train.main([*arguments, "--seed", "1", "--resume"]) == 2
    assert "seed was 0" in capsys.readouterr().err
