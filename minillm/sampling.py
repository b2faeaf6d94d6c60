"""What becomes of the logits: one request's rules for choosing a token.  Knows nothing of models, caches or text.

The order is fixed, and this is its one place:

 1. ids that the tokenizer does not have (padding rows of the embedding) are cut off: they mean nothing;
 2. log-probabilities are taken here, so that they describe the model and not our settings;
 3. logit bias, which corrects the model; then repetition, presence and frequency penalties, which react to the text;
 4. until `min_tokens` have been chosen, the tokens that would end the answer are banned (after the bias, which could
    otherwise bring them back);
 5. temperature 0 takes the highest score, ties to the lowest id; otherwise scores are divided by the temperature;
 6. top-k, then top-p over what is left, then min-p (which looks only at the best score, so that its place among the
    three matters little): after the temperature, so that a flatter distribution offers a longer list;
 7. one token is drawn by the Gumbel-max rule, argmax(score + noise): no normalisation, no sums that depend on an order,
    and the same noise chooses the same token when two runs differ by a rounding error.

How others order the same steps (all three have more samplers):
  Hugging Face 5.23 (`_get_logits_processor`): bias, repetition, min tokens, temperature, top-k, top-p, min-p
  vLLM 0.22 (`v1/sample/sampler.py`): log-probabilities, min tokens, bias, penalties, temperature, min-p, top-k, top-p
  llama.cpp (default of `--samplers`): penalties, top-k, top-p, min-p, temperature, which never changes who may be drawn
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import CheckpointError, SamplingError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; the defaults are greedy and plain.

    At temperature 0 top-k, top-p and min-p are allowed and change nothing: each of them always keeps the best token.

    temperature         0 is greedy, 1 the model's own distribution
    top_k               only the k best tokens, and those that tie with the k-th; 0 is off
    top_p               only the best tokens that together reach this probability; 1 is off
    min_p               only tokens at least this fraction as likely as the best one; 0 is off
    repetition_penalty  > 1 lowers every token seen in prompt or answer, by division (Keskar et al. 2019, section 4.1)
    presence_penalty    subtracted once from every token of the answer (as OpenAI)
    frequency_penalty   subtracted once per occurrence in the answer (as OpenAI)
    logit_bias          token id -> number added to its logit
    seed                None draws one; `Sampler.seed` tells which
    stop                strings that end the answer and are not part of it
    stop_token_ids      ids that end the answer, besides the model's own end-of-sequence ids
    ignore_eos          do not stop at the model's own end-of-sequence ids
    min_tokens          no ending token before this many
    max_tokens          the longest answer
    logprobs            None: none; n: the chosen token's and those of the n most likely
    prompt_logprobs     the same for every token of the prompt

    Raises SamplingError, which names the value, its limits and the remedy.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int = 512
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, 100, "0 is greedy, 1 the model's own distribution")
        if 0 < self.temperature < 1e-5:
            raise SamplingError(f"temperature {self.temperature} is below 0.00001: say 0 for greedy")
        _check_number("top_k", self.top_k, 0, math.inf, "0 turns it off", whole=True)
        _check_number("top_p", self.top_p, 0, 1, "1 turns it off")
        if self.top_p == 0:
            raise SamplingError(
                f"top_p {self.top_p} would keep no token: say temperature 0 for greedy, or 1 to turn top_p off"
            )
        _check_number("min_p", self.min_p, 0, 1, "0 turns it off")
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100, "1 turns it off")
        _check_number("presence_penalty", self.presence_penalty, -2, 2, "0 turns it off")
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2, "0 turns it off")
        for token_id, bias in self.logit_bias.items():
            _check_number(f"logit_bias of token {token_id}", bias, -100, 100, "-100 bans a token in practice")
        if self.seed is not None:
            _check_number("seed", self.seed, -(2**63), 2**63 - 1, "leave it out to have one drawn", whole=True)
        if isinstance(self.stop, str) or not all(self.stop):
            raise SamplingError(f"stop {self.stop!r} must be a sequence of strings that are not empty, as in ('END',)")
        _check_number("min_tokens", self.min_tokens, 0, math.inf, "0 turns it off", whole=True)
        _check_number("max_tokens", self.max_tokens, 0, math.inf, "the default is 512", whole=True)
        if self.min_tokens > self.max_tokens:
            raise SamplingError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}: raise max_tokens")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _check_number(name, count, 0, MOST_LOGPROBS, "leave it out for none", whole=True)

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON can carry, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SamplingParams:
        """What `to_json` gave, after a trip through JSON, which knows no tuples and no whole numbers as keys."""
        tuples = {name: tuple(values[name]) for name in ("stop", "stop_token_ids")}
        bias = {int(token_id): value for token_id, value in values["logit_bias"].items()}
        return cls(**{**values, **tuples, "logit_bias": bias})


def _check_number(name: str, value: float, low: float, high: float, remedy: str, *, whole: bool = False) -> None:
    """Raise SamplingError unless low <= value <= high; `not` around the comparison catches NaN."""
    if (whole and not isinstance(value, int)) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        limits = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise SamplingError(f"{name} {value} must be {kind} {limits}: {remedy}")


MOST_LOGPROBS = 20
MOST_FACTS = 3 + 2 * MOST_LOGPROBS  # numbers that `Sampler.draw` gives, at most


class Sample(NamedTuple):
    """One chosen token, and what the model itself thought (natural logarithms; see `SamplingParams.logprobs`)."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]


class Sampler:
    """The choices of one request.  Its state is bounded: two vectors over the vocabulary and a generator.

    vocab_size is the number of logits (and of ids a prompt may hold), real_vocab the number of ids the tokenizer has.
    Same seed, same logits, same device: same tokens, whatever other requests do.
    Raises SamplingError for ids in `params` that the tokenizer does not have.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        real_vocab: int,
        eos_ids: Collection[int],
        device: torch.device,
        agree: Callable[[Tensor], Tensor] = lambda facts: facts,
    ) -> None:
        """agree: makes what was drawn the same for everybody who computes this together."""
        self.params = params
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self._real_vocab = min(real_vocab, vocab_size)
        self._stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_ids)
        self._generator = torch.Generator(device=device).manual_seed(self.seed)
        self._count = 0
        self._agree = agree
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # [V] in prompt or answer
        self._occurrences = torch.zeros(vocab_size, device=device)  # [V] in the answer
        self._once = torch.ones(1, device=device)  # [1]
        for token_id in (*params.stop_token_ids, *params.logit_bias):
            if not 0 <= token_id < self._real_vocab:
                raise SamplingError(
                    f"token id {token_id} is not in the vocabulary: give one from 0 to {self._real_vocab - 1}"
                )
        banned = [token_id for token_id in self._stop_ids if token_id < self._real_vocab]
        self._banned = torch.tensor(banned, dtype=torch.long, device=device)  # [ending tokens]
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.long, device=device)  # [biases]
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)  # [biases]

    def is_stop(self, token_id: int) -> bool:
        """Whether this token ends the answer: an explicit stop id always does, an eos id unless eos is ignored."""
        return token_id in self._stop_ids

    @torch.inference_mode()
    def restart(self) -> None:
        """Another answer begins: its length and occurrences count from here; what was seen stays seen."""
        self._count = 0
        self._occurrences.zero_()

    def state(self) -> dict[str, Tensor]:
        """What the next choices depend on beside `params`, by name; sizes depend on the vocabulary and the device."""
        return {
            "generator": self._generator.get_state(),
            "count": torch.tensor([self._count]),
            "seen": self._seen,
            "occurrences": self._occurrences,
        }

    @torch.inference_mode()
    def restore_(self, state: Mapping[str, Tensor]) -> None:
        """Go on as the sampler whose `state` this was."""
        self._generator.set_state(state["generator"])
        self._count = int(state["count"])
        self._seen.copy_(state["seen"])
        self._occurrences.copy_(state["occurrences"])

    @torch.inference_mode()
    def observe_prompt(self, ids: Tensor) -> None:
        """Note the ids [T] (any integer type, any device) of a piece of the prompt, for the repetition penalty."""
        self._seen[ids.to(self._seen.device, torch.long)] = True

    def sample(self, logits: Tensor) -> Sample:
        """Choose a token from float32 logits [V]: `draw`, and `note` at once.  The host waits for the device once."""
        return self.note(self.draw(logits).tolist())

    @torch.inference_mode()
    def draw(self, logits: Tensor) -> Tensor:
        """Choose a token from float32 logits [V] (left as they are) and remember it, without the host knowing it.

        What `note` makes a Sample of: float32 [at most MOST_FACTS] on the device, the token's id first.
        """
        logits = logits[: self._real_vocab]  # [V'] the real ids
        scores = self._adjust(logits)
        if self.params.temperature > 0:
            scores = self._candidates(scores / self.params.temperature)
            scores = scores - torch.empty_like(scores).exponential_(generator=self._generator).log()
        facts = [scores.argmax(keepdim=True), logits.amax(0, keepdim=True)]  # [1], [1]
        if self.params.logprobs is not None:
            logprobs = logits.log_softmax(0)
            top = logprobs.topk(min(self.params.logprobs, self._real_vocab))
            facts += [logprobs[facts[0]], top.values, top.indices]  # [1], [n], [n]
        # Ids survive the trip as float32: they are far below 2^24.  NaN and infinity show in the maximum.
        drawn = self._agree(torch.cat([fact.float() for fact in facts]))  # [2], or [3 + 2n]
        token = drawn[:1].long()  # [1]
        self._seen.index_fill_(0, token, True)
        self._occurrences.index_add_(0, token, self._once)
        self._count += 1
        return drawn

    def note(self, drawn: Sequence[float]) -> Sample:
        """What was drawn, once the host has it.

        Raises CheckpointError where the logits held NaN or infinity: they come from broken weights or an overflow, and
        every token would be noise.
        """
        chosen, peak, *rest = drawn
        if not math.isfinite(peak):
            raise CheckpointError(
                f"the model's logits hold {peak}: the weights are damaged or overflow in this dtype; try float32"
            )
        if self.params.logprobs is None:
            return Sample(int(chosen), None, [])
        logprob, *pairs = rest
        half = len(pairs) // 2
        return Sample(int(chosen), logprob, [(int(i), v) for v, i in zip(pairs[:half], pairs[half:], strict=True)])

    def _adjust(self, logits: Tensor) -> Tensor:
        """Steps 3 and 4: logits [V'], which stay what they are -> scores [V']."""
        params, scores = self.params, logits
        if params.logit_bias:
            scores = scores.index_add(0, self._bias_ids, self._bias)
        if params.repetition_penalty != 1:
            factor = params.repetition_penalty
            lowered = torch.where(scores < 0, scores * factor, scores / factor)
            scores = torch.where(self._seen[: self._real_vocab], lowered, scores)
        if params.presence_penalty or params.frequency_penalty:
            occurrences = self._occurrences[: self._real_vocab]
            scores = scores - params.frequency_penalty * occurrences - params.presence_penalty * (occurrences > 0)
        if self._count < params.min_tokens:
            scores = scores.index_fill(0, self._banned, -math.inf)
        return scores

    def _candidates(self, scores: Tensor) -> Tensor:
        """Step 6: scores [V'] with -inf for every token that may not be drawn."""
        params = self.params
        if 0 < params.top_k < len(scores):
            scores = keep_top_k(scores, params.top_k)
        if params.top_p < 1:
            scores = keep_top_p(scores, params.top_p)
        if params.min_p > 0:
            scores = keep_min_p(scores, params.min_p)
        return scores


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """scores [V] with -inf below the k-th highest; ties with it stay (as in Hugging Face and vLLM)."""
    return scores.masked_fill(scores < scores.topk(k).values[-1], -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """scores [V] with -inf where the tokens before it, best first, already reach probability p (Holtzman et al. 2020).

    p = 0.8 and probabilities 0.5, 0.3, 0.2 have 0, 0.5 and 0.8 before them: the first two stay.  Ties: lowest id first.
    """
    ordered, ids = scores.sort(descending=True, stable=True)
    probabilities = ordered.softmax(0)
    before = probabilities.cumsum(0) - probabilities
    return scores.masked_fill(torch.zeros_like(scores, dtype=torch.bool).scatter(0, ids, before >= p), -math.inf)


def keep_min_p(scores: Tensor, p: float) -> Tensor:
    """scores [V] with -inf where the probability is below p times the best one's (Nguyen et al. 2024).

    Ratios of probabilities are differences of scores, so nothing needs to be normalised.
    """
    return scores.masked_fill(scores < scores.amax() + math.log(p), -math.inf)
