"""rms_norm and the gated norm in Triton. Bounds as on the CPU path, in tests/ops/test_rms_norm.py."""

import pytest
import torch

import ops
from tests.ops.checks import UNIT, assert_within, differentiate, differentiate_fp64
from tests.ops.kernels.harness import DEVICE, adversarial, assert_rows_alone

EPS = 1e-6
U = UNIT[torch.float32]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE)


@pytest.mark.parametrize("dim", [1, 37, 128])
@pytest.mark.parametrize("heads", [1, 3])
def test_output_and_gradients(dim: int, heads: int) -> None:
    """The bounds of the CPU path; 2 u more for rsqrt, which a GPU rounds less well."""
    tokens = 70
    inputs, grad = (random(tokens, heads, dim), random(heads, dim)), random(tokens, heads, dim)
    got = differentiate(lambda x, w: ops.rms_norm(x, w, EPS), inputs, grad)
    want = differentiate_fp64(lambda x, w: ops.rms_norm_reference(x, w, EPS), inputs, grad)
    scale = 1 / (inputs[0].double().square().mean(-1, keepdim=True) + EPS).sqrt()
    normed, weighted = (inputs[0] * scale).abs(), (grad * inputs[1]).double().abs()
    assert_within(got.output, want.output, (dim / 2 + 8) * U * want.output.abs())
    terms = scale * (weighted + normed * (weighted * normed).mean(-1, keepdim=True))
    assert_within(got.inputs[0], want.inputs[0], (3 * dim + 24) * U * terms)
    assert_within(got.inputs[1], want.inputs[1], (tokens + dim / 2 + 8) * U * (grad.abs() * normed).sum(0))


@pytest.mark.parametrize(("groups", "dim"), [(1, 5), (3, 21), (4, 128)])
def test_grouped_gate_output_and_gradients(groups: int, dim: int) -> None:
    size, tokens = dim // groups, 9
    inputs, grad = (random(tokens, dim), random(dim), random(tokens, dim)), random(tokens, dim)
    got = differentiate(lambda *a: ops.grouped_rms_norm_gate(*a, groups, EPS), inputs, grad)
    want = differentiate_fp64(lambda *a: ops.grouped_rms_norm_gate_reference(*a, groups, EPS), inputs, grad)
    x, weight, gate = (i.double() for i in inputs)
    scale = 1 / (x.unflatten(-1, (groups, -1)).square().mean(-1, keepdim=True) + EPS).sqrt()
    normed = (x.unflatten(-1, (groups, -1)) * scale).abs()
    gated = grad.abs() * gate.sigmoid()
    weighted = (gated * weight.abs()).unflatten(-1, (groups, -1))
    assert_within(got.output, want.output, (size / 2 + 16) * U * want.output.abs())
    terms = scale * (weighted + normed * (weighted * normed).mean(-1, keepdim=True))
    assert_within(got.inputs[0], want.inputs[0], (3 * size + 32) * U * terms.flatten(-2))
    assert_within(got.inputs[1], want.inputs[1], (tokens + size / 2 + 16) * U * (gated * normed.flatten(-2)).sum(0))
    bound = (size / 2 + 22) * U * (grad * weight).abs() * normed.flatten(-2)
    assert_within(got.inputs[2], want.inputs[2], bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_bits_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    weight = random(37)
    assert_rows_alone(lambda x: (ops.rms_norm(x, weight, EPS),), [random(70, 37).to(dtype)])


def test_gated_row_bits_do_not_depend_on_the_batch() -> None:
    weight = random(96)
    run = lambda x, gate: (ops.grouped_rms_norm_gate(x, weight, gate, 3, EPS),)  # noqa: E731
    assert_rows_alone(run, [random(70, 96), random(70, 96).bfloat16()])


def test_gradient_bits_do_not_depend_on_the_order_of_programs() -> None:
    inputs, grad = (random(200, 64), random(64)), random(200, 64)
    results = []
    for seed in (1, 2):
        with adversarial(seed):
            results.append(differentiate(lambda x, w: ops.rms_norm(x, w, EPS), inputs, grad).inputs)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_residual_sum_is_exact_and_its_norm_is_the_norm_of_the_sum() -> None:
    h, delta, weight = random(70, 48), random(70, 48).bfloat16(), random(48)
    total, normed = ops.add_rms_norm(h, delta, weight, EPS)
    assert torch.equal(total, h + delta.float())
    assert torch.equal(normed, ops.rms_norm(total, weight, EPS))


def test_gradients_of_the_residual_sum() -> None:
    """Both inputs get what reaches the sum directly and through the norm, in one rounding more."""
    h, delta, weight, grad = random(9, 37), random(9, 37), random(37), random(2, 9, 37)
    leaves = [x.clone().requires_grad_() for x in (h, delta, weight)]
    got = torch.autograd.grad(ops.add_rms_norm(*leaves, EPS), leaves, list(grad))
    summed, norm_weight = (h + delta).requires_grad_(), weight.clone().requires_grad_()
    through_norm, grad_weight = torch.autograd.grad(
        ops.rms_norm(summed, norm_weight, EPS), (summed, norm_weight), grad[1]
    )
    assert torch.equal(got[0], through_norm + grad[0])
    assert torch.equal(got[1], got[0])
    assert torch.equal(got[2], grad_weight)
