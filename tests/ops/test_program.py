"""Program: kernels without Python between them do what they do when they are called one by one."""

from functools import partial

import numpy as np
import pytest
import torch

from ops import compiled
from ops.compiled import f32, share, watching
from ops.program import Program, is_kernel


@compiled.compiled
def _mix_kernel(begin, end, x, bits, counts, scale, shift, negated, out):
    for i in range(begin, end):
        value = x[i, 0] * scale + f32(bits[i]) + f32(counts[i, 1]) + f32(shift)
        out[i] = -value if negated else value


@compiled.compiled
def _double_kernel(begin, end, out):
    for i in range(begin, end):
        out[i] *= f32(2)


@compiled.compiled
def _failing_kernel(begin, end, out):
    for i in range(begin, end):
        if out[i] < f32(0):
            raise ValueError("negative")


def recorded(*shares: tuple) -> list[partial]:
    calls: list[partial] = []
    with watching(calls.append):
        for each in shares:
            share(*each)
    return calls


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("operations", [1, 10**9], ids=["one thread", "all threads"])
def test_what_kernels_read_is_read_anew(operations: int) -> None:
    """Arguments of every kind; in order, as the second kernel doubles what the first wrote."""
    x, bits = torch.randn(50, 2), torch.randint(-9, 9, (50,), dtype=torch.int16)
    counts, out = torch.randint(-9, 9, (50, 3)), torch.zeros(50)
    arguments = x, bits, counts, f32(0.3), -1.75, True, out
    calls = recorded((_mix_kernel, 50, operations, *arguments), (_double_kernel, 50, operations, out))
    assert len(calls) == 2 and all(is_kernel(call.func) for call in calls)
    program = Program(calls)
    for _ in range(2):
        x.normal_(), counts.random_(-9, 9)
        for call in calls:
            call()
        want = out.clone()
        program()
        assert torch.equal(out, want) and bool(want.any())


def test_a_kernel_that_fails_is_heard_of() -> None:
    out = torch.ones(5)
    program = Program(recorded((_failing_kernel, 5, 1, out), (_double_kernel, 5, 1, out)))
    program()
    out[3] = -1.0
    before = out.clone()
    with pytest.raises(RuntimeError, match="a kernel failed"):
        program()
    assert torch.equal(out, before), "the kernels behind it do not run"


def test_arguments_of_other_types_than_the_kernel_ran_with_are_refused() -> None:
    (call,) = recorded((_double_kernel, 5, 1, torch.ones(5)))
    with pytest.raises(KeyError):
        Program([partial(call.func, 0, 5, np.ones((5, 5), f32))])
