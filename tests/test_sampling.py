"""Sampling against naive Python, against Hugging Face's processors, and against chance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minillm.errors import CheckpointError, MinillmError, SamplingError
from minillm.sampling import Sampler, SamplingParams, keep_min_p, keep_top_k, keep_top_p

CPU = torch.device("cpu")


def sampler(params: SamplingParams, vocab: int, real: int | None = None, eos: tuple[int, ...] = ()) -> Sampler:
    return Sampler(params, vocab, vocab if real is None else real, eos, CPU)


def random_logits(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def kept(scores: Tensor) -> set[int]:
    return {i for i, score in enumerate(scores.tolist()) if score > -math.inf}


def softmax(scores: list[float]) -> list[float]:
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    return [weight / sum(weights) for weight in weights]


# --- the three filters, naively ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_filters_keep_what_naive_python_keeps(seed: int) -> None:
    scores = random_logits(100, seed)
    values = scores.tolist()
    probabilities = softmax(values)
    best_first = sorted(range(100), key=lambda i: (-values[i], i))

    assert kept(keep_top_k(scores, 7)) == set(best_first[:7])

    nucleus, mass = set(), 0.0
    for i in best_first:
        if mass >= 0.9:
            break
        nucleus.add(i)
        mass += probabilities[i]
    assert kept(keep_top_p(scores, 0.9)) == nucleus

    assert kept(keep_min_p(scores, 0.05)) == {i for i in range(100) if probabilities[i] >= 0.05 * max(probabilities)}


def test_top_k_keeps_ties_with_the_last_and_top_p_breaks_ties_by_id() -> None:
    assert kept(keep_top_k(torch.tensor([2.0, 1.0, 3.0, 2.0]), 2)) == {0, 2, 3}
    assert kept(keep_top_p(torch.zeros(8), 0.375)) == {0, 1, 2}
    assert kept(keep_top_p(torch.tensor([0.0, 5.0]), 1e-9)) == {1}


@pytest.mark.parametrize("seed", range(5))
def test_whole_chain_equals_hugging_face(seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    logits = random_logits(500, seed)
    prompt = torch.randint(0, 500, (40,), generator=torch.Generator().manual_seed(seed))
    chain = transformers.LogitsProcessorList(
        [
            transformers.SequenceBiasLogitsProcessor([[[3], 2.5], [[77], -4.0]]),
            transformers.RepetitionPenaltyLogitsProcessor(1.3),
            transformers.MinNewTokensLengthLogitsProcessor(40, 5, [5, 9], device="cpu"),
            transformers.TemperatureLogitsWarper(0.7),
            transformers.TopKLogitsWarper(60),
            transformers.TopPLogitsWarper(0.92),
            transformers.MinPLogitsWarper(0.02),
        ]
    )
    theirs = chain(prompt[None], logits[None])[0]
    params = SamplingParams(
        temperature=0.7,
        top_k=60,
        top_p=0.92,
        min_p=0.02,
        repetition_penalty=1.3,
        logit_bias={3: 2.5, 77: -4.0},
        min_tokens=5,
    )
    ours = sampler(params, 500, eos=(5, 9))
    ours.observe_prompt(prompt[:13].int())
    ours.observe_prompt(prompt[13:])
    assert torch.equal(ours._candidates(ours._adjust(logits) / 0.7), theirs)
    assert 1 < len(kept(theirs)) < 60


# --- penalties and bans --------------------------------------------------------------------------------------------


def test_penalties_follow_their_formulas() -> None:
    logits = torch.tensor([4.0, -2.0, 1.0, 3.0, -1.0, 0.5])
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={5: 1.5}, max_tokens=9
    )
    ours = sampler(params, 6)
    ours.observe_prompt(torch.tensor([1, 3]))
    assert ours.sample(logits).token_id == 0  # 4 against 3 / 2
    # 0: 4 / 2 - 0.5 - 0.25.  1 and 3 stand in the prompt only: no presence, no frequency.  5 has its bias.
    assert ours._adjust(logits).tolist() == [1.25, -4.0, 1.0, 1.5, -1.0, 2.0]
    assert ours.sample(logits).token_id == 5
    assert ours._adjust(logits).tolist() == [1.25, -4.0, 1.0, 1.5, -1.0, 2.0 / 2 - 0.75]
    assert [ours.sample(logits).token_id for _ in range(2)] == [3, 0]
    assert ours._adjust(logits)[0].item() == 4 / 2 - 0.5 - 2 * 0.25


def test_ending_tokens_are_banned_until_min_tokens_even_with_a_bias() -> None:
    logits = torch.tensor([0.0, 9.0, 8.0, 1.0])
    params = SamplingParams(min_tokens=2, stop_token_ids=(2,), logit_bias={1: 100})
    ours = sampler(params, 4, eos=(1,))
    assert [ours.sample(logits).token_id for _ in range(3)] == [3, 3, 1]


def test_ignore_eos_frees_eos_but_never_an_explicit_stop_id() -> None:
    plain = sampler(SamplingParams(), 8, eos=(1, 2))
    assert [plain.is_stop(i) for i in range(4)] == [False, True, True, False]
    ignoring = sampler(SamplingParams(ignore_eos=True, stop_token_ids=(2, 3), min_tokens=1), 8, eos=(1, 2))
    assert [ignoring.is_stop(i) for i in range(4)] == [False, False, True, True]
    assert ignoring.sample(torch.tensor([0.0, 5, 7, 9, 0, 0, 0, 0])).token_id == 1  # eos is an ordinary token now


def test_ids_beyond_the_tokenizer_are_never_chosen_nor_reported() -> None:
    logits = torch.cat([random_logits(10, 0), torch.full((6,), 50.0)])
    greedy = sampler(SamplingParams(logprobs=20), 16, real=10)
    sample = greedy.sample(logits)
    assert sample.token_id == int(logits[:10].argmax())
    assert sorted(i for i, _ in sample.top) == list(range(10))
    drawing = sampler(SamplingParams(temperature=5.0, seed=1), 16, real=10)
    assert max(drawing.sample(logits).token_id for _ in range(500)) < 10
    with pytest.raises(SamplingError, match=r"token id 10 .* from 0 to 9"):
        sampler(SamplingParams(logit_bias={10: 1.0}), 16, real=10)
    with pytest.raises(SamplingError, match="token id -1"):
        sampler(SamplingParams(stop_token_ids=(-1,)), 16, real=10)


# --- drawing -------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_id_of_ties_and_leaves_the_logits_alone() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0])
    before = logits.clone()
    assert sampler(SamplingParams(min_tokens=1), 4, eos=(0,)).sample(logits).token_id == 1
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("params", "filtered"),
    [
        (SamplingParams(temperature=0.5, seed=12), lambda s: s / 0.5),
        (SamplingParams(temperature=1.5, top_k=5, seed=13), lambda s: keep_top_k(s / 1.5, 5)),
        (SamplingParams(temperature=1.0, top_p=0.8, seed=14), lambda s: keep_top_p(s, 0.8)),
        (SamplingParams(temperature=1.0, min_p=0.1, seed=15), lambda s: keep_min_p(s, 0.1)),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams, filtered: Any) -> None:
    draws, logits = 20_000, random_logits(20, 3)
    expected = filtered(logits).softmax(0) * draws
    ours = sampler(params, 20)
    counts = torch.zeros(20)
    for _ in range(draws):
        counts[ours.sample(logits).token_id] += 1
    possible = expected > 0
    assert counts[~possible].sum() == 0
    often = expected > 5
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    freedom = int(often.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5  # about five standard deviations


def test_a_seed_repeats_and_a_drawn_seed_is_recorded() -> None:
    logits = torch.zeros(50)  # two seeds never draw 40 times the same
    first = sampler(SamplingParams(temperature=1.0), 50)
    tokens = [first.sample(logits).token_id for _ in range(40)]
    again = sampler(SamplingParams(temperature=1.0, seed=first.seed), 50)
    other = sampler(SamplingParams(temperature=1.0, seed=first.seed + 1), 50)
    torch.manual_seed(0)  # the global generator is not involved
    assert [again.sample(logits).token_id for _ in range(40)] == tokens
    assert [other.sample(logits).token_id for _ in range(40)] != tokens


def test_every_seed_that_is_allowed_works() -> None:
    for seed in (-(2**63), -1, 0, 2**63 - 1):
        assert sampler(SamplingParams(temperature=1.0, seed=seed), 4).sample(torch.zeros(4)).token_id in range(4)


def test_minus_infinity_is_a_ban_by_the_model() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0])
    ours = sampler(SamplingParams(temperature=1.0, top_p=0.99, min_p=0.5, repetition_penalty=1.2, seed=0), 4)
    assert {ours.sample(logits).token_id for _ in range(50)} == {1, 3}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_k=3, top_p=0.9, logprobs=2)])
def test_broken_logits_are_an_error(bad: float, params: SamplingParams) -> None:
    logits = random_logits(10, 0)
    logits[4] = bad
    with pytest.raises(CheckpointError, match=r"logits hold (nan|inf).*float32"):
        sampler(params, 10).sample(logits)
    with pytest.raises(CheckpointError, match="-inf"):
        sampler(params, 10).sample(torch.full((10,), -math.inf))
    # what lies beyond the tokenizer is nobody's business
    assert sampler(params, 10, real=4).sample(logits).token_id < 4


# --- log-probabilities ---------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own_and_sum_to_one() -> None:
    logits = torch.cat([random_logits(18, 5), torch.full((2,), 9.0)])
    params = SamplingParams(temperature=0.3, top_k=2, logit_bias={0: 50.0}, repetition_penalty=1.5, seed=0, logprobs=18)
    sample = sampler(params, 20, real=18).sample(logits)
    assert sample.token_id == 0
    expected = [math.log(p) for p in softmax(logits[:18].tolist())]
    assert sample.logprob == pytest.approx(expected[0], abs=1e-5)
    assert dict(sample.top) == pytest.approx(dict(enumerate(expected)), abs=1e-5)
    assert [i for i, _ in sample.top] == sorted(range(18), key=lambda i: -expected[i])
    assert sum(math.exp(logprob) for _, logprob in sample.top) == pytest.approx(1.0, abs=1e-5)


def test_logprobs_zero_gives_the_chosen_one_only_and_none_gives_nothing() -> None:
    logits = random_logits(18, 5)
    chosen = sampler(SamplingParams(logprobs=0), 18).sample(logits)
    assert chosen.top == []
    assert chosen.logprob == pytest.approx(logits.log_softmax(0).max().item())
    assert sampler(SamplingParams(), 18).sample(logits)[1:] == (None, [])


class CountHostReads(TorchFunctionMode):
    """Counts every call by which Python gets a value out of a tensor."""

    reads = 0
    NAMES = frozenset({"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


def test_one_host_read_per_token() -> None:
    everything = SamplingParams(
        temperature=0.8,
        top_k=9,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={1: 1.0},
        min_tokens=2,
        logprobs=3,
    )
    for params in (SamplingParams(), everything):
        ours, logits = sampler(params, 30, eos=(2,)), random_logits(30, 0)
        with CountHostReads() as counter:
            for _ in range(4):
                ours.sample(logits)
        assert counter.reads == 4


# --- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-9),
        ("top_k", -1),
        ("top_k", 0.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {3: math.nan}),
        ("seed", 2**63),
        ("seed", 1.5),
        ("stop", ("",)),
        ("stop", "END"),
        ("min_tokens", -1),
        ("min_tokens", 513),
        ("max_tokens", -1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_bad_parameters_are_one_line_that_says_the_value_and_what_to_do(name: str, value: Any) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert isinstance(caught.value, MinillmError)
    assert name in message
    assert "\n" not in message
    shown = value if not isinstance(value, dict) else value[3]
    assert (repr(shown) if isinstance(shown, str) else str(shown)) in message


def test_the_extremes_that_are_allowed_give_numbers() -> None:
    logits = random_logits(40, 2)
    for params in (
        SamplingParams(temperature=1e-5, top_p=1e-6, min_p=1.0, repetition_penalty=0.01, seed=0),
        SamplingParams(temperature=100, repetition_penalty=100, presence_penalty=2, frequency_penalty=-2, seed=0),
        SamplingParams(temperature=1, top_k=10**9, seed=0, max_tokens=0),
    ):
        ours = sampler(params, 40)
        ours.observe_prompt(torch.arange(20))
        assert all(0 <= ours.sample(logits).token_id < 40 for _ in range(20))
    best = sampler(SamplingParams(temperature=1.0, min_p=1.0), 40)
    assert best.sample(logits).token_id == int(logits.argmax())
