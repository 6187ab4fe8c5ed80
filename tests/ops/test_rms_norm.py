"""rms_norm and the grouped norm with its gate. D channels are normalised together; n = x / rms(x)."""

import pytest
import torch

import ops
from tests.ops.checks import (
    ROWS,
    UNIT,
    assert_rows_do_not_depend_on_batch,
    assert_within,
    differentiate,
    differentiate_fp64,
)

EPS = 1e-6
U = UNIT[torch.float32]


def test_hand_worked() -> None:
    """rms(3, 4) = sqrt(25 / 2)."""
    y = ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0]), 0.0)
    torch.testing.assert_close(y, torch.tensor([[0.848528137, 11.3137085]]))


def test_eps_is_inside_the_root() -> None:
    assert ops.rms_norm(torch.zeros(1, 3), torch.ones(3), EPS).tolist() == [[0.0, 0.0, 0.0]]
    torch.testing.assert_close(ops.rms_norm(torch.tensor([[3.0, 3.0]]), torch.ones(2), 16.0), torch.full((1, 2), 0.6))


@pytest.mark.parametrize("dim", [1, 3, 37, 128])
def test_output_and_gradients(dim: int) -> None:
    """The mean is off by (D + 3) u, its root by half of that; each further step adds u. Bounds per element:

    y   (D/2 + 6) u |y|
    dx  = s (g w - n mean(g w n)): the factors carry D/2 + 4 (s), D/2 + 5 (n, twice), D + 5 (mean): at most 3 D + 20
    dw  = sum over rows of g n: (rows + D/2 + 6) u sum |g n|
    """
    rows, inputs, grad = 7, (torch.randn(7, dim), torch.randn(dim)), torch.randn(7, dim)
    got = differentiate(lambda x, w: ops.rms_norm(x, w, EPS), inputs, grad)
    want = differentiate_fp64(lambda x, w: ops.rms_norm_reference(x, w, EPS), inputs, grad)
    scale = 1 / (inputs[0].double().square().mean(-1, keepdim=True) + EPS).sqrt()
    normed, weighted = (inputs[0] * scale).abs(), (grad * inputs[1]).double().abs()
    assert_within(got.output, want.output, (dim / 2 + 6) * U * want.output.abs())
    terms = scale * (weighted + normed * (weighted * normed).mean(-1, keepdim=True))
    assert_within(got.inputs[0], want.inputs[0], (3 * dim + 20) * U * terms)
    assert_within(got.inputs[1], want.inputs[1], (rows + dim / 2 + 6) * U * (grad.abs() * normed).sum(0))


def test_residual_sum_and_its_norm() -> None:
    """The same bits and the same gradients as the sum and the norm one after the other."""
    h, delta, weight, grad = torch.randn(5, 37), torch.randn(5, 37).bfloat16(), torch.randn(37), torch.randn(2, 5, 37)
    results = []
    for together in (True, False):
        leaves = [x.clone().requires_grad_() for x in (h, delta, weight)]
        total = leaves[0] + leaves[1].float()
        normed = ops.rms_norm(total, leaves[2], EPS)
        if together:
            total, normed = ops.add_rms_norm(*leaves, EPS)
        results.append((total, normed, *torch.autograd.grad((total, normed), leaves, list(grad))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weight_of_each_head() -> None:
    x, weight = torch.randn(5, 3, 8), torch.randn(3, 8)
    together = differentiate(lambda x, w: ops.rms_norm(x, w, EPS), (x, weight), x)
    for head in range(3):
        one = differentiate(lambda x, w: ops.rms_norm(x, w, EPS), (x[:, head], weight[head]), x[:, head])
        torch.testing.assert_close(together.output[:, head], one.output)
        torch.testing.assert_close(together.inputs[0][:, head], one.inputs[0])
        torch.testing.assert_close(together.inputs[1][head], one.inputs[1])


def test_low_precision_input_is_widened_first() -> None:
    x, weight = torch.randn(5, 37).bfloat16(), torch.randn(37)
    assert torch.equal(ops.rms_norm(x, weight, EPS), ops.rms_norm(x.float(), weight, EPS))


@pytest.mark.parametrize(("groups", "dim"), [(1, 5), (3, 21), (4, 128)])
def test_grouped_gate_output_and_gradients(groups: int, dim: int) -> None:
    """As above with D = dim / groups; the sigmoid s and its product add 6 u. 1 - s loses digits where s is near 1, so
    the gate's gradient g n w s (1 - s) is held against |g n w| alone."""
    size = dim // groups
    inputs, grad = (torch.randn(7, dim), torch.randn(dim), torch.randn(7, dim)), torch.randn(7, dim)
    got = differentiate(lambda *a: ops.grouped_rms_norm_gate(*a, groups, EPS), inputs, grad)
    want = differentiate_fp64(lambda *a: ops.grouped_rms_norm_gate_reference(*a, groups, EPS), inputs, grad)
    x, weight, gate = (i.double() for i in inputs)
    scale = 1 / (x.unflatten(-1, (groups, -1)).square().mean(-1, keepdim=True) + EPS).sqrt()
    normed = (x.unflatten(-1, (groups, -1)) * scale).abs()
    gated = grad.abs() * gate.sigmoid()
    weighted = (gated * weight.abs()).unflatten(-1, (groups, -1))
    assert_within(got.output, want.output, (size / 2 + 12) * U * want.output.abs())
    terms = scale * (weighted + normed * (weighted * normed).mean(-1, keepdim=True))
    assert_within(got.inputs[0], want.inputs[0], (3 * size + 26) * U * terms.flatten(-2))
    assert_within(got.inputs[1], want.inputs[1], (7 + size / 2 + 12) * U * (gated * normed.flatten(-2)).sum(0))
    bound = (size / 2 + 18) * U * (grad * weight).abs() * normed.flatten(-2)
    assert_within(got.inputs[2], want.inputs[2], bound)


def test_gate_may_come_in_low_precision() -> None:
    x, weight, gate = torch.randn(5, 24), torch.randn(24), torch.randn(5, 24).bfloat16().requires_grad_()
    y = ops.grouped_rms_norm_gate(x, weight, gate, 3, EPS)
    assert torch.equal(y, ops.grouped_rms_norm_gate(x, weight, gate.float(), 3, EPS))
    y.sum().backward()
    assert gate.grad.dtype == torch.bfloat16


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (37,), (128,), (3, 32), (5, 19)])
def test_row_bits_do_not_depend_on_the_batch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape)
    assert_rows_do_not_depend_on_batch(lambda x: (ops.rms_norm(x, weight, EPS),), torch.randn(ROWS, *shape).to(dtype))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "dim"), [(3, 111), (4, 128)])
def test_gated_row_bits_do_not_depend_on_the_batch(groups: int, dim: int, dtype: torch.dtype) -> None:
    weight, x, gate = torch.randn(dim), torch.randn(ROWS, dim), torch.randn(ROWS, dim).to(dtype)
    assert_rows_do_not_depend_on_batch(lambda x, g: (ops.grouped_rms_norm_gate(x, weight, g, groups, EPS),), x, gate)
