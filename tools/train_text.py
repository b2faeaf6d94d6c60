"""From text files to rows of token ids: what tools/train.py learns from.  Knows nothing of models.

Documents are the unit: a text file is cut at `<|endoftext|>`, at headings and at rules; each document becomes BOS, its
tokens, EOS.  The last documents of every source are held out and never trained on.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from minillm.errors import CheckpointError, ConfigError

BOS, EOS = "<s>", "</s>"
BREAK = re.compile(r"<\|endoftext\|>|^#+ .*$|^-{3,}$", re.MULTILINE)
PLAIN = str.maketrans(  # curly quotes, dashes and the ellipsis as they are typed; no marks of emphasis
    {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2014: "--", 0x2013: "-", 0x2026: "...", "_": None, "*": None}
)
WORD = re.compile(r"[a-z']+")
SHORTEST = 100  # characters: anything shorter is a title or a remnant
HELD_OUT = 0.05  # of the documents of every source


@dataclass(frozen=True)
class Source:
    """The documents of one --data argument; the last of them are held out, the others read `times` in every pass."""

    name: str
    times: int
    train: list[str]
    held_out: list[str]


def read_sources(arguments: Sequence[str], keep_mb: float) -> list[Source]:
    """Read every `PATH[@TIMES]`; if `keep_mb`, cut all but the first to the megabytes that read most like the first.

    Raises ConfigError where there is no text, too little of it, or text that is not UTF-8.
    """
    sources: list[Source] = []
    for argument in arguments:
        path, at, times = argument.rpartition("@")
        if not (at and times.isdigit()):
            path, times = argument, "1"
        if int(times) < 1:
            raise ConfigError(f"--data {argument}: the number after @ says how often to read it, at least once")
        if any(source.name == Path(path).stem for source in sources):
            raise ConfigError(f"--data {path}: another one is called '{Path(path).stem}' too; rename one of them")
        documents = read_documents(Path(path))
        if sources and keep_mb:
            documents = simplest(documents, sources[0].train, keep_mb)
        held = max(1, round(len(documents) * HELD_OUT))
        if len(documents) <= held:
            raise ConfigError(
                f"--data {path} has {len(documents)} documents of {SHORTEST} characters or more; it needs at least 2, "
                f"one of them to measure on: separate documents with headings ('# ...') or <|endoftext|>"
            )
        sources.append(Source(Path(path).stem, int(times), documents[:-held], documents[-held:]))
    return sources


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, or of every .txt and .md file below a folder, without typographic frills."""
    files = sorted(file for file in path.rglob("*") if file.suffix in {".txt", ".md"}) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ConfigError(f"--data {path}: no text there; give a text file or a folder with .txt or .md files")
    documents = []
    for file in files:
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"--data {file} is not UTF-8 (byte {error.start}); convert it first") from None
        for part in BREAK.split(text):
            lines = (" ".join(line.split()) for line in part.translate(PLAIN).splitlines())
            document = "\n".join(line for line in lines if line)
            if len(document) >= SHORTEST:
                documents.append(document)
    return documents


def simplest(documents: Sequence[str], like: Sequence[str], megabytes: float) -> list[str]:
    """The documents, in their order, that surprise a reader of `like` least: by the mean -log frequency of their words.

    Plain language is learned soonest; a small model has no time for the rest.
    """
    counts = Counter(word for text in like for word in WORD.findall(text.lower()))
    total = sum(counts.values()) + 1

    def surprise(document: str) -> float:
        words = WORD.findall(document.lower())
        return sum(-math.log((counts[word] + 0.1) / total) for word in words) / max(len(words), 1)

    room, kept = megabytes * 1e6, set()
    for index in sorted(range(len(documents)), key=lambda index: surprise(documents[index])):
        room -= len(documents[index].encode())
        if room < 0:
            break
        kept.add(index)
    return [document for index, document in enumerate(documents) if index in kept]


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of `vocab` tokens: every text can be written in it, and digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def load_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json that `train_tokenizer` made.  Raises CheckpointError or ConfigError if it is not one."""
    if not file.is_file():
        raise CheckpointError(f"there is no tokenizer {file}; leave --tokenizer out to train one")
    tokenizer = Tokenizer.from_file(str(file))
    if None in (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)):
        raise ConfigError(f"the tokenizer {file} has no {BOS} and {EOS}; use one that tools/train.py trained")
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[Tensor]:
    """Each document as int32 ids [n]: BOS, its tokens, EOS."""
    eos = tokenizer.token_to_id(EOS)
    return [torch.tensor([*each.ids, eos], dtype=torch.int32) for each in tokenizer.encode_batch(documents)]


class PackedText:
    """Rows of `context + 1` tokens cut from shuffled documents that follow one another; every pass shuffles anew.

    Stateless to the outside: row n is the same whenever it is asked for.  Rows overlap by one token, so that every
    token but the first is predicted once: with 9 tokens and a context of 4, row 0 is tokens 0..4 and row 1 tokens 4..8.
    """

    def __init__(self, documents: list[Tensor], context: int, seed: int) -> None:
        self.documents, self.context, self.seed = documents, context, seed
        self.tokens = sum(len(document) for document in documents)
        self.rows = (self.tokens - 1) // context
        if not self.rows:
            raise ConfigError(f"the text has {self.tokens:,} tokens, less than one row of --context {context} + 1")
        self._pass, self._stream = -1, torch.empty(0)

    def batch(self, step: int, rows: int) -> Tensor:
        """The rows of one training step: int64 [rows, context + 1]."""
        return torch.stack([self._row(step * rows + index) for index in range(rows)])  # [rows, context + 1]

    def _row(self, index: int) -> Tensor:
        number, index = divmod(index, self.rows)
        if number != self._pass:
            order = list(range(len(self.documents)))
            random.Random(f"{self.seed}/{number}").shuffle(order)
            self._pass, self._stream = number, torch.cat([self.documents[at] for at in order])  # [tokens]
        start = index * self.context
        return self._stream[start : start + self.context + 1].long()  # [context + 1]
