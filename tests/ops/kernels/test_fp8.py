"""FP8 in Triton: the CPU path's bits for everything that is quantised, products within FP32 rounding, rows alone."""

import pytest
import torch

from ops import fp8, rms_norm, swiglu
from ops.dispatch import Path, force
from tests.ops.fp8_checks import assert_product, awkward
from tests.ops.kernels.harness import DEVICE, adversarial, assert_rows_alone


def on_cpu(run, *arguments):
    with force(Path.CPU):
        return run(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments))


def assert_same(actual: fp8.Quantized, expected: fp8.Quantized) -> None:
    assert torch.equal(actual.values.cpu().float(), expected.values.float())
    assert torch.equal(actual.scale.cpu(), expected.scale)


@pytest.mark.parametrize(("rows", "columns"), [(5, 128), (130, 300)])
def test_quantisation_equals_the_cpu_path(rows: int, columns: int) -> None:
    x = awkward(rows, columns).to(DEVICE)
    assert_same(fp8.quantize_rows(x), on_cpu(fp8.quantize_rows, x))
    mine, cpu = fp8.quantize_weight(x, True), on_cpu(fp8.quantize_weight, x, True)
    assert_same(mine.rows, cpu.rows)
    assert mine.transposed is not None and cpu.transposed is not None
    assert_same(mine.transposed, cpu.transposed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(dtype: torch.dtype) -> None:
    x, weight = fp8.quantize_rows(awkward(37, 300).to(DEVICE)), fp8.quantize_weight(torch.randn(130, 300).to(DEVICE))
    assert_product(fp8.fp8_matmul(x, weight, dtype), x, weight.rows)


def test_gradients_are_products_of_quantised_operands() -> None:
    x, weight = torch.randn(150, 300).to(DEVICE), torch.randn(130, 300).to(DEVICE)
    grad = torch.randn(150, 130).to(DEVICE).bfloat16()
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    grads = torch.autograd.grad(fp8.fp8_linear(*leaves), leaves, grad)
    weight_t = fp8.quantize_weight(weight, for_training=True).transposed
    assert weight_t is not None
    assert_product(grads[0], fp8.quantize_rows(grad), weight_t)
    assert_product(grads[1], fp8.quantize_rows(grad.t().float()), fp8.quantize_rows(x.t()))


def test_one_pass_emits_both_and_each_alone_has_the_same_bits() -> None:
    """The three modes of state-aware recomputation."""
    x = awkward(200, 300).to(DEVICE)
    arguments = (x, fp8.Producer.NONE, None, 0.0)
    rows, turned = fp8._quantize(*arguments, by_rows=True, transposed=True)
    rows_alone, nothing = fp8._quantize(*arguments, by_rows=True, transposed=False)
    nothing_too, turned_alone = fp8._quantize(*arguments, by_rows=False, transposed=True)
    assert nothing is None and nothing_too is None
    for together, alone in ((rows, rows_alone), (turned, turned_alone)):
        assert together is not None and alone is not None
        assert_same(together, fp8.Quantized(alone.values.cpu(), alone.scale.cpu()))


def test_forward_emits_rows_only_and_backward_the_transposed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, inner = [], fp8._triton_quantize
    monkeypatch.setattr(fp8, "_triton_quantize", lambda *a: modes.append(a[4:]) or inner(*a))
    x, norm = torch.randn(40, 256).to(DEVICE).requires_grad_(), torch.ones(256).to(DEVICE)
    weight = torch.randn(128, 256).to(DEVICE).requires_grad_()
    y = fp8.rms_norm_fp8_linear(x, norm, 1e-6, weight)
    assert modes == [(True, False)]
    y.float().sum().backward()
    assert modes[1:] == [(True, True), (False, True)]  # the gradient, then x again


def test_fused_producers() -> None:
    x, norm, gate_up = torch.randn(37, 300).to(DEVICE), torch.randn(300).to(DEVICE), torch.randn(37, 600).to(DEVICE)
    plain = fp8.quantize_rows(rms_norm(x, norm, 1e-6))
    assert_same(fp8.rms_norm_quantize(x, norm, 1e-6), fp8.Quantized(plain.values.cpu(), plain.scale.cpu()))
    plain = fp8.quantize_rows(swiglu(gate_up))
    assert_same(fp8.swiglu_quantize(gate_up), fp8.Quantized(plain.values.cpu(), plain.scale.cpu()))


def test_row_bits_do_not_depend_on_the_batch() -> None:
    weight = fp8.quantize_weight(torch.randn(130, 300).to(DEVICE))
    run = lambda x: (fp8.fp8_matmul(fp8.quantize_rows(x), weight),)  # noqa: E731
    assert_rows_alone(run, [torch.randn(140, 300).to(DEVICE)], counts=(1, 2, 17, 64, 129))


def test_gradient_bits_do_not_depend_on_the_order_of_programs() -> None:
    x, weight = torch.randn(200, 256).to(DEVICE), torch.randn(256, 256).to(DEVICE)
    results = []
    for seed in (1, 2):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with adversarial(seed):
            results.append(torch.autograd.grad(fp8.fp8_linear(*leaves).float().square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_promotion_follows_every_group() -> None:
    """Integers of different groups with scales 2^e apart sum exactly only if each group is promoted on its own."""
    x, weight = torch.ones(16, 256), torch.ones(128, 256)
    x[:, 128:] *= 2.0**-12
    y = fp8.fp8_matmul(fp8.quantize_rows(x.to(DEVICE)), fp8.quantize_weight(weight.to(DEVICE)), torch.float32)
    torch.testing.assert_close(y.cpu(), torch.full((16, 128), 128 + 128 * 2.0**-12), rtol=2e-7, atol=0)
