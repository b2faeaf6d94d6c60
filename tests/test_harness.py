"""The model for lm-evaluation-harness, with the real package: its numbers against naive computations, and its command.

Everything is local: tasks are yaml files over json lines in a temporary folder.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import LLM, ConfigError, ContextFullError, PromptError
from minillm.checkpoint import Checkpoint

from .conftest import ROOT
from .tiny_checkpoint import write_checkpoint

DEMO = str(ROOT / "weights" / "minillm-demo")
STORY = (
    "Once upon a time there was a little girl who lived in a house near the river with her mother and her old dog. "
    "Every morning she walked along the river and looked for stones, and the dog walked beside her. One day"
)
CHOICES = [
    " the dog found a stone.",
    " it rained.",
    " she could not find her dog anywhere, and she began to cry.",
    " a",
]
GREEDY = {"until": [], "max_gen_toks": 24, "do_sample": False}

Requests = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def lm() -> Callable[..., Any]:
    """Makes the model as lm_eval does, from arguments, on the demo's weights."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'minillm[lab]'")
    from lm_eval.api.registry import get_model

    import minillm.lab.harness  # noqa: F401  # registers itself

    def make(pretrained: str = DEMO, **options: Any) -> Any:
        arguments = {"pretrained": pretrained, "dtype": "float32", **options}
        return get_model("minillm").create_from_arg_obj(arguments, {"batch_size": 1, "device": None})

    return make


def requests(kind: str, *arguments: tuple[Any, ...], documents: bool = False) -> list[Any]:
    """Requests of one document, or of a document each."""
    from lm_eval.api.instance import Instance

    return [
        Instance(kind, {}, one, number, ("task", number if documents else 0, 1))  # type: ignore[arg-type]
        for number, one in enumerate(arguments)
    ]


def choices(context: str = STORY, *, documents: bool = False) -> list[Any]:
    return requests("loglikelihood", *((context, choice) for choice in CHOICES), documents=documents)


@torch.inference_mode()
def one_by_one(pretrained: str, tokens: list[int], **plan: Any) -> Tensor:
    """Log-probabilities [n, V'] after each of n tokens, fed one at a time to a fresh cache."""
    checkpoint = Checkpoint.open(pretrained, dtype="float32")
    llm = LLM(checkpoint, checkpoint.load_model(), checkpoint.plan(**plan), chunk=1)
    rows = []
    for position, token in enumerate(tokens):
        hidden = llm.model(torch.tensor([[token]]), llm.cache.append(1), llm.cache)  # [1, 1, hidden]
        rows.append(llm.model.logits(hidden[:, -1])[0, : llm.real_vocab].log_softmax(-1))
        assert llm.cache.seen == [position + 1]
    return torch.stack(rows)


def judged(rows: Tensor, before: int, tokens: list[int]) -> tuple[float, bool]:
    """log p of tokens[before:], and whether each is the likeliest, from the rows [n - 1, V'] that precede them."""
    wanted = torch.tensor(tokens[before:])
    found = rows[before - 1 : len(tokens) - 1]
    return float(found.gather(1, wanted[:, None]).sum()), bool((found.argmax(1) == wanted).all())


@torch.inference_mode()
def by_transformers(tokens: list[int]) -> Tensor:
    transformers = pytest.importorskip("transformers", reason="transformers comes with the test extra")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


# --- log-likelihoods -----------------------------------------------------------------------------------------------


def test_choices_with_the_full_cache_are_those_of_transformers(lm: Callable[..., Any]) -> None:
    model = lm()
    found = model.loglikelihood(choices(), disable_tqdm=True)
    encode = model.checkpoint.tokenizer.encode
    before = len(encode(STORY, bos=True))
    for choice, (score, greedy) in zip(CHOICES, found, strict=True):
        tokens = encode(STORY + choice, bos=True)
        expected, likeliest = judged(by_transformers(tokens), before, tokens)
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == likeliest
    assert model.get_model_info()["cache_of_last_request"]["policy"] == "full"


def test_what_the_model_says_itself_is_greedy(lm: Callable[..., Any]) -> None:
    """Its own answer, scored under the same budget, is the likeliest; with another last token it is not."""
    model = lm(budget=24)
    llm = LLM(model.checkpoint, model.model, model.checkpoint.plan(budget=24))
    before = llm.encode(STORY, raw=True).tolist()
    own = llm.generate(STORY, raw=True, temperature=0.0, max_tokens=16).token_ids
    other = [*own[:-1], own[-1] ^ 1]
    (right, first), (wrong, second) = model.score(before, [own, other])
    assert (first, second) == (True, False)
    assert right > wrong
    rows = one_by_one(DEMO, before + own, budget=24)
    assert judged(rows, len(before), before + own) == (pytest.approx(right, abs=1e-3), True)


@pytest.mark.parametrize(
    "options",
    [{"budget": 0.3}, {"budget": 20}, {"budget": "24KiB"}, {"budget": 0.3, "policy": "h2o"}],
    ids=["fraction", "tokens", "bytes", "attention"],
)
def test_choices_within_a_budget_are_those_of_a_fresh_cache(lm: Callable[..., Any], options: dict[str, Any]) -> None:
    """Each against a cache of its own, read one token at a time; the whole is the context and the longest choice."""
    model, full = lm(**options), lm()
    found = model.loglikelihood(choices(), disable_tqdm=True)
    assert found != full.loglikelihood(choices(), disable_tqdm=True), "nothing was evicted"
    encode = model.checkpoint.tokenizer.encode
    whole, before = max(len(encode(STORY + choice, bos=True)) for choice in CHOICES), len(encode(STORY, bos=True))
    for choice, (score, greedy) in zip(CHOICES, found, strict=True):
        tokens = encode(STORY + choice, bos=True)
        expected, likeliest = judged(one_by_one(DEMO, tokens, context=whole, **options), before, tokens)
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == likeliest


@pytest.mark.parametrize("policy", ["hashevict", "scissorhands", "fastgen", "snapkv"])
def test_a_forked_cache_is_a_freshly_read_one(lm: Callable[..., Any], policy: str) -> None:
    """Bit for bit: the choices of one document, and the same as documents of their own."""
    model = lm(budget=0.3, context=60, policy=policy, kv_dtype="int8")
    together = model.loglikelihood(choices(), disable_tqdm=True)
    assert together == model.loglikelihood(choices(documents=True), disable_tqdm=True)
    assert len(set(together)) == len(CHOICES)


def test_a_shared_context_is_read_once(lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from minillm.lab import harness

    fed: list[int] = []

    def counting(model: Any, cache: Any, tokens: Tensor, chunk: int) -> Any:
        fed.append(tokens.shape[1])
        return original(model, cache, tokens, chunk)

    original = harness.feed
    monkeypatch.setattr(harness, "feed", counting)
    model = lm(budget=0.3)
    pairs = [model.encode_pair(STORY, choice) for choice in CHOICES]
    model.loglikelihood(choices(), disable_tqdm=True)
    assert fed == [len(pairs[0][0]), *(len(after) - 1 for _, after in pairs)]
    assert fed[-1] == 0, "a choice of one token needs nothing to be fed"


def test_requests_come_back_in_order(lm: Callable[..., Any]) -> None:
    model = lm(budget=20)
    pairs = [(STORY, CHOICES[0]), ("A dog", " sat"), (STORY, CHOICES[1]), ("", "Once upon"), ("A dog", " ran")]
    together = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    alone = [model.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)[0] for pair in pairs]
    assert together == alone


@pytest.mark.parametrize("policy", ["hashevict", "snapkv"])
def test_the_smallest_fraction_of_the_smallest_request_is_a_slot(lm: Callable[..., Any], policy: str) -> None:
    model = lm(budget=0.01, policy=policy)
    [(score, _)] = model.loglikelihood(requests("loglikelihood", ("a", " dog ran")), disable_tqdm=True)
    assert math.isfinite(score)
    assert model.get_model_info()["cache_of_last_request"]["slots"] == 1
    assert isinstance(model.generate_until(requests("generate_until", ("a", GREEDY)), disable_tqdm=True)[0], str)


def test_where_context_and_continuation_are_cut(lm: Callable[..., Any]) -> None:
    model = lm()
    encode, bos = model.checkpoint.tokenizer.encode, model.checkpoint.tokenizer.bos_id
    whole = encode("The dog sat", bos=True)
    assert model.encode_pair("The dog", " sat") == (
        encode("The dog", bos=True),
        whole[len(encode("The dog", bos=True)) :],
    )
    assert model.encode_pair("The dog ", "sat") == model.encode_pair("The dog", " sat"), "spaces go to the right"
    assert model.encode_pair("", "The dog") == ([bos], encode("The dog", bos=False))
    assert model.encode_pair(" ", "sat")[0] == [bos]
    said = model.checkpoint.tokenizer.piece(bos)
    assert model.encode_pair("", said + "The dog")[0] == [bos], "a BOS that the text says itself gets no second one"
    assert model.encode_pair(said + "The dog", " sat")[0][:2] == encode("The dog", bos=True)[:2]
    with pytest.raises(PromptError, match="nothing to score"):
        model.loglikelihood(requests("loglikelihood", ("The dog", "")), disable_tqdm=True)


def test_a_model_without_bos_begins_with_its_end_token(lm: Callable[..., Any], tmp_path: Path) -> None:
    model = lm(str(write_checkpoint(tmp_path / "tiny", bos=False)))
    assert model.checkpoint.tokenizer.bos_id is None
    assert model.encode_pair("", "the dog")[0] == [model.checkpoint.tokenizer.eos_ids[0]]
    before, after = model.encode_pair(" ", "dog")
    assert model.checkpoint.tokenizer.decode(after) == " dog", "no token is lost where the prefix is ours"
    assert before == [model.prefix]
    [answer] = model.generate_until(requests("generate_until", ("", GREEDY)), disable_tqdm=True)
    assert isinstance(answer, str)


# --- running text --------------------------------------------------------------------------------------------------


def test_running_text_in_windows_as_transformers_reads_them(lm: Callable[..., Any]) -> None:
    """The rule, written out: each token is predicted once; every window but the last begins with one known token, and
    the last is filled up with what came before.
    """
    model, size = lm(max_length=13), 13
    tokens = model.checkpoint.tokenizer.encode(STORY + CHOICES[2], bos=False)
    assert len(tokens) > 3 * size
    assert len(tokens) % size not in (0, 1)
    expected, predicted = 0.0, 0
    stream = [model.prefix, *tokens]  # token i of the text is stream[i + 1]
    while predicted < len(tokens):
        stop = min(predicted + size, len(tokens))
        window = stream[stop - min(size, stop) : stop + 1]
        expected += judged(by_transformers(window), len(window) - (stop - predicted), window)[0]
        predicted = stop
    [found] = model.loglikelihood_rolling(requests("loglikelihood_rolling", (STORY + CHOICES[2],)), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=2e-3)
    assert model.loglikelihood_rolling(requests("loglikelihood_rolling", ("",)), disable_tqdm=True) == [0]


@pytest.mark.parametrize("budget", [None, 0.3, 16], ids=["full", "fraction", "tokens"])
def test_running_text_in_one_window_is_what_score_says(lm: Callable[..., Any], budget: float | None) -> None:
    model = lm(budget=budget)
    tokens = model.checkpoint.tokenizer.encode(STORY, bos=True)
    llm = LLM.load(DEMO, dtype="float32", budget=budget, context=len(tokens))
    score = llm.score(tokens)
    [found] = model.loglikelihood_rolling(requests("loglikelihood_rolling", (STORY,)), disable_tqdm=True)
    assert found == pytest.approx(-score.nats_per_token * score.tokens, abs=1e-3)


# --- answers -------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate(lm: Callable[..., Any]) -> None:
    model = lm(budget=0.3)
    [found] = model.generate_until(requests("generate_until", (STORY, GREEDY)), disable_tqdm=True)
    whole = len(model.checkpoint.tokenizer.encode(STORY, bos=True)) + GREEDY["max_gen_toks"]
    llm = LLM.load(DEMO, dtype="float32", budget=0.3, context=whole)
    expected = llm.generate(STORY, temperature=0.0, max_tokens=GREEDY["max_gen_toks"], raw=True)
    assert found == expected.text
    assert expected.usage.evicted_tokens > 0
    word = found.split()[3]
    cut = {**GREEDY, "until": [word, "", None]}
    assert model.generate_until(requests("generate_until", (STORY, cut)), disable_tqdm=True) == [found.split(word)[0]]


def test_drawn_answers_differ_and_repeat(lm: Callable[..., Any]) -> None:
    model = lm(budget=40)
    drawn = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    asked = requests("generate_until", *[(STORY, drawn)] * 3)
    found = model.generate_until(asked, disable_tqdm=True)
    assert len(set(found)) == 3
    assert model.generate_until(asked, disable_tqdm=True) == found
    with pytest.raises(ConfigError, match="num_beams is not supported"):
        model.generate_until(requests("generate_until", (STORY, {**GREEDY, "num_beams": 4})), disable_tqdm=True)


def test_a_chat_template_brings_its_own_special_tokens(lm: Callable[..., Any], tmp_path: Path) -> None:
    model = lm(str(write_checkpoint(tmp_path / "chat", template=True)), budget=16)
    tokenizer, history = model.checkpoint.tokenizer, [{"role": "user", "content": "the dog"}]
    assert model.encode_pair("the dog", " sat")[0][0] == tokenizer.bos_id
    text = model.apply_chat_template(history)
    assert text == "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"
    assert "<|im_start|>" in model.chat_template(True)
    begun = [*history, {"role": "assistant", "content": "It is"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False).endswith("<|im_start|>assistant\nIt is")
    [answer] = model.generate_until(requests("generate_until", (text, GREEDY)), disable_tqdm=True)
    same = LLM.load(model.checkpoint.name, dtype="float32", budget=16)
    assert answer == same.generate("the dog", temperature=0.0, max_tokens=GREEDY["max_gen_toks"]).text
    with pytest.raises(ConfigError, match="by name"):
        model.chat_template("rag")


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("lm")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8}, "one at a time"),
        ({"memory": "1GiB"}, "name a budget"),
        ({"max_length": 0}, "at least 1 token"),
        ({"budget": 0.3, "hash_bitz": 4}, "has no option hash_bitz"),
        ({"trust_remote_code": True}, "has no option trust_remote_code"),
    ],
)
def test_mistakes_are_said_before_the_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    from minillm.lab.harness import MiniLLM

    monkeypatch.setattr(Checkpoint, "load_model", lambda _: pytest.fail("the weights were read"))
    with pytest.raises(ConfigError, match=message):
        MiniLLM(DEMO, **options)


def test_a_cache_that_may_not_evict_refuses_what_does_not_fit(lm: Callable[..., Any]) -> None:
    model = lm(budget=20, on_overflow="error")
    with pytest.raises(ContextFullError):
        model.loglikelihood(choices(), disable_tqdm=True)


def test_the_full_cache_says_where_it_extrapolates(lm: Callable[..., Any], tmp_path: Path) -> None:
    folder, text = write_checkpoint(tmp_path / "tiny"), "the dog sat on the mat " * 120
    with pytest.warns(UserWarning, match="longer than the 512 tokens"):
        lm(str(folder)).loglikelihood(requests("loglikelihood", (text, "x")), disable_tqdm=True)
    [(score, _)] = lm(str(folder), budget=64).loglikelihood(requests("loglikelihood", (text, "x")), disable_tqdm=True)
    assert math.isfinite(score)


@pytest.mark.parametrize(("name", "status"), [("__main__", 2), ("minillm.lab.harness", 1)])
def test_without_lm_eval_it_says_what_to_install(name: str, status: int) -> None:
    hide = "import sys, runpy; sys.modules['lm_eval'] = None"
    code = f"{hide}; runpy.run_module('minillm.lab.harness', run_name={name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == status
    last = done.stderr.splitlines()[-1]
    assert re.search(r"lm_eval[.\w]* is missing: pip install 'minillm\[lab\]'$", last)
    assert ("Traceback" in done.stderr) == (name != "__main__")


# --- the command ---------------------------------------------------------------------------------------------------

CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
ANSWER = """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n", "Question:"], max_gen_toks: 16, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
"""
MEDQA = """
output_type: multiple_choice
doc_to_text: "{{question}}\\nA. {{options.A}}\\nB. {{options.B}}\\nC. {{options.C}}\\nD. {{options.D}}\\nAnswer:"
doc_to_target: "{{answer_idx}}"
doc_to_choice: [A, B, C, D]
metric_list: [{metric: acc}]
"""


def write_task(folder: Path, name: str, body: str, data: list[dict[str, Any]] | Path) -> None:
    """A yaml file over json lines, which are written too unless there is a file."""
    if isinstance(data, list):
        rows, data = data, folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test"
    (folder / f"{name}.yaml").write_text(f"task: {name}\n{files}{body}")


def evaluate(folder: Path, tasks: str, arguments: str, *options: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Run the command, without a network: results, and samples by task."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "minillm.lab.harness", "--model", "minillm", "--model_args", arguments]
    command += ["--tasks", tasks, "--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [results] = (folder / "out").rglob("results_*.json")
    samples = {task: next((folder / "out").rglob(f"samples_{task}_*.jsonl")) for task in tasks.split(",")}
    lines = {task: path.read_text().splitlines() for task, path in samples.items()}
    return json.loads(results.read_text()), {task: list(map(json.loads, text)) for task, text in lines.items()}


@pytest.mark.slow
def test_the_command_runs_all_three_kinds_of_task(lm: Callable[..., Any], tmp_path: Path) -> None:
    rows = [
        {"question": STORY, "choices": [choice.strip() for choice in CHOICES], "answer": 0},
        {"question": "The little dog", "choices": ["sat down", "zqx vwq"], "answer": 0},
    ]
    texts = [{"text": STORY}, {"text": STORY * 12}]  # the second is longer than a window
    write_task(tmp_path, "local_choice", CHOICE, rows)
    write_task(tmp_path, "local_rolling", ROLLING, texts)
    write_task(tmp_path, "local_answer", ANSWER, [{"question": "Where is the dog?", "answer": "here"}])
    arguments = f"pretrained={DEMO},budget=0.3,policy=hashevict,dtype=float32"
    results, samples = evaluate(tmp_path, "local_choice,local_rolling,local_answer", arguments)
    model = lm(budget=0.3, policy="hashevict")
    running = requests("loglikelihood_rolling", *((row["text"],) for row in texts))
    total = sum(model.loglikelihood_rolling(running, disable_tqdm=True))
    perplexity = math.exp(-total / sum(len(row["text"].encode()) for row in texts))
    assert results["results"]["local_rolling"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=1e-5)
    for row, sample in zip(rows, samples["local_choice"], strict=True):
        pairs = requests("loglikelihood", *((row["question"], f" {choice}") for choice in row["choices"]))
        scores = [score for score, _ in model.loglikelihood(pairs, disable_tqdm=True)]
        assert [float(one[0]) for one in sample["filtered_resps"]] == pytest.approx(scores, abs=1e-3)
        assert sample["acc"] == float(scores.index(max(scores)) == row["answer"])
    question = ("Question: Where is the dog?\nAnswer:", {**GREEDY, "max_gen_toks": 16, "until": ["\n\n", "Question:"]})
    answers = model.generate_until(requests("generate_until", question), disable_tqdm=True)
    assert samples["local_answer"][0]["resps"] == [answers]
    assert results["config"]["cache_of_last_request"]["policy"] == "hashevict"
    assert results["config"]["model_args"]["budget"] == 0.3


@pytest.mark.slow
def test_real_questions(lm: Callable[..., Any], shared_data: Path, tmp_path: Path) -> None:
    """MedQA and GSM8K as their files have them, with a fifth of the cache."""
    data = shared_data / "eval"
    write_task(tmp_path, "medqa_local", MEDQA, data / "medqa-test.jsonl")
    write_task(tmp_path, "gsm8k_local", ANSWER, data / "gsm8k-test.jsonl")
    arguments = f"pretrained={DEMO},budget=0.2,dtype=float32"
    results, samples = evaluate(tmp_path, "medqa_local,gsm8k_local", arguments, "--limit", "3", "--num_fewshot", "0")
    assert {name: one["effective"] for name, one in results["n-samples"].items()} == {
        "medqa_local": 3,
        "gsm8k_local": 3,
    }
    model = lm(budget=0.2)
    for sample in samples["medqa_local"]:
        pairs = [(one["arg_0"], one["arg_1"]) for one in sample["arguments"].values()]
        assert len(pairs) == 4
        scores = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
        assert [float(one[0]) for one in sample["filtered_resps"]] == pytest.approx([s for s, _ in scores], abs=1e-3)
    asked = [
        tuple(one["arguments"]["gen_args_0"][f"arg_{number}"] for number in range(2)) for one in samples["gsm8k_local"]
    ]
    answers = model.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert [one["resps"][0][0] for one in samples["gsm8k_local"]] == answers


def test_the_entry_point_of_newer_releases_finds_it() -> None:
    """Their registry holds an entry point, which this one can hold too: it is loaded, and not registered twice."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'minillm[lab]'")
    code = """
from importlib.metadata import EntryPoint
import lm_eval.models
from lm_eval.api.registry import get_model, model_registry
model_registry.register("minillm", target=EntryPoint("minillm", "minillm.lab.harness:MiniLLM", "lm_eval.models"))
print(get_model("minillm").__name__, get_model("dummy").__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "MiniLLM DummyLM\n"


@pytest.mark.usefixtures("lm")
def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    write_task(tmp_path, "local_answer", ANSWER, [{"question": "Where?", "answer": "here"}])
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "minillm.lab.harness", "--model", "minillm", "--model_args"]
    command += [f"pretrained={DEMO},budget=7.5", "--tasks", "local_answer", "--include_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("minillm: error: budget 7.5 is out of range")
    assert "Traceback" not in done.stderr
