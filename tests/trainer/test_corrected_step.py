"""Corrections in a step of the trainer: which log-probs they see, and what becomes of gradient and metrics."""

import dataclasses

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.trainer.test_trainer import gradients, on_policy, unchanged, weights
from trainer.config import TrainerConfig
from trainer.correction_config import BOUNDS, CorrectionConfig
from trainer.loss import policy_loss


def shifted(trainer, samples, shift: float) -> list:
    """As if the engine had given every token exp(shift) times the trainer's probability."""
    recorded = zip(samples, trainer.log_probs(samples), strict=True)
    return [dataclasses.replace(each, rollout_log_probs=found + np.float32(shift)) for each, found in recorded]


def test_equation_5_has_the_ratio_to_the_record_and_equation_6_to_its_own_past(make_trainer, samples) -> None:
    """The record is half as probable: ratio 2 in Eq. 5. In Eq. 6 the ratio is 1 and the weight may say 2."""
    half = float(np.log(0.5))
    rollout, own, weighed = (
        make_trainer(**config)
        for config in ({}, {"old_log_probs": "recomputed"}, {"correction": {"method": "token_tis", "cap": 10.0}})
    )
    stale = shifted(rollout, samples, half)
    metrics = [trainer.compute(stale).metrics for trainer in (rollout, own, weighed)]
    assert [each["policy/ratio_max"] for each in metrics] == pytest.approx([2.0, 1.0, 1.0], rel=1e-6)
    assert metrics[2]["correction/weight_mean"] == pytest.approx(2.0, rel=1e-6)
    for one, other in zip(gradients(own), gradients(weighed), strict=True):
        torch.testing.assert_close(2 * one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [method for method in BOUNDS if method != "none"])
def test_no_correction_moves_a_bit_where_trainer_and_engine_agree(make_trainer, samples, method: str) -> None:
    plain, corrected = make_trainer(token_budget=14), make_trainer(token_budget=14, correction={"method": method})
    for _ in range(2):
        batch = on_policy(plain, samples)
        for trainer in (plain, corrected):
            trainer.compute(batch)
            trainer.apply()
    assert unchanged(corrected, weights(plain))


def test_a_step_that_masks_all_has_no_gradient_and_no_nan(make_trainer, samples) -> None:
    """In Eq. 5 the ratio of what is masked would overflow."""
    trainer = make_trainer(correction={"method": "geometric_mask"})
    before = [parameter.clone() for parameter in trainer.policy.parameters()]
    result = trainer.compute(shifted(trainer, samples, -200.0))
    assert result.metrics["policy/loss"] == 0.0
    assert result.metrics["correction/sequences_masked"] == len(samples)
    assert trainer.apply()["policy/grad_norm"] == 0.0
    assert all(torch.equal(*pair) for pair in zip(trainer.policy.parameters(), before, strict=True))


def test_masked_tokens_stay_in_the_denominator(make_trainer, samples) -> None:
    """One sequence is recorded so wrongly that it is vetoed: the others' gradients are as if it had no advantage."""
    masked, silent = make_trainer(correction={"method": "none", "veto": 1e-4}), make_trainer()
    batch = on_policy(masked, samples)
    wrong = dataclasses.replace(batch[2], rollout_log_probs=batch[2].rollout_log_probs + np.float32(12.0))
    metrics = masked.compute([*batch[:2], wrong, *batch[3:]]).metrics
    assert metrics["correction/sequences_vetoed"] == 1
    silent.compute([*batch[:2], dataclasses.replace(batch[2], advantage=0.0), *batch[3:]])
    for one, other in zip(gradients(masked), gradients(silent), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_micro_batches_change_nothing(make_trainer, samples) -> None:
    options = {"correction": {"method": "sequence_tis", "veto": 0.01}}
    whole, cut = make_trainer(token_budget=1000, **options), make_trainer(token_budget=12, **options)
    metrics = [trainer.compute(samples).metrics for trainer in (whole, cut)]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)
    for one, other in zip(gradients(whole), gradients(cut), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_weights_are_constants_and_multiply_the_gradient() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    loss_weights = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    loss, _ = policy_loss(log_probs, log_probs.detach(), advantages, 4, 0.2, 0.28, loss_weights)
    loss.backward()
    assert loss.item() == pytest.approx(-(2.0 - 0.5) / 4)
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([-0.5, 0.0, 0.125])


def test_the_correction_can_be_switched_on_between_steps(make_trainer, samples) -> None:
    trainer = make_trainer()
    assert not any(name.startswith("correction/") for name in trainer.compute(samples).metrics)
    trainer.apply()
    trainer.set_correction(CorrectionConfig(method="icepop"))
    assert trainer.compute(samples).metrics["correction/masked_fraction"] > 0


def test_a_ratio_never_counts_twice(make_trainer) -> None:
    with pytest.raises(ValidationError, match="would count twice"):
        TrainerConfig.model_validate({"old_log_probs": "rollout", "correction": {"method": "icepop"}})
    trainer = make_trainer(old_log_probs="rollout", correction={"method": "geometric_mask"})
    with pytest.raises(ValueError, match="set old_log_probs to auto or recomputed"):
        trainer.set_correction(CorrectionConfig(method="token_tis"))
    assert trainer.correction.method == "geometric_mask"
