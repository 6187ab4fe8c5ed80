"""A policy that multiplies in blockwise FP8: both sides quantise alike, so they still agree in every bit (A6)."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import ops
from policy.config import PolicyConfig
from policy.names import export_tensors
from policy.transformer import Policy
from tests.policy import tiny
from tests.rollout.tiny import make_engine, make_request

# Every kind of layer; dimensions that fill the blocks of the quantisation, and (dense) some that do not.
WIDE = {"hidden_size": 128, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 72}
CONFIGS = {
    "hybrid with experts": replace(tiny.make_config(), **WIDE, initializer_range=0.1, fp8_linear=True),
    "dense": replace(tiny.family_config("qwen3"), initializer_range=0.1, fp8_linear=True),
    "softmax with experts": replace(
        tiny.family_config("qwen3_moe"),
        hidden_size=128,
        moe_intermediate_size=64,
        initializer_range=0.1,
        fp8_linear=True,
    ),
}
CASES = pytest.mark.parametrize("name", sorted(CONFIGS))


@cache
def make_policy(name: str, seed: int = 0) -> Policy:
    policy = Policy(CONFIGS[name], torch.bfloat16)
    policy.initialize(seed)
    return policy


def packed(policy: Policy, sequences: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and ids of one training forward."""
    layout = ops.ChunkLayout.build([len(each) for each in sequences], policy.config.chunk_size)
    ids = torch.from_numpy(np.concatenate(sequences))
    return policy(ids, layout), ids


def assert_trainer_agrees(policy: Policy, requests, completions) -> None:
    for completion in completions:
        prompt = requests[completion.request_id].prompt_ids
        hidden, ids = packed(policy, [np.concatenate([prompt, completion.token_ids])])
        rows = torch.arange(len(prompt) - 1, len(ids) - 1)
        log_probs, _ = policy.log_probs(hidden[rows], ids[rows + 1], 1.0)
        assert np.array_equal(log_probs.detach().numpy(), completion.log_probs)


@CASES
@pytest.mark.parametrize("with_gradients", [True, False])
def test_engine_equals_the_training_forward(name: str, with_gradients: bool) -> None:
    policy = make_policy(name)
    requests = [make_request(i, n, 2, 12) for i, n in enumerate((1, 16, 37))]
    engine = make_engine(policy, max_batch=4, prefill_tokens=24)
    with torch.set_grad_enabled(with_gradients):
        assert_trainer_agrees(policy, requests, engine.generate(requests))


@CASES
def test_new_weights_are_quantised_anew(name: str) -> None:
    engine, other = make_engine(make_policy(name), max_batch=4), make_policy(name, seed=1)
    requests = [make_request(0, 20, 2, 12)]
    before = engine.generate(requests)
    engine.load_weights(export_tensors(other), policy_version=1)
    after = engine.generate(requests)
    assert_trainer_agrees(other, requests, after)
    assert not np.array_equal(before[0].log_probs, after[0].log_probs)


@CASES
def test_a_step_in_place_is_seen_by_the_next_forward_without_gradients(name: str) -> None:
    policy = Policy(CONFIGS[name], torch.bfloat16)
    policy.initialize(seed=0)
    with torch.no_grad():
        packed(policy, [np.arange(20)])
        for parameter in policy.parameters():
            parameter.mul_(1.25)
        kept = packed(policy, [np.arange(20)])[0]
    assert torch.equal(kept, packed(policy, [np.arange(20)])[0].detach())


def test_every_weight_learns_in_about_the_direction_of_bf16() -> None:
    """e4m3 rounds every factor by up to 2^-4, about 0.04 in the mean of squares, so a product of two is off by 0.05 of
    its norm, and some ten of them in a row (forward and backward of a few layers) by 0.17: a cosine of 0.98. Half of
    that again for chance; a wrong transposition or scale brings it near 0. (With experts, tokens change theirs.)"""
    fp8 = make_policy("dense")
    plain = Policy(replace(fp8.config, fp8_linear=False), torch.bfloat16)
    plain.load_state_dict(fp8.state_dict())
    gradients = []
    for policy in (fp8, plain):
        hidden, ids = packed(policy, [np.arange(1, 40)])
        targets = policy.log_probs(hidden[:-1], ids[1:], 1.0)[0].sum()
        gradients.append(torch.autograd.grad(targets, list(policy.parameters())))
    for (parameter, _), quantised, exact in zip(fp8.named_parameters(), *gradients, strict=True):
        if exact.norm() > 0:
            cosine = torch.nn.functional.cosine_similarity(quantised.flatten(), exact.flatten(), dim=0)
            assert cosine > 0.97, (parameter, cosine)


@CASES
def test_every_weight_has_a_gradient(name: str) -> None:
    policy = make_policy(name)
    hidden, ids = packed(policy, [np.arange(1, 40)])
    loss = policy.log_probs(hidden[:-1], ids[1:], 1.0)[0].sum()
    for gradient in torch.autograd.grad(loss, list(policy.parameters())):
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_experts_learn_as_in_bf16_at_the_same_place() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((24, 128), (4, 128, 128), (4, 128, 64), (24, 2))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    ids, grad = torch.rand(24, 4, generator=generator).topk(2).indices, torch.randn(24, 128, generator=generator)
    x, gate_up, down, weights = inputs
    found = ops.trained_fp8_experts(x, gate_up, down, ids, weights)
    quantised = [ops.quantize_weight(weight.detach().flatten(0, 1)) for weight in (gate_up, down)]
    assert torch.equal(found, ops.fp8_experts(x.detach(), *quantised, ids, weights.detach(), 4))
    plain = ops.experts(x, gate_up, down, ids, weights, torch.bfloat16)
    for one, other in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True
    ):
        assert torch.equal(one, other) and one.abs().sum() > 0


def test_fp32_is_refused() -> None:
    with pytest.raises(ValueError, match="the working dtype must be bfloat16"):
        Policy(CONFIGS["dense"], torch.float32)


def test_experts_that_share_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="fp8_linear needs hidden_size and 2 x moe_intermediate_size"):
        replace(tiny.make_config(), fp8_linear=True)


def test_the_field_lies_under_our_own_key() -> None:
    fields = CONFIGS["dense"].to_hf("bfloat16")
    assert fields["lockstep"]["fp8_linear"] is True
    assert PolicyConfig.from_hf(fields) == CONFIGS["dense"]
