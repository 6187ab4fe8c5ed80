"""Which decay convention fits: a text that a policy wrote itself tells, if it is long enough."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ops
from policy.checkpoint import load_policy, read_config, save_policy
from policy.transformer import Policy
from rl.base_policy import made_config
from rl.compare_decay import Fit, chunk_length, compare_decay, score_both
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Request, SamplingParams
from tests.policy.chat import chat_tokenizer
from tests.policy.tiny import make_config, make_policy
from tests.rl.command import lockstep, refusal
from tests.rl.tiny import tiny_recipe

LENGTH, CHUNKS = 80, 64


def write(folder: Path, decay_layer_index: str) -> Path:
    save_policy(folder, make_policy(make_config(decay_layer_index=decay_layer_index), torch.float32))
    return folder


@pytest.mark.parametrize("convention", ["engine", "hf"])
def test_a_policys_own_words_fit_its_own_convention(tmp_path: Path, convention: str) -> None:
    folder = write(tmp_path, convention)
    engine = Engine(load_policy(folder).to_working_dtype(), RolloutConfig(max_batch=CHUNKS, memory_mb=64))
    sampling = SamplingParams(LENGTH - 1)
    texts = engine.generate([Request(0, np.array([1]), CHUNKS, sampling, seed=0)])
    ids = [token for text in texts if len(text.token_ids) == LENGTH - 1 for token in (1, *text.token_ids.tolist())]
    fit = score_both(folder, ids, LENGTH)
    assert (fit.verdict, fit.left_over, fit.tokens) == (convention, 0, LENGTH - 1)
    assert (fit.difference > 0) == (convention == "engine")


def test_the_rule_by_hand() -> None:
    """Differences 1, 2, 3, 2: mean 2, standard deviation sqrt(2/3), standard error sqrt(1/6) = 0.408."""
    engine, hf = np.array([4.0, 4.0, 4.0, 4.0]), np.array([5.0, 6.0, 7.0, 6.0])
    fit = Fit((engine, hf), 31, 0)
    assert fit.difference == 2.0 and fit.error == pytest.approx(0.408248, abs=1e-6) and fit.verdict == "engine"
    assert Fit((hf, engine), 31, 0).verdict == "hf"
    assert Fit((engine, engine), 31, 0).verdict == "undecided"
    # Mean 2, standard deviation sqrt(8/3), error 0.816: 2.4 standard errors.
    assert Fit((engine, np.array([4.0, 6.0, 8.0, 6.0])), 31, 0).verdict == "undecided"


def test_a_policy_is_scored_by_its_own_log_probs(tmp_path: Path) -> None:
    folder = write(tmp_path, "engine")
    ids = torch.randint(0, 50, (8 * 32 + 5,)).tolist()
    fit = score_both(folder, ids, 32)
    assert (len(fit.losses[0]), fit.tokens, fit.left_over) == (8, 31, 5)
    policy = make_policy(make_config(), torch.float32)
    hidden = policy(torch.tensor(ids[32:64]), ops.ChunkLayout.build([32], 16))
    rows = policy.full_log_probs(hidden, 1.0)
    expected = -np.mean([rows[place, ids[32 + place + 1]].item() for place in range(31)])
    assert fit.losses[0][1] == pytest.approx(expected, rel=1e-6)
    assert (fit.losses[1] != fit.losses[0]).all()


@pytest.mark.parametrize(("tokens", "positions", "length"), [(10**6, 4096, 2048), (10**6, 512, 512), (800, 512, 100)])
def test_length_of_a_chunk(tokens: int, positions: int, length: int) -> None:
    assert chunk_length(tokens, positions, Path("t.txt")) == length


def test_the_command_says_which_and_by_how_much(tmp_path: Path) -> None:
    config = replace(make_config(), vocab_size=300)
    save_policy(tmp_path, make_policy(config, torch.float32))
    chat_tokenizer(None).save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("a short text of no sense at all, again and again " * 20)
    result = lockstep("eval", tmp_path, "--compare-decay", text)
    assert result.exit_code == 0, result.output
    assert (
        f"{text}: 10 chunks, 95 tokens scored in each; the last 20 tokens fill none and are left out" in result.stdout
    )
    assert "engine: perplexity per token " in result.stdout and "hf - engine: " in result.stdout
    assert ("fits, " in result.stdout) != ("undecided: " in result.stdout)
    text.write_text("too short")
    assert "9 tokens; the comparison needs 8 chunks of at least 32" in refusal(
        "eval", tmp_path, "--compare-decay", text
    )
    assert "cannot be read as UTF-8" in refusal("eval", tmp_path, "--compare-decay", tmp_path / "none.txt")
    both = refusal("eval", tmp_path, "--compare-decay", text, "--data", "synthetic")
    assert both == refusal("eval", tmp_path) and both.startswith("give either --data ")


def test_a_family_without_decay(tmp_path: Path) -> None:
    fields = '"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16'
    fields += ', "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "eos_token_id": 0'
    (tmp_path / "config.json").write_text(f'{{"model_type": "qwen3", {fields}}}')
    with pytest.raises(ValueError, match="a qwen3 policy has no lightning layers, so no decay to compare"):
        compare_decay(tmp_path, tmp_path / "t.txt")


def test_the_recipe_chooses_and_the_export_says(tmp_path: Path) -> None:
    config = made_config(tiny_recipe(tmp_path, "policy.decay_layer_index=hf"), 300, 0)
    assert config.decay_layer_index == "hf"
    assert made_config(tiny_recipe(tmp_path), 300, 0).decay_layer_index == "engine"
    policy = Policy(config, torch.float32)
    policy.initialize(0)
    save_policy(tmp_path / "out", policy)
    assert read_config(tmp_path / "out").decay_layer_index == "hf"
    assert read_config(tmp_path / "out", decay_layer_index="engine").decay_layer_index == "engine"
    assert load_policy(tmp_path / "out", decay_layer_index="engine").config == replace(
        config, decay_layer_index="engine"
    )
