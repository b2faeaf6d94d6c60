"""minillm beside transformers, llama.cpp and gpt-fast: one shape, the same questions, interleaved on one machine.

    python tools/bench_peers.py [--engines minillm-int4 llama-q4_0 ...] [--questions decode-16 ...] [--rounds 5]
        [--shape tinyllama] [--layers N] [--threads 2] [--peers-python VENV/bin/python] [--gpt-fast FOLDER]

Every engine is a process of its own that is started once, keeps its weights and waits for questions, so that only one
computes at any time.  In each of `--rounds` rounds every engine is asked once, in an order that rotates; a first round
warms up and is not counted.  Weights are random (std 0.02): speed does not depend on what they are.

What is asked.  prefill-N: an empty cache reads N tokens, up to the likeliest next one.  decode-N: `--tokens` greedy
tokens, one by one, after N tokens that were read outside the timing and are kept from round to round (peers take back
what they decoded, and so does our full cache; a bounded cache just goes on; 32 tokens hold one of its evictions).
`@614` is ours with hashevict-plus in 614 slots per layer and KV head, a budget of 0.3; `full` keeps everything, as the
peers do.  Tokens per second are medians over rounds, and so are ratios, each of which compares two answers of one
round; the smallest and the largest follow in brackets.

Who is asked.  `minillm-*` and `transformers` (bfloat16, sdpa, its default cache) run in this python's environment.
`llama-*` is llama.cpp by llama-cpp-python, built on this machine; its python (`--peers-python`) has that and `gguf`.
It reads GGUF files of random blocks that are written to `--folder` once, with the types that llama-quantize gives (q4_0
keeps its output matrix in q6_K), and keeps its cache in float16, its default.  It prefills with flash attention and
decodes without: on two Xeon cores, after 2,048 tokens in q4_0, it decodes 10 tokens a second with it, its own choice,
and 23 without, while it reads 150 and 126.  Where gcc is 12 and the processor has AMX, build it with
CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'": that compiler drops the configuration of the tiles, and the
first batch of a quantised model ends in a segmentation fault.
`gpt-fast` is model.py of a checkout (`--gpt-fast`) in bfloat16, eager, though it was made to be compiled.

Other people's work.  A measurement is repeated, up to three times, if other processes (and the host, in stolen time)
had more than a tenth of a core meanwhile; if all had, the quietest is kept and its engine marked `*`.  The last line is
JSON with every answer.  Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import IO, Any

LIMIT = 0.1  # cores that others may have while an engine is measured
PAUSE = 0.3  # seconds between measurements: threads of the engine before spin for a moment
VOCABULARY = 32_000
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {"tinyllama": (2048, 5632, 22, 32, 4), "mistral-7b": (4096, 14_336, 32, 32, 8)}
OTHERWISE = {"vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu"}
OTHERWISE |= {"max_position_embeddings": 32_768, "tie_word_embeddings": False}
TORCH = ("minillm-bf16", "minillm-int8", "minillm-int4", "transformers", "gpt-fast")
ENGINES = (*TORCH, "llama-bf16", "llama-q8_0", "llama-q4_0")


@dataclass(frozen=True)
class Question:
    """prefill: read `length` tokens.  decode: go on after `length` tokens; slots: of our caches, None = full."""

    do: str
    length: int
    slots: tuple[int | None, ...] = (None,)


QUESTIONS = {
    "prefill-512": Question("prefill", 512),
    "prefill-4096": Question("prefill", 4096),
    "decode-16": Question("decode", 16),
    "decode-2048": Question("decode", 2048, (614, None)),
    "decode-16384": Question("decode", 16_384, (2048,)),
}


def text(length: int) -> list[int]:
    """The beginning of one text for every engine; it has no special tokens."""
    draw = random.Random(0)
    return [draw.randrange(300, VOCABULARY) for _ in range(length)]


# The engines.  `hold` makes the cache hold exactly the first `length` tokens of the text, with room for more; `feed`
# appends tokens and answers with the likeliest next one.  They import what they need in the process that runs them.


class Minillm:
    """Ours: bfloat16, int8 or int4."""

    def __init__(self, args: argparse.Namespace, shape: dict[str, Any]) -> None:
        import torch

        from minillm.config import ModelConfig
        from minillm.loader import random_model

        scheme = {"bf16": None}.get(args.kind, args.kind)
        config = ModelConfig.from_hf({"architectures": ["LlamaForCausalLM"], **shape})
        self.model = random_model(config, dtype=torch.bfloat16, device=torch.device("cpu"), scheme=scheme, seed=0)
        self.torch, self.caches = torch, dict[tuple[int, int, int | None], Any]()

    def hold(self, length: int, room: int, slots: int | None) -> None:
        from minillm.cache import KVCache
        from minillm.eviction import Retention
        from minillm.policies import make_policy

        if (length, room, slots) not in self.caches:
            policy, retention = make_policy("hashevict-plus" if slots else "full"), slots or length + room
            self.caches[length, room, slots] = KVCache(
                self.model.config, policy, Retention.of(retention, recent_share=3), dtype=self.torch.bfloat16
            )
        self.cache = self.caches[length, room, slots]
        if length and self.cache.seen[0] == 0:
            self.feed(text(length))
        elif slots is None:
            for layer in self.cache.layers:
                layer.positions.masked_fill_(layer.positions >= length, -1)
            self.cache.seen = [length]

    def feed(self, tokens: list[int]) -> int:
        from minillm.generate import feed

        ids = self.torch.tensor([tokens])  # [1, n]
        if len(tokens) == 1:
            last = self.model(ids, self.cache.append(1), self.cache)  # [1, 1, hidden]
        else:
            *_, (_, last) = feed(self.model, self.cache, ids.int(), 256)
        return int(self.model.logits(last[:, -1]).argmax())

    def bandwidth(self) -> float:
        """Bytes per second at which all threads together read what no cache holds: the best of five."""
        numbers, times = self.torch.ones(1 << 28), []  # 1 GiB
        for _ in range(6):
            begin = time.perf_counter()
            numbers.sum()
            times.append(time.perf_counter() - begin)
        return float(numbers.nbytes / min(times[1:]))


class Transformers:
    """transformers, as its `generate` runs it: one forward pass for the prompt, a cache that grows."""

    def __init__(self, args: argparse.Namespace, shape: dict[str, Any]) -> None:  # noqa: ARG002
        import torch
        import transformers

        config = transformers.AutoConfig.for_model("llama", **shape)
        self.model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.tensor, self.empty = torch.tensor, lambda: transformers.DynamicCache(config=config)
        self.cache = self.empty()

    def hold(self, length: int, room: int, slots: None) -> None:  # noqa: ARG002
        if length == 0:
            self.cache = self.empty()
        elif (held := self.cache.get_seq_length()) > length:
            self.cache.crop(length - held)
        elif held < length:
            self.feed(text(length)[held:])

    def feed(self, tokens: list[int]) -> int:
        answer = self.model(self.tensor([tokens]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(answer.logits[0, -1].argmax())


class GptFast:
    """gpt-fast's model; it attends over all of its cache, which is therefore made only as long as is needed."""

    def __init__(self, args: argparse.Namespace, shape: dict[str, Any]) -> None:
        import torch

        sys.path.insert(0, str(args.gpt_fast))
        from model import ModelArgs, Transformer

        names = ("dim", "intermediate_size", "n_layer", "n_head", "n_local_heads")
        sizes = {name: shape[key] for name, key in zip(names, SIZES, strict=True)}
        with torch.device("meta"):
            self.model = Transformer(ModelArgs(**sizes, vocab_size=VOCABULARY, block_size=args.context))
        self.model.to_empty(device="cpu").to(torch.bfloat16).requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.02)
        self.torch, self.held = torch, 0

    def hold(self, length: int, room: int, slots: None) -> None:  # noqa: ARG002
        if not length + room <= self.model.max_seq_length < length + room + 8:
            self.model.max_seq_length, self.held = -1, 0
            self.model.setup_caches(1, length + room)
        self.held = min(self.held, length)
        while self.held < length:
            self.feed(text(length)[self.held : self.held + 512])

    def feed(self, tokens: list[int]) -> int:
        at = self.torch.arange(self.held, self.held + len(tokens))
        self.held += len(tokens)
        return int(self.model(self.torch.tensor([tokens]), at)[0, -1].argmax())


class LlamaCpp:
    """llama.cpp by its C interface, in batches of 512, with flash attention where that is faster: not in decoding."""

    def __init__(self, args: argparse.Namespace, shape: dict[str, Any]) -> None:
        import llama_cpp

        path = args.folder / f"{args.shape}-{shape['num_hidden_layers']}-{args.kind}.gguf"
        if not path.is_file():
            write_gguf(path, args.kind, shape)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self.api, self.args, self.contexts = llama_cpp, args, dict[bool, Any]()
        self.system = llama_cpp.llama_print_system_info().decode()

    def hold(self, length: int, room: int, slots: None) -> None:  # noqa: ARG002
        flash = length == 0  # to prefill
        if flash not in self.contexts:
            options = self.api.llama_context_default_params()
            options.n_ctx, options.n_batch, options.n_ubatch = self.args.context, 512, 512
            options.n_threads = options.n_threads_batch = self.args.threads
            options.flash_attn_type = int(flash)
            self.contexts[flash] = self.api.llama_init_from_model(self.model, options)
        self.context = self.contexts[flash]
        memory = self.api.llama_get_memory(self.context)
        self.api.llama_memory_seq_rm(memory, 0, length, -1)
        held = self.api.llama_memory_seq_pos_max(memory, 0) + 1
        if held < length:
            self.feed(text(length)[held:])

    def feed(self, tokens: list[int]) -> int:
        import numpy

        for start in range(0, len(tokens), 512):
            piece = tokens[start : start + 512]
            ids = (ctypes.c_int32 * len(piece))(*piece)  # which has to outlive the batch
            if code := self.api.llama_decode(self.context, self.api.llama_batch_get_one(ids, len(piece))):
                raise RuntimeError(f"llama_decode answered {code}")
        logits = self.api.llama_get_logits(self.context)  # of the last token alone
        return int(numpy.ctypeslib.as_array(logits, (VOCABULARY,)).argmax())


def write_gguf(path: Path, kind: str, shape: dict[str, Any]) -> None:
    """A llama model without a tokenizer.  Every tensor is cut out of one pool of random blocks, each from elsewhere.

    The number of blocks in the pool is odd (and mostly prime), so that rows of a tensor do not repeat.
    """
    import gguf
    import numpy

    draw, types, blocks = numpy.random.default_rng(0), gguf.GGMLQuantizationType, (1 << 19) - 1
    main, f32, q6_k = types[kind.upper()], types.F32, types.Q6_K
    weights = draw.normal(0, 0.02, (blocks, 32)).astype(numpy.float32)
    sixes = draw.integers(0, 256, (blocks // 8, 210), dtype=numpy.uint8)  # 256 numbers of 6 bits in 192 bytes, then ...
    sixes[:, 192:208], sixes[:, 208:] = 8, numpy.array([0.000135], "<f2").view(numpy.uint8)  # ... 16 scales, and theirs
    pools = {main: gguf.quants.quantize(weights, main).reshape(-1), q6_k: sixes.reshape(-1)}
    hidden, wide, layers, heads, kv_heads = (shape[key] for key in SIZES)
    top = {"token_embd": (VOCABULARY, hidden), "output_norm": (hidden,), "output": (VOCABULARY, hidden)}
    square, narrow = (hidden, hidden), (kv_heads * hidden // heads, hidden)
    each = {"attn_norm": (hidden,), "attn_q": square, "attn_k": narrow, "attn_v": narrow, "attn_output": square}
    each |= {"ffn_norm": (hidden,), "ffn_gate": (wide, hidden), "ffn_up": (wide, hidden), "ffn_down": (hidden, wide)}
    shapes = top | {f"blk.{layer}.{name}": size for layer in range(layers) for name, size in each.items()}

    writer = gguf.GGUFWriter(path.with_suffix(".part"), "llama")
    numbers = {"context_length": shape["max_position_embeddings"], "vocab_size": VOCABULARY, "block_count": layers}
    numbers |= {"embedding_length": hidden, "feed_forward_length": wide, "rope.dimension_count": hidden // heads}
    for key, number in (numbers | {"attention.head_count": heads, "attention.head_count_kv": kv_heads}).items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    tensors = []  # type and bytes of each
    for name, size in shapes.items():
        made = f32 if len(size) == 1 else q6_k if name == "output" and main == types.Q4_0 else main
        weights_in_block, bytes_of_block = gguf.GGML_QUANT_SIZES[made]
        tensors.append((made, prod(size) // weights_in_block * bytes_of_block))
        writer.add_tensor_info(f"{name}.weight", size, numpy.dtype(numpy.float32), tensors[-1][1], made)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for made, count in tensors:
        if made == f32:
            writer.write_tensor_data(numpy.ones(count // 4, numpy.float32))
        else:
            start = int(draw.integers(blocks // 8)) * gguf.GGML_QUANT_SIZES[made][1]
            writer.write_tensor_data(numpy.resize(numpy.roll(pools[made], start), count))
    writer.close()
    path.with_suffix(".part").rename(path)


def work(args: argparse.Namespace) -> None:
    """One engine: answer one JSON object per line of stdin with one per line of stdout, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log
    family, _, args.kind = args.worker.partition("-")
    packages = ["llama_cpp_python"] if family == "llama" else ["torch", "transformers"]
    about: dict[str, Any] = {"versions": {package: version(package) for package in packages}}
    with contextlib.ExitStack() as stack:
        if args.worker in TORCH:
            import torch

            torch.set_num_threads(args.threads)
            stack.enter_context(torch.inference_mode())
        make = {"minillm": Minillm, "transformers": Transformers, "gpt": GptFast, "llama": LlamaCpp}
        engine: Any = make[family](args, shape_of(args))
        print(json.dumps(about | ({"system": engine.system} if family == "llama" else {})), file=answers)
        for line in sys.stdin:
            try:
                answer = respond(engine, **json.loads(line))
            except Exception as error:  # said aloud, and the others go on
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers)


def respond(engine: Any, do: str, tokens: int = 0, context: int = 0, slots: int | None = None) -> dict[str, Any]:
    """Seconds, or what else was asked for."""
    if do == "memory":
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {"bytes": int(status["VmHWM"].split()[0]) * 1024}
    if do == "bandwidth":
        return {"bytes_per_second": engine.bandwidth()}
    engine.hold(context, tokens, slots)
    ids = text(tokens)
    begin = time.perf_counter()
    if do == "prefill":
        engine.feed(ids)
    else:
        token = ids[0]
        for _ in range(tokens):
            token = engine.feed([token])
    return {"seconds": time.perf_counter() - begin}


# The one who asks.


class Worker:
    """An engine in its own process."""

    def __init__(self, engine: str, args: argparse.Namespace) -> None:
        """Start it and wait until it has its weights; what it says goes to a log in the folder."""
        options = {"--worker": engine, "--shape": args.shape, "--layers": shape_of(args)["num_hidden_layers"]}
        options |= {"--threads": args.threads, "--context": args.context, "--folder": args.folder}
        options |= {"--gpt-fast": args.gpt_fast} if args.gpt_fast else {}
        words = [str(word) for option in options.items() for word in option]
        python = sys.executable if engine in TORCH else str(args.peers_python)
        self.engine, self.ours, self.log = engine, engine.startswith("minillm"), args.folder / f"{engine}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.about = self._answer()

    def ask(self, **request: object) -> dict[str, Any]:
        """One request, one answer; an engine that died answers with an error."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        stdout: IO[str] = self.process.stdout  # type: ignore[assignment]
        line = stdout.readline()
        return json.loads(line) if line else {"error": f"it ended; its own words are in {self.log}"}


class Watch:
    """How much of the machine everybody else has had."""

    def __init__(self, workers: list[Worker]) -> None:
        self.stats = [Path(f"/proc/{pid}/stat") for pid in (os.getpid(), *(worker.process.pid for worker in workers))]

    def now(self) -> tuple[float, int]:
        """Seconds, and jiffies that others have had since the machine was started."""
        ticks = [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4]  # all but idle and waiting for disks; the last is stolen time
        for stat in self.stats:
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]  # of all threads
            busy -= int(user) + int(system)
        return time.perf_counter(), busy

    def others(self, since: tuple[float, int]) -> float:
        """Cores that others had since then, on average."""
        now = self.now()
        return max(0.0, (now[1] - since[1]) / os.sysconf("SC_CLK_TCK") / (now[0] - since[0]))

    def rest(self, patience: float) -> None:
        """Pause, and go on pausing while others are at work, but not for more than `patience` seconds."""
        until = time.perf_counter() + patience
        while True:
            begin = self.now()
            time.sleep(PAUSE)
            if self.others(begin) <= LIMIT or time.perf_counter() > until:
                return


def measure(worker: Worker, request: dict[str, Any], watch: Watch, patience: float) -> dict[str, Any]:
    """Tokens per second, cores that others had meanwhile, and how many measurements were thrown away for that."""
    tries: list[tuple[float, float]] = []  # others, tokens per second
    while len(tries) < 4 and (not tries or tries[-1][0] > LIMIT):
        watch.rest(patience)
        begin = watch.now()
        answer = worker.ask(**request)
        if "error" in answer:
            return answer
        tries.append((round(watch.others(begin), 3), request["tokens"] / answer["seconds"]))
    others, speed = min(tries)
    return {"speed": speed, "others": others, "discarded": len(tries) - 1, "contended": others > LIMIT}


def interview(workers: list[Worker], question: Question, watch: Watch, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one question: the measurements of each contender, or what was wrong with it."""
    context, tokens = (0, question.length) if question.do == "prefill" else (question.length, args.tokens)
    contenders = {}
    for worker in workers:
        for slots in question.slots if worker.ours else (None,):
            name = f"{worker.engine} {f'@{slots}' if slots else 'full'}" if worker.ours else worker.engine
            contenders[name] = worker, {"do": question.do, "tokens": tokens, "context": context, "slots": slots}
    found: dict[str, Any] = {}
    for name, (worker, request) in contenders.items():  # warm up, and read the context
        answer = worker.ask(**request)
        found[name] = answer if "error" in answer else []
    order = [name for name in contenders if found[name] == []]
    for _ in range(args.rounds):
        for name in order:
            if isinstance(found[name], list):
                answer = measure(*contenders[name], watch, args.patience)
                found[name] = answer if "error" in answer else [*found[name], answer]
                print(f"bench_peers: {name} {json.dumps(answer)}", file=sys.stderr, flush=True)
        order = order[1:] + order[:1]
    return found


def spread(values: list[float]) -> str:
    """12.34 [12.11 12.60]: the median, the smallest and the largest."""
    return f"{statistics.median(values):.2f} [{min(values):.2f} {max(values):.2f}]"


def table(found: dict[str, Any]) -> str:
    """Tokens per second of every contender, then each of ours over each peer."""
    lines, speeds = [], dict[str, list[float]]()
    for name, answers in found.items():
        if isinstance(answers, list):
            speeds[name] = [answer["speed"] for answer in answers]
            said = spread(speeds[name]) + " *" * any(answer["contended"] for answer in answers)
        else:
            said = answers["error"]
        lines.append(f"  {name:<20} {said}")
    ours, peers = ([name for name in speeds if name.startswith("minillm") == mine] for mine in (True, False))
    if ours and peers:
        lines.append(" " * 23 + "".join(f"{'/ ' + peer:<20}" for peer in peers))
        for mine in ours:
            ratios = ([a / b for a, b in zip(speeds[mine], speeds[peer], strict=True)] for peer in peers)
            lines.append(f"  {mine:<20} " + "".join(f"{spread(ratio):<20}" for ratio in ratios))
    return "\n".join(lines)


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    """The sizes of the model as config.json has them, with as many layers as were asked for."""
    shape = dict(zip(SIZES, SHAPES[args.shape], strict=True)) | OTHERWISE
    return shape | ({"num_hidden_layers": args.layers} if args.layers else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="default: all whose options are given")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in one measurement")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--patience", type=float, default=20.0, help="seconds to wait for others before a measurement")
    parser.add_argument("--peers-python", type=Path, default=sys.executable, help="one that has llama_cpp and gguf")
    parser.add_argument("--gpt-fast", type=Path, help="a checkout of gpt-fast")
    parser.add_argument("--folder", type=Path, default="runs/peers", help="for GGUF files and logs")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    engines = args.engines or [engine for engine in ENGINES if engine != "gpt-fast" or args.gpt_fast]
    if "gpt-fast" in engines and not args.gpt_fast:
        parser.error("the engine gpt-fast needs --gpt-fast FOLDER, a checkout of it")
    args.folder.mkdir(parents=True, exist_ok=True)
    args.context = max(QUESTIONS[name].length for name in args.questions) + args.tokens
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].lstrip("\t: ")
    report: dict[str, Any] = {"date": datetime.datetime.now().isoformat(timespec="minutes"), "cpu": cpu}
    report |= {name: getattr(args, name) for name in ("shape", "layers", "threads", "rounds", "tokens")}
    workers = []
    for engine in engines:
        print(f"bench_peers: starting {engine}", file=sys.stderr, flush=True)
        workers.append(Worker(engine, args))
        if "error" in workers[-1].about:
            raise SystemExit(f"bench_peers: {engine} did not start: {workers[-1].about['error']}")
    watch = Watch(workers)
    if workers[0].ours:
        watch.rest(args.patience)
        report |= workers[0].ask(do="bandwidth")
        print(f"memory is read at {report['bytes_per_second'] / 1e9:.1f} GB/s")
    report["engines"] = {worker.engine: worker.about for worker in workers}
    report["questions"] = {}
    for name in args.questions:
        print(f"{name}: tokens per second, median of {args.rounds} rounds [smallest largest]", flush=True)
        report["questions"][name] = interview(workers, QUESTIONS[name], watch, args)
        print(table(report["questions"][name]), flush=True)
    for worker in workers:
        worker.about["peak_bytes"] = worker.ask(do="memory").get("bytes")
        worker.process.communicate()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
