"""What may be asked: every message says the value got and the rule."""

import math

import numpy as np
import pytest

from rollout.request import Completion, Request, SamplingParams

PROMPT = np.array([3, 1, 4])


def test_greedy_and_whole_distribution_are_valid() -> None:
    params = SamplingParams(max_new_tokens=1, temperature=0.0)
    assert (params.top_p, params.top_k) == (1.0, 0)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("temperature", -0.5, "finite and at least 0"),
        ("temperature", math.inf, "finite and at least 0"),
        ("temperature", math.nan, "finite and at least 0"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.5, "above 0 and at most 1"),
        ("top_p", math.nan, "above 0 and at most 1"),
        ("top_k", -1, "at least 0"),
    ],
)
def test_sampling_params_that_make_no_sense(name: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} = {value}: must be {rule}"):
        SamplingParams(**{"max_new_tokens": 4, name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": PROMPT[:0]}, "prompt length = 0: must be at least 1 token"),
        ({"num_samples": 0}, "num_samples = 0: must be at least 1"),
        ({"seed": -1}, r"seed = -1: must be from 0 to 2\^64 - 1"),
        ({"seed": 2**64}, r"seed = 18446744073709551616: must be from 0 to 2\^64 - 1"),
        ({"step": 2**32}, r"step = 4294967296: must be from 0 to 2\^32 - 1"),
        ({"prompt": -2}, r"prompt = -2: must be from 0 to 2\^32 - 1"),
        ({"full_vocab_samples": (0, 2)}, r"full_vocab_samples = \(0, 2\): must be samples below num_samples"),
    ],
)
def test_requests_that_make_no_sense(fields: dict, message: str) -> None:
    valid = {"request_id": 1, "prompt_ids": PROMPT, "num_samples": 2, "sampling": SamplingParams(4), "seed": 0}
    Request(**valid)
    with pytest.raises(ValueError, match=f"^{message}$"):
        Request(**{**valid, **fields})


def test_an_unstarted_completion_is_an_empty_abort() -> None:
    completion = Completion.unstarted(Request(5, PROMPT, 2, SamplingParams(4), seed=0), sample=1)
    assert (completion.request_id, completion.sample, completion.finish_reason) == (5, 1, "abort")
    for array, dtype in (("token_ids", np.int64), ("log_probs", np.float32), ("policy_versions", np.int64)):
        assert len(getattr(completion, array)) == 0
        assert getattr(completion, array).dtype == dtype
    assert completion.full_log_probs is None
