"""Routing replay: what is recorded, and what a forward does with a record."""

import pytest
import torch
from torch import Tensor

import ops
from policy.routing import UNKNOWN, Routing
from policy.transformer import MoE, Policy
from tests.policy.tiny import VOCAB, family_config, make_policy, shared_policy

IDS = torch.arange(40) * 7 % VOCAB
LENGTHS = (23, 17)


def forward(policy: Policy, routing: Routing | None) -> Tensor:
    layout = ops.ChunkLayout.build(LENGTHS, policy.config.chunk_size)
    return policy(IDS, layout, routing=routing)


@pytest.fixture(params=["bailing_moe_linear", "qwen3_moe_mixed"])
def policy(request) -> Policy:
    if request.param == "bailing_moe_linear":
        return make_policy(shared_policy(torch.bfloat16).config, torch.bfloat16)
    return make_policy(family_config(request.param), torch.bfloat16)


def mixtures(policy: Policy) -> list[MoE]:
    return [block.mlp for block in policy.layers if isinstance(block.mlp, MoE)]


def test_recording_moves_no_bit_and_replaying_the_record_neither(policy: Policy) -> None:
    record = Routing()
    plain, recorded = forward(policy, None), forward(policy, record)
    chosen = record.chosen()
    assert chosen.dtype == torch.int16
    assert chosen.shape == (len(IDS), len(mixtures(policy)), policy.config.num_experts_per_tok)
    replay = Routing(chosen.flip(-1))  # the order of experts does not matter
    assert torch.equal(recorded, plain)
    assert torch.equal(forward(policy, replay), plain)
    assert torch.equal(replay.chosen(), chosen)


def test_what_is_not_known_is_left_to_the_router(policy: Policy) -> None:
    record = Routing()
    plain = forward(policy, record)
    chosen = record.chosen()
    chosen[::2] = UNKNOWN
    assert torch.equal(forward(policy, Routing(chosen)), plain)


def test_other_experts_change_the_tokens_that_see_them(policy: Policy) -> None:
    record = Routing()
    plain = forward(policy, record)
    other = record.chosen().clone()
    other[30] = (other[30] + 1) % policy.config.num_experts
    replayed = Routing(other)
    moved = (forward(policy, replayed) != plain).any(1)
    assert not moved[:30].any(), "tokens before it, and the other sequence"
    assert moved[30:].any()
    assert torch.equal(replayed.chosen()[:, 0], record.chosen()[:, 0]), "the router's own choice is what is reported"


def test_the_gradient_of_a_replay_reaches_the_router(policy: Policy) -> None:
    record = Routing()
    forward(policy, record)
    # One expert of the token is exchanged in the first mixture, for the lowest one that it does not have.
    other = record.chosen().clone()
    missing = next(expert for expert in range(policy.config.num_experts) if expert not in other[5, 0])
    other[5, 0, 0] = missing
    forward(policy, Routing(other))[5].sum().backward()
    gradient = mixtures(policy)[0].gate.weight.grad
    assert gradient is not None
    assert gradient[missing].abs().max() > 0


def gradients(policy: Policy, routing: Routing | None) -> list[Tensor]:
    policy.zero_grad()
    hidden = forward(policy, routing)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return [hidden.detach(), *(weight.grad.clone() for weight in policy.parameters() if weight.grad is not None)]


def test_replaying_the_own_weights_moves_no_bit_of_values_and_gradients(policy: Policy) -> None:
    record = Routing()
    plain = gradients(policy, record)
    experts, weights = record.chosen(), record.weights()
    assert weights.dtype == torch.float32 and weights.shape == experts.shape
    assert not weights.requires_grad
    experts[::3], weights[::3] = UNKNOWN, torch.nan
    for replay in (Routing(experts, weights), Routing(experts.flip(-1), weights.flip(-1))):
        replayed = gradients(policy, replay)
        assert len(plain) == len(replayed)
        assert all(torch.equal(*pair) for pair in zip(plain, replayed, strict=True))


def test_other_weights_change_the_tokens_that_see_them_and_keep_to_their_expert(policy: Policy) -> None:
    record = Routing()
    plain = forward(policy, record)
    experts, weights = record.chosen(), record.weights().clone()
    weights[30] *= torch.linspace(0.5, 1.5, weights.shape[-1])
    moved = forward(policy, Routing(experts, weights))
    assert torch.equal(moved[:30], plain[:30])
    assert not torch.equal(moved[30], plain[30])
    assert torch.equal(forward(policy, Routing(experts.flip(-1), weights.flip(-1))), moved)
    assert not torch.equal(forward(policy, Routing(experts.flip(-1), weights)), moved)


def test_the_weight_of_an_expert_is_the_recorded_one() -> None:
    """What a mixture gives is linear in its weights, and a factor of two rounds nothing."""
    policy = make_policy(family_config("qwen3_moe"), torch.float32)
    mixture, x = mixtures(policy)[0], torch.randn(5, policy.config.hidden_size)
    record = Routing()
    plain = mixture(x, record)
    doubled = mixture(x, Routing(record.chosen(), 2 * record.weights()))
    assert torch.equal(doubled, 2 * plain)


def test_the_gradient_passes_recorded_weights_by(policy: Policy) -> None:
    record = Routing()
    forward(policy, record)
    forward(policy, Routing(record.chosen(), 0.5 * record.weights()))[5].sum().backward()
    gradient = mixtures(policy)[-1].gate.weight.grad
    assert gradient is not None and gradient.abs().max() > 0
