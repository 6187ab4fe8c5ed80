"""A real SGLang behind the verbs: what it samples, under which weights, and that nothing stale is read.

One server for the file, as a CPU takes half a minute to start one: the engine that starts it sends weights by disk;
others join it by its URL.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policy.checkpoint import dtype_name, save_config
from policy.digest import tensor_digest, weights_digest
from rollout.config import RolloutConfig
from rollout.request import Completion, Request, SamplingParams
from rollout.sglang_engine.engine import SglangEngine
from rollout.verbs import EngineDied
from tests.policy.test_vllm import LOG_PROB_ERROR
from tests.rollout.vllm_engine.tiny import LONG, config_of, difference, policy_of, prompt, request, weights

pytestmark = pytest.mark.sglang
MISSING = (
    "LOCKSTEP_SGLANG_PYTHON does not name the Python of an environment with SGLang: "
    "`.ci/sglang DIR && export LOCKSTEP_SGLANG_PYTHON=DIR/bin/python` makes one, of 3.4 GB"
)
# Derived for one entry at five sigma; of the largest of many counts, twice that. Measured: 0.3e-4.
ERROR = 2 * LOG_PROB_ERROR
STALE = 0.1  # what other weights change at least, in the largest entry: measured 7 and more


def python() -> str:
    """The interpreter that has SGLang."""
    found = os.environ.get("LOCKSTEP_SGLANG_PYTHON")
    assert found, MISSING
    return found


def open_engine(folder: Path, **sglang: Any) -> SglangEngine:
    settings = {"start_seconds": 300.0, "answer_seconds": 120.0, **sglang}
    mode = settings.pop("on_new_weights", "reprefill")
    rollout = RolloutConfig.model_validate(
        {"engine": "sglang", "max_batch": 16, "memory_mb": 32, "on_new_weights": mode, "sglang": settings}
    )
    save_config(folder, config_of("qwen3"), dtype_name(torch.float32), None)
    return SglangEngine(config_of("qwen3"), folder, torch.float32, rollout, torch.device("cpu"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangEngine]:
    engine = open_engine(tmp_path_factory.mktemp("policy"), python=python())
    assert engine.server is not None
    yield engine
    engine.server.stop()


@pytest.fixture
def engine(shared: SglangEngine) -> SglangEngine:
    shared.load_weights(weights("qwen3"), 0)
    return shared


def guest(shared: SglangEngine, folder: Path, **sglang: Any) -> SglangEngine:
    """Another engine at the same server."""
    return open_engine(folder, url=str(shared.describe()["url"]), **sglang)


def largest(version: int, asked: list[Request], completions: list[Completion]) -> float:
    """Difference to the trainer, times the temperature, which divides the error as it divides the logits."""
    found = {each.request_id: each for each in asked}
    return max(
        float(difference(policy_of("qwen3", version), found[each.request_id], each).max())
        * (found[each.request_id].sampling.temperature or 1.0)
        for each in completions
    )


@pytest.mark.parametrize("way", ["disk", "distributed"])
def test_after_every_update_log_probs_are_those_of_the_new_weights(
    shared: SglangEngine, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.sglang_engine.weights.buckets.__defaults__", (2**16,))  # several broadcasts
    engine = guest(shared, tmp_path, weights=way)
    asked = [request(0, 5, 2), request(1, LONG, temperature=0.5), request(2, 128, 3), request(3, 60, temperature=0.0)]
    for version in (0, 1, 2):
        engine.load_weights(weights("qwen3", version), version)
        expected = {name: tensor_digest(tensor) for name, tensor in weights("qwen3", version).items()}
        assert engine.weights_digest() == weights_digest(expected)
        completions = engine.generate(asked)
        assert largest(version, asked, completions) < ERROR
        assert version == 0 or largest(version - 1, asked, completions) > STALE
        assert {int(each) for done in completions for each in done.policy_versions} == {version}


def test_log_probs_are_at_the_temperature_before_the_limits_and_after_them_when_asked(engine: SglangEngine) -> None:
    limits = [{"top_k": 20}, {"top_k": 20, "top_p": 0.8}, {"top_k": 250, "min_p": 0.05}, {"top_k": 40, "top_p": 0.9}]
    asked = [
        request(index, 40, temperature=temperature, processed_log_probs=True, top_log_probs=3, **limit)
        for index, (temperature, limit) in enumerate((t, limit) for t in (0.5, 1.0, 1.7) for limit in limits)
    ]
    completions = engine.generate(asked)
    assert largest(0, asked, completions) < ERROR
    for each, done in zip(asked, completions, strict=True):
        rows, chosen = done.full_log_probs, done.token_ids[:, None]
        assert rows is not None and done.top_log_probs is not None and done.top_token_ids is not None
        assert np.array_equal(np.take_along_axis(rows, chosen, 1)[:, 0], done.log_probs)
        assert np.array_equal(-np.sort(-rows, 1)[:, :3], done.top_log_probs)
        assert np.array_equal(np.take_along_axis(rows, done.top_token_ids, 1), done.top_log_probs)
        limited = np.take_along_axis(limited_rows(rows, each.sampling), chosen, 1)[:, 0]
        # Both normalise the same probabilities, in FP32: a few ulp of a log-prob of at most 16, and as much of the log.
        assert done.processed_log_probs is not None
        assert np.abs(limited - done.processed_log_probs).max() < 16 * 8 * 2**-24


def limited_rows(rows: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """top-k, then top-p and min-p, both of the whole distribution, renormalised at the end: the order of SGLang."""
    ordered, places = torch.from_numpy(rows).double().softmax(1).sort(dim=1, descending=True, stable=True)
    outside = torch.arange(rows.shape[1]) >= (sampling.top_k or rows.shape[1])
    outside = outside | (ordered.cumsum(1) - ordered > sampling.top_p) | (ordered < sampling.min_p * ordered[:, :1])
    kept = ordered.masked_fill(outside, 0.0)
    limited = (kept / kept.sum(1, keepdim=True)).log()
    return torch.full_like(limited, -torch.inf).scatter(1, places, limited).numpy()


def test_stop_tokens_end_a_completion_and_samples_differ(engine: SglangEngine) -> None:
    plain = engine.generate([request(0, 30, 16, max_new_tokens=40)])
    ends = config_of("qwen3").stop_token_ids
    assert {each.finish_reason for each in plain} == {"stop", "length"}
    assert len({tuple(each.token_ids.tolist()) for each in plain}) > 12
    for each in plain:
        assert (each.finish_reason == "stop") == (each.token_ids[-1] in ends)
        assert not np.isin(each.token_ids[:-1], ends).any()
    greedy = engine.generate([request(0, 30, temperature=0.0)])[0]
    own = int(greedy.token_ids[1])
    stopped = engine.generate([request(0, 30, temperature=0.0, stop_token_ids=(own,))])[0]
    first = int(np.flatnonzero(greedy.token_ids == own)[0])
    assert (stopped.token_ids.tolist(), stopped.finish_reason) == (greedy.token_ids[: first + 1].tolist(), "stop")


def running(engine: SglangEngine, asked: list[Request]) -> tuple[threading.Thread, list[Completion]]:
    """Generates in a thread, some steps into the work."""
    answers: list[Completion] = []
    thread = threading.Thread(target=lambda: answers.extend(engine.generate(asked)))
    thread.start()
    wait_for(lambda: used_tokens(engine) > sum(len(each.prompt_ids) for each in asked[:2]) + 8)
    return thread, answers


def used_tokens(engine: SglangEngine) -> int:
    return int(engine._client.get("/v1/loads")["loads"][0]["num_used_tokens"])


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def many(index: int, samples: int = 32) -> Request:
    """Enough that some run for long, and some begin late."""
    return Request(index, prompt(LONG), samples, SamplingParams(200), 7, 1, index, tuple(range(samples)))


def test_an_aborted_request_comes_back_with_what_it_has(engine: SglangEngine) -> None:
    asked = [many(0, 64), many(1)]
    thread, answers = running(engine, asked)
    engine.abort(0)
    thread.join()
    assert [(each.request_id, each.sample) for each in answers] == [
        (i, s) for i, n in ((0, 64), (1, 32)) for s in range(n)
    ]
    aborted = [each for each in answers if each.finish_reason == "abort"]
    assert {each.request_id for each in aborted} == {0} and {len(each.token_ids) > 0 for each in aborted} == {
        True,
        False,
    }
    assert largest(0, asked, [each for each in answers if len(each.token_ids)]) < ERROR


def test_nothing_is_computed_while_paused_and_nothing_is_lost(engine: SglangEngine) -> None:
    thread, answers = running(engine, [many(0)])
    engine.pause()
    used = used_tokens(engine)
    thread.join(0.5)
    assert thread.is_alive() and used_tokens(engine) == used > 0
    engine.resume()
    thread.join()
    assert {each.finish_reason for each in answers} <= {"stop", "length"} and len(answers) == 32
    assert largest(0, [many(0)], answers) < ERROR


@pytest.mark.parametrize("mode", ["reprefill", "continue"])
def test_weights_that_arrive_in_the_middle_hold_for_every_later_token(
    shared: SglangEngine, mode: str, tmp_path: Path
) -> None:
    engine = guest(shared, tmp_path, on_new_weights=mode)
    engine.load_weights(weights("qwen3"), 0)
    thread, answers = running(engine, [many(0)])
    engine.load_weights(weights("qwen3", 1), 1)
    thread.join()
    mixed = [each for each in answers if set(each.policy_versions.tolist()) == {0, 1}]
    later = [each for each in answers if set(each.policy_versions.tolist()) == {1}]
    assert mixed and later and largest(1, [many(0)], later) < ERROR
    for each in mixed:
        new = each.policy_versions == 1
        assert (np.diff(each.policy_versions) >= 0).all()
        assert difference(policy_of("qwen3", 0), many(0), each)[~new].max() < ERROR
        fresh = difference(policy_of("qwen3", 1), many(0), each)[new]
        assert fresh.max() < ERROR if mode == "reprefill" else fresh.min() > ERROR


@pytest.mark.parametrize("salted, emptied", [(False, False), (True, False), (False, True)])
def test_a_stale_prefix_can_be_provoked_and_either_defence_stops_it(
    shared: SglangEngine, salted: bool, emptied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = guest(shared, tmp_path, on_new_weights="reprefill" if emptied else "continue")
    if not salted:
        monkeypatch.setattr(engine, "_cache_salt", lambda: f"the same for every version of {tmp_path}")
    engine.load_weights(weights("qwen3"), 0)
    engine.generate([request(0, LONG)])
    engine.load_weights(weights("qwen3", 1), 1)
    found = largest(1, [request(0, LONG)], engine.generate([request(0, LONG)]))
    assert found < ERROR if salted or emptied else found > STALE


def test_a_refused_broadcast_hangs_nobody(
    shared: SglangEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = guest(shared, tmp_path, weights="distributed")
    engine.load_weights(weights("qwen3"), 0)
    command = engine._client.command
    skipped = ("/begin_weight_update",)
    monkeypatch.setattr(engine._client, "command", lambda path, body: path in skipped or command(path, body))
    start = time.monotonic()
    with pytest.raises(ValueError, match="must run between begin_weight_update"):
        engine.load_weights(weights("qwen3", 1), 1)
    assert time.monotonic() - start < 60  # half of answer_seconds, at which the broadcast itself would end
    with pytest.raises(ValueError, match="the update to the weights of version 1 failed"):
        engine.generate([request(0, 5)])
    shared.resume()


def test_a_server_that_is_killed_is_dead_with_its_last_words(shared: SglangEngine) -> None:
    """The last test here, as there is no server after it."""
    shared.load_weights(weights("qwen3"), 0)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            shared.generate([many(0)])
        except EngineDied as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: used_tokens(shared) > LONG)
    assert shared.server is not None
    shared.server._process.kill()
    thread.join(60)
    assert len(errors) == 1 and "does not answer /generate" in str(errors[0])
