"""The vLLM side of benchmarks.engine; run in the environment that has vLLM: PYTHON engine_vllm.py FOLDER JOB.

FOLDER holds a Qwen3 policy, JOB is JSON: prompts (token ids), new_tokens, dtype and threads. Writes "ready" to standard
output, then for every line read a line of JSON: seconds, and the new tokens made in them. Ends with its input.
"""

import json
import os
import sys
import time
from pathlib import Path


def main(folder: str, job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    # One process, which has all threads: the fastest settings on two cores.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(job["threads"]),
    }
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own chatter
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder, dtype=job["dtype"], enforce_eager=True, kv_cache_memory_bytes=256 << 20, max_model_len=1024, seed=0,
        skip_tokenizer_init=True, enable_prefix_caching=False,
    )  # fmt: skip
    sampling = SamplingParams(temperature=1.0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
