"""Generated tokens per second: the local engine against `transformers` generate, on the same CPU threads.

    python -m benchmarks.engine [--out FOLDER] [--quick]

transformers has no Ring-linear model, so the two policies are not the same network. Ours is Ring-shaped: three layers
of lightning attention and one of softmax attention, experts in all layers but the first. Theirs is a Qwen3 of equal
width, layers, heads, head dimension and feed-forward width: softmax attention everywhere and a dense feed-forward,
which is as wide as all the experts that one of our tokens meets. Weights are random on both sides.

Both sample at temperature 1 from the whole vocabulary, with a cache, and never stop early: 64 prompts of 32 tokens, 128
new tokens each. The engine also records every token's log-probability, as it always does. The runs alternate; the
ratio is that of the medians. The result is written to engine.json.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from benchmarks.common import alternate, arguments, rates, ring_10m_config, write_result
from policy.checkpoint import DTYPES
from policy.config import PolicyConfig
from policy.transformer import Policy
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.request import Request, SamplingParams

NEVER = -1  # end-of-text id that no token has
COMPARISON = (
    "Different networks of equal width, layers, heads and active feed-forward width. lockstep: a Ring-shaped policy, "
    "3 of 4 layers with lightning attention, 3 of 4 with experts. transformers: a dense Qwen3, softmax attention in "
    "every layer, because it has no Ring-linear. Random weights, no early stop."
)


@dataclass(frozen=True)
class Load:
    batch: int = 64
    prompt: int = 32
    new_tokens: int = 128
    repeats: int = 5

    @property
    def tokens(self) -> int:
        return self.batch * self.new_tokens

    def prompts(self, vocab_size: int) -> np.ndarray:
        """int64 [batch, prompt]"""
        return np.random.default_rng(0).integers(0, vocab_size, (self.batch, self.prompt))


QUICK = Load(batch=4, prompt=8, new_tokens=8, repeats=2)


class LockstepSide:
    def __init__(self, config: PolicyConfig, dtype: torch.dtype, load: Load) -> None:
        policy = Policy(dataclasses.replace(config, eos_token_id=NEVER), dtype)
        policy.initialize(seed=0)
        self.parameters = policy.num_parameters()
        self.engine = Engine(policy.to_working_dtype(), RolloutConfig(max_batch=load.batch))
        sampling = SamplingParams(load.new_tokens)
        prompts = load.prompts(config.vocab_size)
        self.requests = [Request(i, ids, 1, sampling, seed=0, prompt=i) for i, ids in enumerate(prompts)]

    def generate(self) -> int:
        """New tokens made."""
        return sum(len(completion.token_ids) for completion in self.engine.generate(self.requests))


class TransformersSide:
    def __init__(self, config: PolicyConfig, dtype: torch.dtype, load: Load) -> None:
        torch.manual_seed(0)
        self.model = Qwen3ForCausalLM(qwen3_config(config)).eval()
        self.model.to(dtype=dtype)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.prompts = torch.from_numpy(load.prompts(config.vocab_size))
        self.generation = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            max_new_tokens=load.new_tokens,
            min_new_tokens=load.new_tokens,
            pad_token_id=0,
        )

    def generate(self) -> int:
        """New tokens made."""
        out = self.model.generate(
            self.prompts, attention_mask=torch.ones_like(self.prompts), generation_config=self.generation
        )
        return out[:, self.prompts.shape[1] :].numel()


def qwen3_config(config: PolicyConfig) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )


def measure(config: PolicyConfig, dtype: torch.dtype, load: Load) -> dict[str, Any]:
    ours, theirs = LockstepSide(config, dtype, load), TransformersSide(config, dtype, load)
    assert ours.generate() == theirs.generate() == load.tokens, "a side stopped early"
    our_seconds, their_seconds = alternate(ours.generate, theirs.generate, load.repeats)
    our_rates, their_rates = rates(load.tokens, our_seconds), rates(load.tokens, their_seconds)
    return {
        "lockstep": {"parameters": ours.parameters, "tokens_per_second": our_rates},
        "transformers": {"parameters": theirs.parameters, "tokens_per_second": their_rates},
        "ratio": our_rates["median"] / their_rates["median"],
    }


def main() -> None:
    args = arguments(__doc__)
    load, config = QUICK if args.quick else Load(), ring_10m_config()
    results = {name: measure(config, dtype, load) for name, dtype in DTYPES.items()}
    record = {
        "comparison": COMPARISON,
        "load": dataclasses.asdict(load),
        "policy": dataclasses.asdict(config),
        **results,
    }
    path = write_result(args, "engine", record)
    print(COMPARISON)
    for name, result in results.items():
        sides = [f"{side} {result[side]['tokens_per_second']['median']:.0f}" for side in ("lockstep", "transformers")]
        print(f"{name}: {', '.join(sides)} tokens/s, ratio {result['ratio']:.2f}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
