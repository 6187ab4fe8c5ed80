"""Our exports in a real vLLM, on the CPU: the folder alone makes it write the greedy tokens of our engine.

vLLM pins much of what it needs, so it lives in an environment of its own and is run there, once for all folders.
"""

import json
import os
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from policy.checkpoint import save_policy
from policy.config import PolicyConfig
from policy.tokenizer import train_tokenizer
from policy.transformer import Policy
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Completion, Request, SamplingParams
from tests.policy.tiny import FIELDS, make_policy

MISSING = (
    "LOCKSTEP_VLLM_PYTHON does not name the Python of an environment with vLLM, so no export was tried there: "
    "`.ci/vllm DIR && export LOCKSTEP_VLLM_PYTHON=DIR/bin/python` makes one, of 3.6 GB"
)
SCRIPT = Path(__file__).with_name("vllm_generate.py")
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
VOCAB, MAX_NEW_TOKENS = 300, 32
ENDS = list(range(12))  # so many tokens end a text that some completions stop
# In place of the tiny policies' own. vLLM has kernels for few head widths; 32 is the least.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "initializer_range": 0.15,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "eos_token_id": ENDS,
}
# On both sides of our chunks of 16 and of vLLM's blocks of 128.
LENGTHS = (1, 7, 16, 33, 64, 100, 128, 150)
# As in test_families.py: at this width and size weights multiply as they do there, but sums have up to 128 terms, so
# that a hidden state is off by sqrt(40 * 128) = 72 u. Twice, as a margin for Llama's attention scores, which no norm
# holds small. Measured: 3.5e-5 for Llama, 0.7e-5 for Qwen3.
LOG_PROB_ERROR = 2 * 72 * 1.7 * 5 * 2**0.5 * 2**-24  # 1.0e-4
Answer = list[tuple[list[int], str, list[float]]]  # by prompt: token ids, finish reason, log-probs


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(len(ENDS), VOCAB, length).tolist() for length in LENGTHS]


@cache
def policy_of(name: str) -> Policy:
    fields = {field: SIZES.get(field, value) for field, value in FIELDS[name].items()}
    return make_policy(PolicyConfig.from_hf(fields | {"lockstep": {"chunk_size": 16}}), torch.float32)


def ours(name: str) -> list[Completion]:
    sampling = SamplingParams(MAX_NEW_TOKENS, temperature=0.0)
    requests = [Request(i, np.array(ids), 1, sampling, 0, full_vocab_samples=(0,)) for i, ids in enumerate(prompts())]
    return Engine(policy_of(name).to_working_dtype(), RolloutConfig(max_batch=8, memory_mb=16)).generate(requests)


def export(name: str, folder: Path) -> None:
    save_policy(folder, policy_of(name))
    train_tokenizer(["one two three"], VOCAB).save_pretrained(folder)


@pytest.fixture(scope="module")
def vllm() -> str:
    """The Python of the environment that has it."""
    python = os.environ.get("LOCKSTEP_VLLM_PYTHON")
    if not python and os.environ.get("CI") != "true":
        pytest.skip(MISSING)
    assert python, MISSING
    return python


@pytest.fixture(scope="module")
def theirs(vllm: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    root = tmp_path_factory.mktemp("vllm")
    for name in FIELDS:
        export(name, root / name)
    job, answer = root / "job.json", root / "answer.json"
    folders = [str(root / name) for name in FIELDS]
    job.write_text(json.dumps({"folders": folders, "prompts": prompts(), "max_new_tokens": MAX_NEW_TOKENS}))
    environment = os.environ | SETTINGS | {"VLLM_CACHE_ROOT": str(root), "VLLM_CONFIG_ROOT": str(root)}
    command = [vllm, "-I", str(SCRIPT), str(job), str(answer)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return dict(zip(FIELDS, json.loads(answer.read_text()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_vllm_writes_the_greedy_tokens_of_our_engine(theirs: dict[str, Answer], name: str) -> None:
    completions = ours(name)
    for completion, (token_ids, finish_reason, log_probs) in zip(completions, theirs[name], strict=True):
        assert lead_of_the_best(completion) > 2 * LOG_PROB_ERROR  # so that it is the best in both
        assert (completion.token_ids.tolist(), completion.finish_reason) == (token_ids, finish_reason)
        assert np.abs(completion.log_probs - np.array(log_probs)).max() < LOG_PROB_ERROR
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    assert len({token for completion in completions for token in completion.token_ids}) > 20


def lead_of_the_best(completion: Completion) -> float:
    """The least, over the tokens, of the distance to the second best."""
    assert completion.full_log_probs is not None
    second, best = np.sort(completion.full_log_probs)[:, -2:].T
    return float((best - second).min())
