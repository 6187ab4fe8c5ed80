"""First suspects: which tokens are compared, and whether both sides saw the same prompt."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from rl.data_columns import Row
from rl.data_config import DataConfig
from rl.diagnose.evidence import Evidence
from rl.diagnose.finding import Finding
from rl.prompts import encode

SHIFTS = (-1, 1, -2, 2)


def check_response_mask(evidence: Evidence) -> Finding | None:
    """The trainer's mask has to cover the completion and nothing else."""
    wrong = []
    for place, each in enumerate(evidence.sequences):
        right = np.arange(len(each.token_ids)) >= len(each.prompt_ids)
        if not np.array_equal(each.response_mask, right):
            wrong.append(place)
    if not wrong:
        return None
    each = evidence.sequences[wrong[0]]
    covered = np.flatnonzero(each.response_mask)
    first, last = (int(covered[0]), int(covered[-1])) if len(covered) else (-1, -1)
    return Finding(
        "wrong response mask",
        f"the trainer's response mask covers tokens {first} to {last}, the completion lies at "
        f"{len(each.prompt_ids)} to {len(each.token_ids) - 1}",
        "the response mask of the trainer's batch (trainer/batch.py)",
        "build the mask from the prompt's length: true on every completion token and on no other",
        {"sequences": len(wrong), "shift": first - len(each.prompt_ids), **_shift_numbers(evidence)},
    )


def check_shift(evidence: Evidence) -> Finding | None:
    """One side's record may describe the neighbours of the tokens that it claims to describe."""
    shift = _found_shift(evidence)
    if shift is None:
        return None
    return Finding(
        "shifted log-probs",
        f"the {evidence.suspect}'s log-probs are those of other tokens, {abs(shift)} "
        f"{'later' if shift > 0 else 'earlier'}",
        f"the shift between logits and labels in the {evidence.suspect}",
        "row t - 1 of the hidden states predicts token t; align every per-token tensor to the token that it describes",
        _shift_numbers(evidence),
    )


def _shift_numbers(evidence: Evidence) -> dict[str, float | int | str]:
    shift = _found_shift(evidence)
    return {} if shift is None else {"log_probs_explained_by_shift": shift}


def _found_shift(evidence: Evidence) -> int | None:
    return next((shift for shift in SHIFTS if _is_shifted(evidence, shift)), None)


def _is_shifted(evidence: Evidence, shift: int) -> bool:
    """Whether the suspect's record of token n is what is expected of token n + shift, for all that have one."""

    def shifted(place: int) -> np.ndarray:
        row, observed = evidence.reference[place], evidence.observed[place]
        places = np.arange(len(observed)) + len(evidence.sequences[place].prompt_ids) - 1 + shift
        inside = (places >= 0) & (places < len(row))
        return np.where(inside, row[np.clip(places, 0, len(row) - 1)], observed)

    longer = any(len(each.completion_ids) > abs(shift) for each in evidence.sequences)
    return longer and evidence.residual(shifted) is not None


def check_prompt(evidence: Evidence) -> Finding | None:
    """The prompt's tokens have to come from its text once, by the recipe's template, and be those the suspect saw."""
    config, rows = evidence.sample.recipe.data, [each.row for each in evidence.sequences]
    pairs = zip(encode(rows, config, evidence.tokenizer), evidence.sequences, strict=True)
    strange = [at for at, ((_, ids), each) in enumerate(pairs) if not np.array_equal(ids, each.prompt_ids)]
    if strange:
        return _other_tokens(evidence, strange)
    if not evidence.mismatch:
        return None
    for name, what, prompts in _other_prompts(evidence):
        if any(not np.array_equal(ids, each.prompt_ids) for ids, each in zip(prompts, evidence.sequences, strict=True)):
            residual = evidence.residual(partial(_with_prompts, evidence, prompts))
            if residual is not None:
                return _other_prompt(evidence, name, what, prompts[0])
    return None


def _with_prompts(evidence: Evidence, prompts: list[np.ndarray], place: int) -> np.ndarray:
    return evidence.completion(evidence.sequences[place], prompt=prompts[place])


def _other_tokens(evidence: Evidence, strange: list[int]) -> Finding:
    each = evidence.sequences[strange[0]]
    for name, what, prompts in _other_prompts(evidence):
        if all(np.array_equal(prompts[at], evidence.sequences[at].prompt_ids) for at in strange):
            return _other_prompt(evidence, name, what, prompts[strange[0]])
    return Finding(
        "other prompt tokens",
        f"the {len(each.prompt_ids)} prompt tokens of {len(strange)} sequences are not what the recipe makes of their "
        "problems",
        "data.chat, data.prompt_template and the tokenizer of the policy",
        "encode prompts once, with the policy's own tokenizer and template, and send token ids to the engine",
        {"sequences": len(strange), "prompt_tokens": len(each.prompt_ids)},
    )


def _other_prompt(evidence: Evidence, name: str, what: str, prompt: np.ndarray) -> Finding:
    return Finding(
        name,
        f"the record is that of other prompts: {what}",
        "data.chat, data.system, data.thinking and the chat template that the engine applies",
        "encode prompts once, with the policy's own template, and send token ids to the engine instead of text",
        {"prompt_tokens": len(evidence.sequences[0].prompt_ids), "explained_by_prompt_tokens": len(prompt)},
    )


def _other_prompts(evidence: Evidence) -> Iterator[tuple[str, str, list[np.ndarray]]]:
    """Ways in which prompts go wrong: name of the cause, the way, and int64 ids for every sequence."""
    config, tokenizer, rows = evidence.sample.recipe.data, evidence.tokenizer, [each.row for each in evidence.sequences]
    for what, changed in _other_configs(config, tokenizer.chat_template is not None):
        yield "wrong chat template", what, [_encoded(evidence, row, changed) for row in rows]
    texts = [each.prompt_text for each in evidence.sequences]
    for what, special in (("with special tokens added once more", True), ("without special tokens", False)):
        ids = tokenizer(texts, add_special_tokens=special)["input_ids"]
        yield "prompt tokenised twice", f"the text, {what}", [np.array(each, dtype=np.int64) for each in ids]
    if tokenizer.chat_template is not None:
        bare = config.model_copy(update={"prompt_template": "{problem}"})
        again = [replace(row, problem=text, messages=()) for row, text in zip(rows, texts, strict=True)]
        twice = [_encoded(evidence, row, bare) for row in again]
        yield "prompt tokenised twice", "the template around what had already been through it", twice
        yield "wrong chat template", "without the opening of the answer", [_unopened(evidence, row) for row in rows]


def _encoded(evidence: Evidence, row: Row, config: DataConfig) -> np.ndarray:
    return np.array(encode([row], config, evidence.tokenizer)[0][1], dtype=np.int64)


def _other_configs(config: DataConfig, has_template: bool) -> Iterator[tuple[str, DataConfig]]:
    off = {"chat": "off", "system": None, "thinking": None}
    yield "plain text, no chat template", config.model_copy(update=off)
    yield "the bare problem", config.model_copy(update={**off, "prompt_template": "{problem}"})
    if has_template:
        yield "the tokenizer's chat template", config.model_copy(update={"chat": "on"})
        yield "no system message", config.model_copy(update={"system": None})
        yield "thinking left to the template", config.model_copy(update={"thinking": None})


def _unopened(evidence: Evidence, row: Row) -> np.ndarray:
    """The chat as the recipe makes it, without the generation prompt at its end."""
    opened = evidence.tokenizer.apply_chat_template
    ids = opened(_chat(row, evidence.sample.recipe.data), tokenize=True, return_dict=False, add_generation_prompt=False)
    return np.array(ids, dtype=np.int64)


def _chat(row: Row, config: DataConfig) -> list[dict[str, str]]:
    messages = row.messages or (("user", config.prompt(row.problem).strip()),)
    if config.system is not None and messages[0][0] != "system":
        messages = (("system", config.system), *messages)
    return [{"role": role, "content": content} for role, content in messages]
