"""Routes put together by request, from steps of a runner that is none: prefixes of others, preemption, new weights."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from policy.config import PolicyConfig
from rollout.config import RolloutConfig
from rollout.routes import RouteType, completion_fields
from rollout.vllm_engine.routes import RouteRecorder

BLOCK = 4
CONFIG = PolicyConfig(10, num_hidden_layers=3, num_experts=50, num_experts_per_tok=2)  # the first layer is dense
UNKNOWN_ROUTE = [[-1, -1], [-1, -1]]


def routes(*marks: int) -> torch.Tensor:
    """Of tokens, told apart by a number: [T, 2, 2]."""
    return torch.tensor([[[mark, mark + 1], [mark + 2, mark + 3]] for mark in marks])


class Steps:
    """A runner with two groups of block tables, of which the second counts."""

    def __init__(self, mode: str = "weights") -> None:
        self.runner = SimpleNamespace(query_start_loc=SimpleNamespace(np=np.zeros(9, np.int32)))
        kind = RouteType(CONFIG, RolloutConfig.model_validate({"routing_replay": mode}))
        self.recorder = RouteRecorder(self.runner, kind, lambda: self.chosen, group=1)

    def step(self, *requests: tuple[str, list[int], int, tuple[int, ...]]) -> None:
        """Each: name, blocks, first position, and a mark of every token from there."""
        self.runner.input_batch = SimpleNamespace(
            req_ids=[name for name, *_ in requests], block_table=[None, self.table([each[1] for each in requests])]
        )
        counts = [len(marks) for *_, marks in requests]
        self.runner.query_start_loc.np[1 : len(counts) + 1] = np.cumsum(counts)
        positions = [start + i for _, _, start, marks in requests for i in range(len(marks))]
        self.runner.positions = torch.tensor([*positions, 77, 77])  # vLLM pads
        experts = routes(*(mark for *_, marks in requests for mark in marks), 0, 0)
        self.chosen = experts, experts / 64
        self.recorder.record()

    @staticmethod
    def table(rows: list[list[int]]) -> Any:
        held = np.zeros((8, 6), np.int32)
        for row, blocks in enumerate(rows):
            held[row, : len(blocks)] = blocks
        return SimpleNamespace(block_size=BLOCK, get_numpy_array=lambda: held)

    def experts(self, name: str, tokens: int) -> list[Any]:
        fields = completion_fields(self.recorder.take(name, tokens))
        experts, weights = fields["routed_experts"], fields["routed_weights"]
        assert (experts.dtype, weights.dtype) == (np.int16, np.float32)
        assert np.array_equal(weights, np.where(experts < 0, np.nan, experts / 64), equal_nan=True)
        return experts.tolist()


def test_each_request_has_the_routes_of_its_own_tokens_at_their_positions() -> None:
    steps = Steps()
    steps.step(("a", [3, 1], 0, (1, 2, 3)), ("b", [2], 0, (4, 5)))
    steps.step(("b", [2], 2, (6,)), ("a", [3, 1], 3, (7,)))
    steps.step(("a", [3, 1], 4, (8,)))
    assert steps.experts("a", 5) == routes(1, 2, 3, 7, 8).tolist()
    assert steps.experts("b", 3) == routes(4, 5, 6).tolist()
    assert steps.experts("b", 1) == [UNKNOWN_ROUTE]  # forgotten


def test_a_prefix_has_the_routes_of_whoever_computed_its_blocks_even_in_the_same_step() -> None:
    steps = Steps()
    steps.step(("b", [5, 2], 4, (9,)), ("a", [5, 1], 0, (1, 2, 3, 4, 5)))
    steps.step(("c", [5, 3], 4, (6,)))
    assert steps.experts("a", 5) == routes(1, 2, 3, 4, 5).tolist()
    assert steps.experts("b", 5) == routes(1, 2, 3, 4, 9).tolist()
    assert steps.experts("c", 5) == routes(1, 2, 3, 4, 6).tolist()


def test_blocks_that_are_used_again_do_not_reach_back() -> None:
    steps = Steps()
    steps.step(("a", [5], 0, (1, 2, 3, 4)))
    steps.step(("b", [5], 0, (5, 6, 7, 8)))
    assert steps.experts("a", 4) == routes(1, 2, 3, 4).tolist()


def test_what_is_computed_again_after_preemption_counts() -> None:
    steps = Steps()
    steps.step(("a", [1, 2], 0, (1, 2, 3, 4, 5)))
    steps.step(("a", [1, 2], 5, (6,)))
    steps.step(("a", [3, 4], 0, (11, 12, 13, 14, 15, 16, 17)))
    assert steps.experts("a", 7) == routes(11, 12, 13, 14, 15, 16, 17).tolist()


@pytest.mark.parametrize(("told", "marks"), [(True, (11, 12, 13, 14)), (False, (1, 2, 3, 4))])
def test_after_new_weights_the_place_reached_is_no_sign_of_an_own_past(told: bool, marks: tuple[int, ...]) -> None:
    """Sample a stopped at position 4; b computed the block anew, and a goes on from it at 4."""
    steps = Steps()
    steps.step(("a", [1], 0, (1, 2, 3, 4)))
    if told:
        steps.recorder.forget_places()
    steps.step(("b", [2, 3], 0, (11, 12, 13, 14, 15)), ("a", [2, 4], 4, (16,)))
    assert steps.experts("a", 5) == routes(*marks, 16).tolist()


def test_what_nobody_saw_is_unknown_and_what_is_beyond_the_end_left_out() -> None:
    steps = Steps()
    steps.step(("a", [1, 3], 4, (1, 2, 3)))
    assert steps.experts("a", 6) == [UNKNOWN_ROUTE] * 4 + routes(1, 2).tolist()
    steps.step(("a", [1, 3], 4, (1, 2, 3)))
    assert steps.experts("a", 2) == [UNKNOWN_ROUTE] * 2


def test_without_weights_there_are_none() -> None:
    steps = Steps("experts")
    steps.step(("a", [1], 0, (1, 2)))
    fields = completion_fields(steps.recorder.take("a", 2))
    assert list(fields) == ["routed_experts"] and fields["routed_experts"].tolist() == routes(1, 2).tolist()
