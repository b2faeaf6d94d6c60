"""The memory promise: what is planned is what a process holds, what does not fit is refused, what breaks it stops.

Peaks are VmHWM of fresh processes, as Linux counts them: Python, libraries, tokenizer and allocator are all in.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm import LLM, BudgetError, MemoryPromiseError
from minillm.backends import cpu
from minillm.backends.reference import attend_
from minillm.budget import CachePlan
from minillm.checkpoint import Checkpoint
from minillm.cli.main import main
from minillm.eviction import evict_
from minillm.inventory import Weights
from minillm.loader import save_checkpoint
from minillm.memory import Guard, Held, Room, held, room, trim
from minillm.planner import CONVERSION_BYTES, MemoryPlan, attention_bytes, size_of
from minillm.policies import POLICIES
from tests.helpers import tiny_config, tiny_model
from tests.ranks import ROOT, finish, start
from tests.tiny_checkpoint import write_checkpoint

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
MIB = 2**20


def fresh(*arguments: object) -> dict[str, Any]:
    """What tests/peak.py measures in a process of its own."""
    line = [sys.executable, "-m", "tests.peak", json.dumps(arguments)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write_large(folder: Path, **heads: int) -> Path:
    """Eight layers, 28 million parameters in float32, which keep 32 KiB a token with four KV heads."""
    write_checkpoint(folder)
    sizes = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "head_dim": 64}
    config = tiny_config(**sizes, **heads, sliding_windows=(None,) * 8, max_position_embeddings=4096)
    save_checkpoint(folder, tiny_model(config), config)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large(tmp_path_factory.mktemp("large"), num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture(scope="module")
def shared_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two KV heads, of which some of four processes have to hold the same."""
    return write_large(tmp_path_factory.mktemp("shared"), num_attention_heads=8, num_key_value_heads=2)


@linux_only
@pytest.mark.parametrize(
    ("dtype", "tokens", "options"),
    [
        ("float32", 1200, {"budget": 1000}),
        ("bfloat16", 1200, {"budget": 1000, "policy": "h2o"}),
        ("float32", 2040, {"context": 2048}),
        ("bfloat16", 700, {"budget": 512, "rows": 2, "policy": "window"}),
        ("float32", 1100, {"budget": 700, "layer_budget": "pyramid", "kv_dtype": "int8", "policy": "keydiff"}),
    ],
    ids=["float32", "bfloat16-h2o", "full", "two-rows", "pyramid-int8"],
)
def test_planned_is_measured(dtype: str, tokens: int, options: dict[str, Any], folder: Path) -> None:
    found = fresh(str(folder), dtype, tokens, {}, options)
    planned, peak = found["planned"], found["peak"]
    print(f"\n{dtype} {options}: planned {planned / MIB:.1f} MiB, peak {peak / MIB:.1f} MiB", found["parts"])
    assert found["held"] == found["cache"]
    assert abs(peak - planned) <= 0.02 * planned + 16 * MIB


RANKED: dict[str, tuple[int, tuple[Any, ...]]] = {  # processes, and what tests/peak.py is asked
    "float32-wide": (2, ("float32", 1200, {}, {"budget": 800}, 1024)),
    "bfloat16-h2o": (4, ("bfloat16", 600, {}, {"budget": 400, "policy": "h2o"})),
    "int8-two-rows": (2, ("bfloat16", 600, {"weights": "int8"}, {"budget": 400, "rows": 2, "policy": "window"})),
    "reference": (2, ("float32", 600, {"backend": "reference"}, {"budget": 400})),
}


@linux_only
@pytest.mark.parametrize(("ranks", "asked"), RANKED.values(), ids=RANKED)
def test_every_rank_holds_what_was_planned(ranks: int, asked: tuple[Any, ...], shared_heads: Path) -> None:
    """And none of them more: of four, two hold the same KV head, and gather the attention of its queries."""
    processes = start(ranks, "tests.peak", json.dumps((str(shared_heads), *asked)), module=True)
    for rank, (status, answer, errors) in enumerate(finish(processes, 90)):
        assert status == 0, errors
        found = json.loads(answer)
        planned, peak, parts = found["planned"], found["peak"], found["parts"]
        print(f"\nrank {rank} of {ranks}, {asked}: planned {planned / MIB:.1f} MiB, peak {peak / MIB:.1f} MiB", parts)
        assert found["held"] == found["cache"] == sum(parts[name] for name in parts if name.startswith("cache "))
        assert planned - 0.02 * planned - 16 * MIB <= peak <= planned, rank


@linux_only
def test_a_run_stays_under_the_promise(folder: Path, tmp_path: Path) -> None:
    """The largest budget that fits is chosen, a prompt far longer than that is read, and the peak stays below."""
    prompt = tmp_path / "prompt"
    prompt.write_text("the dog sat on the mat and " * 500)

    def run(command: str, *words: object) -> dict[str, Any]:
        line = [sys.executable, "-m", "minillm", command, "--model", folder, "--dtype", "float32", "--json"]
        done = subprocess.run([*map(str, line), *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    promise = run("plan", "--budget", 400)["bytes"]["total"]
    flags = ("--memory", f"{promise}B", "--file", prompt, "--max-tokens", 4, "--ignore-eos", "--threads", 1)
    found = run("generate", *flags)
    print(f"\n{found['memory']}, {found['cache']['slots']} slots")
    assert found["memory"]["promise"] == promise
    assert found["memory"]["peak"] <= found["memory"]["planned"] <= promise
    assert found["usage"]["seen_tokens"] > 5 * found["cache"]["slots"]
    assert 100 <= found["cache"]["slots"] <= 500  # the prompt has been counted, so base is a little more
    assert found["cache"]["policy"] == "hashevict-plus"


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    """Opened, in a process that is said to hold 300 MiB."""
    opened = Checkpoint.open(str(folder), dtype="float32", device="cpu")
    vars(opened)["base"] = 300 * MIB
    return opened


def needs(checkpoint: Checkpoint, *, memory: str | int | None = None, chunk: int = 256, **options: Any) -> MemoryPlan:
    plan = checkpoint.plan(memory=memory, chunk=chunk, **options)
    return checkpoint.memory_plan(plan, memory=memory, chunk=chunk)


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_dtype": "int8"}, {"layer_budget": "pyramid"}, {"policy": "window", "evict_every": 1}],
    ids=["plain", "int8", "pyramid", "window"],
)
def test_memory_alone_takes_the_largest_budget_that_fits(options: dict[str, Any], checkpoint: Checkpoint) -> None:
    limit = needs(checkpoint, budget=1000, **options).total
    found = needs(checkpoint, memory=limit, context=20_000, **options)
    assert found.total <= limit
    assert found.cache.evicts
    assert needs(checkpoint, budget=found.cache.slots + 40, context=20_000, **options).total > limit
    for context, positions, slots in ((2000, None, 2000), (5000, None, 4096), (5000, "absolute", 5000)):
        whole = needs(checkpoint, memory="3GiB", context=context, positions=positions, **options)
        assert whole.cache.slots == slots  # no more than the model looks back
        assert whole.cache.evicts  # it can go on for ever, although the context fits


def test_memory_and_budget_must_fit_together(checkpoint: Checkpoint) -> None:
    asked = {"budget": 0.5, "context": 4000}
    total = needs(checkpoint, **asked).total
    needs(checkpoint, **asked, memory=total).require()
    refusal = r"needed and --memory is .*: it would fit with --budget \d+ \(.*--context \d+"
    with pytest.raises(BudgetError, match=refusal):
        needs(checkpoint, **asked, memory=total - 1).require()
    with pytest.raises(BudgetError, match="no budget, dtype or context makes it fit"):
        needs(checkpoint, memory="1MiB").require()
    with pytest.raises(BudgetError, match="it would fit with --budget"):  # who wants everything kept is not given less
        needs(checkpoint, memory=total, policy="full", context=20_000).require()


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"context": 8000}, {"budget", "kv_dtype", "context"}),
        ({"budget": 0.5, "context": 8000, "policy": "h2o"}, {"budget", "kv_dtype", "context"}),
        ({"budget": 0.5, "context": 8000, "kv_dtype": "int8"}, {"budget", "dtype", "context"}),
        ({"policy": "full", "context": 8000}, {"budget", "kv_dtype", "context", "policy"}),
        ({"budget": 300, "chunk": 1024}, {"budget", "dtype", "chunk"}),
    ],
    ids=["everything", "fraction", "int8", "full", "tokens"],
)
def test_each_of_the_three_ways_fits(asked: dict[str, Any], names: set[str], checkpoint: Checkpoint) -> None:
    before = needs(checkpoint, **asked)
    limit = before.total - 4 * MIB
    ways = before.three_ways(limit)
    print("", *(f"{way.what}: {way.flags} {way.plan.total:,} of {limit:,}" for way in ways), sep="\n")
    assert len(ways) == 3
    assert {name for way in ways for name in way.options} == names
    for way in ways:
        options = asked | way.options
        dtype = options.pop("dtype", "float32")
        applied = replace(checkpoint, dtype=getattr(torch, dtype))
        vars(applied)["base"] = checkpoint.base
        assert needs(applied, **options).total == way.plan.total <= limit


def test_a_plan_that_the_machine_cannot_hold(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = needs(checkpoint, budget=100)
    for ever, now, outcome in ((1, 1, "error"), (1 << 40, 1, "warning"), (1 << 40, 1 << 40, "nothing")):
        found = Room(ever, now)
        monkeypatch.setattr("minillm.planner.room", lambda _, found=found: found)
        if outcome == "error":
            with pytest.raises(BudgetError, match="all that this process could ever have is 1 B"):
                plan.require()
        elif outcome == "warning":
            with pytest.warns(UserWarning, match="are free now"):
                plan.require()
        else:
            with warnings.catch_warnings(action="error"):
                plan.require()


def test_sizes() -> None:
    assert size_of("6GiB") == 6 * 2**30
    assert size_of(1000) == 1000
    for wrong in ("0.5", "100", "lots", 0):
        with pytest.raises(BudgetError):
            size_of(wrong)


@linux_only
def test_a_broken_promise_stops_the_run(folder: Path) -> None:
    trim()  # what the tests before have left: loading hands it back, and the promise would have that much room
    llm = LLM.load(str(folder), dtype="float32", budget=64, memory=held().now + 250 * MIB)
    stream = llm.stream([5, 6, 7], max_tokens=50, ignore_eos=True, raw=True)
    next(stream)
    behind_its_back = torch.ones(300 * MIB, dtype=torch.uint8)
    error = r"above the promise of [\d,]+; [\d,]+ were planned: lower --budget \(now 64"
    with pytest.raises(MemoryPromiseError, match=error):
        stream.finish()
    del behind_its_back
    assert llm.generate([5, 6, 7], max_tokens=3, ignore_eos=True).usage.completion_tokens == 3  # a new request may try
    with pytest.raises(MemoryPromiseError):
        Guard(1, "cpu", "remedy").check()


@pytest.mark.parametrize(
    "readings",  # MiB now and at most, of which a promise of 100 is broken by those that are marked
    [
        [(90, 90, False), (90, 101, True), (90, 102, False), (90, 105, False), (101, 105, True), (90, 150, True)],
        [(90, 200, False), (90, 203, False), (90, 205, True), (90, 205, False), (100, 205, False), (101, 205, True)],
    ],
    ids=["kept-before", "broken-before"],
)
def test_a_broken_promise_is_told_once(readings: list[tuple[int, int, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak stays when the memory is given back, and is read a little higher later: no new request pays for that."""

    def read(now: int, peak: int) -> None:
        monkeypatch.setattr("minillm.memory.held", lambda _: Held(now * MIB, peak * MIB))

    read(*readings[0][:2])
    guard = Guard(100 * MIB, "cpu", "remedy")
    for now, peak, broken in readings:
        read(now, peak)
        with pytest.raises(MemoryPromiseError, match="above the promise") if broken else nullcontext():
            guard.check()


def tree(root: Path, files: dict[str, object]) -> Path:
    """A /proc and /sys: file contents by path."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(content))
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       1000 kB\nMemFree:     50 kB\nMemAvailable:    900 kB\n"}
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@linux_only
@pytest.mark.parametrize(
    ("files", "ever", "added"),
    [
        ({}, 1000 * 1024, 900 * 1024),
        ({"proc/self/cgroup": "0::/\n"}, 1000 * 1024, 900 * 1024),  # no controller anywhere
        (  # nested: the inner one says "max", the outer one limits; inactive file pages do not count
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "max\n",
                f"{V2}/a/memory.max": "500000\n",
                f"{V2}/a/memory.current": "300000\n",
                f"{V2}/a/memory.stat": "anon 1\ninactive_file 100000\nactive_file 7\n",
            },
            500_000,
            300_000,
        ),
        (  # a namespace of its own: the group is the mount's root
            {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "5000\n", f"{V2}/memory.current": "6000\n"},
            5000,
            -1000,
        ),
        (  # version 1 in a container: the path is the host's, and only the root is to be seen
            {
                "proc/self/cgroup": "5:memory:/docker/1234\n1:name=systemd:/x\n",
                f"{V1}/memory.limit_in_bytes": "400000\n",
                f"{V1}/memory.usage_in_bytes": "100000\n",
                f"{V1}/memory.stat": "inactive_file 5\ntotal_inactive_file 50000\n",
            },
            400_000,
            350_000,
        ),
        (  # hybrid, without a limit: version 1's word for it is a number beyond all machines
            {
                "proc/self/cgroup": "4:cpu,memory:/a\n0::/b\n",
                f"{V1}/a/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/a/memory.usage_in_bytes": "100000\n",
                "sys/fs/cgroup/unified/b/memory.max": "700000\n",
                "sys/fs/cgroup/unified/b/memory.current": "0\n",
            },
            700_000,
            700_000,
        ),
    ],
    ids=["none", "bare", "nested", "namespace", "version-1", "hybrid"],
)
def test_control_groups(files: dict[str, object], ever: int, added: int, tmp_path: Path) -> None:
    """What could ever be had, and what could be added to what this process holds."""
    found = room(root=tree(tmp_path, MEMINFO | files))
    assert found.ever == ever
    assert abs(found.now - held().now - added) < 8 * MIB  # what is held moves between two readings
    assert found.now - room(root=tree(tmp_path / "more", MEMINFO)).now <= 8 * MIB


def storages(nested: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


class Living(TorchDispatchMode):
    """Counts the bytes of tensors made inside it for as long as they live; `most` is the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            if storage._cdata not in given | self.known:  # not a view
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def gone(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.now -= count


HASH_OPTIONS: list[dict[str, Any]] = [{"centred": True, "norm_weighted": True}, {"decay": 0.9}, {"recent_queries": 8}]
HASH_OPTIONS += [{"hash_bits": 64}, {"hash_bits": 256}]


@pytest.mark.parametrize(
    ("policy", "options"), [*((name, {}) for name in POLICIES), *(("hashevict", options) for options in HASH_OPTIONS)]
)
def test_attention_holds_what_the_plan_says(policy: str, options: dict[str, Any]) -> None:
    """Filling the last slots and evicting the first tokens, with every tensor that lives on the way counted."""
    slots, new = 1024, 64
    dtypes, heads = (torch.float32, torch.bfloat16), 8
    for kv_heads, dtype, kv_dtype, pinned in product((1, 8), dtypes, ("auto", "int8"), (False, True)):
        shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 64}
        config = tiny_config(num_hidden_layers=1, sliding_windows=(None,), **shape)
        plan = CachePlan.of(config, budget=slots, whole=slots, dtype=dtype, policy=policy, kv_dtype=kv_dtype, **options)
        cache = plan.allocate(torch.device("cpu"))
        cache.seen = [slots - new]
        cache.layers[0].positions[:] = torch.arange(slots, dtype=torch.int32)
        length = 2 * new if plan.evicts else new
        q, k = (torch.randn(1, count, length, 64).to(dtype) for count in (heads, kv_heads))
        span = cache.append(length)
        cache.layers[0].flagged = pinned
        with torch.inference_mode(), Living() as living:
            attend_(cache.layers[0], q, k, k, span, q if plan.position_mode == "window" else None)
        planned = attention_bytes(plan, 256, plan.rows)
        lived = living.most - q.nbytes  # the result is counted as an activation
        assert lived <= planned <= 2 * lived + MIB, (kv_heads, dtype, kv_dtype, pinned, lived / MIB, planned / MIB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_of_a_prompt_stays_as_small_as_said(dtype: torch.dtype) -> None:
    """In more slots than the model looks back, before anything is evicted: both ends of the window are masked."""
    slots, new, head = 20_000, 256, {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = tiny_config(num_hidden_layers=1, sliding_windows=(None,), max_position_embeddings=512, **head)
    plan = CachePlan.of(config, budget=slots, whole=slots, dtype=dtype, policy="window")
    cache = plan.allocate(torch.device("cpu"))
    cache.seen = [slots - 2 * new]
    cache.layers[0].positions[:] = torch.arange(slots, dtype=torch.int32)
    q = torch.randn(1, 1, new, 8).to(dtype)
    with torch.inference_mode(), Living() as living:
        cpu.attend_(cache.layers[0], q, q, q, cache.append(new), q)
    assert cpu.MASK_BYTES / 2 < living.most <= cpu.MASK_BYTES + MIB / 2


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        *((name, {}) for name, rule in POLICIES.items() if rule.evicts),
        *(("hashevict", options) for options in HASH_OPTIONS),
    ],
)
def test_an_eviction_holds_what_the_plan_says(policy: str, options: dict[str, Any]) -> None:
    """The first one, when all tokens are tagged, and a later one, after few tokens or many: without attention."""
    slots = 1024
    for kv_heads, kv_dtype, every in product((1, 8), ("auto", "int8"), (32, 600)):
        shape = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "head_dim": 64}
        config = tiny_config(num_hidden_layers=1, sliding_windows=(None,), **shape)
        given: dict[str, Any] = {"policy": policy, "kv_dtype": kv_dtype, "evict_every": every, **options}
        plan = CachePlan.of(config, budget=slots, whole=2 * slots, dtype=torch.bfloat16, **given)
        layer = plan.allocate(torch.device("cpu")).layers[0]
        q, k = (torch.randn(1, count, 64).to(torch.bfloat16) for count in (8, kv_heads))
        for now in (slots, slots + every):
            layer.positions[:] = torch.arange(slots, dtype=torch.int32)
            with torch.inference_mode(), Living() as living:
                evict_(layer, q, k, torch.tensor([now]), settle=now == slots)
            assert living.most <= attention_bytes(plan, 1, plan.rows), (kv_heads, kv_dtype, every, now)


def test_loading_counts_the_tensor_that_is_converted() -> None:
    plan = CachePlan.of(tiny_config(), budget=8, whole=8, dtype=torch.bfloat16)
    weights = Weights(((10**9, torch.float32), (5, torch.bfloat16)), "test")
    parts = MemoryPlan(plan, weights, 0, torch.device("cpu")).parts
    later = sum(count for name, count in parts.items() if name.startswith(("cache", "workspace")))
    assert parts["weights"] == 2 * (10**9 + 5)
    assert parts["conversion"] == 4 * 10**9 + CONVERSION_BYTES - later
    stored = Weights(((10**9, torch.bfloat16),), "test")
    assert "conversion" not in MemoryPlan(plan, stored, 0, torch.device("cpu")).parts


def test_plan_says_whether_it_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "model")
    parts = ["base", "weights", "cache keys", "workspace attention", "total"]
    no = ["does not fit", "too much", "choose a smaller model"]
    for memory, words in (("64GiB", ["fits into the"]), ("1MiB", no)):
        assert main(["plan", "--model", str(folder), "--budget", "0.5", "--memory", memory]) == 0
        table = capsys.readouterr().out
        assert all(word in table for word in parts + words)
    assert main(["generate", "hi", "--model", str(folder), "--memory", "1MiB"]) == 2
    assert "makes it fit" in capsys.readouterr().err
    assert main(["verify", str(folder), "--file", str(folder / "config.json"), "--memory", "6GiB"]) == 2
    assert "--memory does not count the full cache" in capsys.readouterr().err
