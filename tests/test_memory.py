"""The promise: the most memory a process ever holds does not depend on how long the text is.

Peaks are VmHWM of fresh processes, as Linux counts them: everything is in, tokenizer and allocator included.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from minillm import LLM
from minillm.cache import KVCache
from minillm.loader import save_checkpoint
from minillm.tokenizer import Tokenizer
from tests.helpers import tiny_config, tiny_model

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc/self/status")

SLOTS, CHUNK = 32, 32  # a prompt of 4 times the slots is longer than two chunks
SHORT, LONG = 4 * SLOTS, 200 * SLOTS
LARGE = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "head_dim": 64}
SENTENCE = "the old whale sailed under a grey sky and nobody on the shore knew why it had come near"

CHILD = """
import contextlib, io, json, pathlib, sys, time

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

def pieces(path):
    with open(path, encoding="utf-8") as file:
        while piece := file.read(1 << 16):
            yield piece

def library(folder, path, dtype, budget, chunk):
    import torch
    from minillm import LLM
    torch.set_num_threads(1)
    llm = LLM.load(folder, budget=budget, chunk=chunk, dtype=dtype, evict_every=8)
    resident = []
    tokens = llm.encode(pieces(path))
    note = lambda done, total: resident.append(status("VmRSS"))
    result = llm.stream(tokens, max_tokens=8, ignore_eos=True, progress=note).finish()
    return {"tokens": result.usage.seen_tokens, "growth": resident[-1] - resident[2]}

def command(folder, path, dtype, budget, chunk):
    from minillm.cli.main import main
    answer = io.StringIO()
    words = ["generate", "--model", folder, "--dtype", dtype, "--file", path, "--budget", str(budget), "--json"]
    words += ["--chunk", str(chunk), "--evict-every", "8", "--max-tokens", "8", "--threads", "1"]
    with contextlib.redirect_stdout(answer):
        assert main(words) == 0
    return {"tokens": json.loads(answer.getvalue())["usage"]["seen_tokens"]}

def encode(folder, path):
    from minillm.tokenizer import Tokenizer
    return {"tokens": len(Tokenizer.from_folder(pathlib.Path(folder)).encode_stream(pieces(path), bos=True))}

name, *arguments = json.loads(sys.argv[1])
begin = time.perf_counter()
found = globals()[name](*arguments)
print(json.dumps({**found, "peak": status("VmHWM"), "seconds": time.perf_counter() - begin}))
"""


def fresh(name: str, folder: Path, text: Path, *options: object) -> dict[str, float]:
    """Run one function of CHILD in a process of its own: tokens seen, and the peak memory of that process in bytes."""
    arguments = json.dumps([name, str(folder), str(text), *options])
    done = subprocess.run([sys.executable, "-c", CHILD, arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def text_file(path: Path, characters: int) -> Path:
    """Random words that never repeat themselves for long, about so many characters."""
    draw = random.Random(0)
    path.write_text(" ".join(draw.choices(SENTENCE.split(), k=characters // 2))[:characters], "utf-8")
    return path


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers that keep 12 KiB a token in float32: a leak of one of their tensors in every token could not hide."""
    folder = tmp_path_factory.mktemp("large")
    config = tiny_config(**LARGE, num_attention_heads=8, num_key_value_heads=4, sliding_windows=(None,) * 6)
    save_checkpoint(folder, tiny_model(config), config)
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([SENTENCE], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    bpe.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """A checkpoint folder by name: the real stories260K, or `random`."""
    if request.param == "random":
        return Path(request.getfixturevalue("random_checkpoint"))
    return Path(request.getfixturevalue("shared_data")) / "models" / "stories260K"


def tokens_file(path: Path, checkpoint: Path, tokens: int) -> Path:
    """A text of about so many tokens."""
    sample = text_file(path, 10_000).read_text("utf-8")
    return text_file(path, tokens * len(sample) // len(Tokenizer.from_folder(checkpoint).encode(sample, bos=False)))


@linux_only
@pytest.mark.parametrize(
    ("checkpoint", "dtype", "way"),
    [
        ("stories260K", "float32", "command"),
        ("random", "bfloat16", "library"),
        pytest.param("random", "float32", "command", marks=pytest.mark.slow),
    ],
    indirect=["checkpoint"],
)
def test_peak_memory_does_not_depend_on_the_prompt(checkpoint: Path, dtype: str, way: str, tmp_path: Path) -> None:
    short, long = (
        fresh(way, checkpoint, tokens_file(tmp_path / "text", checkpoint, tokens), dtype, SLOTS, CHUNK)
        for tokens in (SHORT, LONG + SLOTS)
    )
    print(f"\n{checkpoint.name} {dtype} {way}, {SLOTS} slots:", *(f"{run} " for run in (short, long)))
    assert 2 * CHUNK < short["tokens"] < 5 * SLOTS
    assert long["tokens"] >= LONG
    assert abs(long["peak"] - short["peak"]) <= 0.01 * short["peak"] + 8 * 2**20


@linux_only
@pytest.mark.parametrize(
    ("checkpoint", "characters"),
    [
        ("random", 4_000_000),
        pytest.param("stories260K", 10_000_000, marks=pytest.mark.slow),
    ],
    indirect=["checkpoint"],
)
def test_a_long_text_is_tokenised_at_four_bytes_a_token(checkpoint: Path, characters: int, tmp_path: Path) -> None:
    short, long = (
        fresh("encode", checkpoint, text_file(tmp_path / "text", count)) for count in (characters // 10, characters)
    )
    tokens, growth = long["tokens"] - short["tokens"], long["peak"] - short["peak"]
    print(f"\n{checkpoint.name}: {characters:,} characters, {long} after {short}: {growth / tokens:.2f} bytes a token")
    assert tokens > characters / 10
    assert growth <= 4 * 17 / 16 * tokens + 0.01 * short["peak"] + 8 * 2**20  # an array grows by a sixteenth at a time


def addresses(cache: KVCache) -> list[tuple[str, int, int]]:
    """(name, address, bytes) of every tensor that the cache holds, private ones included."""
    return [
        (f"{index}.{name}", value.data_ptr(), value.nbytes)
        for index, layer in enumerate(cache.layers)
        for name, value in (vars(layer) | layer.state).items()
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize("policy", ["full", "window", "hashevict", "hashevict-key"])
def test_the_caches_tensors_never_change(policy: str, random_checkpoint: Path) -> None:
    slots = 16
    llm = LLM.load(
        str(random_checkpoint), budget=None if policy == "full" else slots, policy=policy, context=5 * slots + 8
    )
    before = addresses(llm.cache)
    assert len(before) >= 6 * 4
    assert sum(size for *_, size in before) >= llm.cache.nbytes == llm.plan.nbytes
    for _ in range(2):  # the second from a cache that was reset
        result = llm.generate([5, 6, 7, 8], max_tokens=5 * slots, ignore_eos=True)
        assert result.usage.seen_tokens > 5 * slots
        assert addresses(llm.cache) == before
        llm.cache.reset()
        assert addresses(llm.cache) == before
