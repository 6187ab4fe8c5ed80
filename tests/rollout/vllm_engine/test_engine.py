"""A real vLLM behind the verbs: what it samples, under which weights, and that nothing stale is read."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from policy.digest import tensor_digest, weights_digest
from rollout.request import Completion, Request, SamplingParams
from rollout.vllm_engine import weights as vllm_weights
from rollout.vllm_engine.engine import VllmEngine
from tests.policy.test_vllm import LOG_PROB_ERROR
from tests.rollout.vllm_engine.tiny import (
    LONG,
    config_of,
    difference,
    open_engine,
    policy_of,
    prompt,
    request,
    trainer_rows,
    weights,
)

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
FAMILIES = ("qwen3", "qwen3_tied", "qwen3_moe", "qwen3_moe_mixed", "llama_scaled", "llama_all_heads")
# Derived for one entry at five sigma. Here the largest of some 100,000 counts, which is about as far out by itself, so
# twice that. Measured: 0.9e-4 for Llama, 0.3e-4 for Qwen3.
ERROR = 2 * LOG_PROB_ERROR
STALE = 0.1  # what other weights change at least, in the largest entry: measured 6 and more


@pytest.fixture(scope="module")
def shared() -> VllmEngine:
    """Of the family qwen3; tests load the weights that they want."""
    return open_engine("qwen3")


@pytest.fixture
def engine(shared: VllmEngine) -> VllmEngine:
    shared.load_weights(weights("qwen3"), 0)
    return shared


def largest(family: str, version: int, asked: list[Request], completions: list[Completion]) -> float:
    found = {each.request_id: each for each in asked}
    policy = policy_of(family, version)
    return max(float(difference(policy, found[each.request_id], each).max()) for each in completions)


def at_step(engine: VllmEngine, number: int, action: Callable[[], Any]) -> pytest.MonkeyPatch:
    """Runs the action between the steps number - 1 and number of the engine, counted from 0."""
    patch, steps, step = pytest.MonkeyPatch(), iter(range(10**6)), engine._step
    patch.setattr(engine, "_step", lambda: (action() if next(steps) == number else None, step()))
    return patch


@pytest.mark.parametrize("family", FAMILIES)
def test_after_every_update_log_probs_are_those_of_the_new_weights(family: str) -> None:
    engine = open_engine(family)
    asked = [request(0, 5, 2), request(1, LONG), request(2, 128, 3), request(3, 60, temperature=0.0)]
    for version in (0, 1, 2):
        engine.load_weights(weights(family, version), version)
        expected = {name: tensor_digest(tensor) for name, tensor in weights(family, version).items()}
        assert engine.weights_digest() == weights_digest(expected)
        completions = engine.generate(asked)
        assert largest(family, version, asked, completions) < ERROR
        assert version == 0 or largest(family, version - 1, asked, completions) > STALE
        assert {int(each) for done in completions for each in done.policy_versions} == {version}


def test_log_probs_are_at_the_temperature_before_the_limits_and_after_them_when_asked(engine: VllmEngine) -> None:
    limits = [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}]
    asked = [
        request(index, 40, temperature=temperature, processed_log_probs=True, top_log_probs=3, **limit)
        for index, (temperature, limit) in enumerate((t, limit) for t in (0.5, 1.0, 1.7) for limit in limits)
    ]
    for each, completion in zip(asked, engine.generate(asked), strict=True):
        rows, chosen = completion.full_log_probs, completion.token_ids[:, None]
        assert rows is not None and np.abs(trainer_rows(policy_of("qwen3"), each, completion) - rows).max() < (
            ERROR / each.sampling.temperature
        )
        assert np.array_equal(np.take_along_axis(rows, chosen, 1)[:, 0], completion.log_probs)
        assert completion.top_log_probs is not None and completion.top_token_ids is not None
        assert np.array_equal(-np.sort(-rows, 1)[:, :3], completion.top_log_probs)
        assert np.array_equal(np.take_along_axis(rows, completion.top_token_ids, 1), completion.top_log_probs)
        limited = np.take_along_axis(limited_rows(rows, each.sampling), chosen, 1)[:, 0]
        # Both normalise the same numbers, in FP32: an error of a few ulp of a log-prob of at most 16.
        assert completion.processed_log_probs is not None
        assert np.abs(limited - completion.processed_log_probs).max() < 16 * 4 * 2**-24


def limited_rows(rows: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """min-p, then top-k, then top-p on what is left, each renormalised: the order of vLLM."""
    log_probs = torch.from_numpy(rows).double()
    floor = log_probs.max(1, keepdim=True).values + np.log(sampling.min_p or 1e-300)
    log_probs = log_probs.masked_fill(log_probs < floor, -torch.inf)
    if sampling.top_k:
        least = log_probs.topk(sampling.top_k).values[:, -1:]
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
    ordered, places = log_probs.log_softmax(1).sort(1, descending=True)
    outside = ordered.exp().cumsum(1) - ordered.exp() >= sampling.top_p
    kept = torch.full_like(log_probs, -torch.inf).scatter(1, places, ordered.masked_fill(outside, -torch.inf))
    return kept.log_softmax(1).numpy()


def test_a_batch_repeats_and_its_samples_differ(engine: VllmEngine) -> None:
    asked = [request(0, 30, 8), request(1, LONG, 8)]
    first, second = engine.generate(asked), engine.generate(asked)
    assert [each.token_ids.tolist() for each in first] == [each.token_ids.tolist() for each in second]
    assert all(np.array_equal(a.log_probs, b.log_probs) for a, b in zip(first, second, strict=True))
    assert len({tuple(each.token_ids.tolist()) for each in first}) == 16


def test_stop_tokens_end_a_completion_but_not_before_the_fewest_tokens(engine: VllmEngine) -> None:
    plain = engine.generate([request(0, 30, 8, max_new_tokens=40)])
    ends = config_of("qwen3").stop_token_ids
    assert {each.finish_reason for each in plain} == {"stop", "length"}
    for each in plain:
        assert (each.finish_reason == "stop") == (each.token_ids[-1] in ends)
        assert not np.isin(each.token_ids[:-1], ends).any()
    own = int(plain[0].token_ids[0])
    stopped = engine.generate([request(0, 30, 8, max_new_tokens=40, stop_token_ids=(own,))])[0]
    assert (stopped.token_ids.tolist(), stopped.finish_reason) == ([own], "stop")
    late = engine.generate([request(0, 30, 8, max_new_tokens=40, min_new_tokens=30, stop_token_ids=(own,))])
    assert all(len(each.token_ids) >= 30 for each in late)
    assert largest("qwen3", 0, [request(0, 30)], late) < ERROR  # the mask is not in the log-probs


def test_an_aborted_request_comes_back_with_what_it_has(engine: VllmEngine) -> None:
    asked = [request(0, 30, 12, max_new_tokens=60), request(1, 30, 12, max_new_tokens=60)]
    whole = engine.generate(asked)
    patch = at_step(engine, 5, lambda: engine.abort(0))
    cut = engine.generate(asked)
    patch.undo()
    assert [(each.request_id, each.sample) for each in cut] == [(i, s) for i in (0, 1) for s in range(12)]
    aborted = [each for each in cut if each.finish_reason == "abort"]
    assert {each.request_id for each in aborted} == {0} and max(len(each.token_ids) for each in aborted) == 5
    for each, other in zip(cut, whole, strict=True):
        assert each.token_ids[:5].tolist() == other.token_ids[: len(each.token_ids)][:5].tolist()
    assert engine.describe()["running"] == 0


def test_nothing_is_computed_while_paused_and_nothing_is_lost(engine: VllmEngine) -> None:
    asked, answers = [request(0, 30, 4, max_new_tokens=200)], []
    started = threading.Event()
    patch = at_step(engine, 3, started.set)
    thread = threading.Thread(target=lambda: answers.extend(engine.generate(asked)))
    thread.start()
    assert started.wait(60)
    engine.pause()
    before = [len(sample.drawn) for sample in engine._running.values()]
    thread.join(0.2)
    assert thread.is_alive() and [len(sample.drawn) for sample in engine._running.values()] == before
    engine.resume()
    thread.join()
    patch.undo()
    assert [each.token_ids.tolist() for each in answers] == [each.token_ids.tolist() for each in engine.generate(asked)]


@pytest.mark.parametrize("mode", ["reprefill", "continue"])
def test_weights_that_arrive_in_the_middle_hold_for_every_later_token(mode: str) -> None:
    engine = open_engine("qwen3", on_new_weights=mode, max_batch=2)
    engine.load_weights(weights("qwen3"), 0)
    # One prompt for all, so that a sample which begins later could read the prefix of older weights.
    asked = [Request(i, prompt(LONG), 2, SamplingParams(24, min_new_tokens=24), 7, 1, i, (0, 1)) for i in range(2)]
    patch = at_step(engine, 4, lambda: engine.load_weights(weights("qwen3", 1), 1))
    first, second, *later = engine.generate(asked)
    patch.undo()
    for each in (first, second):
        assert each.policy_versions.tolist() == [0] * 4 + [1] * 20
        assert difference(policy_of("qwen3"), asked[0], each)[:4].max() < ERROR
        fresh = difference(policy_of("qwen3", 1), asked[0], each)[4:]
        assert fresh.max() < ERROR if mode == "reprefill" else fresh.min() > ERROR
    assert all((each.policy_versions == 1).all() for each in later)
    assert largest("qwen3", 1, asked, later) < ERROR


@pytest.mark.parametrize("left_out", [("_forget_prefixes", "_cache_salt"), ("_forget_prefixes",), ("_cache_salt",)])
def test_a_stale_prefix_can_be_provoked_and_either_defence_stops_it(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, left_out: tuple[str, ...]
) -> None:
    for name in left_out:
        monkeypatch.setattr(engine, name, lambda: "the same for every version")
    engine.load_weights(weights("qwen3"), 0)
    engine.generate([request(0, LONG)])
    engine.load_weights(weights("qwen3", 1), 1)
    completions = engine.generate([request(0, LONG)])
    found = largest("qwen3", 1, [request(0, LONG)], completions)
    assert found > STALE if len(left_out) == 2 else found < ERROR


@pytest.mark.parametrize("family, left_out", [("qwen3_tied", "_pack_tied_head"), ("qwen3_moe", "_unpack_experts")])
def test_weights_that_the_loader_leaves_behind_are_found(
    family: str, left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(family)
    monkeypatch.setattr(vllm_weights, left_out, lambda model: None)
    with pytest.raises((ValueError, RuntimeError), match=r"computes with other weights|size of tensor"):
        engine.load_weights(weights(family), 0)
    with pytest.raises(ValueError, match="the update to the weights of version 0 failed"):
        engine.generate([request(0, 5)])


def test_an_update_that_fails_ends_the_engine() -> None:
    engine = open_engine("qwen3")
    with pytest.raises(ValueError, match="it has no weights yet"):
        engine.generate([request(0, 5)])
    engine.load_weights(weights("qwen3"), 0)
    broken = weights("qwen3") | {"model.norm.weight": torch.ones(3)}

    def update() -> None:
        with pytest.raises(ValueError, match=r"model\.norm\.weight has shape"):
            engine.load_weights(broken, 1)

    patch = at_step(engine, 2, update)
    with pytest.raises(ValueError, match="the update to the weights of version 1 failed"):
        engine.generate([request(0, 5, max_new_tokens=20, min_new_tokens=20)])
    patch.undo()
    for use in (engine.weights_digest, lambda: engine.load_weights(weights("qwen3"), 2)):
        with pytest.raises(ValueError, match="cannot work: the update to the weights of version 1 failed"):
            use()


@pytest.mark.parametrize(
    "asked, message",
    [
        (
            Request(4, np.array([300]), 1, SamplingParams(4), 0),
            "request 4: prompt token ids from 300 to 300, .* 0 to 299",
        ),
        (
            Request(4, prompt(500), 1, SamplingParams(13), 0),
            r"prompt 500 \+ max_new_tokens 13 exceeds the policy's 512",
        ),
        (Request(4, prompt(5), 1, SamplingParams(4, stop_strings=("x",)), 0), "stop_strings need an engine with"),
    ],
)
def test_requests_that_could_never_run_are_refused(engine: VllmEngine, asked: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate([request(0, 5), asked])
    assert engine.describe()["running"] == 0


def test_sleep_between_batches_changes_nothing(engine: VllmEngine) -> None:
    asleep = open_engine("qwen3", sleep_when_idle=True)
    asleep.load_weights(weights("qwen3"), 0)
    expected = engine.generate([request(0, LONG, 4)])
    for _ in range(2):
        found = asleep.generate([request(0, LONG, 4)])
        assert [each.token_ids.tolist() for each in found] == [each.token_ids.tolist() for each in expected]
