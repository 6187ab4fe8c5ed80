"""The first operator whose outputs differ between trainer and engine, and what is known to make that one differ."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from policy.transformer import MoE, Policy
from rl.diagnose.evidence import Evidence, is_explained
from rl.diagnose.finding import Finding, Number
from rl.diagnose.traces import Difference, Outputs, Trace, first_difference, trace_decoding, trace_training

Arguments = tuple[Any, ...]
SPLITS = (2, 3, 4, 6, 8, 16)


def check_operators(evidence: Evidence) -> Finding | None:
    """Compares the traces that the two processes left; without one of an engine, its decoding is repeated here."""
    sample = evidence.sample
    each = sample.sequences[sample.traced]
    ids = each.token_ids[: sample.traced_length or len(each.token_ids)]
    run = evidence.policy, ids, len(each.prompt_ids), sample.temperature
    if sample.trainer_trace and sample.engine_trace:
        trainer, engine = sample.trainer_trace, sample.engine_trace
    else:
        trainer, engine = trace_training(*run), trace_decoding(*run)
    found = first_difference(trainer, engine)
    if found is None:
        return None
    if not evidence.has_witnessed_weights:
        return _unnamed(evidence, found, "engine", _numbers(found, len(ids), "engine"))
    reference = trace_training(*run, arguments_of=found.operator)
    guilty = _guilty(found, reference, trainer, engine)
    numbers = _numbers(found, len(ids), guilty)
    wrong = (trainer if guilty == "trainer" else engine).outputs[found.operator]
    for explain in (_unstable_top_k, _other_product):
        if cause := explain(found, reference.arguments, wrong, evidence.policy, guilty):
            return replace(cause, numbers=numbers)
    return _unnamed(evidence, found, guilty, numbers)


def _guilty(found: Difference, reference: Trace, trainer: Trace, engine: Trace) -> str:
    """Whose output is not that of this process; the engine's where both are not."""
    mine = Trace({found.operator: reference.outputs.get(found.operator, ())})
    return "trainer" if first_difference(mine, engine) is None and first_difference(mine, trainer) else "engine"


def _numbers(found: Difference, tokens: int, guilty: str) -> dict[str, Number]:
    return {
        "operator": found.operator,
        "side": guilty,
        "token": tokens - 1 + found.row if not found.operator.startswith("lm_head") else tokens + found.row,
        "unequal": found.unequal,
        "elements": found.elements,
        "max_abs": found.max_abs,
        "max_rel": found.max_rel,
    }


def _unnamed(evidence: Evidence, found: Difference, guilty: str, numbers: dict[str, Number]) -> Finding:
    fast = [name for name in evidence.sample.recipe.ops.fast if found.operator.endswith(name)]
    setting = f"ops.fast = {fast}" if fast else f"{found.operator} in the {guilty}"
    remedy = (
        f"take {', '.join(fast)} out of ops.fast to have trainer and engine agree"
        if fast
        else "run `lockstep doctor` on the machine of each worker; if it passes there, look for what differs in this "
        "operator's inputs, kernel or library version"
    )
    return Finding(
        "first different operator",
        f"{found.operator} is the first operator that gives other bits in the engine than in the trainer "
        f"({found.unequal} of {found.elements} values differ, by at most {found.max_abs:.3g}, which is "
        f"{found.max_rel:.3g} of the largest)",
        setting,
        remedy,
        numbers,
    )


def _unstable_top_k(
    found: Difference, arguments: Arguments, wrong: Outputs, policy: Policy, guilty: str
) -> Finding | None:
    """Routers that chose other experts of equal scores."""
    if not found.operator.endswith(".route") or not arguments:
        return None
    module = policy.get_submodule(found.operator.removesuffix(".route"))
    assert isinstance(module, MoE)
    logits, bias = arguments[:2]
    scores = logits.sigmoid() if module.config.score_function == "sigmoid" else logits.softmax(-1)
    theirs, ours = wrong[0].long(), ops.route(*arguments)[0].long()
    biased = (scores if bias is None else scores + bias)[-len(theirs) :].cpu()
    ours = ours[-len(theirs) :].cpu()
    best = [biased.gather(1, ids).sort(-1).values for ids in (ours, theirs)]
    rows = int((ours.sort(-1).values != theirs.sort(-1).values).any(1).sum())
    if not rows or not torch.equal(*best):
        return None
    return Finding(
        "unstable top-k",
        f"{found.operator} chose other experts of equal score in the {guilty}, for {rows} tokens",
        f"the router's top-k in the {guilty}",
        "give ties to the lowest index: a stable sort, or a top-k that promises an order",
    )


def _other_product(
    found: Difference, arguments: Arguments, wrong: Outputs, policy: Policy, guilty: str
) -> Finding | None:
    """Products whose sum over K was cut into parts, or whose kernel follows the number of rows."""
    if not found.operator.endswith((".linear", ".fp32_linear")) or not arguments:
        return None
    x, weight, dtype = arguments[:3]
    for name, what, product in _products(x, weight, dtype, wrong[0].dtype):
        mine = product().cpu()[-len(wrong[0]) :]
        if is_explained(found.max_abs, float((mine.double() - wrong[0].double()).abs().max())):
            return Finding(
                name,
                f"{found.operator} {what} in the {guilty}",
                f"the matrix product of {found.operator.rpartition('.')[0]}",
                "use a product whose order of summation follows from the weight's shape alone: no split-K, no tile "
                "that the number of rows decides",
            )
    return None


def _products(x: Tensor, weight: Tensor, dtype: torch.dtype, result: torch.dtype) -> Iterator[tuple[str, str, Any]]:
    """Other ways to the product of x [T, K] and weight [N, K]: name of the cause, the way, the product."""
    operand, matrix = x.to(result), weight.to(dtype).to(result)
    for parts in SPLITS:
        if parts <= operand.shape[1]:
            for rows in (len(x), 1):
                for partial_sums in dict.fromkeys((torch.float32, result)):
                    split = partial(_split, operand, matrix, parts, partial_sums, rows)
                    yield "split-K product", f"sums over K in {parts} parts", split
    alone = partial(_by_rows, operand, matrix, 1)
    yield "row-dependent product", "multiplies single rows by another kernel than many", alone
    yield "row-dependent product", "does not pad its rows", partial(F.linear, operand, matrix)


def _split(operand: Tensor, matrix: Tensor, parts: int, partial_sums: torch.dtype, rows: int) -> Tensor:
    pieces = zip(operand.chunk(parts, 1), matrix.chunk(parts, 1), strict=True)
    total = [_by_rows(a.to(partial_sums), b.to(partial_sums), rows) for a, b in pieces]
    return torch.stack(total).to(partial_sums).sum(0).to(operand.dtype)


def _by_rows(operand: Tensor, matrix: Tensor, rows: int) -> Tensor:
    return torch.cat([F.linear(piece, matrix) for piece in operand.split(rows)])
