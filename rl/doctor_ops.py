"""The probes of `lockstep doctor`: each operator as the policy calls it, in sizes like those of the quickstart."""

import torch
from torch import Tensor

import ops
from rl.doctor_attention import lightning_attention, softmax_attention
from rl.doctor_probe import Probe, RowPath, normal

BATCH = 2048
HIDDEN, WIDTH, EXPERT_WIDTH, HEADS, HEAD_DIM, EPS = 128, 384, 96, 4, 32, 1e-6
EXPERTS, TOP_K, GROUPS, TOP_GROUPS = 8, 2, 2, 1
# In and out features. Libraries cut long sums for several threads.
LINEAR_SHAPES = ((HIDDEN, 2 * WIDTH), (WIDTH, HIDDEN), (EXPERT_WIDTH, HIDDEN), (512, 1536), (1280, 96))


def _linear(dtype: torch.dtype) -> dict[str, RowPath]:
    def path(in_features: int, out_features: int) -> RowPath:
        u, v = normal(BATCH, in_features // 2), normal(out_features, in_features // 2, seed=1, scale=in_features**-0.5)
        order = torch.randperm(in_features, generator=torch.Generator().manual_seed(0))
        # The products cancel but for their rounding, which the rounding of a large result to BF16 would hide.
        x, weight = torch.cat([u, u], 1)[:, order].contiguous(), torch.cat([v, -v], 1)[:, order].contiguous()
        return lambda rows: ops.linear(x[rows], weight, dtype)

    paths = [path(*shape) for shape in LINEAR_SHAPES]
    return {"forward": lambda rows: torch.cat([run(rows) for run in paths], dim=1)}


def _rms_norm(dtype: torch.dtype) -> dict[str, RowPath]:
    x, weight = normal(BATCH, HEADS, HEAD_DIM).to(dtype), normal(HEADS, HEAD_DIM, seed=1)
    flat = weight.flatten()

    def forward(rows: slice) -> Tensor:
        per_head = ops.rms_norm(x[rows], weight, EPS).flatten(1)
        return torch.cat([per_head, ops.rms_norm(x[rows].flatten(1), flat, EPS)], dim=1)

    return {"forward": forward}


def _swiglu(dtype: torch.dtype) -> dict[str, RowPath]:
    x = normal(BATCH, 2 * WIDTH).to(dtype)
    return {"forward": lambda rows: ops.swiglu(x[rows])}


def _qk_norm_rope(dtype: torch.dtype) -> dict[str, RowPath]:
    x, table = normal(BATCH, HEADS + 2, HEAD_DIM).to(dtype), ops.rope_table(BATCH, HEAD_DIM // 2, 10000.0)
    positions, weight = torch.arange(BATCH), normal(HEAD_DIM, seed=1)

    def forward(rows: slice) -> Tensor:
        q, k, v = ops.qk_norm_rope(x[rows], weight, weight, HEADS, table, positions[rows], EPS)
        return torch.cat([q, k, v.float()], dim=1)

    return {"forward": forward}


def _grouped_rms_norm_gate(dtype: torch.dtype) -> dict[str, RowPath]:
    x, gate, weight = normal(BATCH, HIDDEN), normal(BATCH, HIDDEN, seed=1).to(dtype), normal(HIDDEN, seed=2)
    return {"forward": lambda rows: ops.grouped_rms_norm_gate(x[rows], weight, gate[rows], 2, EPS)}


def _experts(dtype: torch.dtype) -> dict[str, RowPath]:
    logits, bias, x = normal(BATCH, 8), normal(8, seed=1, scale=0.1), normal(BATCH, HIDDEN, seed=2)
    gate_up, down = normal(8, 192, HIDDEN, seed=3, scale=0.1), normal(8, HIDDEN, 96, seed=4, scale=0.1)

    def forward(rows: slice) -> Tensor:
        ids, weights = ops.route(logits[rows], bias, 2, 2, 1, 1.0)
        return torch.cat([ids.float(), weights, ops.experts(x[rows], gate_up, down, ids, weights, dtype)], dim=1)

    return {"forward": forward}


def _log_probs(dtype: torch.dtype) -> dict[str, RowPath]:
    vocab, batch = 8192 + 256, 256  # two blocks of the vocabulary
    hidden, head = normal(batch, HIDDEN), normal(vocab, HIDDEN, seed=1, scale=0.3)
    targets = torch.arange(batch) * (vocab // batch)
    return {"forward": lambda rows: torch.stack(ops.log_probs(hidden[rows], head, targets[rows], 0.8, dtype), dim=1)}


def _sample(dtype: torch.dtype) -> dict[str, RowPath]:
    hidden, head = normal(BATCH, HIDDEN), normal(512, HIDDEN, seed=1, scale=0.3)
    index = torch.arange(BATCH)
    temperature, top_p = (index % 3) * 0.5, torch.where(index % 4 == 0, 0.9, 1.0)
    uniform = torch.rand(BATCH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    top_k, min_p = torch.where(index % 5 == 0, 20, 0), torch.where(index % 7 == 0, 0.1, 0.0)

    def forward(rows: slice) -> Tensor:
        tokens, chosen, all_log_probs, _ = ops.sample(
            hidden[rows], head, temperature[rows], top_p[rows], top_k[rows], min_p[rows], uniform[rows], dtype
        )
        return torch.cat([tokens.float().unsqueeze(1), chosen.unsqueeze(1), all_log_probs], dim=1)

    return {"forward": forward}


PROBES: dict[str, Probe] = {
    "linear": _linear,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "qk_norm_rope": _qk_norm_rope,
    "grouped_rms_norm_gate": _grouped_rms_norm_gate,
    "lightning_attention": lightning_attention,
    "softmax_attention": softmax_attention,
    "route and experts": _experts,
    "log_probs": _log_probs,
    "sample": _sample,
}
