"""Sessions: whatever is saved, restored, copied or cut in pieces goes on with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm import LLM, BudgetError, ContextFullError, PromptError, SamplingError, SessionError
from minillm.checkpoint import Checkpoint
from minillm.conversation import Conversation
from minillm.policies import POLICIES
from minillm.saved import cache_tensors, settings, small_tensors
from minillm.session import Session
from minillm.snapshot import Snapshot
from tools.soak_sessions import soak

from .tiny_checkpoint import write_checkpoint

WORDS = "once upon a time there was a little cat who liked to sleep in the sun and a big dog said hello to her. "
SLOTS = 40
GREEDY: dict[str, Any] = {"seed": 0, "ignore_eos": True}
DRAWN: dict[str, Any] = {
    "temperature": 1.0,
    "seed": 3,
    "top_k": 50,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.2,
    "logit_bias": {7: 1.5},
    "stop": ("no such text",),
    "ignore_eos": True,
}
POSIX = pytest.mark.skipif(os.name != "posix", reason="fork and signals")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("chat"), template=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(str(folder), budget=SLOTS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.session"


def twin(llm: LLM, **plan: Any) -> LLM:
    """Another LLM over the same model, with the same plan or another."""
    return LLM(llm.checkpoint, llm.model, llm.checkpoint.plan(**plan) if plan else llm.plan)


def ids(session: Session, count: int) -> list[int]:
    return session.generate(max_tokens=count).finish().token_ids


def content(session: Session) -> dict[str, torch.Tensor]:
    """All that would be saved."""
    return {name: tensor.clone() for name, tensor in (cache_tensors(session) | small_tensors(session)).items()}


def differing(session: Session, other: dict[str, torch.Tensor]) -> list[str]:
    mine = content(session)
    assert mine.keys() == other.keys()
    return [name for name in mine if not torch.equal(mine[name].view(torch.uint8), other[name].view(torch.uint8))]


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "kv_dtype"), [(GREEDY, "auto"), (DRAWN, "auto"), (DRAWN, "int8")], ids=["greedy", "drawn", "drawn, int8"]
)
@pytest.mark.parametrize("policy", POLICIES)
def test_resuming_is_exact_for_every_policy(
    policy: str, rules: dict[str, Any], kv_dtype: str, llm: LLM, file: Path
) -> None:
    """Ten tokens, saved, restored elsewhere, ten more: the twenty of one go, and the same bits in every tensor."""
    options: dict[str, Any] = {"policy": policy, "context": 400, "kv_dtype": kv_dtype}
    here = twin(llm, budget=None if policy == "full" else SLOTS, **options)
    session = here.session(**rules)
    size = session.nbytes
    session.append(WORDS)
    whole = ids(session, 20)
    session.save(file)
    end = content(session)

    session = here.session(**rules)
    session.append(WORDS)
    first = ids(session, 10)
    session.save(file)
    assert file.stat().st_size == size == session.nbytes
    middle = content(session)

    there = LLM(here.checkpoint, here.model, here.plan)
    there.generate([5, 6, 7] * 30, max_tokens=5)  # something else in its cache
    restored = there.session()
    restored.load(file)
    assert differing(restored, middle) == []
    assert first + ids(restored, 10) == whole
    restored.save(file)
    assert differing(restored, end) == []
    if policy != "full":
        assert restored.usage().evicted_tokens > 20


@pytest.mark.parametrize("options", [{"hash_bits": 24, "centred": True, "norm_weighted": True, "decay": 0.9}])
def test_resuming_is_exact_with_the_policys_options(options: dict[str, Any], llm: LLM, file: Path) -> None:
    here = twin(llm, budget=SLOTS, policy="hashevict", **options)
    whole, part = here.session(**DRAWN), here.session(**DRAWN)
    whole.append(WORDS)
    expected = ids(whole, 30)
    part.append(WORDS)
    found = []
    for _ in range(6):
        found += ids(part, 5)
        part.save(file)
        part = LLM(here.checkpoint, here.model, here.plan).session()
        part.load(file)
    assert found == expected


def test_resuming_in_another_process(folder: Path, llm: LLM, file: Path) -> None:
    session = llm.session(**DRAWN)
    session.append(WORDS)
    whole = ids(session, 20)
    session = llm.session(**DRAWN)
    session.append(WORDS)
    first = ids(session, 10)
    session.save(file)
    code = f"""
import torch
from minillm import LLM
torch.set_num_threads(1)
session = LLM.load({str(folder)!r}, budget={SLOTS}).session()
session.load({str(file)!r})
print(session.generate(max_tokens=10).finish().token_ids)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert first + json.loads(done.stdout) == whole


def test_a_session_may_be_saved_between_two_pieces_of_an_answer(llm: LLM, file: Path) -> None:
    session = llm.session(**DRAWN)
    session.append(WORDS)
    whole = ids(session, 20)
    session = llm.session(**DRAWN)
    session.append(WORDS)
    stream = session.generate(max_tokens=20)
    while stream.completion_tokens < 8:
        next(stream)
    drawn = stream.completion_tokens
    session.save(file)
    assert stream.finish().token_ids == whole, "saving changes nothing"
    restored = twin(llm).session()
    restored.load(file)
    assert ids(restored, 20 - drawn) == whole[drawn:]


@POSIX
def test_saving_killing_loading_and_resuming_again_and_again(folder: Path, tmp_path: Path) -> None:
    """40 of the 500 cycles that `tools/soak_sessions.py` runs, and 40 more as long as no kill has met a save."""
    llm, met = LLM.load(str(folder), budget=SLOTS), Counter[str]()
    for seed in range(8):
        (tmp_path / str(seed)).mkdir()
        met += Counter(soak(llm, tmp_path / str(seed), cycles=40, tokens=60, seed=seed))
        if met["killed while saving"]:
            break
    print("\n", dict(met))
    assert met["killed while saving"] > 0
    assert met["stages"] > 5
    assert met["resumed and compared"] > 0


def test_a_saved_file_holds_nothing_of_other_requests(llm: LLM, file: Path) -> None:
    """Neither what an earlier request left in the slots, nor what was evicted."""
    files = []
    for other in ([5, 6, 7] * 40, [9, 8] * 50):
        llm.generate(other, max_tokens=5)
        session = llm.session(**GREEDY)
        session.append("a cat")
        session.save(file)
        files.append(file.read_bytes())
        for layer in llm.cache.layers:
            assert not layer.keys[layer.positions < 0].any()
    assert files[0] == files[1]


# --- feeding and answering -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_session_says_what_a_request_says(rules: dict[str, Any], llm: LLM) -> None:
    request = llm.generate(WORDS, max_tokens=24, **rules)
    session = llm.session(**rules)
    assert session.generate(WORDS, max_tokens=24).finish().token_ids == request.token_ids
    session = llm.session(**rules)
    for piece in llm.encode(WORDS).split(17):
        session.append(piece)
    parts = [session.generate(max_tokens=count).finish() for count in (1, 3, 20)]
    assert [token for part in parts for token in part.token_ids] == request.token_ids
    assert "".join(part.text for part in parts) == request.text
    assert session.usage().seen_tokens == len(llm.encode(WORDS)) + 23


def test_text_ids_and_pieces_may_be_appended(llm: LLM) -> None:
    """BOS stands at the beginning and nowhere else."""
    tokens = llm.encode(WORDS)
    ways: list[Callable[[Session], object]] = [
        lambda session: session.append(WORDS),
        lambda session: session.append(tokens),
        lambda session: [session.append(piece) for piece in (tokens[:1].tolist(), tokens[1:])],
        lambda session: session.append(iter([WORDS[:10], WORDS[10:]])),
        lambda session: session.append(tokens.split(4).__iter__()),
    ]
    for way in ways:
        session = llm.session(**GREEDY)
        way(session)
        assert session.seen == len(tokens) - 1
        assert session.pending == [int(tokens[-1])]


def test_penalties_count_the_present_answer(llm: LLM) -> None:
    """They go on with the answer, and begin again with a prompt; what was seen stays seen."""
    session = llm.session(**DRAWN)
    session.append(WORDS)
    first = ids(session, 5)
    assert session.sampler.state()["occurrences"].sum() == 5
    ids(session, 5)
    assert session.sampler.state()["occurrences"].sum() == 10
    ids(session, 0)
    session.generate("a cat", max_tokens=4).finish()
    assert session.sampler.state()["occurrences"].sum() == 4
    assert session.sampler.state()["seen"][first].all()


def test_an_answer_that_has_ended_needs_a_new_prompt(llm: LLM) -> None:
    session = llm.session(**GREEDY)
    with pytest.raises(PromptError, match="nothing to go on from"):
        session.generate()
    session.append(WORDS)
    token = ids(session, 1)[0]
    ended = llm.session(stop_token_ids=(token,), **GREEDY)
    assert ended.generate(WORDS).finish().finish_reason == "stop"
    with pytest.raises(PromptError, match="nothing to go on from"):
        ended.generate()
    assert ended.generate("a cat", max_tokens=3).finish().token_ids


def test_a_newer_request_takes_the_cache_over(llm: LLM, file: Path) -> None:
    session = llm.session(**GREEDY)
    session.append(WORDS)
    stream = session.generate(max_tokens=20)
    next(stream)
    session.save(file)
    session.append("a cat")
    with pytest.raises(PromptError, match="newer request has taken over"):
        next(stream)
    llm.generate("hello", max_tokens=2)
    for act in (session.generate, session.usage, session.fork, lambda: session.append("a"), lambda: session.save(file)):
        with pytest.raises(PromptError, match="is gone; load it"):
            act()
    session.load(file)
    assert ids(session, 3)


def test_a_refused_request_changes_nothing(folder: Path) -> None:
    llm = LLM.load(str(folder), context=40)
    session = llm.session(**GREEDY)
    session.append("once upon a time")
    before = content(session)
    for act in (lambda: session.append(WORDS * 2), lambda: session.generate(WORDS * 2)):
        with pytest.raises(ContextFullError):
            act()
    with pytest.raises(PromptError, match="out of range"):
        session.append([99999])
    with pytest.raises(SamplingError):
        session.generate(max_tokens=-1)
    assert differing(session, before) == []
    assert ids(session, 2)


def test_the_seed_is_kept_and_other_rules_may_follow(llm: LLM) -> None:
    session = llm.session(temperature=1.0, ignore_eos=True)
    seed = session.sampler.seed
    assert session.generate(WORDS, max_tokens=3).finish().seed == seed
    state = session.sampler.state()["generator"]
    session.use(llm._params(None, {"temperature": 0.5}))
    assert session.sampler.seed == session.params.seed == seed
    assert torch.equal(session.sampler.state()["generator"], state)
    session.use(llm._params(None, {"seed": 7}))
    assert torch.equal(session.sampler.state()["generator"], torch.Generator().manual_seed(7).get_state())


# --- pins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "full"])
def test_pinned_tokens_stay(policy: str, llm: LLM, file: Path) -> None:
    """In every layer and head, across saving, and the last one too, which is fed with what comes next."""
    here = twin(llm, budget=SLOTS, policy=policy, recent=4)
    session = here.session(**GREEDY)
    session.append("the dog sat")
    start = session.seen + 1
    session.append("on the mat", pin=True)
    session.save(file)
    session = LLM(here.checkpoint, here.model, here.plan).session()
    session.load(file)
    session.append(WORDS)
    session.generate(WORDS, max_tokens=30).finish()
    pinned = set(range(start, start + session.pinned))
    assert session.pinned == len(here.checkpoint.tokenizer.encode("on the mat", bos=False, continuation=True))
    assert session.usage().evicted_tokens > SLOTS
    for layer in session.llm.cache.layers:
        for head in layer.positions[0].tolist():
            assert pinned <= set(head)


def test_more_pins_than_slots_are_refused_before_anything_runs(llm: LLM) -> None:
    session = llm.session(**GREEDY)
    room = llm.plan.retention.room_for_pins
    session.append([5] * room, pin=True)
    before = content(session)
    for act in (
        lambda: session.append([6], pin=True),
        lambda: session.generate("a", pin=True),
        lambda: llm.session().append([6] * (room + 1), pin=True),
    ):
        with pytest.raises(BudgetError, match="pinned tokens do not fit"):
            act()
    assert differing(session, before) == []
    assert session.generate(WORDS, max_tokens=5).finish().token_ids


# --- fork and rewind -------------------------------------------------------------------------------------------------


def test_a_fork_goes_its_own_way(llm: LLM) -> None:
    session = llm.session(**DRAWN)
    session.append(WORDS)
    ids(session, 5)
    fork = session.fork()
    assert fork.llm.model is llm.model
    assert fork.llm.cache.nbytes == llm.plan.nbytes
    assert differing(session, content(fork)) == []
    fork.generate("a big dog", max_tokens=30).finish()
    twin_of = session.fork()
    expected = ids(twin_of, 20)
    assert ids(session, 20) == expected
    llm.session().fork().append("the fork of a session that has not begun")


def test_a_fork_counts_as_memory(llm: LLM) -> None:
    plan = llm.checkpoint.memory_plan(llm.plan, memory="64GiB", chunk=256)
    roomy = LLM(llm.checkpoint, llm.model, llm.plan, memory=replace(plan, promise=plan.total + llm.plan.nbytes))
    fork = roomy.session().fork()
    assert fork.llm.memory is not None
    assert fork.llm.memory.total == plan.total + llm.plan.nbytes
    with pytest.raises(BudgetError, match="are needed and --memory is"):
        fork.fork()


@pytest.mark.parametrize("policy", ["full", "window", "hashevict", "l2"])
def test_rewinding_is_as_if_it_had_never_been_said(policy: str, llm: LLM) -> None:
    here = twin(llm, budget=None if policy == "full" else SLOTS, policy=policy)
    session, plain = here.session(**GREEDY), LLM(here.checkpoint, here.model, here.plan).session(**GREEDY)
    for one in (session, plain):
        one.append("the dog sat on")
        one.append("the mat", pin=policy == "l2")
    count = session.seen + 1
    ids(session, 5)
    session.append("a cat", pin=policy == "l2")
    session.rewind(session.seen + 1 - count)
    assert session.seen == count
    with pytest.raises(PromptError, match="nothing to go on from"):
        session.generate()
    other = "and upon a time"
    assert session.generate(other, max_tokens=30).finish().token_ids == (
        plain.generate(other, max_tokens=30).finish().token_ids
    )
    assert session.pinned == plain.pinned


def test_rewinding_is_refused_where_it_cannot_be_exact(llm: LLM) -> None:
    session = llm.session(**GREEDY)
    session.append([5, 6, 7])
    for tokens in (4, -1):
        with pytest.raises(SessionError, match="cannot rewind"):
            session.rewind(tokens)
    session.append([8] * (SLOTS - 2))
    assert session.seen == SLOTS
    session.rewind(1)
    session.append([8, 8])
    with pytest.raises(SessionError, match="some have been evicted; restore a session that was saved before"):
        session.rewind(1)
    for options in ({"policy": "h2o"}, {"policy": "snapkv"}, {"policy": "hashevict", "decay": 0.9}):
        session = twin(llm, budget=SLOTS, **options).session(**GREEDY)
        session.append([5, 6, 7])
        with pytest.raises(SessionError, match="remembers queries that came after"):
            session.rewind(1)


# --- files that do not fit -------------------------------------------------------------------------------------------

OTHER: dict[str, dict[str, Any]] = {  # field -> another plan, which differs in that field
    "policy": {"budget": SLOTS, "policy": "window"},
    "decay": {"budget": SLOTS, "decay": 0.9},
    "slots": {"budget": SLOTS + 1},
    "sinks": {"budget": SLOTS, "sinks": 1},
    "recent": {"budget": SLOTS, "recent": 3},
    "evict-every": {"budget": SLOTS, "evict_every": 1},
    "context": {"budget": SLOTS, "context": 300},
    "positions": {"budget": SLOTS, "positions": "absolute"},
    "kv-dtype": {"budget": SLOTS, "kv_dtype": "int8"},
}


@pytest.mark.parametrize("field", OTHER)
def test_another_cache_is_named(field: str, llm: LLM, file: Path) -> None:
    session = llm.session(**GREEDY)
    session.append(WORDS)
    session.save(file)
    other = twin(llm, **OTHER[field]).session(**GREEDY)
    refuse(other, file, field, settings(session)[field], settings(other)[field])


@pytest.mark.parametrize(("field", "option"), [("hash-bits", {"hash_bits": 8}), ("policy-seed", {"policy_seed": 1})])
def test_another_projection_is_named(field: str, option: dict[str, int], llm: LLM, file: Path) -> None:
    session = twin(llm, budget=SLOTS, policy="hashevict").session(**GREEDY)
    session.append(WORDS)
    session.save(file)
    other = twin(llm, budget=SLOTS, policy="hashevict", **option).session(**GREEDY)
    refuse(other, file, field, settings(session)[field], settings(other)[field])


def refuse(session: Session, file: Path, field: str, saved: str, ours: str) -> None:
    """Loading is refused, the field and both values are named, and the running session goes on."""
    session.append(WORDS)
    before = content(session)
    with pytest.raises(SessionError, match="use the same settings") as refused:
        session.load(file)
    assert f"{field} {saved} (here {ours})" in str(refused.value)
    assert saved != ours
    assert differing(session, before) == []
    assert ids(session, 3)


@pytest.mark.parametrize(
    "field", ["chunk", "threads", "torch", "minillm", "device", "backend", "model", "dtype", "weights"]
)
def test_another_way_to_compute_is_named(
    field: str, llm: LLM, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = llm.session(**GREEDY)
    session.append(WORDS)
    session.save(file)
    saved = settings(session)[field]
    other = twin(llm)
    if field == "chunk":
        other.chunk = 64
    elif field == "threads":
        torch.set_num_threads(2)
    elif field == "torch":
        monkeypatch.setattr(torch, "__version__", "2.0")
    elif field == "minillm":
        monkeypatch.setattr("minillm.fingerprint.__version__", "0.0")
    elif field == "device":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "of another kind")
    else:
        write_checkpoint(tmp_path / "other")
        config = tmp_path / "other" / "config.json"
        if field == "model":
            config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 5000.0}))
        options = {"dtype": "bfloat16", "backend": "reference", "weights": "int8"}
        asked = {field: options[field]} if field in options else {}
        checkpoint = Checkpoint.open(str(tmp_path / "other"), **asked)
        other = LLM(checkpoint, checkpoint.load_model(), checkpoint.plan(budget=SLOTS))
    try:
        refuse(other.session(**GREEDY), file, field, saved, settings(other.session())[field])
    finally:
        torch.set_num_threads(1)


def test_weights_that_differ_are_another_model(llm: LLM, tmp_path: Path) -> None:
    """One byte of the first, a middle or the last tensor."""
    write_checkpoint(tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    assert Checkpoint.open(str(tmp_path / "other")).digest == llm.checkpoint.digest
    good = weights.read_bytes()
    for at in (len(good) // 4, len(good) // 2, len(good) - 1):
        weights.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert Checkpoint.open(str(tmp_path / "other")).digest != llm.checkpoint.digest


def test_every_difference_is_named_at_once(llm: LLM, file: Path) -> None:
    session = llm.session()
    with pytest.raises(SessionError, match="has not begun"):
        session.save(file)
    session.append("a cat")
    session.save(file)
    with pytest.raises(SessionError) as refused:
        twin(llm, budget=24, policy="window", sinks=0).session().load(file)
    for field in ("policy hashevict-plus (here window)", "slots 40 (here 24)", "sinks 2 (here 0)"):
        assert field in str(refused.value)
    assert "decay" not in str(refused.value), "options of another policy are no news beside the policy"


def test_a_damaged_file_leaves_the_running_session_alone(llm: LLM, file: Path) -> None:
    session = llm.session(**GREEDY)
    session.append(WORDS)
    session.save(file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    ids(session, 5)
    before = content(session)
    with pytest.raises(SessionError, match="is damaged"):
        session.load(file)
    assert differing(session, before) == []
    assert ids(session, 5)


def test_a_disk_that_fails_while_loading_leaves_a_cache_that_belongs_to_nobody(
    llm: LLM, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = llm.session(**GREEDY)
    session.append(WORDS)
    session.save(file)
    whole, fill = ids(session, 5), Snapshot.fill_

    def failing(snapshot: Snapshot, tensors: dict[str, torch.Tensor]) -> None:
        if any(name.endswith("keys") for name in tensors):
            raise OSError(5, "Input/output error")
        fill(snapshot, tensors)

    monkeypatch.setattr(Snapshot, "fill_", failing)
    with pytest.raises(SessionError, match="cannot be read: Input/output error"):
        session.load(file)
    monkeypatch.undo()
    with pytest.raises(PromptError, match="is gone; load it"):
        session.generate()
    session.load(file)
    assert ids(session, 5) == whole


# --- conversations ---------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_after_loading(chat_folder: Path, file: Path) -> None:
    llm = LLM.load(str(chat_folder), budget=64)
    talk = Conversation(llm, system="be kind", pin_system=True)
    talk.send("hello", max_tokens=8).finish()
    talk.save(file)
    rest = [talk.send(text, max_tokens=8, **DRAWN).finish().text for text in ("who are you", "and the cat")]
    other = Conversation(twin(llm))
    other.load(file)
    assert (other.system, other.pin_system) == ("be kind", True)
    assert [other.send(text, max_tokens=8, **DRAWN).finish().text for text in ("who are you", "and the cat")] == rest
    other.reset()
    assert other.usage().seen_tokens == 0
    other.send("hello", max_tokens=2).finish()
    assert other.session.pinned > 0


def test_the_system_message_and_any_other_can_be_pinned(chat_folder: Path) -> None:
    llm = LLM.load(str(chat_folder), budget=96, recent=8, positions="absolute")
    tokenizer, template = llm.checkpoint.tokenizer, llm.checkpoint.template
    assert template is not None
    talk = Conversation(llm, system="be kind", pin_system=True)
    talk.send(WORDS, max_tokens=4).finish()
    opening = tokenizer.encode(template.render_around([{"role": "system", "content": "be kind"}])[0], bos=False)
    assert talk.session.pinned == len(opening)
    before = talk.session.seen + len(talk.session.pending)
    turn = tokenizer.encode(template.render_turn({"role": "user", "content": "the cat"}, system="be kind"), bos=False)
    talk.send("the cat", pin=True, max_tokens=4).finish()
    assert talk.session.pinned == len(opening) + len(turn)
    for _ in range(4):
        talk.send(WORDS, max_tokens=4).finish()
    kept = {*range(len(opening)), *range(before, before + len(turn))}
    for layer in llm.cache.layers:
        for head in layer.positions[0].tolist():
            assert kept <= set(head)
    with pytest.raises(BudgetError, match="pinned tokens do not fit"):
        talk.send(WORDS * 2, pin=True)
    with pytest.raises(PromptError, match="no system message to pin"):
        Conversation(llm, pin_system=True)


def test_going_on_with_an_answer_that_was_cut_off(chat_folder: Path) -> None:
    llm = LLM.load(str(chat_folder), budget=64)
    talk = Conversation(llm)
    whole = talk.send("hello", max_tokens=12, **GREEDY).finish().text
    talk.reset()
    first = talk.send("hello", max_tokens=5, **GREEDY).finish().text
    assert first + talk.go_on(max_tokens=7, **GREEDY).finish().text == whole
