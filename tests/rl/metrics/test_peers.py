"""Names and definitions of other systems: the golden values with their printed digits, and the traps."""

import math

import numpy as np
import pytest

from rl.metrics.pairs import Pairs
from rl.metrics.peers import PEERS, nemo_rl, openrlhf, peer_metrics, prime_rl, skyrl, slime, tinker, trl
from rl.metrics.verl import Weighting, verl, verl_2026_01, verl_rejection
from tests.rl.metrics.golden import golden, golden_and_masked, printed

SEQUENCE = Weighting(level="sequence", batch_normalize=True)
ICEPOP = Weighting(lower=0.5)


def rollout_corr(values: dict[str, float], *names: str) -> list[str]:
    return printed(values, *(f"rollout_corr/{name}" for name in names))


def test_verl_off_policy_metrics() -> None:
    for published in (verl, verl_2026_01):
        values = published(golden())
        assert rollout_corr(values, "kl", "k3_kl", "chi2_token", "chi2_seq", "ppl_ratio") == (
            ["0.058333", "0.251879", "1.006075", "0.047325", "1.018578"]
        )
        assert rollout_corr(values, "training_ppl", "rollout_ppl", "log_ppl_abs_diff") == (
            ["4.167725", "4.060270", "0.156250"]
        )
        # Means of a are -1.5625 and -1.25, of b -1.4 and -1.4.
        assert rollout_corr(values, "training_log_ppl", "rollout_log_ppl") == ["1.406250", "1.400000"]
        assert rollout_corr(values, "log_ppl_diff", "log_ppl_diff_max", "log_ppl_diff_min") == (
            ["0.006250", "0.162500", "-0.150000"]
        )


def test_verl_weights_mean_other_things_in_its_two_publications() -> None:
    names = ("rollout_is_mean", "rollout_is_eff_sample_size", "rollout_is_std")
    assert rollout_corr(verl(golden()), *names) == ["1.073832", "0.800089", "0.536766"]
    assert rollout_corr(verl_2026_01(golden()), *names) == ["1.193545", "0.850635", "0.469312"]
    assert verl(golden())["rollout_corr/rollout_is_max"] == 2.0
    assert verl_2026_01(golden())["rollout_corr/rollout_is_max"] == pytest.approx(math.e)


def test_verl_icepop() -> None:
    names = ("rollout_is_mean", "rollout_is_eff_sample_size", "rollout_is_oob_ratio")
    assert rollout_corr(verl(golden(), ICEPOP), *names) == ["0.703310", "0.645525", "0.333333"]


def test_verl_sequence_weights_and_batch_normalisation() -> None:
    applied = SEQUENCE.applied(golden())
    assert [f"{weight:.6f}" for weight in applied] == ["0.522046"] * 4 + ["1.349859"] * 2
    values = verl(golden(), Weighting(batch_normalize=True))
    assert rollout_corr(values, "rollout_is_batch_norm_factor") == ["1.073832"]
    # In sequence level a sequence counts once: (0.522046 + 1.349859) / 2.
    assert rollout_corr(verl(golden(), SEQUENCE), "rollout_is_batch_norm_factor") == ["0.935952"]


def test_verl_sequence_extremes_are_of_the_raw_product() -> None:
    values = verl(golden(), Weighting(level="sequence", upper=1.2))
    assert rollout_corr(values, "rollout_is_max", "rollout_is_min", "rollout_is_seq_max") == (
        ["1.349859", "0.522046", "1.200000"]
    )
    shares = verl(golden(), Weighting(level="sequence", upper=1.5))
    assert shares["rollout_corr/rollout_is_ratio_fraction_high"] == 0.0
    assert shares["rollout_corr/rollout_is_ratio_fraction_low"] == 0.5
    assert values["rollout_corr/rollout_is_seq_fraction_high"] == 0.5


def test_verl_debug_metrics_are_of_probabilities() -> None:
    values = verl(golden())
    names = ("max", "mean", "std")
    assert printed(values, *(f"training/rollout_probs_diff_{name}" for name in names)) == (
        ["0.383400", "0.095069", "0.142575"]
    )
    assert printed(values, "training/rollout_actor_probs_pearson_corr") == ["0.879505"]


def test_verl_rejection() -> None:
    keep, fractions = verl_rejection(golden(), "token_k1,seq_mean_k3", "0.5_2.0,0.2")
    assert keep.tolist() == [False] * 4 + [True] * 2
    assert rollout_corr(fractions, "rollout_rs_masked_fraction", "rollout_rs_seq_masked_fraction") == (
        ["0.666667", "0.500000"]
    )


@pytest.mark.parametrize(
    ("options", "thresholds", "kept"),
    [
        # k1 = -d bounds rollout over train: 1.5 is above log 4, -1.0 is not below log 0.25.
        ("token_k1", "0.25_4.0", [1, 1, 1, 0, 1, 1]),
        # One number U means [1/U, U].
        ("token_k1", "2.0", [1, 1, 0, 0, 1, 1]),
        # The other way round as asymmetric bounds read: only d <= 0.1 and d >= -2.
        ("token_k1", "0.9048_8.0", [1, 1, 0, 1, 1, 0]),
        ("seq_sum_k1", "0.8_1.2", [0, 0, 0, 0, 0, 0]),
        ("seq_sum_k1", "0.7_2.0", [1, 1, 1, 1, 1, 1]),
        ("seq_mean_k1", "0.9_2.0", [1, 1, 1, 1, 0, 0]),
        # d^2 / 2 is at most 1.125 in the first sequence and 0.045 in the second.
        ("seq_max_k2", "1.0", [0, 0, 0, 0, 1, 1]),
        ("token_k2", "0.5", [1, 1, 1, 0, 1, 1]),
    ],
)
def test_verl_rejection_by_hand(options: str, thresholds: str, kept: list[int]) -> None:
    assert verl_rejection(golden(), options, thresholds)[0].tolist() == [bool(each) for each in kept]


def test_a_sequence_with_an_empty_mask_counts_in_verl_as_perplexity_1_and_weight_0() -> None:
    values, without = verl(golden_and_masked()), verl(golden())
    by_sequence = {"training_ppl": 1.0, "training_log_ppl": 0.0, "chi2_seq": 0.0, "rollout_is_seq_mean": 0.0}
    for name, counted in by_sequence.items():
        expected = (2 * without[f"rollout_corr/{name}"] + counted) / 3
        assert values[f"rollout_corr/{name}"] == pytest.approx(expected, rel=1e-12)
    assert values["rollout_corr/kl"] == without["rollout_corr/kl"]
    assert values["rollout_corr/rollout_is_seq_min"] == 0.0


def test_slime_averages_within_a_sequence_first() -> None:
    values = slime(golden())
    names = ("mis_kl", "mis_k3_kl", "mis_chi2_token", "mis_chi2_seq", "mis_ppl_ratio", "mis_log_ppl_abs_diff")
    assert printed(values, *(f"train/{name}" for name in names)) == (
        ["0.006250", "0.195141", "0.857321", "0.047325", "1.018578", "0.156250"]
    )
    assert printed(values, "train/train_rollout_logprob_abs_diff") == ["0.418750"]
    assert printed(values, "train/mis_training_ppl", "train/mis_rollout_ppl") == ["4.167725", "4.060270"]
    # One of the first sequence's four ratios, e, is above 2, none of the second's two.
    assert values["train/mis_tis_truncate_fraction"] == values["train/tis_clipfrac"] == 0.125


def test_a_sequence_with_an_empty_mask_counts_in_slime_as_0_everywhere() -> None:
    values, without = slime(golden_and_masked()), slime(golden())
    for name, value in values.items():
        assert value == pytest.approx(2 / 3 * without[name], rel=1e-12), name


def test_log_ratios_are_clamped_only_where_the_system_does() -> None:
    far = Pairs.of([np.array([-1.0])], [np.array([-31.0])])
    assert verl(far)["rollout_corr/chi2_token"] == pytest.approx(math.exp(40), rel=1e-7)
    assert verl(far)["rollout_corr/k3_kl"] == pytest.approx(math.exp(30), rel=1e-7)
    assert slime(far)["train/mis_chi2_seq"] == pytest.approx(math.exp(40), rel=1e-7)
    assert slime(far)["train/tis"] == pytest.approx(math.exp(30), rel=1e-7)


def test_nemo_rl() -> None:
    values = nemo_rl(golden())
    assert printed(values, "train/token_mult_prob_error", "train/gen_kl_error") == ["1.970417", "0.251879"]
    d = golden().log_ratio
    assert values["train/policy_kl_error"] == pytest.approx(np.mean(np.exp(-d) - 1 + d))
    assert values["train/sampling_importance_ratio"] == pytest.approx(1.193545, abs=5e-7)
    # Of one token p = 0.5 against 0.25: the mixture is 0.375.
    single = nemo_rl(Pairs.of([np.log([0.5])], [np.log([0.25])]))
    kls = [ratio - 1 - math.log(ratio) for ratio in (0.5 / 0.375, 0.25 / 0.375)]
    assert single["train/js_divergence_error"] == pytest.approx(sum(kls) / 2)
    assert single["train/approx_entropy"] == pytest.approx(2 * math.log(2))


def test_trl_masks_a_sequence_above_the_cap() -> None:
    values = trl(golden())
    assert printed(values, "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max") == (
        ["0.508333", "1.500000"]
    )
    names = [f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max")]
    assert printed(values, *names) == ["0.522046", "0.935952", "1.349859"]
    assert printed(trl(golden(), cap=1.0), *names) == ["0.000000", "0.261023", "0.522046"]


def test_the_others() -> None:
    assert printed(prime_rl(golden()), "mismatch_kl/all/mean") == ["0.251879"]
    names = [f"policy/rollout_train_logprobs_abs_diff_{name}" for name in ("mean", "max", "min", "std")]
    assert printed(skyrl(golden()), *names) == ["0.508333", "1.500000", "0.000000", "0.605324"]
    assert printed(openrlhf(golden()), "train/vllm_kl") == ["0.058333"]
    assert printed(tinker(golden()), "optim/kl_sample_train_v1", "optim/kl_sample_train_v2") == ["0.058333", "0.281875"]


def test_no_two_systems_give_one_name_to_two_values() -> None:
    """But for verl's two publications, of which a recipe takes one."""
    found = [peer_metrics(golden(), [name]) for name in PEERS if name != "verl-2026-01"]
    assert sum(map(len, found)) == len({name for each in found for name in each})
