"""route in Triton: the reference's choices, ties included, weights and gradients, rows alone."""

import pytest
import torch

import ops
from tests.ops.checks import UNIT, assert_within, differentiate, differentiate_fp64
from tests.ops.kernels.harness import DEVICE, assert_rows_alone

U = UNIT[torch.float32]
SETTINGS = [(2, 1, 1), (4, 4, 2), (3, 8, 4), (2, 3, 2)]  # top_k, groups, groups kept; 24 experts


@pytest.mark.parametrize("settings", SETTINGS)
def test_against_reference(settings: tuple[int, int, int]) -> None:
    """Bounds as on the CPU path, in tests/ops/test_router.py."""
    top_k, scale = settings[0], 2.5
    logits, bias = torch.randn(33, 24), 0.1 * torch.randn(24)
    grad, device_bias = torch.randn(33, top_k), bias.to(DEVICE)
    ids = ops.route(logits.to(DEVICE), device_bias, *settings, scale)[0].cpu()
    assert torch.equal(ids, ops.route_reference(logits.double(), bias.double(), *settings, scale)[0])
    run = lambda x: ops.route(x, device_bias, *settings, scale)[1]  # noqa: E731
    got = differentiate(run, (logits.to(DEVICE),), grad.to(DEVICE))
    want = differentiate_fp64(lambda x: ops.route_reference(x, bias, *settings, scale)[1], (logits,), grad)
    assert_within(got.output.cpu(), want.output, (top_k + 14) * U * want.output)
    assert_within(got.inputs[0].cpu(), want.inputs[0], (2 * top_k + 44) * U * 2 * grad.abs().max().item() * scale)


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_scores_against_reference(renormalize: bool) -> None:
    """As above; the softmax adds the rounding of E summands and of a shift by the largest logit."""
    logits, grad, settings = torch.randn(33, 24), torch.randn(33, 4), (4, 1, 1, 1.0, "softmax", renormalize)
    got = differentiate(lambda x: ops.route(x, None, *settings)[1], (logits.to(DEVICE),), grad.to(DEVICE))
    want = differentiate_fp64(lambda x: ops.route_reference(x, None, *settings)[1], (logits,), grad)
    ids = ops.route(logits.to(DEVICE), None, *settings)[0].cpu()
    assert torch.equal(ids, ops.route_reference(logits.double(), None, *settings)[0])
    assert_within(got.output.cpu(), want.output, (24 + 30) * U * want.output)
    assert_within(got.inputs[0].cpu(), want.inputs[0], 200 * U * grad.abs().max().item())


@pytest.mark.parametrize("settings", SETTINGS)
def test_ties_go_to_the_lowest_index(settings: tuple[int, int, int]) -> None:
    """Logits whose sigmoid is exact, so that ties are ties in every precision."""
    logits = torch.tensor([-200.0, 0.0, 40.0])[torch.randint(0, 3, (64, 24))]
    ids, _ = ops.route(logits.to(DEVICE), torch.zeros(24).to(DEVICE), *settings, 1.0)
    assert torch.equal(ids.cpu(), ops.route_reference(logits, torch.zeros(24), *settings, 1.0)[0])


def test_routing_of_a_token_does_not_depend_on_its_batch() -> None:
    bias = (0.1 * torch.randn(40)).to(DEVICE)
    assert_rows_alone(lambda x: ops.route(x, bias, 4, 5, 3, 2.5), [torch.randn(150, 40).to(DEVICE)])


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_of_given_experts_have_the_bits_of_route(scoring: str, renormalize: bool) -> None:
    logits, grad, groups = torch.randn(33, 24), torch.randn(33, 4), (8, 4) if scoring == "sigmoid" else (1, 1)
    logits, grad = logits.to(DEVICE), grad.to(DEVICE)
    route = lambda x: ops.route(x, None, 4, *groups, 2.5, scoring, renormalize)  # noqa: E731
    ids = route(logits)[0]
    routed = differentiate(lambda x: route(x)[1], (logits,), grad)
    given = differentiate(lambda x: ops.expert_weights(x, ids, 2.5, scoring, renormalize), (logits,), grad)
    assert torch.equal(given.output, routed.output)
    assert torch.equal(given.inputs[0], routed.inputs[0])


def test_weights_of_given_experts_follow_their_own_row() -> None:
    ids = torch.stack([torch.randperm(24)[:4].sort().values for _ in range(33)]).to(DEVICE)
    logits = torch.randn(33, 24).to(DEVICE)
    together = ops.expert_weights(logits, ids, 2.5)
    assert torch.equal(
        torch.cat([ops.expert_weights(logits[n : n + 1], ids[n : n + 1], 2.5) for n in range(33)]), together
    )
    expected = logits.sigmoid().gather(1, ids)
    assert_within(together.cpu(), (2.5 * expected / expected.sum(1, keepdim=True)).cpu(), 20 * U * together.cpu())
