"""The benchmarks: what they count and compare, and that they run."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ops
from benchmarks import common, decode_step, engine, group, long_context, record, trainer
from ops.sampling import sample
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


def test_engine_benchmark_takes_turns_and_compares_round_by_round() -> None:
    load = engine.Load(batch=2, prompt=3, new_tokens=4, repeats=1)
    result = engine.measure(TINY, engine.dense_twin(TINY), torch.float32, load)
    assert result["parameters"]["lockstep"] == Policy(TINY, torch.float32).num_parameters()
    rates = {side: rate["median"] for side, rate in result["tokens_per_second"].items()}
    assert result["ratio"] == {
        "lockstep": 1.0,
        "transformers": pytest.approx(rates["lockstep"] / rates["transformers"]),
    }


def test_the_sides_compute_the_same_policy(tmp_path: Path) -> None:
    load, config = engine.Load(batch=2, prompt=5, new_tokens=1), engine.dense_twin(TINY)
    policy = engine.build(config, torch.float32)
    with engine.others(policy, torch.float32, load, None) as sides:
        side = sides["transformers"]
        assert isinstance(side, engine.TransformersSide)
        with torch.no_grad():
            theirs = side.model(side.prompts).logits.log_softmax(-1)
            layout = ops.ChunkLayout.build([5, 5], config.chunk_size)
            ours = policy.full_log_probs(policy(side.prompts.flatten(), layout), 1.0).view(theirs.shape)
    # Sums of at most 32 terms through 2 layers, values of order 1: far inside 1e-5 in FP32, far outside in another net.
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_compared_networks_have_equal_widths() -> None:
    ours = common.ring_10m_config()
    theirs = engine.dense_twin(ours)
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
    sizes = {"qwen3 10M": 10_491_136, "qwen3 108M": 107_761_920, "ring 9M": 9_184_512}
    assert {n: Policy(c, torch.bfloat16).num_parameters() for n, (c, _) in engine.shapes(quick=False).items()} == sizes


def test_a_step_is_taken_apart_into_all_of_its_time() -> None:
    load = engine.Load(batch=2, prompt=3, new_tokens=4)
    side, replay = engine.LockstepSide(engine.build(TINY, torch.float32), load), ops.Recording.replay
    step = decode_step.take_apart(side.policy, side.generate, load.batch)
    assert step["steps"] == 4
    assert ops.Recording.replay is replay and ops.sample is sample  # what was watched is itself again
    assert all(ms > 0 for ms in {**step["parts"], **step["limits"], **step["memory"]}.values())


def test_long_context_compares_siblings_of_equal_width() -> None:
    load = long_context.Load(longest=128, shortest=64, piece=64, decoded=1)
    hybrid = long_context.hybrid_config(load)
    softmax = replace(hybrid, layer_group_size=1)
    assert [hybrid.is_softmax(i) for i in range(5)] == [False] * 4 + [True]
    assert all(softmax.is_softmax(i) for i in range(5))
    seconds = long_context.measure({"hybrid": hybrid, "softmax": softmax}, load)
    assert [len(times) for side in seconds.values() for times in side.values()] == [2] * 4
    assert long_context.ratios({"softmax": {"decode": [2.0, 3.0]}, "hybrid": {"decode": [1.0, 6.0]}}, "decode") == [
        2,
        0.5,
    ]


@pytest.mark.parametrize(
    ("values", "at"), [([0.5, 1.1, 2.0], 2), ([2.0, 0.9, 1.5], 4), ([1.1, 1.2, 1.3], 1), ([0.9] * 3, None)]
)
def test_crossover_is_where_the_hybrid_stays_faster(values: list[float], at: int | None) -> None:
    assert long_context.crossover([1, 2, 4], values) == at


def test_group_benchmark_measures_the_three_sides_in_turn() -> None:
    seconds = group.measure(TINY, group.Load(prompt=20, group=3, repeats=2))
    assert {name: len(times) for name, times in seconds.items()} == {"one": 2, "group": 2, "alone": 2}


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
