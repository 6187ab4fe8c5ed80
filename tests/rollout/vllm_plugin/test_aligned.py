"""Our policy in a real vLLM: it samples what the local engine does, and the trainer computes the same, bit for bit."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

import ops
from policy.checkpoint import save_policy
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Completion, Request
from rollout.vllm_engine.launch import ENVIRONMENT
from tests.policy.tiny import make_policy
from tests.rollout.vllm_engine.tiny import (
    config_of,
    open_engine,
    policy_of,
    prompt,
    request,
    reset_groups,
    trainer_rows,
    watch,
    weights,
)

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
FAMILIES = ("ring_linear", "qwen3", "qwen3_moe_mixed", "llama_scaled")
# Prompt lengths on both sides of chunks of 16, with what is asked of the draws.
ASKED: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (15, {"temperature": 0.7}),
    (16, {"temperature": 1.3, "top_p": 0.8, "processed_log_probs": True}),
    (33, {"top_k": 5, "top_log_probs": 3}),
    (100, {"temperature": 0.0}),
    (150, {"min_p": 0.05, "min_new_tokens": 20}),
    (200, {"stop_token_ids": tuple(range(12, 40))}),
]
PREFILL = 64  # tokens of a step, so that prompts are cut


def asked() -> list[Request]:
    return [request(index, length, 1 + index % 3, **limits) for index, (length, limits) in enumerate(ASKED)]


def replay_of(family: str) -> Literal["none", "weights"]:
    """Routes with their weights, where there are mixtures."""
    return "weights" if family in ("ring_linear", "qwen3_moe_mixed") else "none"


def local_engine(family: str, dtype: torch.dtype) -> Engine:
    policy = make_policy(config_of(family), dtype).to_working_dtype()
    return Engine(policy, RolloutConfig(memory_mb=32, routing_replay=replay_of(family)))


def differing_fields(ours: list[Completion], theirs: list[Completion]) -> Iterator[str]:
    for left, right in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(Completion):
            values = getattr(left, field.name), getattr(right, field.name)
            if type(values[0]) is not type(values[1]) or not np.array_equal(*values):
                yield f"{field.name} of {left.request_id}, sample {left.sample}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_the_local_engines_and_rows_the_trainers(family: str, dtype: torch.dtype) -> None:
    theirs = open_engine(
        family, dtype, vllm_aligned=True, max_batch=6, prefill_tokens=PREFILL, routing_replay=replay_of(family)
    )
    ours = local_engine(family, dtype)
    for version in (0, 1):
        for engine in (ours, theirs):
            engine.load_weights(weights(family, version, dtype), version)
        assert ours.weights_digest() == theirs.weights_digest()
        completions = theirs.generate(asked())
        assert list(differing_fields(ours.generate(asked()), completions)) == []
        assert {each.finish_reason for each in completions} == {"stop", "length"}
        for each in completions:
            rows = trainer_rows(policy_of(family, version, dtype), asked()[each.request_id], each)
            assert np.array_equal(each.full_log_probs, rows)
            assert (each.routed_weights is not None) == (replay_of(family) == "weights")


@pytest.mark.parametrize("family", ["ring_linear", "qwen3"])
def test_bits_stay_where_a_prefix_is_cached_and_where_memory_runs_out(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler

    replay = replay_of(family)
    engine = open_engine(family, vllm_aligned=True, memory_mb=1, prefill_tokens=PREFILL, routing_replay=replay)
    ours = local_engine(family, torch.float32)
    for each in (ours, engine):
        each.load_weights(weights(family), 0)
    preempted = watch(monkeypatch, Scheduler, "_preempt_request")
    known = watch(monkeypatch, KVCacheManager, "get_computed_blocks")
    crowd = [request(index, 30, 5, max_new_tokens=150, min_new_tokens=150) for index in range(2)]
    for requests in (crowd, [request(2, 200)], [request(2, 200)]):
        assert list(differing_fields(ours.generate(requests), engine.generate(requests))) == []
    assert preempted
    assert known[-1][1] >= 128


def test_samples_that_run_go_on_under_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was cached is computed again, so the tokens after an update are those of a whole forward."""
    engine = open_engine("ring_linear", vllm_aligned=True)
    asked_for = [request(0, 40, 2, max_new_tokens=30, min_new_tokens=30)]
    engine.load_weights(weights("ring_linear", 0), 0)
    steps, step = iter(range(1000)), engine._step

    def update_once() -> None:
        if next(steps) == 10:
            engine.load_weights(weights("ring_linear", 1), 1)
        step()

    monkeypatch.setattr(engine, "_step", update_once)
    completions = engine.generate(asked_for)
    for each in completions:
        rows = trainer_rows(policy_of("ring_linear", 1), asked_for[0], each)
        new = each.policy_versions == 1
        assert 0 < new.sum() < 30
        assert np.array_equal(each.full_log_probs[new], rows[new])
        assert (each.full_log_probs[~new] != rows[~new]).any(axis=1).all()


@pytest.mark.parametrize("family", ["ring_linear", "qwen3"])
def test_in_vllm_alone_raw_logits_are_the_trainers_log_probs(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights come from the folder, at start-up and in an update; vLLM draws."""
    for name, value in ENVIRONMENT.items():  # vLLM reads it when it is imported
        monkeypatch.setenv(name, value)
    from vllm import LLM, SamplingParams

    from rollout.vllm_plugin import ALIGNED_CLASS, register

    register()
    for version in (0, 1):
        save_policy(tmp_path / str(version), policy_of(family, version))
    reset_groups()
    llm = LLM(
        str(tmp_path / "0"), hf_overrides={} if family == "ring_linear" else {"architectures": [ALIGNED_CLASS]},
        dtype="float32", enforce_eager=True, kv_cache_memory_bytes=16 << 20, logprobs_mode="raw_logits",
        skip_tokenizer_init=True, max_num_batched_tokens=160, generation_config="vllm",
    )  # fmt: skip
    prompts = [prompt(length, length).tolist() for length in (3, 60, 200)]
    for version in (0, 1):
        if version:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path / "1")})
            llm.reset_prefix_cache()
        sampling = SamplingParams(max_tokens=20, logprobs=0, ignore_eos=True, detokenize=False)
        for answer in llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False):
            ids, entries = list(answer.outputs[0].token_ids), answer.outputs[0].logprobs
            recorded = np.float32([entry[token].logprob for entry, token in zip(entries, ids, strict=True)])
            assert np.array_equal(recorded, forward_log_probs(family, version, answer.prompt_token_ids, ids))


@torch.no_grad()
def forward_log_probs(family: str, version: int, prompt_ids: list[int], ids: list[int]) -> np.ndarray:
    policy, sequence = policy_of(family, version), torch.tensor([*prompt_ids, *ids])
    layout = ops.ChunkLayout.build([len(sequence) - 1], policy.config.chunk_size)
    hidden = policy(sequence[:-1], layout)[len(prompt_ids) - 1 :]
    log_probs: np.ndarray = policy.log_probs(hidden, sequence[len(prompt_ids) :], 1.0)[0].numpy()
    return log_probs


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    engine = open_engine("qwen3", vllm_aligned=True)
    model = engine._llm.apply_model(lambda model: model)[0]
    given = weights("qwen3") | {"model.norm.weight": torch.ones(7)}
    del given["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing lm_head\.weight; model\.norm\.weight has shape \[7\], not \[128\]"):
        model.load_weights(given.items())


@pytest.mark.parametrize(
    ("processes", "dtype", "message"),
    [(2, torch.bfloat16, "2 processes for one engine"), (1, torch.float16, "dtype torch.float16: .* bfloat16 or")],
)
def test_what_the_policy_is_not_built_for_is_refused(processes: int, dtype: torch.dtype, message: str) -> None:
    from rollout.vllm_plugin.model import SoftmaxModel

    parallel, model = SimpleNamespace(world_size=processes), SimpleNamespace(dtype=dtype)
    with pytest.raises(ValueError, match=message):
        SoftmaxModel(vllm_config=SimpleNamespace(parallel_config=parallel, model_config=model))
