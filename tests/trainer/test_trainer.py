"""Steps of the trainer: what they compute, what they change and when."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from trainer.batch import TrainSample


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.state_tensors().items()}


def unchanged(trainer, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in trainer.state_tensors().items())


def gradients(trainer) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in trainer.policy.parameters()]


def on_policy(trainer, samples: list[TrainSample]) -> list[TrainSample]:
    recorded = zip(samples, trainer.log_probs(samples), strict=True)
    return [dataclasses.replace(sample, rollout_log_probs=log_probs) for sample, log_probs in recorded]


def test_log_probs_are_those_of_each_sequence_by_itself(make_trainer, samples) -> None:
    trainer = make_trainer()
    policy = trainer.policy
    for sample, found in zip(samples, trainer.compute(samples).log_probs, strict=True):
        for offset, log_prob in enumerate(found):
            position = sample.prompt_length + offset
            before = torch.tensor(sample.input_ids[position - 1])
            hidden = policy.embedding(before) + policy.position(torch.tensor(position - 1)) + policy.offset
            logits = policy.lm_head(hidden.tanh() * policy.scale) / 0.7
            assert log_prob == pytest.approx(logits.log_softmax(-1)[sample.input_ids[position]].item(), abs=1e-5)


def test_compute_log_probs_and_full_log_probs_agree(make_trainer, samples) -> None:
    trainer = make_trainer(token_budget=14)
    computed, forward = trainer.compute(samples).log_probs, trainer.log_probs(samples)
    for sample, first, second in zip(samples, computed, forward, strict=True):
        assert np.array_equal(first, second)
        full = trainer.full_log_probs(sample)
        assert full.shape == (sample.completion_length, 11)
        targets = sample.input_ids[sample.prompt_length :]
        np.testing.assert_allclose(full[np.arange(len(targets)), targets], first, atol=1e-5)


def test_on_policy_samples_have_a_ratio_of_exactly_one(make_trainer, samples) -> None:
    trainer = make_trainer(token_budget=14)
    metrics = trainer.compute(on_policy(trainer, samples)).metrics
    assert (metrics["policy/ratio_max"], metrics["policy/approx_kl"], metrics["policy/clip_fraction"]) == (
        1.0,
        0.0,
        0.0,
    )
    assert 0 < metrics["policy/entropy"] <= math.log(11)


def test_entropies_belong_to_the_tokens_of_each_sample(make_trainer, samples) -> None:
    trainer = make_trainer(token_budget=14)
    result = trainer.compute(samples)
    assert [len(each) for each in result.entropies] == [sample.completion_length for sample in samples]
    rows = [trainer.full_log_probs(sample).astype(np.float64) for sample in samples]
    for found, full in zip(result.entropies, rows, strict=True):
        # float32 logits of at most 11 entries: a few roundings of 6e-8 each.
        np.testing.assert_allclose(found, -(np.exp(full) * full).sum(axis=1), atol=1e-5)


def test_loss_of_the_step_is_per_token(make_trainer, samples) -> None:
    trainer = make_trainer()
    result = trainer.compute(on_policy(trainer, samples))
    assert result.tokens == 37
    by_hand = -sum(sample.advantage * sample.completion_length for sample in samples) / 37
    assert result.metrics["policy/loss"] == pytest.approx(by_hand, abs=1e-5)


def test_micro_batches_change_neither_metrics_nor_gradients(make_trainer, samples) -> None:
    whole, cut = make_trainer(token_budget=1000), make_trainer(token_budget=12)
    metrics = [trainer.compute(samples).metrics for trainer in (whole, cut)]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)
    for one, other in zip(gradients(whole), gradients(cut), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_sample_without_signal_is_compared_but_moves_no_gradient(make_trainer, samples) -> None:
    """Its tokens still count in the denominator, so the others' gradients shrink by 37 over the tokens with signal."""
    both, alone = make_trainer(), make_trainer()
    silent = [samples[0], *(dataclasses.replace(sample, advantage=0.0) for sample in samples[1:])]
    result = both.compute(silent)
    assert [len(found) for found in result.log_probs] == [sample.completion_length for sample in samples]
    for found, expected in zip(result.log_probs, both.log_probs(samples), strict=True):
        assert np.array_equal(found, expected)
    alone.compute(samples[:1])
    share = samples[0].completion_length / result.tokens
    for one, other in zip(gradients(both), gradients(alone), strict=True):
        torch.testing.assert_close(one, other * share, rtol=0, atol=1e-6)


def test_a_step_without_any_signal_changes_no_weight_and_counts(make_trainer, samples) -> None:
    trainer = make_trainer()
    before = weights(trainer)
    trainer.compute([dataclasses.replace(sample, advantage=0.0) for sample in samples])
    assert trainer.apply()["policy/grad_norm"] == 0.0
    assert unchanged(trainer, before) and trainer.policy_version == 1


def test_same_samples_give_the_same_weights_bit_for_bit(make_trainer, samples) -> None:
    one, other = make_trainer(token_budget=14), make_trainer(token_budget=14)
    for _ in range(3):
        for trainer in (one, other):
            trainer.compute(samples)
            trainer.apply()
    assert unchanged(one, weights(other))


def test_only_apply_changes_weights_and_version(make_trainer, samples) -> None:
    trainer = make_trainer()
    before = weights(trainer)
    trainer.compute(samples)
    assert unchanged(trainer, before)
    assert trainer.policy_version == 0
    metrics = trainer.apply()
    assert not unchanged(trainer, before)
    assert trainer.policy_version == 1
    assert metrics["policy/grad_norm"] > 0
    assert metrics["policy/learning_rate"] == 0.05


def test_the_learning_rate_follows_the_schedule(make_trainer, samples) -> None:
    trainer = make_trainer(warmup_steps=5)
    for rate in (0.01, 0.02):
        trainer.compute(samples)
        assert trainer.apply()["policy/learning_rate"] == pytest.approx(rate)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([rate, rate])


def test_discarded_gradients_leave_no_trace(make_trainer, samples) -> None:
    trainer, fresh = make_trainer(), make_trainer()
    trainer.compute(samples[:3])
    trainer.discard()
    with pytest.raises(AssertionError, match="without compute"):
        trainer.apply()
    for each in (trainer, fresh):
        each.compute(samples)
        each.apply()
    assert unchanged(trainer, weights(fresh))


def test_gradients_of_a_step_are_never_added_to_those_of_another(make_trainer, samples) -> None:
    trainer = make_trainer()
    trainer.compute(samples)
    with pytest.raises(AssertionError, match="discard"):
        trainer.compute(samples)


def test_a_compute_that_raised_leaves_no_trace(make_trainer, samples) -> None:
    trainer, fresh = make_trainer(token_budget=12), make_trainer(token_budget=12)
    out_of_vocabulary = TrainSample.demonstration(np.array([1, 11]), 1)
    with pytest.raises((IndexError, RuntimeError)):
        trainer.compute([*samples, out_of_vocabulary])
    for each in (trainer, fresh):
        each.compute(samples)
    assert all(torch.equal(*pair) for pair in zip(gradients(trainer), gradients(fresh), strict=True))


def test_the_gradient_norm_is_clipped(make_trainer, samples) -> None:
    trainer = make_trainer(clip_grad_norm=1e-3)
    trainer.compute(samples)
    norm = torch.cat([gradient.flatten() for gradient in gradients(trainer)]).norm()
    applied = []
    trainer.optimizer.register_step_pre_hook(lambda *_: applied.extend(gradients(trainer)))
    assert trainer.apply()["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert norm > 1e-2
    assert torch.cat([gradient.flatten() for gradient in applied]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing(make_trainer, samples) -> None:
    trainer = make_trainer()
    trainer.compute(samples)
    trainer.apply()
    before = weights(trainer)
    trainer.compute(samples)
    trainer.policy.scale.grad[2] = math.nan
    with pytest.raises(FloatingPointError, match="gradient norm is nan at step 2; no weight was changed"):
        trainer.apply()
    assert unchanged(trainer, before)
    assert trainer.policy_version == 1


def test_the_policy_moves_towards_what_was_rewarded(make_trainer) -> None:
    trainer = make_trainer()
    good, bad = np.array([1, 2, 3]), np.array([1, 4, 5])
    nothing = np.zeros(2, np.float32)
    for _ in range(20):
        pair = on_policy(trainer, [TrainSample(good, 1, nothing, 1.0), TrainSample(bad, 1, nothing, -1.0)])
        trainer.compute(pair)
        trainer.apply()
    rewarded, punished = trainer.log_probs(pair)
    assert np.exp(rewarded.sum()) > 0.3
    assert np.exp(punished.sum()) < 0.01


def test_supervised_steps_teach_the_completion(make_trainer) -> None:
    trainer = make_trainer()
    demonstrations = [(np.array([1, 2, 3, 4]), 2), (np.array([5, 6, 7]), 1)]
    losses = [trainer.supervised_step(demonstrations)["supervised/loss"] for _ in range(60)]
    assert losses[0] > 1.5
    assert losses[-1] < 0.2
    assert trainer.policy_version == 60
