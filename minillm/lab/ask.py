"""Ask a bounded cache: contexts are read once, side by side; every question goes to a copy of what was kept of them.

The same path as generation: what a question and its answer push out of the cache is gone for that question too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..answer import target_logprobs
from ..budget import CachePlan
from ..cache import KVCache
from ..errors import ConfigError
from ..generate import feed, flags_of
from ..llm import LLM
from .cases import Asked, Case


class Fork:
    """What a cache held at one moment, to be gone back to as often as wanted.  Copies what is not fixed."""

    def __init__(self, cache: KVCache) -> None:
        self.cache, self.seen = cache, list(cache.seen)
        self.flagged = [layer.flagged for layer in cache.layers]
        self.held = [
            {name: tensor.clone() for name, tensor in layer.tensors().items() if name not in cache.fixed}
            for layer in cache.layers
        ]

    def restore_(self) -> None:
        """Put everything back as it was."""
        self.cache.seen = list(self.seen)
        for layer, flagged, held in zip(self.cache.layers, self.flagged, self.held, strict=True):
            layer.flagged, tensors = flagged, layer.tensors()
            for name, tensor in held.items():
                tensors[name].copy_(tensor)


@torch.inference_mode()
def ask(llm: LLM, cases: Sequence[Case]) -> list[list[float]]:
    """The score of every question of every case, 0 to 1; minus nats per token for a case without questions.

    All contexts must have the same number of tokens, all cases as many questions, and the cache of `llm` must have a
    row for each case.
    """
    contexts = torch.tensor([case.context for case in cases])  # [B, n]
    if len({len(case.questions) for case in cases}) > 1:
        raise ConfigError("cases that are asked side by side must have the same number of questions")
    llm.owner = None
    llm.cache.reset()
    if not cases[0].questions:
        return [[score] for score in _running_text(llm, contexts)]
    for _ in feed(llm.model, llm.cache, contexts, llm.chunk):
        pass
    fork = Fork(llm.cache)
    found: list[list[float]] = [[] for _ in cases]
    for asked in zip(*(case.questions for case in cases), strict=True):
        for scores, score in zip(found, _ask_one(llm, fork, asked), strict=True):
            scores.append(score)
    return found


def _running_text(llm: LLM, contexts: Tensor) -> list[float]:
    """Minus the nats per token of the second half of each text [B, n], the first being what there is to remember."""
    total, at, start = torch.zeros(len(contexts), dtype=torch.float64), 0, contexts.shape[1] // 2
    for tokens, hidden in feed(llm.model, llm.cache, contexts[:, :-1], llm.chunk):
        first, stop = max(start, at), at + tokens.shape[1]  # positions whose successors count
        for row in range(len(contexts) if first < stop else 0):
            targets = contexts[row, first + 1 : stop + 1].to(hidden.device)
            total[row] += target_logprobs(llm.model, hidden[row, first - at :], targets, llm.real_vocab).sum().cpu()
        at = stop
    return [float(value) / (contexts.shape[1] - 1 - start) for value in total]


def _ask_one(llm: LLM, fork: Fork, asked: Sequence[Asked]) -> list[float]:
    """One question of every row."""
    if asked[0].wanted:
        answers = _answers(llm, fork, asked)
        decode = llm.checkpoint.tokenizer.decode
        return [_said(one, text, decode(one.answers[one.right])) for one, text in zip(asked, answers, strict=True)]
    if all(len(one.answers) == 1 for one in asked):
        logits = _after(llm, fork, asked, [one.answers[0] for one in asked])
        return [
            float(logits_of_row.argmax(-1).tolist() == one.answers[0])
            for logits_of_row, one in zip(logits, asked, strict=True)
        ]
    totals = []  # by choice, of every row
    for choice in range(max(len(one.answers) for one in asked)):
        wanted = [one.answers[min(choice, len(one.answers) - 1)] for one in asked]
        found = _after(llm, fork, asked, wanted)
        totals.append(
            [
                float(row.log_softmax(-1).gather(1, torch.tensor(ids, device=row.device)[:, None]).sum())
                for row, ids in zip(found, wanted, strict=True)
            ]
        )
    best = torch.tensor(totals).argmax(0)  # [B]
    return [float(found == one.right) for found, one in zip(best.tolist(), asked, strict=True)]


def _said(asked: Asked, text: str, right: str) -> float:
    """The share of what was wanted that a text holds; where the order counts, its mean with ROUGE-L."""
    recall = sum(wanted in text for wanted in asked.wanted) / len(asked.wanted)
    return (recall + rouge_l(text.split(), right.split())) / 2 if asked.ordered else recall


def rouge_l(said: Sequence[str], right: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words.  a c d, a b c -> a c: 2 / 3."""
    lengths = [0] * (len(right) + 1)  # of the subsequence of what was said so far with the first words of the answer
    for word in said:
        before = list(lengths)
        for at, other in enumerate(right, 1):
            lengths[at] = before[at - 1] + 1 if word == other else max(before[at], lengths[at - 1])
    return 2 * lengths[-1] / (len(said) + len(right)) if said or right else 1.0


def _after(llm: LLM, fork: Fork, asked: Sequence[Asked], answers: Sequence[list[int]]) -> list[Tensor]:
    """The logits [n, V'] that precede each token of each row's answer, the answer itself being fed."""
    rows = [one.prompt + answer for one, answer in zip(asked, answers, strict=True)]
    longest = max(map(len, rows))
    # Rows end at different places.  What stands behind an end is not looked at, and nothing looks ahead.
    ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])  # [B, n]
    fork.restore_()
    hidden = torch.cat([part for _, part in feed(llm.model, llm.cache, ids, llm.chunk)], 1)  # [B, n, hidden]
    ends = [(len(row) - len(answer) - 1, len(row) - 1) for row, answer in zip(rows, answers, strict=True)]
    return [llm.model.logits(hidden[row, a:z])[:, : llm.real_vocab] for row, (a, z) in enumerate(ends)]


def _answers(llm: LLM, fork: Fork, asked: Sequence[Asked]) -> list[str]:
    """What the model itself says next, greedily, for as many tokens as the right answer has."""
    fork.restore_()
    lengths = [len(one.prompt) + len(one.answers[one.right]) for one in asked]
    rows = [list(one.prompt) for one in asked]
    for at in range(max(lengths) - 1):
        token = torch.tensor([[row[at]] for row in rows])  # [B, 1]
        span = llm.cache.append(1, flags=flags_of(llm.cache, token))
        hidden = llm.model(token.to(llm.cache.device), span, llm.cache)  # [B, 1, hidden]
        likeliest = llm.model.logits(hidden[:, -1])[:, : llm.real_vocab].argmax(-1).tolist()  # [B]
        for row, following in zip(rows, likeliest, strict=True):
            if len(row) == at + 1:  # its prompt is over: it goes on by itself
                row.append(following)
    decode = llm.checkpoint.tokenizer.decode
    return [decode(row[len(one.prompt) : end]) for row, one, end in zip(rows, asked, lengths, strict=True)]


def reader(llm: LLM, plan: CachePlan) -> LLM:
    """Another cache for the same model."""
    return LLM(llm.checkpoint, llm.model, plan, chunk=llm.chunk, memory=llm.memory)
