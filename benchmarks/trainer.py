"""Arithmetic of a training step against the machine's own peak, which is the rate of one plain matrix product.

    python -m benchmarks.trainer [--out FOLDER] [--quick]

A step is `Trainer.compute` and `Trainer.apply` on one micro-batch of 12 samples (64 prompt and 96 completion tokens
each), with deterministic algorithms, as in a run. Its arithmetic is that of the matrix products alone (`step_flops`).
The peak is F.linear of 4096 x 1024 x 1024 in the same dtype, measured in turn with the steps; the ratio is that of the
medians. Two shapes: the quickstart's and one of about 10 million parameters. The result is written to trainer.json.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import alternate, arguments, quickstart_config, rates, ring_10m_config, write_result
from policy.checkpoint import DTYPES
from policy.config import PolicyConfig
from policy.transformer import Policy
from trainer.batch import TrainSample
from trainer.config import TrainerConfig
from trainer.trainer import Trainer

PEAK_SHAPE = (4096, 1024, 1024)  # rows, in and out features
SHAPES: dict[str, Callable[[], PolicyConfig]] = {"quickstart": quickstart_config, "ring_10m": ring_10m_config}


@dataclass(frozen=True)
class Load:
    samples: int = 12
    prompt: int = 64
    completion: int = 96
    repeats: int = 7
    products: int = 10  # of PEAK_SHAPE in one timing of the peak


QUICK = Load(samples=4, prompt=16, completion=16, repeats=2, products=1)


def step_flops(config: PolicyConfig, load: Load) -> int:
    """Floating-point operations of the matrix products of one step, two for each multiply-add.

    Forward, and twice that for backward (one product for each operand's gradient). What backward recomputes, and all
    that is not a matrix product, counts as none. Attention counts whole chunk tiles, as they are computed.
    """
    length = load.prompt + load.completion
    tokens, layers = load.samples * length, range(config.num_hidden_layers)
    weights = sum(_attention_weights(config, layer) + _feed_forward_weights(config, layer) for layer in layers)
    head = load.samples * load.completion * config.vocab_size * config.hidden_size
    attention = load.samples * sum(_attention_products(config, layer, length) for layer in layers)
    return 3 * 2 * (tokens * weights + head + attention)


def _attention_weights(config: PolicyConfig, layer: int) -> int:
    """Multiply-adds of the projections for one token."""
    width = config.num_attention_heads * config.head_dim
    gate = 0 if config.is_softmax(layer) else width
    return config.hidden_size * (width + 2 * config.kv_heads(layer) * config.head_dim + width + gate)


def _feed_forward_weights(config: PolicyConfig, layer: int) -> int:
    """Multiply-adds for one token: gate, up and down of what it meets, and the router."""
    if not config.is_moe(layer):
        return 3 * config.hidden_size * config.intermediate_size
    experts = config.num_experts_per_tok * config.moe_intermediate_size + config.moe_shared_expert_intermediate_size
    return config.hidden_size * (3 * experts + config.num_experts)


def _attention_products(config: PolicyConfig, layer: int, length: int) -> int:
    """Multiply-adds for one sequence. Softmax: two products for each pair of a query tile and a key block up to it.

    Lightning: two products inside each tile, the state read by each tile, the state written by each full one.
    """
    chunk, dim = config.chunk_size, config.head_dim
    tiles, full = -(-length // chunk), length // chunk
    if config.is_softmax(layer):
        return config.num_attention_heads * tiles * (tiles + 1) // 2 * 2 * chunk * chunk * dim
    return config.num_attention_heads * chunk * dim * (tiles * (2 * chunk + dim) + full * dim)


def measure(config: PolicyConfig, dtype: torch.dtype, load: Load) -> dict[str, Any]:
    rows, in_features, out_features = PEAK_SHAPE
    x, weight = torch.randn(rows, in_features).to(dtype), torch.randn(out_features, in_features).to(dtype)
    step = _step(config, dtype, load)

    def products() -> None:
        for _ in range(load.products):
            F.linear(x, weight)

    step_seconds, product_seconds = alternate(step, products, load.repeats)
    flops = step_flops(config, load)
    achieved = rates(flops, step_seconds)
    peak = rates(2 * rows * in_features * out_features * load.products, product_seconds)
    return {
        "step_flops": flops,
        "step_flop_per_second": achieved,
        "peak_flop_per_second": peak,
        "ratio": achieved["median"] / peak["median"],
    }


def _step(config: PolicyConfig, dtype: torch.dtype, load: Load) -> Callable[[], object]:
    policy = Policy(config, dtype)
    policy.initialize(seed=0)
    length = load.prompt + load.completion
    trainer = Trainer(policy, TrainerConfig(token_budget=load.samples * length, learning_rate=1e-6), temperature=1.0)
    random = np.random.default_rng(0)
    # Log-probs of the uniform distribution, near those of an untrained policy.
    recorded = np.full(load.completion, -np.log(config.vocab_size), dtype=np.float32)
    samples = [
        TrainSample(random.integers(0, config.vocab_size, length), load.prompt, recorded, (-1.0) ** index)
        for index in range(load.samples)
    ]

    def step() -> None:
        trainer.compute(samples)
        trainer.apply()

    return step


def main() -> None:
    args = arguments(__doc__)
    load = QUICK if args.quick else Load()
    torch.use_deterministic_algorithms(True)
    results: dict[str, dict[str, Any]] = {}
    for shape, config in SHAPES.items():
        results[shape] = {"policy": dataclasses.asdict(config())}
        for name, dtype in DTYPES.items():
            result = results[shape][name] = measure(config(), dtype, load)
            achieved, peak = (result[f"{side}_flop_per_second"]["median"] / 1e9 for side in ("step", "peak"))
            print(f"{shape}, {name}: {achieved:.1f} of {peak:.1f} GFLOP/s, ratio {result['ratio']:.3f}")
    path = write_result(args, "trainer", {"load": dataclasses.asdict(load), "peak_shape": PEAK_SHAPE, **results})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
