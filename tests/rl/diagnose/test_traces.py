"""Traces: the same operators with the same bits in training and in decoding, and the first of them that differs."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import ops
from policy import transformer
from policy.transformer import Policy
from rl.diagnose import traces
from rl.diagnose.operators import operator, replace_operators
from rl.diagnose.traces import Trace, first_difference, trace_decoding, trace_training
from tests.rl.diagnose.rig import CONFIG

IDS = np.arange(40, dtype=np.int64) * 7 % 300
PROMPT = 21


@pytest.fixture(scope="module")
def policy() -> Policy:
    made = Policy(CONFIG, torch.bfloat16)
    made.initialize(seed=1)
    return made


def test_training_and_decoding_leave_one_trace(policy: Policy) -> None:
    training = trace_training(policy, IDS, PROMPT, 0.5)
    decoding = trace_decoding(policy, IDS, PROMPT, 0.5)
    assert list(training.outputs) == list(decoding.outputs)
    assert first_difference(training, decoding) is None
    rows = {name: len(parts[0]) for name, parts in training.outputs.items()}
    assert rows.pop("lm_head.log_probs") == len(IDS) - PROMPT
    assert set(rows.values()) == {len(IDS) - 1}


def test_names_say_layer_and_operator(policy: Policy) -> None:
    names = list(trace_training(policy, IDS, PROMPT, 1.0).outputs)
    assert names[:6] == [
        "layers.0.input_layernorm.rms_norm",
        "layers.0.attention.query_key_value.linear",
        "layers.0.attention.qk_norm_rope",
        "layers.0.attention.lightning_attention",
        "layers.0.attention.g_proj.linear",
        "layers.0.attention.grouped_rms_norm_gate",
    ]
    assert {"layers.3.attention.softmax_attention", "layers.2.mlp.route", "layers.2.mlp.experts"} <= set(names)
    assert names[-2:] == ["norm.add_rms_norm", "lm_head.log_probs"]


def test_a_trace_leaves_the_policy_as_it_was(policy: Policy) -> None:
    before = {name: set(vars(module)) for name, module in policy.named_modules()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in policy.modules())
    trace_decoding(policy, IDS, PROMPT, 1.0)
    assert {name: set(vars(module)) for name, module in policy.named_modules()} == before
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in policy.modules()) == 0
    assert vars(transformer)["ops"] is ops


def test_of_long_traces_the_last_rows_are_kept(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trace_training(policy, IDS, PROMPT, 1.0)
    row_bytes = 4 * traces.ROW_WIDTHS * CONFIG.hidden_size * CONFIG.num_hidden_layers
    monkeypatch.setattr(traces, "MAX_TRACE_BYTES", 3 * row_bytes)
    for short in (trace_training(policy, IDS, PROMPT, 1.0), trace_decoding(policy, IDS, PROMPT, 1.0)):
        assert {len(part) for parts in short.outputs.values() for part in parts} == {3}
        assert first_difference(short, whole) is None


def test_the_first_difference_is_measured() -> None:
    ours = Trace({"a": (torch.tensor([[1.0, 2.0], [3.0, 4.0]]),), "b": (torch.tensor([1.0]),)})
    theirs = Trace({"a": (torch.tensor([[1.0, 2.0], [3.5, 4.0]]),), "b": (torch.tensor([2.0]),)})
    found = first_difference(ours, theirs)
    assert found is not None
    assert (found.operator, found.row, found.unequal, found.elements) == ("a", -1, 1, 4)
    assert (found.max_abs, found.max_rel) == (0.5, 0.125)


def test_calls_of_other_threads_are_not_recorded(policy: Policy) -> None:
    """An engine may decode in one thread while its actor traces in another."""
    alone = trace_training(policy, IDS, PROMPT, 1.0)
    attention = operator("lightning_attention")
    layout = ops.ChunkLayout.build([5], CONFIG.chunk_size)

    def interrupted(*arguments: object) -> torch.Tensor:
        other = threading.Thread(target=lambda: policy(torch.arange(5), layout))
        other.start()
        other.join()
        result: torch.Tensor = attention(*arguments)
        return result

    calls = iter([interrupted])
    with replace_operators({"lightning_attention": lambda *each: next(calls, attention)(*each)}):
        disturbed = trace_training(policy, IDS, PROMPT, 1.0)
    assert list(disturbed.outputs) == list(alone.outputs)
    assert first_difference(disturbed, alone) is None


def test_replaced_operators_come_back(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replace_operators({"swiglu": len}):
        assert operator("swiglu") is len and operator("linear") is ops.linear
        raise RuntimeError
    assert operator("swiglu") is ops.swiglu
