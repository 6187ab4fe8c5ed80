"""Greedy completions by vLLM; run by test_vllm.py in the environment that has it: PYTHON vllm_generate.py JOB ANSWER.

JOB is JSON: folders, each with a policy, and for all of them prompts (token ids) and max_new_tokens. ANSWER becomes
JSON: for each folder, for each prompt, (token ids, finish reason, their log-probs).
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.outputs import CompletionOutput


def complete(folder: str, prompts: list[list[int]], max_new_tokens: int) -> list[tuple[list[int], str, list[float]]]:
    """What ends a text is the folder's to say; left alone, vLLM would round FP32 weights to 16 bits."""
    engine = LLM(folder, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, logprobs=0, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [read(answer.outputs[0]) for answer in answers]


def read(output: CompletionOutput) -> tuple[list[int], str, list[float]]:
    token_ids = list(output.token_ids)
    log_probs = [entry[token].logprob for entry, token in zip(output.logprobs, token_ids, strict=True)]
    return token_ids, output.finish_reason, log_probs


def main(job_file: str, answer_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    answers = []
    for folder in job["folders"]:
        answers.append(complete(folder, job["prompts"], job["max_new_tokens"]))
        cleanup_dist_env_and_memory()
    Path(answer_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
