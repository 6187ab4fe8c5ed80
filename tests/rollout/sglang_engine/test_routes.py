"""Experts from SGLang's answers, without SGLang."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policy.names import export_tensors
from rollout.config import RolloutConfig
from rollout.request import Completion, Request, SamplingParams
from rollout.sglang_engine.engine import SglangEngine
from rollout.sglang_engine.routes import routed_experts
from tests.policy.tiny import family_config, make_policy
from tests.rollout.sglang_engine.fake import Fake, fake_server

CONFIG = family_config("qwen3_moe_mixed")
MIXTURES = [layer for layer in range(CONFIG.num_hidden_layers) if CONFIG.is_moe(layer)]
SHAPE = (5, CONFIG.num_hidden_layers, CONFIG.num_experts_per_tok)  # two prompt tokens, four sampled, one not fed
ASKED = Request(3, np.array([5, 6]), 2, SamplingParams(4), seed=7)


def table() -> np.ndarray:
    """int32, different in every token, zeros in dense layers."""
    experts = (np.arange(5)[:, None, None] + np.arange(SHAPE[1])[:, None] + np.arange(SHAPE[2])) % CONFIG.num_experts
    experts[:, [layer for layer in range(SHAPE[1]) if layer not in MIXTURES]] = 0
    return experts.astype(np.int32)


def encoded(experts: np.ndarray) -> str:
    return base64.b64encode(experts.tobytes()).decode()


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server() as server:
        yield server


def open_engine(fake: Fake, family: str = "qwen3_moe_mixed") -> SglangEngine:
    settings = {"url": fake.url, "start_seconds": 1.0, "answer_seconds": 20.0}
    rollout = RolloutConfig.model_validate({"engine": "sglang", "routing_replay": "experts", "sglang": settings})
    return SglangEngine(family_config(family), Path("unused"), torch.float32, rollout, torch.device("cpu"))


def generate(fake: Fake, sent: str | None, monkeypatch: pytest.MonkeyPatch, reason: str = "length") -> list[Completion]:
    def answer(fake: Fake, body: dict[str, Any]) -> dict[str, Any]:
        assert body["return_routed_experts"] is True
        found = fake.counted(body, 4, {"type": reason})
        found["meta_info"]["routed_experts"] = sent
        return found

    monkeypatch.setattr("rollout.sglang_engine.engine.check_weights", lambda *call: None)
    engine = open_engine(fake)
    engine.load_weights(export_tensors(make_policy(CONFIG, torch.float32)), 0)
    fake.behaviours["/generate"] = answer
    if reason == "abort":
        monkeypatch.setattr(engine, "_answers", aborted(engine))
    return engine.generate([ASKED])


def aborted(engine: SglangEngine) -> Any:
    """As if somebody had asked for it once the requests were under way."""
    answers = engine._answers

    async def run(requests: list[Request]) -> list[Completion]:
        post = engine._post

        async def then_abort(*call: Any) -> dict[str, Any]:
            found = await post(*call)
            engine.abort(ASKED.request_id)
            return found

        engine._post = then_abort  # type: ignore[method-assign]
        return await answers(requests)

    return run


def test_every_token_has_the_experts_of_the_mixture_layers(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    for completion in generate(fake, encoded(table()), monkeypatch):
        found = completion.routed_experts
        assert found is not None and found.dtype == np.int16
        assert np.array_equal(found, table()[:, MIXTURES])
        assert completion.routed_weights is None


def test_of_an_aborted_sample_they_may_be_unknown(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [each.routed_experts for each in generate(fake, None, monkeypatch, "abort") if len(each.token_ids)]
    assert found
    for experts in found:
        assert experts is not None and experts.dtype == np.int16
        assert experts.shape == (5, len(MIXTURES), SHAPE[2]) and (experts == -1).all()


def test_an_answer_without_them_ends_the_batch_with_the_remedy(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"request 3, sample [01]: .* 0 bytes, .*set rollout\.routing_replay=none"):
        generate(fake, None, monkeypatch)


def changed(place: tuple[int, ...], value: int) -> np.ndarray:
    experts = table()
    experts[place] = value
    return experts


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ("$", "no base64"),
        (encoded(table()[1:]), r"not those of int32 \[5, 4, "),
        (encoded(np.zeros(SHAPE, np.int32)), "not . different ones"),
        (encoded(changed((2, MIXTURES[0], 0), CONFIG.num_experts)), "different ones"),
        (encoded(changed((4, MIXTURES[-1], 1), -1)), "different ones"),
    ],
)
def test_what_cannot_have_been_recorded_is_refused(sent: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routed_experts(sent, 5, CONFIG)


def test_a_server_that_does_not_record_is_refused(fake: Fake) -> None:
    fake.records_experts = False
    with pytest.raises(ValueError, match=r"start it with --enable-return-routed-experts, or set .* to none"):
        open_engine(fake)


def test_a_policy_without_mixtures_is_refused(fake: Fake) -> None:
    with pytest.raises(ValueError, match="routing_replay = experts: the policy has no mixture of experts"):
        open_engine(fake, "qwen3")
    assert not fake.seen
