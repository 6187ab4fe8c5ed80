"""The trainer on the real network: packing moves no bit, and a resumed run is the same run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ops import ChunkLayout
from policy.config import PolicyConfig
from policy.routing import Routing
from policy.transformer import Policy
from trainer.batch import TrainSample
from trainer.config import TrainerConfig
from trainer.state import load_checkpoint, save_checkpoint
from trainer.trainer import Trainer

CONFIG = PolicyConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    layer_group_size=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=48,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
    num_experts=4,
    max_position_embeddings=128,
    chunk_size=16,
)


def make(seed: int = 0, token_budget: int = 100) -> Trainer:
    policy = Policy(CONFIG, torch.bfloat16)
    policy.initialize(seed)
    return Trainer(policy, TrainerConfig(token_budget=token_budget, learning_rate=0.01, warmup_steps=3), 0.8)


@pytest.fixture(scope="module")
def sequences() -> list[TrainSample]:
    random = np.random.default_rng(1)
    lengths = [(3, 45), (17, 1), (1, 33), (8, 8), (2, 70)]
    return [
        TrainSample(random.integers(0, 40, p + c), p, random.uniform(-4, -3, c).astype(np.float32), random.normal())
        for p, c in lengths
    ]


def test_packing_moves_no_bit_of_a_log_prob(sequences) -> None:
    trainer = make()
    computed = trainer.compute(sequences).log_probs
    for sample, packed in zip(sequences, computed, strict=True):
        (alone,) = trainer.log_probs([sample])
        assert np.array_equal(alone, packed)
        completion = sample.input_ids[sample.prompt_length :]
        assert np.array_equal(trainer.full_log_probs(sample)[np.arange(len(completion)), completion], packed)


def test_every_parameter_has_a_gradient_that_packing_does_not_change(sequences) -> None:
    whole, cut = make(token_budget=1000), make(token_budget=50)
    metrics = [trainer.compute(sequences).metrics for trainer in (whole, cut)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    for (name, one), other in zip(whole.policy.named_parameters(), cut.policy.parameters(), strict=True):
        assert one.grad is not None, name
        assert one.grad.abs().max() > 0, name
        torch.testing.assert_close(other.grad, one.grad, rtol=0.02, atol=1e-3 * one.grad.abs().max().item(), msg=name)


def test_resuming_is_bitwise(sequences, tmp_path: Path) -> None:
    straight = make()
    for step in range(4):
        if step == 2:
            save_checkpoint(tmp_path / "step_000002", straight, {})
        straight.compute(sequences)
        straight.apply()
    resumed = make(seed=1)
    load_checkpoint(tmp_path / "step_000002", resumed)
    for _ in range(2):
        resumed.compute(sequences)
        resumed.apply()
    expected = straight.state_tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_tensors().items())


def test_supervised_steps_lower_the_loss(sequences) -> None:
    trainer = make()
    demonstrations = [(sample.input_ids, sample.prompt_length) for sample in sequences[:2]]
    losses = [trainer.supervised_step(demonstrations)["supervised/loss"] for _ in range(20)]
    assert losses[0] == pytest.approx(np.log(40), rel=0.05)
    assert losses[-1] < 0.7 * losses[0]


def recorded(trainer: Trainer, samples: list[TrainSample], turn: int, with_weights: bool = True) -> list[TrainSample]:
    """With the experts of the trainer's own router, each `turn` further on: 0 is what an aligned engine records."""
    made = []
    for sample in samples:
        routing = Routing()
        layout = ChunkLayout.build([len(sample.input_ids)], CONFIG.chunk_size)
        with torch.no_grad():
            trainer.policy(torch.from_numpy(sample.input_ids), layout, routing=routing)
        experts = (routing.chosen()[:-1].numpy() + np.int16(turn)) % np.int16(CONFIG.num_experts)
        weights = routing.weights()[:-1].numpy() if with_weights else None
        made.append(dataclasses.replace(sample, routed_experts=experts, routed_weights=weights))
    return made


@pytest.mark.parametrize("with_weights", [False, True])
def test_replaying_the_trainers_own_routing_moves_no_bit(sequences, with_weights: bool) -> None:
    plain, replayed = make(), make()
    samples = recorded(plain, sequences, 0, with_weights)
    results = [plain.compute(sequences), replayed.compute(samples)]
    assert results[0].routed_experts == [None] * len(sequences)
    for sample, chosen in zip(samples, results[1].routed_experts, strict=True):
        assert chosen is not None and sample.routed_experts is not None
        assert np.array_equal(chosen, sample.routed_experts)
    for trainer in (plain, replayed):
        trainer.apply()
    expected = plain.state_tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in replayed.state_tensors().items())


def test_packing_moves_no_bit_of_a_replay_and_every_forward_replays(sequences) -> None:
    """Two samples have no record. Those with one have other log-probs than without."""
    trainer = make()
    turned = recorded(trainer, sequences, turn=1)
    samples = [sequences[0], *turned[1:4], sequences[4]]
    result = trainer.compute(samples)
    assert [experts is None for experts in result.routed_experts] == [True, False, False, False, True]
    for sample, packed in zip(samples, result.log_probs, strict=True):
        (alone,) = trainer.log_probs([sample])
        assert np.array_equal(alone, packed)
        completion = sample.input_ids[sample.prompt_length :]
        assert np.array_equal(trainer.full_log_probs(sample)[np.arange(len(completion)), completion], packed)
    differs = [not np.array_equal(*pair) for pair in zip(result.log_probs, trainer.log_probs(sequences), strict=True)]
    assert differs == [False, True, True, True, False]


def test_a_weight_counts_at_its_own_token(sequences) -> None:
    """Token 20 of a prompt of 3 is token 17 of the completion: the record of token 20 tells what predicts the next."""
    trainer = make()
    (sample,) = recorded(trainer, sequences[:1], turn=0)
    assert sample.routed_weights is not None
    weights = sample.routed_weights.copy()
    weights[20] *= np.float32(0.5)
    plain, moved = trainer.log_probs([sample, dataclasses.replace(sample, routed_weights=weights)])
    assert np.array_equal(moved[:18], plain[:18])
    assert moved[18] != plain[18]


def test_samples_without_weights_keep_the_trainers_own(sequences) -> None:
    trainer = make()
    experts, weights = (recorded(trainer, sequences[:2], 1, with_weights) for with_weights in (False, True))
    mixed = trainer.compute([experts[0], weights[1]]).log_probs
    assert np.array_equal(mixed[0], trainer.log_probs(experts)[0])
    assert np.array_equal(mixed[1], trainer.log_probs(weights)[1])
    assert not np.array_equal(mixed[0], trainer.log_probs(weights)[0])


def test_a_record_of_another_policy_is_refused(sequences) -> None:
    trainer = make()
    (sample,) = recorded(trainer, sequences[:1], turn=0)
    assert sample.routed_experts is not None
    for experts in (sample.routed_experts + np.int16(CONFIG.num_experts), sample.routed_experts[:, :, :1]):
        with pytest.raises(ValueError, match="the engine runs another policy"):
            trainer.compute([dataclasses.replace(sample, routed_experts=experts, routed_weights=None)])


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (np.zeros((3, 1, 1), np.int64), r"routed_experts are int64 \[3, 1, 1\] for 4 input_ids"),
        (np.zeros((4, 1, 1), np.int16), r"int16 \[4, 1, 1\] for 4 input_ids"),
        (np.zeros((3, 1, 2), np.int16), "must be different experts"),
        (np.array([[[0, 1]], [[-1, 2]], [[-1, -1]]], np.int16), "or -1 throughout"),
    ],
)
def test_a_record_that_cannot_be_is_refused(experts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSample(np.arange(4), 2, np.zeros(2, np.float32), 1.0, experts)


EXPERTS = np.array([[[0, 1]], [[-1, -1]], [[2, 0]]], np.int16)
WEIGHTS = np.array([[[0.5, 0.5]], [[np.nan, np.nan]], [[0.25, 0.75]]], np.float32)


@pytest.mark.parametrize(
    ("experts", "weights", "message"),
    [
        (None, WEIGHTS, r"float32 \[3, 1, 2\] for routed_experts of None"),
        (EXPERTS, WEIGHTS[:2], r"float32 \[2, 1, 2\] for routed_experts of \[3, 1, 2\]"),
        (EXPERTS, WEIGHTS.astype(np.float64), "float64"),
        (EXPERTS, np.nan_to_num(WEIGHTS), "finite where routed_experts are known, and NaN"),
        (EXPERTS[[0, 2, 2]], WEIGHTS, "finite where routed_experts are known"),
    ],
)
def test_recorded_weights_that_cannot_be_are_refused(experts, weights, message: str) -> None:
    sample = TrainSample(np.arange(4), 2, np.zeros(2, np.float32), 1.0, EXPERTS, WEIGHTS)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(sample, routed_experts=experts, routed_weights=weights)
