"""What of the SGLang engine needs no SGLang: every way a server can fail, shown by one that computes nothing."""

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policy.digest import tensor_digest, weights_digest
from policy.names import export_tensors
from rollout.config import RolloutConfig
from rollout.request import Request, SamplingParams
from rollout.sglang_engine.engine import API_KEY, SglangEngine
from rollout.sglang_engine.samples import sample_body
from rollout.verbs import EngineDied
from tests.policy.tiny import family_config, make_config, make_policy
from tests.rollout.sglang_engine.fake import Behaviour, Fake, fake_server

ASKED = Request(3, np.array([5, 6]), 2, SamplingParams(4), seed=7, step=1, prompt=2)
REFUSAL = (400, b'{"success":false,"message":"not now"}')
UPDATES = {"disk": "/update_weights_from_disk", "distributed": "/update_weights_from_distributed"}


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server() as server:
        yield server


def open_engine(fake: Fake, **rollout: Any) -> SglangEngine:
    sglang = {"url": fake.url, "start_seconds": 1.0, "answer_seconds": 20.0} | rollout.pop("sglang", {})
    settings = RolloutConfig.model_validate({"engine": "sglang", "max_batch": 4, "sglang": sglang, **rollout})
    return SglangEngine(family_config("qwen3"), Path("unused"), torch.float32, settings, torch.device("cpu"))


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    policy = make_policy(family_config("qwen3"), torch.float32)
    policy.initialize(seed)
    return export_tensors(policy)


def ready(fake: Fake, **rollout: Any) -> SglangEngine:
    engine = open_engine(fake, **rollout)
    engine.load_weights(tensors(), 0)
    return engine


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """The thread and, once it has ended, what came of it."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except (ValueError, EngineDied) as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def test_completions_come_back_by_request_and_sample(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "a key")
    engine = ready(fake)
    engine.load_weights(tensors(1), 5)
    completions = engine.generate([replace(ASKED, request_id=9, prompt_ids=np.array([1])), ASKED])
    assert [(each.request_id, each.sample) for each in completions] == [(9, 0), (9, 1), (3, 0), (3, 1)]
    last = completions[3]
    assert (last.token_ids.tolist(), last.log_probs.tolist()) == ([7, 8, 9, 10], [-0.5] * 4)
    assert (last.policy_versions.tolist(), last.finish_reason) == ([5] * 4, "length")
    assert last.log_probs.dtype == np.float32 and last.full_log_probs is last.top_log_probs is None
    assert set(fake.headers) == {"Bearer a key"}
    assert engine.describe() | {"seconds": 0, "url": ""} == {
        "engine": "sglang", "url": "", "server_pid": None, "policy_version": 5, "dtype": "float32", "max_batch": 4,
        "max_sequence": 96, "running": 0, "tokens": 16, "seconds": 0,
    }  # fmt: skip


def test_a_request_says_all_that_was_asked() -> None:
    sampling = SamplingParams(4, 0.7, 0.9, 20, 0.1, 0, (3,), ("x",), 2, True)
    asked = replace(ASKED, sampling=sampling, full_vocab_samples=(1,))
    bodies = [sample_body(asked, sample, f"name {sample}", "salt", (0, 1), 3) for sample in (0, 1)]
    seeds = [body["sampling_params"].pop("sampling_seed") for body in bodies]
    assert seeds[0] != seeds[1] and all(0 <= seed < 2**63 for seed in seeds)
    common = {
        "input_ids": [5, 6],
        "extra_key": "salt",
        "return_logprob": True,
        "top_logprobs_num": 2,
        "return_sampling_mask": True,
        "sampling_logprobs_mode": "selected",
        "sampling_params": {
            "max_new_tokens": 4,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 20,
            "min_p": 0.1,
            "stop_token_ids": [0, 1, 3],
            "stop": ["x"],
        },
    }
    assert bodies == [common | {"rid": "name 0"}, common | {"rid": "name 1", "token_ids_logprob": [0, 1, 2]}]


def test_an_answer_has_what_was_asked_for(fake: Fake) -> None:
    def answer(fake: Fake, body: dict[str, Any]) -> dict[str, Any]:
        found = fake.counted(body, 2, {"type": "stop", "matched": 8})
        found["meta_info"] |= {
            "weight_versions": [{"version": "0", "start": 0, "end": 1}, {"version": "1", "start": 1, "end": 2}],
            "output_top_logprobs": [[[-0.1, 9, None], [-0.2, 8, None]]] * 2,
            "output_token_ids_logprobs": [[[-float(token), token, None] for token in range(50)]] * 2,
            "output_token_sampling_logprobs": [-0.25, -0.5],
        }
        return found

    engine = ready(fake)
    fake.behaviours["/generate"] = answer
    sampling = SamplingParams(4, top_k=20, top_log_probs=2, processed_log_probs=True)
    (done,) = engine.generate([replace(ASKED, num_samples=1, sampling=sampling, full_vocab_samples=(0,))])
    assert (done.policy_versions.tolist(), done.finish_reason) == ([0, 1], "stop")
    assert done.top_token_ids is not None and done.top_token_ids.tolist() == [[9, 8]] * 2
    assert done.top_log_probs is not None and done.top_log_probs.tolist() == np.float32([[-0.1, -0.2]] * 2).tolist()
    assert done.full_log_probs is not None and np.array_equal(done.full_log_probs[1], -np.arange(50, dtype=np.float32))
    assert done.processed_log_probs is not None and done.processed_log_probs.tolist() == [-0.25, -0.5]


@pytest.mark.parametrize("temperature, expected", [(1.0, [-0.5] * 4), (0.0, [0.0] * 4)])
def test_log_probs_after_no_limit_are_those_before_and_of_a_greedy_token_0(
    fake: Fake, temperature: float, expected: list[float]
) -> None:
    sampling = SamplingParams(4, temperature, processed_log_probs=True)
    (done, _) = ready(fake).generate([replace(ASKED, sampling=sampling)])
    assert done.processed_log_probs is not None and done.processed_log_probs.tolist() == expected


def meta(**fields: Any) -> Behaviour:
    """The usual answer with other fields."""

    def answer(fake: Fake, body: dict[str, Any]) -> dict[str, Any]:
        found = fake.counted(body, 4, {"type": "length"})
        found["meta_info"] |= fields
        return found

    return answer


@pytest.mark.parametrize(
    "behaviour, kind, message",
    [
        (lambda fake, body: (400, b'{"error":{"message":"too long"}}'), ValueError, r"/generate \(HTTP 400\).*too"),
        (lambda fake, body: (500, b"Internal Server Error"), ValueError, r"refused /generate \(HTTP 500\): Internal"),
        (lambda fake, body: (200, b"<html>"), ValueError, "answered /generate with what is no JSON object: <html>"),
        (lambda fake, body: (200, b"\xff\xfe{"), ValueError, "no JSON object"),
        (lambda fake, body: (200, b"[1]"), ValueError, "no JSON object"),
        (lambda fake, body: {"text": "hello"}, ValueError, "sample [01]: .* has output_ids: Field required"),
        (lambda fake, body: (0, b""), EngineDied, "does not answer /generate: RemoteProtocolError"),
        (meta(output_token_logprobs=[[-0.5, 7, None]]), ValueError, "log-probs are of other tokens"),
        (meta(output_token_logprobs=[[None, 7, None]]), ValueError, r"output_token_logprobs.0.0: .*\(got None\)"),
        (meta(output_token_logprobs=[[float("-inf"), 7, None]]), ValueError, "should be a finite number"),
        (meta(weight_versions=[]), ValueError, "weight versions do not cover its 4 tokens"),
        (meta(weight_versions=[{"version": "0", "start": 1, "end": 4}]), ValueError, "do not cover"),
        (meta(weight_versions=[{"version": "0", "start": 0, "end": 5}]), ValueError, "do not cover"),
        (meta(weight_versions=[{"version": "default", "start": 0, "end": 4}]), ValueError, "weights that are not ours"),
        (meta(finish_reason={"type": "tired"}), ValueError, "finish_reason.type: Input should be 'stop', 'length' or"),
        (meta(finish_reason={"type": "abort"}), ValueError, "request 3: SGLang aborted it, and nobody had asked"),
        (lambda fake, body: fake.counted(body, 3, {"type": "length"}), ValueError, "gave 3 tokens of max_new_tokens 4"),
        (lambda fake, body: fake.counted(body, 5, {"type": "stop"}), ValueError, "gave 5 tokens of max_new_tokens 4"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_an_error(fake: Fake, behaviour: Behaviour, kind: type, message: str) -> None:
    engine = ready(fake)
    fake.behaviours["/generate"] = behaviour
    with pytest.raises(kind, match=message):
        engine.generate([ASKED])
    del fake.behaviours["/generate"]
    assert len(engine.generate([ASKED])) == 2


def test_a_slow_server_counts_as_dead(fake: Fake) -> None:
    engine = ready(fake, sglang={"answer_seconds": 0.5})
    fake.behaviours["/generate"] = Fake.until_aborted
    with pytest.raises(EngineDied, match="does not answer /generate: ReadTimeout"):
        engine.generate([ASKED])


def test_a_server_that_went_away_is_dead_and_the_error_travels() -> None:
    with fake_server() as fake:
        engine = ready(fake)
    with pytest.raises(EngineDied, match="does not answer /generate: ConnectError") as caught:
        engine.generate([ASKED])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(EngineDied, match="/pause_generation"):
        engine.load_weights(tensors(), 1)
    with pytest.raises(ValueError, match="the update to the weights of version 1 failed"):
        engine.generate([ASKED])


@pytest.mark.parametrize("way", UPDATES)
def test_weights_arrive_whole_under_their_version(fake: Fake, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.sglang_engine.weights.buckets.__defaults__", (4096,))
    engine = open_engine(fake, sglang={"weights": way})
    for version in (0, 1, 4):
        sent = tensors(version)
        engine.load_weights(sent, version)
        assert all(torch.equal(fake.weights[name], tensor) for name, tensor in sent.items())
        expected = weights_digest({name: tensor_digest(tensor) for name, tensor in sent.items()})
        assert (engine.weights_digest(), fake.version) == (expected, str(version))
    calls = [body for path, body in fake.seen if path == UPDATES[way]]
    assert (len(calls) > 9) == (way == "distributed") and all(body["flush_cache"] is True for body in calls)
    assert fake.paths().count("/init_weights_update_group") == (way == "distributed")
    assert all(not Path(body["model_path"]).exists() for body in calls if way == "disk")


@pytest.mark.parametrize("mode, pause, flush", [("reprefill", "retract", True), ("continue", "in_place", False)])
def test_running_samples_are_put_back_or_go_on_and_no_old_prefix_is_shared(
    fake: Fake, mode: str, pause: str, flush: bool
) -> None:
    engine = ready(fake, on_new_weights=mode)
    engine.generate([ASKED])
    engine.load_weights(tensors(1), 1)
    engine.generate([ASKED])
    bodies = dict(fake.seen)
    assert bodies["/pause_generation"] == {"mode": pause}
    assert bodies["/update_weights_from_disk"]["flush_cache"] is flush
    salts = [body["extra_key"] for path, body in fake.seen if path == "/generate"]
    assert salts[0] == salts[1] != salts[2] == salts[3]


@pytest.mark.parametrize("mode, asked_again", [("reprefill", False), ("continue", True)])
def test_a_sample_that_waited_while_weights_arrived_is_asked_again_unless_caches_were_emptied(
    fake: Fake, mode: str, asked_again: bool
) -> None:
    engine = ready(fake, on_new_weights=mode)

    def late(fake: Fake, body: dict[str, Any]) -> Any:
        if engine.policy_version == 0:
            engine.load_weights(tensors(1), 1)
        return fake.generate(body)

    fake.behaviours["/generate"] = late
    (done,) = engine.generate([replace(ASKED, num_samples=1)])
    assert done.policy_versions.tolist() == [1] * 4
    salts = [body["extra_key"] for path, body in fake.seen if path == "/generate"]
    assert len(salts) == len(set(salts)) == 1 + asked_again


BROKEN: list[tuple[str, str, Behaviour, type, str]] = [
    ("disk", "/pause_generation", lambda fake, body: REFUSAL, ValueError, "not now"),
    ("disk", "/update_weights_from_disk", lambda fake, body: REFUSAL, ValueError, "HTTP 400.*not now"),
    ("disk", "/update_weights_from_disk", lambda fake, body: {"success": False, "message": "no"}, ValueError, "no$"),
    ("disk", "/update_weights_from_disk", lambda fake, body: (0, b""), EngineDied, "RemoteProtocolError"),
    ("disk", "/update_weights_from_disk", lambda fake, body: {}, ValueError, "refused"),
    ("disk", "/model_info", lambda fake, body: {"weight_version": "0"}, ValueError, "of version 0 after .* version 1"),
    ("disk", "/weights_checker", lambda fake, body: {"ranks": [{"checksums": {}}]}, ValueError, "computes with other"),
    ("disk", "/weights_checker", lambda fake, body: {"success": False}, ValueError, "no checksums of the one rank"),
    ("disk", "/continue_generation", lambda fake, body: REFUSAL, ValueError, "not now"),
    ("distributed", "/begin_weight_update", lambda fake, body: REFUSAL, ValueError, "begin_weight_update.*not now"),
    ("distributed", "/begin_weight_update", lambda fake, body: {"success": True}, ValueError, "between begin and end"),
    ("distributed", "/update_weights_from_distributed", lambda fake, body: REFUSAL, ValueError, "not now"),
    ("distributed", "/update_weights_from_distributed", lambda fake, body: (0, b""), EngineDied, "RemoteProtocolError"),
    ("distributed", "/end_weight_update", lambda fake, body: REFUSAL, ValueError, "end_weight_update.*not now"),
]


@pytest.mark.parametrize("way, path, behaviour, kind, message", BROKEN)
def test_an_update_that_fails_ends_the_engine_and_hangs_nobody(
    fake: Fake, way: str, path: str, behaviour: Behaviour, kind: type, message: str
) -> None:
    engine = ready(fake, sglang={"weights": way})
    fake.behaviours = {"/generate": Fake.until_aborted}
    thread, outcome = in_thread(lambda: engine.generate([ASKED]))
    assert fake.running.wait(20)
    fake.behaviours[path] = behaviour
    start = time.monotonic()
    with pytest.raises(kind, match=message):
        engine.load_weights(tensors(1), 1)
    assert time.monotonic() - start < 10  # half of answer_seconds: nobody waited for a broadcast to time out
    thread.join()
    for use in (engine.weights_digest, lambda: engine.generate([ASKED]), lambda: engine.load_weights(tensors(), 2)):
        with pytest.raises(ValueError, match="cannot work: the update to the weights of version 1 failed"):
            use()
    assert isinstance(outcome[0], ValueError) and "version 1 failed" in str(outcome[0])
    fake.aborted |= {body["rid"] for path, body in fake.seen if path == "/generate"}


@pytest.mark.parametrize(
    "behaviour, kind", [(lambda fake, body: REFUSAL, ValueError), (lambda *_: (0, b""), EngineDied)]
)
def test_a_server_that_does_not_join_the_group_hangs_nobody(fake: Fake, behaviour: Behaviour, kind: type) -> None:
    engine = open_engine(fake, sglang={"weights": "distributed"})
    fake.behaviours["/init_weights_update_group"] = behaviour
    start = time.monotonic()
    with pytest.raises(kind, match="/init_weights_update_group"):
        engine.load_weights(tensors(), 0)
    assert time.monotonic() - start < 10


def test_a_server_that_says_yes_and_never_joins_is_given_up(fake: Fake) -> None:
    engine = open_engine(fake, sglang={"weights": "distributed", "answer_seconds": 0.5})
    fake.behaviours["/init_weights_update_group"] = lambda fake, body: {"success": True}
    with pytest.raises(EngineDied, match=r"did not join /init_weights_update_group in 0\.5 s"):
        engine.load_weights(tensors(), 0)


def test_an_error_of_any_kind_ends_the_engine(fake: Fake, tmp_path: Path) -> None:
    engine = open_engine(fake, sglang={"weights_folder": str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError):
        engine.load_weights(tensors(), 0)
    with pytest.raises(ValueError, match="the update to the weights of version 0 failed"):
        engine.generate([ASKED])


def test_weights_that_do_not_fit_are_refused_before_the_server_hears_of_them(fake: Fake) -> None:
    engine = open_engine(fake)
    with pytest.raises(ValueError, match="it has no weights yet"):
        engine.generate([ASKED])
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        engine.load_weights(tensors() | {"model.norm.weight": torch.ones(3)}, 0)
    assert "/pause_generation" not in fake.paths()


def test_an_aborted_request_comes_back_with_what_it_has(fake: Fake) -> None:
    engine = ready(fake, max_batch=3)
    fake.behaviours["/generate"] = Fake.until_aborted
    asked = [replace(ASKED, num_samples=4), replace(ASKED, request_id=4)]
    thread, outcome = in_thread(lambda: engine.generate(asked))
    assert fake.running.wait(20)
    with pytest.raises(ValueError, match="while earlier requests run"):
        engine.generate([ASKED])
    engine.abort(3)
    engine.abort(4)
    thread.join()
    assert [(each.request_id, each.sample, each.finish_reason) for each in outcome[0]] == [
        *((3, sample, "abort") for sample in range(4)),
        *((4, sample, "abort") for sample in range(2)),
    ]
    assert {len(each.token_ids) for each in outcome[0]} == {0, 3}  # some had not begun, and were never sent
    assert fake.paths().count("/generate") == 3


def test_new_weights_leave_a_paused_engine_paused(fake: Fake) -> None:
    engine = ready(fake)
    engine.pause()
    engine.load_weights(tensors(1), 1)
    assert not fake.gate.is_set()
    engine.resume()
    assert fake.gate.is_set()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt_ids": np.array([50])}, "request 3: prompt token ids from 50 to 50, the policy has 0 to 49"),
        ({"sampling": SamplingParams(95)}, r"prompt 2 \+ max_new_tokens 95 exceeds 96 tokens"),
        ({"sampling": SamplingParams(4, stop_strings=("x",))}, "stop_strings need a tokenizer"),
        ({"sampling": SamplingParams(4, min_new_tokens=1)}, "min_new_tokens = 1, .* set it to 0"),
        ({"sampling": SamplingParams(4, top_p=0.9, processed_log_probs=True)}, "processed_log_probs with top_k = 0"),
    ],
)
def test_requests_that_could_never_run_are_refused(fake: Fake, change: dict[str, Any], message: str) -> None:
    engine = ready(fake)
    with pytest.raises(ValueError, match=message):
        engine.generate([replace(ASKED, request_id=2), replace(ASKED, **change)])
    assert "/generate" not in fake.paths()


@pytest.mark.parametrize(
    "rollout, message",
    [
        ({"speculative_tokens": 2}, "only the local engine drafts"),
        ({"routing_replay": "weights"}, "gives experts without their weights; set it to experts"),
        ({"workers": 2}, "one server at rollout.sglang.url; set workers to 1"),
    ],
)
def test_recipes_that_sglang_cannot_serve_are_refused(fake: Fake, rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"rollout.engine = sglang: .*{message}"):
        open_engine(fake, **rollout)
    assert not fake.seen


def test_ring_linear_is_refused(fake: Fake) -> None:
    settings = RolloutConfig.model_validate({"engine": "sglang", "sglang": {"url": fake.url}})
    with pytest.raises(ValueError, match=r"no class for model_type bailing_moe_linear; set rollout\.engine=local"):
        SglangEngine(make_config(), Path("unused"), torch.float32, settings, torch.device("cpu"))


def test_a_server_that_is_not_there_or_is_no_sglang(fake: Fake) -> None:
    fake.behaviours["/server_info"] = lambda fake, body: {"device": "cpu"}
    with pytest.raises(ValueError, match="max_req_input_len = None, not a count; is it SGLang"):
        open_engine(fake)
    fake.behaviours["/health"] = lambda fake, body: (503, b"")
    with pytest.raises(ValueError, match=r"no healthy SGLang server at http.* for 0.2 s.*LOCKSTEP_SGLANG_API_KEY"):
        open_engine(fake, sglang={"start_seconds": 0.2})
