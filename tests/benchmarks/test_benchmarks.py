"""The benchmarks: what they count and compare, and that they run."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import common, engine, record, trainer
from policy.config import PolicyConfig
from policy.transformer import Policy

# Layer 0: lightning attention, dense. Layer 1: softmax attention, experts.
TINY = PolicyConfig(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=2,
    layer_group_size=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=10,
    num_experts=4,
    moe_intermediate_size=3,
    moe_shared_expert_intermediate_size=5,
    chunk_size=16,
)


def test_step_flops_by_hand() -> None:
    layer_0 = 8 * (16 + 32 + 16 + 16) + 3 * 8 * 10  # q, k and v, output, gate; feed-forward
    layer_1 = 8 * (16 + 16 + 16) + 3 * 8 * (2 * 3 + 5) + 8 * 4  # q, k and v, output; two experts and the shared; router
    lightning = 2 * 16 * 8 * (2 * (16 + 16 + 8) + 8)  # 2 tiles: scores, values, state read; 1 full: state written
    softmax = 2 * 3 * (16 * 16 * 8 + 16 * 16 * 8)  # tile 0 sees one block, tile 1 two
    forward = 24 * (layer_0 + layer_1) + 8 * 16 * 8 + lightning + softmax
    assert trainer.step_flops(TINY, trainer.Load(samples=1, prompt=16, completion=8)) == 3 * 2 * forward == 513408


def test_step_flops_grow_with_the_samples() -> None:
    one, three = (trainer.step_flops(TINY, trainer.Load(samples=count)) for count in (1, 3))
    assert three == 3 * one


def test_trainer_benchmark_measures_a_step_against_a_product(monkeypatch) -> None:
    monkeypatch.setattr(trainer, "PEAK_SHAPE", (8, 16, 16))
    result = trainer.measure(TINY, torch.float32, trainer.QUICK)
    achieved, peak = result["step_flop_per_second"], result["peak_flop_per_second"]
    assert len(achieved["runs"]) == len(peak["runs"]) == trainer.QUICK.repeats
    assert result["ratio"] == achieved["median"] / peak["median"] > 0


def test_engine_benchmark_generates_equal_token_counts_on_both_sides() -> None:
    load = engine.Load(batch=2, prompt=3, new_tokens=4, repeats=1)
    result = engine.measure(TINY, torch.float32, load)
    assert result["lockstep"]["parameters"] == Policy(TINY, torch.float32).num_parameters()
    our_rate, their_rate = (result[side]["tokens_per_second"]["median"] for side in ("lockstep", "transformers"))
    assert result["ratio"] == our_rate / their_rate > 0


def test_the_compared_networks_have_equal_widths() -> None:
    ours = common.ring_10m_config()
    theirs = engine.qwen3_config(ours)
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    ):
        assert getattr(theirs, name) == getattr(ours, name)
    experts = ours.num_experts_per_tok * ours.moe_intermediate_size + ours.moe_shared_expert_intermediate_size
    assert experts == theirs.intermediate_size
    assert 9e6 < Policy(ours, torch.bfloat16).num_parameters() < 11e6


def test_quickstart_shape_is_the_recipe() -> None:
    config = common.quickstart_config()
    assert (config.vocab_size, config.hidden_size, config.num_experts, config.chunk_size) == (512, 128, 8, 16)


def test_rates_and_turns() -> None:
    assert common.rates(12.0, [2.0, 3.0, 12.0]) == {"median": 4.0, "runs": [6.0, 4.0, 1.0]}
    order: list[str] = []
    seconds = common.alternate(lambda: order.append("a"), lambda: order.append("b"), 2)
    assert order == ["a", "b"] * 3
    assert [len(side) for side in seconds] == [2, 2]


def test_result_says_where_it_is_from(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/engine.py", "--quick"])
    path = common.write_result(Namespace(out=tmp_path / "new", quick=True), "engine", {"ratio": 1.5})
    written = json.loads(path.read_text())
    assert path == tmp_path / "new" / "engine.json"
    assert (written["ratio"], written["command"]) == (1.5, "python -m benchmarks.engine --quick")
    assert {"date", "commit", "device", "versions", "quick"} < set(written)
    assert written["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_commit_is_marked_dirty(monkeypatch) -> None:
    answers = {"rev-parse": "abc123", "status": " M ops/linear.py"}
    monkeypatch.setattr(record, "output", lambda _, command, *options: answers[command])
    assert record.commit() == "abc123-dirty"
    answers["status"] = ""
    assert record.commit() == "abc123"


@pytest.mark.parametrize("command", [["no-such-program"], ["git", "no-such-command"]])
def test_a_command_that_fails_says_nothing(command: list[str]) -> None:
    assert record.output(*command) == ""
