"""What corrections in the loss save when sampler and trainer drift apart: reward with and without, on one task.

    python -m benchmarks.correction [--out FOLDER] [--quick]

The task: answer six digits by the same digits in reverse, twice. A small hybrid policy with experts first imitates
answers of which every other digit is wrong, then learns by GRPO; the reward is the share of right digits. Four arms
start from the same weights and see the same prompts and addressed draws:

    aligned      the engine holds the trainer's weights: no bit differs
    uncorrected  the engine holds weights of 8 steps ago, rounded to blockwise FP8 (e4m3, 128x128), as an asynchronous
                 run with an FP8 engine does; the loss takes its samples for the trainer's own (Eq. 6, no weight)
    token_tis    the same samples' weights capped at 2, with a veto below 1e-4: the default of unaligned runs
    icepop       the same, tokens with a ratio outside 0.5 to 5 left out

Curves and the mean reward of the last steps are written to correction.json, the picture to correction.svg.
"""

import dataclasses
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import ops
from benchmarks.common import arguments, write_result
from policy.config import PolicyConfig
from policy.names import export_tensors
from policy.transformer import Policy
from rl.advantage import group_advantages
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Completion, Request, SamplingParams
from trainer.batch import TrainSample
from trainer.config import TrainerConfig
from trainer.correction_config import DEFAULT_VETO, NO_CORRECTION, CorrectionConfig
from trainer.trainer import Trainer

DIGITS, ASK, END = 10, 10, 15  # a prompt is digits and ASK
PROMPT, ANSWER = 6, 12
PEERS, PROMPTS = 8, 24
CONFIG = PolicyConfig(
    vocab_size=16,
    hidden_size=64,
    num_hidden_layers=2,
    layer_group_size=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    group_norm_size=1,
    intermediate_size=128,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=64,
    num_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    max_position_embeddings=64,
    initializer_range=0.08,
    eos_token_id=END,
    pad_token_id=END,
    chunk_size=16,
)


@dataclass(frozen=True)
class Load:
    steps: int = 150
    imitation_steps: int = 250
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rate: float = 1e-3
    lag: int = 8  # versions
    wrong: float = 0.5  # share of imitated digits
    last: int = 20  # steps of the final reward


QUICK = Load(steps=3, imitation_steps=3, seeds=(0,), last=2)


@dataclass(frozen=True)
class Arm:
    correction: CorrectionConfig = NO_CORRECTION
    mismatched: bool = True


ARMS = {
    "aligned": Arm(mismatched=False),
    "uncorrected": Arm(),
    "token_tis": Arm(CorrectionConfig(method="token_tis", veto=DEFAULT_VETO)),
    "icepop": Arm(CorrectionConfig(method="icepop")),
}
COLOURS = {"aligned": "#1b7f4b", "uncorrected": "#c0392b", "token_tis": "#2c5fa8", "icepop": "#b7791f"}


def imitate(load: Load, seed: int) -> dict[str, Tensor]:
    """The weights that every arm starts from."""
    policy = Policy(CONFIG, torch.float32)
    policy.initialize(seed)
    trainer = Trainer(policy, TrainerConfig(learning_rate=3e-3, warmup_steps=10), temperature=1.0)
    random = np.random.default_rng([seed, 1])
    for _ in range(load.imitation_steps):
        trainer.supervised_step([_demonstration(random, load.wrong) for _ in range(64)])
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def _prompt(random: np.random.Generator) -> np.ndarray:
    return np.append(random.integers(0, DIGITS, PROMPT), ASK)


def _answer(prompt: np.ndarray) -> np.ndarray:
    return np.resize(prompt[:PROMPT][::-1], ANSWER)


def _demonstration(random: np.random.Generator, wrong: float) -> tuple[np.ndarray, int]:
    prompt = _prompt(random)
    slips = random.random(ANSWER) < wrong
    shown = np.where(slips, random.integers(0, DIGITS, ANSWER), _answer(prompt))
    return np.concatenate([prompt, shown]), len(prompt)


def train(start: dict[str, Tensor], arm: Arm, load: Load, seed: int) -> dict[str, list[float]]:
    """Curves over steps: reward, entropy, the share of weight that is left, and k3 between trainer and record."""
    policy = Policy(CONFIG, torch.float32)
    policy.load_state_dict(start)
    settings = TrainerConfig(
        learning_rate=load.learning_rate, warmup_steps=10, old_log_probs="recomputed", correction=arm.correction
    )
    trainer = Trainer(policy, settings, temperature=1.0)
    engine = Engine(Policy(CONFIG, torch.float32).to_working_dtype(), RolloutConfig(memory_mb=64))
    versions: deque[dict[str, Tensor]] = deque(maxlen=load.lag + 1 if arm.mismatched else 1)
    random, curves = np.random.default_rng([seed, 2]), dict[str, list[float]]()
    for step in range(load.steps):
        versions.append(_weights(policy, in_fp8=arm.mismatched))
        engine.load_weights(versions[0], step)
        samples, reward = _sample(engine, [_prompt(random) for _ in range(PROMPTS)], seed, step)
        result = trainer.compute(samples)
        trainer.apply()
        found = {"reward": reward, "k3": _k3(samples, result.log_probs), "entropy": result.metrics["policy/entropy"]}
        found |= {name: value for name, value in result.metrics.items() if name.startswith("correction/")}
        for name, value in found.items():
            curves.setdefault(name, []).append(round(value, 6))
    return curves


def _weights(policy: Policy, in_fp8: bool) -> dict[str, Tensor]:
    tensors = {name: tensor.detach().clone() for name, tensor in export_tensors(policy).items()}
    return {name: _rounded(tensor) if in_fp8 and tensor.ndim == 2 else tensor for name, tensor in tensors.items()}


def _rounded(weight: Tensor) -> Tensor:
    return ops.quantize_weight(weight).rows.dequantize(weight.shape[1])


def _sample(engine: Engine, prompts: list[np.ndarray], seed: int, step: int) -> tuple[list[TrainSample], float]:
    sampling = SamplingParams(ANSWER)
    requests = [Request(n, prompt, PEERS, sampling, seed, step, n) for n, prompt in enumerate(prompts)]
    completions = engine.generate(requests)
    rewards = np.array([_reward(completion, prompts[completion.request_id]) for completion in completions])
    advantages = group_advantages(rewards.reshape(-1, PEERS)).flatten().tolist()
    samples = []
    for completion, advantage in zip(completions, advantages, strict=True):
        prompt = prompts[completion.request_id]
        ids = np.concatenate([prompt, completion.token_ids])
        samples.append(TrainSample(ids, len(prompt), completion.log_probs, advantage))
    return samples, float(rewards.mean())


def _reward(completion: Completion, prompt: np.ndarray) -> float:
    given = completion.token_ids
    return float((given == _answer(prompt)[: len(given)]).sum()) / ANSWER


def _k3(samples: list[TrainSample], log_probs: list[np.ndarray]) -> float:
    """Mean of exp(d) - 1 - d over tokens, d = trainer - engine."""
    d = np.concatenate(log_probs).astype(np.float64) - np.concatenate([each.rollout_log_probs for each in samples])
    return float((np.expm1(d) - d).mean())


def draw(curves: dict[str, list[dict[str, list[float]]]], path: Path) -> None:
    """Reward and mismatch of every arm: the mean over seeds, and the band from the lowest to the highest."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, 2), {"reward": "reward", "k3": "mismatch, mean k3 (nats)"}.items(), strict=True
    ):
        for arm, runs in curves.items():
            values = np.array([_smooth(run[name]) for run in runs])
            if name == "k3" and not values.any():
                continue  # exactly 0, which a logarithmic axis cannot show
            steps = np.arange(1, values.shape[1] + 1)
            axes.plot(steps, values.mean(axis=0), color=COLOURS[arm], label=arm)
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=COLOURS[arm], alpha=0.15, lw=0)
        axes.set(xlabel="step", title=title, yscale="log" if name == "k3" else "linear")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path)


def _smooth(values: list[float], width: int = 9) -> np.ndarray:
    """The mean of up to `width` values up to and including each."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - width, 0)
    smoothed: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return smoothed


def main() -> None:
    args = arguments(__doc__)
    load = QUICK if args.quick else Load()
    torch.use_deterministic_algorithms(True)
    starts = {seed: imitate(load, seed) for seed in load.seeds}
    curves: dict[str, list[dict[str, list[float]]]] = {}
    arms: dict[str, Any] = {}
    for name, arm in ARMS.items():
        curves[name] = [train(starts[seed], arm, load, seed) for seed in load.seeds]
        final = [float(np.mean(run["reward"][-load.last :])) for run in curves[name]]
        arms[name] = {"final_reward": final, "curves": curves[name]}
        k3 = np.mean([run["k3"] for run in curves[name]])
        print(f"{name}: reward {np.mean(final):.3f} ({', '.join(f'{each:.3f}' for each in final)}), mean k3 {k3:.4f}")
    path = write_result(args, "correction", {"load": dataclasses.asdict(load), "arms": arms})
    draw(curves, path.with_suffix(".svg"))
    print(f"written to {path} and {path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
