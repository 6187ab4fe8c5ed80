"""Generated tokens per second: the local engine against vLLM and transformers `generate`, on the same CPU threads.

    LOCKSTEP_VLLM_PYTHON=build/vllm/bin/python python -m benchmarks.engine [--dtype D] [--shapes 10M] [--out FOLDER]

Two Qwen3 policies, of 10 and 108 million parameters: same weights, same prompts, one dtype on every side. vLLM runs in
the environment that LOCKSTEP_VLLM_PYTHON names (`.ci/vllm` makes one), without it that side is left out. A third row
has a Ring-shaped policy, for which transformers has no class: lightning attention in 3 of 4 layers, experts in 3 of 4.
Beside it runs a dense Qwen3 of equal width, layers and heads, as wide as the experts that one of our tokens meets.

All sample at temperature 1 from the whole vocabulary, with a cache, and never stop early: 64 prompts of 32 tokens, 128
new tokens each. The engine also records every token's log-probability, as it always does; the others do not. The sides
take turns, and a ratio is the median over rounds. Then the engine's step is taken apart and set against what the
machine can do (`benchmarks.decode_step`). The result is written to engine-DTYPE.json.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from transformers import GenerationConfig, Qwen3ForCausalLM

from benchmarks import decode_step
from benchmarks.common import parser_of, rates, ring_10m_config, write_result
from policy.checkpoint import DTYPES, dtype_name, save_policy
from policy.config import PolicyConfig
from policy.transformer import Policy
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Request, SamplingParams

NEVER = -1  # end-of-text id that no token has
VLLM_SIDE = Path(__file__).with_name("engine_vllm.py")


@dataclass(frozen=True)
class Load:
    batch: int = 64
    prompt: int = 32
    new_tokens: int = 128
    repeats: int = 3

    @property
    def tokens(self) -> int:
        return self.batch * self.new_tokens

    def prompts(self, vocab_size: int) -> np.ndarray:
        """int64 [batch, prompt]"""
        return np.random.default_rng(0).integers(0, vocab_size, (self.batch, self.prompt))


QUICK = Load(batch=4, prompt=8, new_tokens=8, repeats=2)


def qwen3_config(
    vocab_size: int, hidden_size: int, layers: int, heads: int, kv_heads: int, head_dim: int, width: int
) -> PolicyConfig:
    fields = {
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": width,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    }
    return PolicyConfig.from_hf(fields)


def dense_twin(config: PolicyConfig) -> PolicyConfig:
    """A Qwen3 of the width, layers, heads and feed-forward width of a Ring-shaped policy."""
    return qwen3_config(
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
    )


class Side(Protocol):
    def generate(self) -> float:
        """Seconds for the load. AssertionError when fewer tokens came."""
        ...


class LockstepSide:
    def __init__(self, policy: Policy, load: Load) -> None:
        self.policy, self.load = policy, load
        self.engine = Engine(policy, RolloutConfig(max_batch=load.batch))
        sampling = SamplingParams(load.new_tokens)
        prompts = load.prompts(policy.config.vocab_size)
        self.requests = [Request(i, ids, 1, sampling, seed=0, prompt=i) for i, ids in enumerate(prompts)]

    def generate(self) -> float:
        start = time.perf_counter()
        completions = self.engine.generate(self.requests)
        seconds = time.perf_counter() - start
        assert sum(len(completion.token_ids) for completion in completions) == self.load.tokens
        return seconds


class TransformersSide:
    def __init__(self, folder: Path, dtype: torch.dtype, load: Load) -> None:
        self.model = Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None
        self.prompts = torch.from_numpy(load.prompts(self.model.config.vocab_size))
        self.generation = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            max_new_tokens=load.new_tokens,
            min_new_tokens=load.new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        self.load = load

    def generate(self) -> float:
        start, mask = time.perf_counter(), torch.ones_like(self.prompts)
        out = self.model.generate(self.prompts, attention_mask=mask, generation_config=self.generation)
        seconds = time.perf_counter() - start
        assert out[:, self.prompts.shape[1] :].numel() == self.load.tokens
        return seconds


class VllmSide:
    """A child process in the environment that has vLLM; idle but for its turns."""

    def __init__(self, python: str, folder: Path, dtype: torch.dtype, load: Load, vocab_size: int) -> None:
        job = folder / "job.json"
        prompts, threads = load.prompts(vocab_size).tolist(), torch.get_num_threads()
        fields = {"prompts": prompts, "new_tokens": load.new_tokens, "dtype": dtype_name(dtype), "threads": threads}
        job.write_text(json.dumps(fields))
        self.load, self.log = load, (folder / "vllm.log").open("w+")
        self.child = subprocess.Popen(
            [python, str(VLLM_SIDE), str(folder), str(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self._read()

    def generate(self) -> float:
        assert self.child.stdin
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        answer = json.loads(self._read())
        assert answer["tokens"] == self.load.tokens
        return float(answer["seconds"])

    def _read(self) -> str:
        assert self.child.stdout
        line = self.child.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"vLLM ended: {self.log.read()[-2000:]}")
        return line

    def close(self) -> None:
        assert self.child.stdin and self.child.stdout
        self.child.stdin.close()
        self.child.wait()
        self.child.stdout.close()
        self.log.close()


@contextlib.contextmanager
def others(policy: Policy, dtype: torch.dtype, load: Load, vllm_python: str | None) -> Iterator[dict[str, Side]]:
    """The sides that read the policy from a folder."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, exported = Path(name), copy.copy(policy)
        exported.config = dataclasses.replace(policy.config, eos_token_id=0)
        save_policy(folder, exported)
        sides: dict[str, Side] = {"transformers": TransformersSide(folder, dtype, load)}
        if vllm_python:
            sides["vllm"] = vllm = VllmSide(vllm_python, folder, dtype, load, policy.config.vocab_size)
            stack.callback(vllm.close)
        yield sides


def build(config: PolicyConfig, dtype: torch.dtype) -> Policy:
    policy = Policy(dataclasses.replace(config, eos_token_id=NEVER), dtype)
    policy.initialize(seed=0)
    return policy.to_working_dtype()


def measure(
    config: PolicyConfig, their_config: PolicyConfig, dtype: torch.dtype, load: Load, vllm_python: str | None = None
) -> dict[str, Any]:
    """Rates by side, and the ratios of ours to theirs."""
    ours = build(config, dtype)
    theirs = ours if config == their_config else build(their_config, dtype)
    with others(theirs, dtype, load, vllm_python) as sides:
        sides = {"lockstep": LockstepSide(ours, load), **sides}
        for side in sides.values():
            side.generate()  # untimed
        rounds = [{name: side.generate() for name, side in sides.items()} for _ in range(load.repeats)]
    seconds = {name: [times[name] for times in rounds] for name in sides}
    return {
        "parameters": {"lockstep": ours.num_parameters(), "others": theirs.num_parameters()},
        "tokens_per_second": {name: rates(load.tokens, times) for name, times in seconds.items()},
        "ratio": {name: median(times[name] / times["lockstep"] for times in rounds) for name in sides},
    }


def shapes(quick: bool) -> dict[str, tuple[PolicyConfig, PolicyConfig]]:
    """By name: our policy, and the others'."""
    if quick:
        tiny = qwen3_config(512, 64, 2, 2, 1, 32, 128)
        return {"qwen3 tiny": (tiny, tiny)}
    small = qwen3_config(16384, 256, 8, 4, 2, 64, 768)
    large = qwen3_config(32768, 768, 12, 12, 4, 64, 2304)
    ring = ring_10m_config()
    return {"qwen3 10M": (small, small), "qwen3 108M": (large, large), "ring 9M": (ring, dense_twin(ring))}


def run(args: argparse.Namespace) -> dict[str, Any]:
    load, dtype, vllm_python = (
        QUICK if args.quick else Load(),
        DTYPES[args.dtype],
        os.environ.get("LOCKSTEP_VLLM_PYTHON"),
    )
    results = {}
    for name, (ours, theirs) in shapes(args.quick).items():
        if args.shapes and not any(each in name for each in args.shapes):
            continue
        results[name] = measure(ours, theirs, dtype, load, vllm_python)
        side = LockstepSide(build(ours, dtype), load)
        results[name]["step"] = decode_step.take_apart(side.policy, side.generate, load.batch)
        show(name, results[name])
    return {"load": dataclasses.asdict(load), "dtype": dtype_name(dtype), "shapes": results}


def show(name: str, result: Mapping[str, Any]) -> None:
    ours, theirs = result["parameters"]["lockstep"], result["parameters"]["others"]
    print(f"{name}: {ours:,} parameters" + ("" if ours == theirs else f", the others' {theirs:,}"))
    for side, rate in result["tokens_per_second"].items():
        print(f"  {side:12} {rate['median']:7.0f} tokens/s   ours is {result['ratio'][side]:.2f}x")
    print(decode_step.table(result["step"]), flush=True)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and products on every side")
    parser.add_argument(
        "--shapes", nargs="*", metavar="NAME", help="those whose name holds one of these; all otherwise"
    )
    args = parser.parse_args()
    print(f"written to {write_result(args, f'engine-{args.dtype}', run(args))}")


if __name__ == "__main__":
    main()
