"""What of the vLLM engine needs no vLLM: seeds, memory, refusals."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from policy.checkpoint import save_config
from rollout.config import RolloutConfig
from rollout.request import Request, SamplingParams
from rollout.sample_seed import sample_seed
from rollout.vllm_engine.engine import VllmEngine
from rollout.vllm_engine.launch import max_sequence, refuse_unserved
from rollout.vllm_engine.samples import Drawn, Sample
from tests.policy.tiny import family_config, make_config

ASKED = Request(3, np.array([5, 6]), 4, SamplingParams(8), seed=7, step=1, prompt=2)


def test_every_part_of_the_address_makes_another_seed() -> None:
    others = [replace(ASKED, seed=8), replace(ASKED, step=2), replace(ASKED, prompt=1), replace(ASKED, seed=2**64 - 1)]
    seeds = [sample_seed(ASKED, sample) for sample in range(4)] + [sample_seed(other, 0) for other in others]
    assert len(set(seeds)) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    # Of the address alone: not of the request's id, nor of how many samples it has.
    assert sample_seed(replace(ASKED, request_id=9, num_samples=1), 0) == seeds[0]
    assert seeds[0] == 2506821900172027675


def test_a_completion_has_what_was_asked_for_and_no_more() -> None:
    plain = Sample(ASKED, 1)
    plain.append(Drawn(4, -0.5), 2)
    plain.append(Drawn(9, -1.5), 3)
    done = plain.finish("stop")
    assert (done.request_id, done.sample, done.finish_reason) == (3, 1, "stop")
    assert done.token_ids.tolist() == [4, 9] and done.policy_versions.tolist() == [2, 3]
    assert done.log_probs.tolist() == [-0.5, -1.5] and done.log_probs.dtype == np.float32
    assert done.full_log_probs is done.top_token_ids is done.processed_log_probs is None
    assert len(Sample(ASKED, 0).finish("abort").token_ids) == 0


def test_the_longest_sequence_is_what_positions_and_memory_allow() -> None:
    config = family_config("qwen3")  # 3 layers, 2 key-value heads of 16: 768 bytes a token in FP32, 96 KiB a block
    assert max_sequence(config, torch.float32, RolloutConfig(memory_mb=1)) == 96  # its positions
    long = replace(config, max_position_embeddings=10**6)
    assert max_sequence(long, torch.float32, RolloutConfig(memory_mb=1)) == 9 * 128  # 10 blocks, one of them unused
    assert max_sequence(long, torch.bfloat16, RolloutConfig(memory_mb=1)) == 20 * 128
    wide = replace(config, head_dim=2048)
    with pytest.raises(ValueError, match=r"memory_mb = 1: .* at least 24 MiB"):
        max_sequence(wide, torch.float32, RolloutConfig(memory_mb=1))


def test_ring_linear_needs_our_operators() -> None:
    with pytest.raises(ValueError, match=r"set rollout\.vllm_aligned=true, or rollout\.engine=local"):
        refuse_unserved(make_config())
    refuse_unserved(family_config("llama"))


def test_without_vllm_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", None)
    save_config(tmp_path, family_config("qwen3"), "float32", None)
    with pytest.raises(ValueError, match=r"vLLM cannot be imported .* pip install '\.\[vllm\]'"):
        VllmEngine(family_config("qwen3"), tmp_path, torch.float32, RolloutConfig(engine="vllm"), torch.device("cpu"))
