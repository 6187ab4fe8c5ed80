"""Decode steps through fixed buffers, padded to a few sizes: the bits of plain steps. Recorded and replayed on a GPU
and on the CPU path; in the interpreter, under the adversarial dot, the same buffers step by step."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import ops
from ops.dispatch import Path, force
from policy.cache import CachePools, CacheView
from policy.names import export_tensors, load_tensors
from policy.transformer import Policy
from rollout import decode_graph
from rollout.decode_graph import CPU_STEP, DecodeGraphs, padded_sizes
from tests.ops.kernels.harness import DEVICE, ON_GPU, adversarial
from tests.policy.tiny import FIELDS, family_config
from tests.policy.tiny import make_policy as make_family
from tests.rollout.tiny import make_policy

SLOTS, WIDTH, SEQUENCES = 4, 4, 3
PROMPTS = (14, 16, 31)  # the next tokens end a chunk, begin one, and end one


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(policy: Policy) -> tuple[CachePools, np.ndarray, np.ndarray]:
    """Pools in which the prompts are computed; slots and blocks of the sequences, neither in order."""
    pools = CachePools(policy.config, SLOTS + 1, SLOTS * WIDTH + 1, policy.dtype, policy.device)
    slots = np.array([2, 0, 3])
    table = np.random.default_rng(0).permutation(SLOTS * WIDTH)[: SEQUENCES * WIDTH].reshape(SEQUENCES, WIDTH)
    ids = torch.arange(sum(PROMPTS), device=policy.device) % 40
    layout = ops.ChunkLayout.build(PROMPTS, policy.config.chunk_size, device=policy.device)
    policy(ids, layout, view_of(pools, slots, table))
    return pools, slots, table


def view_of(pools: CachePools, slots: np.ndarray, table: np.ndarray) -> CacheView:
    return CacheView(pools, torch.from_numpy(slots).to(DEVICE), torch.from_numpy(table).to(DEVICE))


def owned(pools: CachePools) -> list[Tensor]:
    """What sequences may own: all but the spare slot and block."""
    return [pool[:-1] for kind in (pools.linear, pools.softmax) for layer in kind.values() for pool in layer]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_padded_step_through_fixed_buffers_gives_the_bits_of_a_plain_one(dtype: torch.dtype) -> None:
    policy = copy.deepcopy(make_policy(group=3, dtype=dtype)).to_working_dtype(DEVICE)
    with force(Path.TRITON):
        assert_steps_are_plain_ones(policy, capture=ON_GPU)


def assert_steps_are_plain_ones(policy: Policy, capture: bool, steps: int = 3) -> None:
    with adversarial(order_seed=1):
        (plain, slots, table), (fixed, *_) = opened(policy), opened(policy)
    graphs = DecodeGraphs(policy, fixed, SLOTS, SLOTS * WIDTH, SLOTS, WIDTH, capture)
    for step in range(steps):
        ids, positions = (np.arange(SEQUENCES) + 5 * step) % 40, np.array(PROMPTS) + step
        layout = ops.ChunkLayout.build([1] * SEQUENCES, policy.config.chunk_size, positions.tolist(), policy.device)
        with adversarial(order_seed=2 + step):
            want = policy(torch.from_numpy(ids).to(policy.device), layout, view_of(plain, slots, table))
        with adversarial(order_seed=9 - step):
            got = graphs.run(ids, slots, table, positions)
        assert torch.equal(got, want)
        assert all(torch.equal(one, other) for one, other in zip(owned(fixed), owned(plain), strict=True))
    if capture and steps > decode_graph.PLAIN_STEPS and policy.device.type == "cpu":
        assert isinstance(graphs._steps[CPU_STEP].graph, ops.Recording)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["ring", *FIELDS])
def test_a_replayed_step_on_a_cpu_gives_the_bits_of_a_plain_one(family: str, dtype: torch.dtype) -> None:
    policy = make_policy(group=3, dtype=dtype) if family == "ring" else make_family(family_config(family), dtype)
    assert_steps_are_plain_ones(copy.deepcopy(policy).to_working_dtype(), capture=True, steps=18)


def test_a_replayed_step_in_fp8_gives_the_bits_of_a_plain_one() -> None:
    config = replace(make_policy(group=3).config, fp8_linear=True, moe_intermediate_size=128, hidden_size=128)
    assert_steps_are_plain_ones(make_family(config, torch.bfloat16).to_working_dtype(), capture=True, steps=8)


def test_a_recording_lasts_for_one_version_of_the_weights() -> None:
    policy, other = (make_family(family_config("qwen3"), torch.bfloat16).to_working_dtype() for _ in range(2))
    pools, slots, table = opened(policy)
    graphs = DecodeGraphs(policy, pools, SLOTS, SLOTS * WIDTH, SLOTS, WIDTH, capture=True)
    step = np.arange(SEQUENCES), slots, table, np.array(PROMPTS)
    for _ in range(decode_graph.PLAIN_STEPS + 2):  # of softmax layers, which may be computed again at the same place
        before = graphs.run(*step).clone()
    assert isinstance(graphs._steps[CPU_STEP].graph, ops.Recording)
    other.initialize(seed=7)
    load_tensors(policy, export_tensors(other))
    plain, *_ = opened(policy)
    layout = ops.ChunkLayout.build([1] * SEQUENCES, policy.config.chunk_size, PROMPTS)
    want = policy(torch.from_numpy(step[0]), layout, view_of(plain, slots, table))
    opened_again = [pool for kind in (pools.linear, pools.softmax) for layer in kind.values() for pool in layer]
    for pool, fresh in zip(opened_again, owned(plain), strict=True):
        pool[:-1] = fresh
    after = graphs.run(*step)
    assert torch.equal(after, want) and not torch.equal(after, before)


@pytest.mark.parametrize("read", [lambda x: x.sum().item() * x, lambda x: x[x > 0]], ids=["a number", "a size"])
def test_what_depends_on_numbers_cannot_be_recorded(read: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        ops.Recording(lambda: read(torch.ones(3)))


def test_new_weights_are_copied_to_where_a_recording_reads_them() -> None:
    policy = copy.deepcopy(make_policy()).to_working_dtype()
    other = Policy(policy.config, policy.dtype)
    other.initialize(seed=7)
    places = [parameter.data_ptr() for parameter in policy.parameters()]
    load_tensors(policy, export_tensors(other))
    assert places == [parameter.data_ptr() for parameter in policy.parameters()]


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 64, 65, 100, 256])
def test_sizes_grow_to_hold_every_batch(max_batch: int) -> None:
    sizes = padded_sizes(max_batch)
    assert sizes[0] == 1 and sizes[-1] >= max_batch and all(a < b <= a + 32 for a, b in itertools.pairwise(sizes))
