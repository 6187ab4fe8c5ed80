"""The trainer on the real network: packing moves no bit, and a resumed run is the same run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from policy.config import PolicyConfig
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
