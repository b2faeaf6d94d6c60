"""Train a small Llama on text files with this package's own network, and export it as a Hugging Face-style folder.

    python tools/train.py runs/first --data stories.txt@5 --data books/ --keep-mb 12 --minutes 60 --export weights/first

A run lives in its folder: recipe.json (what was asked for), tokenizer.json, checkpoint.safetensors (weights, optimisers
and progress in one file, replaced at once) and log.jsonl.  `--resume` goes on from the last checkpoint.  A batch is a
function of (seed, step) alone, so on a CPU an interrupted run takes bit for bit the same steps as an uninterrupted one.

This file is the command and its loop; train_core.py is the step, train_text.py the data, train_export.py the result.
Data is seen only as `Batches`: to mix in something else than text, write another `batch(step, rows)`.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor
from train_core import Recipe, Trainer
from train_export import Facts, export
from train_tasks import WITH_TASKS, TaskRows
from train_text import BOS, EOS, PackedText, encode, load_tokenizer, read_sources, train_tokenizer

from minillm.errors import CheckpointError, ConfigError, MinillmError
from minillm.lab.tasks import Prose


class Batches(Protocol):
    """Where training rows come from; `tokens` is how many one pass has."""

    tokens: int

    def batch(self, step: int, rows: int) -> Tensor:
        """int64 [rows, context + 1], or as many tokens in shorter rows; a function of nothing but the step."""


@dataclass
class Run:
    """One training run in its folder."""

    folder: Path
    export_to: Path
    recipe: Recipe
    tokenizer: Tokenizer
    trainer: Trainer
    batches: Batches
    held_out: dict[str, list[Tensor]]
    bytes_per_token: dict[str, float]
    facts: dict[str, str]
    minutes: float
    steps: int
    stopped: bool = False

    def go(self, every: float) -> None:
        """Train to the end or until interrupted; checkpoint and export every `every` minutes and when it is over."""
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._train(every)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _train(self, every: float) -> None:
        trainer, recipe = self.trainer, self.recipe
        before, began, saved = trainer.seconds, time.monotonic(), time.monotonic()
        first, smooth = trainer.step, 0.0
        while (done := self.fraction()) < 1 and not self.stopped:
            loss = trainer.train_step(self.batches.batch(trainer.step, recipe.batch))
            if not math.isfinite(loss):
                raise MinillmError(
                    f"the loss became {loss} at step {trainer.step}; lower RATES and go on with --resume"
                )
            trainer.seconds = before + time.monotonic() - began
            smooth = loss if trainer.step == first + 1 else 0.95 * smooth + 0.05 * loss
            if trainer.step % 10 == 0:
                speed = (trainer.step - first) * recipe.batch * recipe.context / (trainer.seconds - before)
                left = trainer.seconds * (1 - done) / max(done, 1e-9) / 60
                self.log(step=trainer.step, loss=smooth, tokens_per_second=round(speed), minutes_left=left)
            if time.monotonic() - saved > 60 * every and self.fraction() < 1:
                self.checkpoint()
                saved = time.monotonic()
        self.checkpoint()

    def fraction(self) -> float:
        """How much of the run is done, by steps or else by time."""
        return self.trainer.step / self.steps if self.steps else self.trainer.seconds / (60 * self.minutes)

    def checkpoint(self) -> None:
        """Save the state, measure on the held-out text, export."""
        self.trainer.save(self.folder / "checkpoint.safetensors")
        losses: dict[str, tuple[float, float]] = {}
        for name, documents in self.held_out.items():
            losses[name] = self.trainer.measure(documents), self.bytes_per_token[name]
            bits = losses[name][0] / losses[name][1] / math.log(2)
            self.log(held_out=name, step=self.trainer.step, loss=losses[name][0], bits_per_byte=bits)
        facts = Facts(
            **self.facts,
            tied=self.recipe.tied,
            seconds=self.trainer.seconds,
            seen=self.trainer.step * self.recipe.batch * self.recipe.context,
            pass_tokens=self.batches.tokens,
            losses=losses,
        )
        export(self.export_to, self.trainer.mean, self.trainer.config, self.tokenizer, facts)

    def log(self, **facts: float | str) -> None:
        """One line on stderr, rounded, and one in log.jsonl."""
        shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items())
        print("  ".join(shown), file=sys.stderr, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def _stop(self, *_: object) -> None:
        self.stopped = True  # the step is finished first, so that a checkpoint never holds half of one


def prepare(arguments: argparse.Namespace) -> Run:
    """Read the text, train or load the tokenizer, build or restore the trainer.  Raises MinillmError."""
    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in fields(Recipe)})
    folder, device = arguments.run, pick_device(arguments.device)
    recipe.config(recipe.vocab, 0, 1)  # a wrong shape should be known before the text is read
    check_run(folder, recipe, arguments.resume)
    sources = read_sources(recipe.data, recipe.keep_mb)
    if arguments.resume or arguments.tokenizer:
        tokenizer = load_tokenizer(folder / "tokenizer.json" if arguments.resume else arguments.tokenizer)
    else:
        texts = (text for source in sources for text in source.train * source.times)
        tokenizer = train_tokenizer(chain(texts, WITH_TASKS if recipe.tasks else ()), recipe.vocab)

    train = [ids for source in sources for ids in encode(tokenizer, source.train) * source.times]
    batches: Batches = PackedText(train, recipe.context, recipe.seed)
    if recipe.tasks:
        prose = Prose("\n".join(text for source in sources for text in source.train))
        batches = TaskRows(train, tokenizer, prose, recipe)
    held_out = {source.name: encode(tokenizer, source.held_out) for source in sources}
    ratio = {}
    for source in sources:
        ratio[source.name] = len("".join(source.held_out).encode()) / sum(map(len, held_out[source.name]))
    config = recipe.config(tokenizer.get_vocab_size(), tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS))
    trainer = Trainer(recipe, config, device, arguments.threads if device.type == "cpu" else 1)
    if arguments.resume:
        trainer.restore(folder / "checkpoint.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n", "utf-8")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{arguments.threads} CPU threads"
    facts = {"command": arguments.command, "about_data": arguments.about_data, "hardware": hardware}
    return Run(
        folder=folder,
        export_to=arguments.export or folder / "export",
        recipe=recipe,
        tokenizer=tokenizer,
        trainer=trainer,
        batches=batches,
        held_out=held_out,
        bytes_per_token=ratio,
        facts=facts,
        minutes=arguments.minutes,
        steps=arguments.steps,
    )


def check_run(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Raise CheckpointError or ConfigError unless the folder can take this run."""
    if resume:
        file = folder / "recipe.json"
        if not file.exists():
            raise CheckpointError(f"--resume: {folder} holds no run; start it without --resume")
        before = json.loads(file.read_text("utf-8"))
        changes = [f"{key} was {before.get(key)}" for key, value in asdict(recipe).items() if before.get(key) != value]
        if changes:
            raise ConfigError(f"--resume: the run began with other options ({'; '.join(changes)}); repeat the old ones")
    elif (folder / "checkpoint.safetensors").exists():
        raise ConfigError(f"{folder} already holds a run; add --resume to go on with it, or name another folder")


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; exits with status 2 and one clear line if it makes no sense."""
    parser = argparse.ArgumentParser("train.py", description="Train a small Llama on text files and export it.")
    add = parser.add_argument
    add("run", type=Path, help="folder of the run: recipe, tokenizer, checkpoint, log")
    add("--data", action="append", required=True, metavar="PATH[@TIMES]", help="text file or folder, read TIMES a pass")
    add("--keep-mb", type=float, default=0.0, help="of later --data keep the megabytes that read most like the first")
    add("--export", type=Path, help="folder of the finished model (default: RUN/export)")
    add("--tokenizer", type=Path, help="a tokenizer.json that this program made (default: train one)")
    add("--vocab", type=int, default=4096, help="size of the tokenizer to train")
    for option, default in (("hidden", 256), ("layers", 5), ("heads", 8), ("kv-heads", 4), ("intermediate", 640)):
        add(f"--{option}", type=int, default=default)
    add("--tied", action="store_true", help="use the embedding as output projection too")
    add("--context", type=int, default=512, help="tokens of a row")
    add(
        "--tasks", type=float, default=0.0, help="share of the rows that are questions about a text (minillm/lab/tasks)"
    )
    add("--batch", type=int, default=16, help="rows of an update")
    add("--minutes", type=float, default=60.0, help="training time in all")
    add("--steps", type=int, default=0, help="train this many updates instead")
    add("--every", type=float, default=5.0, help="minutes between checkpoints")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on from the last checkpoint in RUN")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=int, default=2, help="CPU workers, one core each")
    add("--about-data", default="The texts named in the command.", help="origin and licences, for the model card")
    arguments = parser.parse_args(argv)
    for option in ("hidden", "layers", "heads", "kv_heads", "intermediate", "context", "batch", "threads"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1")
    if arguments.vocab < 258:
        parser.error(f"--vocab {arguments.vocab} must be at least 258: 256 bytes, {BOS} and {EOS}")
    if not 0 <= arguments.tasks <= 1:
        parser.error(f"--tasks {arguments.tasks} must lie between 0 and 1: it is a share of the rows")
    if min(arguments.minutes, arguments.every) <= 0 or min(arguments.steps, arguments.keep_mb) < 0:
        parser.error("--minutes and --every must be above 0, --steps and --keep-mb not below 0")
    hidden = {"--resume", "--about-data", arguments.about_data}
    arguments.command = shlex.join(word for word in argv if word not in hidden)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Train and export; exit status 0 when done, 2 after a mistake of the user, 130 if interrupted (and saved)."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        print(f"train.py: training needs torch 2.9 or later, this is {torch.__version__}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    try:
        run = prepare(arguments)
        run.go(arguments.every)
    except MinillmError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    if run.stopped:
        print("train.py: interrupted and saved; go on with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
