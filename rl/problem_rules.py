"""The rules of a recipe's data section: which problems are trained on. What a rule leaves out is counted."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rl.data import source_of
from rl.data_columns import Row, comparable_answer
from rl.data_config import DataConfig
from rl.data_filters import filter_rows
from rl.duplicates import contamination_report, find_contamination, find_duplicates
from rl.prompts import prompt_lengths

Selection = tuple[list[Row], list[str]]


def select_problems(
    rows: list[Row], held_out: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Selection:
    """The training rows that the recipe wants, and a line on each rule that left some out or found something.

    Raises ValueError where nothing is left of a source, a pass rate is missing, or contamination is to be refused.
    """
    kept, lines = _deduplicated(rows, config)
    kept, more = _filtered(kept, config, tokenizer)
    lines += more
    kept, more = _decontaminated(kept, held_out, config)
    lines += more
    left = {source_of(row) for row in kept}
    for each in config.train:
        if each.source not in left:
            raise ValueError(f"{each.source}: no training problem is left; relax the rules: {'; '.join(lines)}")
    return kept, lines


def _deduplicated(rows: list[Row], config: DataConfig) -> Selection:
    repeats = find_duplicates(rows, near=config.deduplicate == "near") if config.deduplicate != "off" else {}
    if not repeats:
        return rows, []
    answers = [comparable_answer(row.answer) for row in rows]
    others = sum(answers[number] != answers[earlier] for number, earlier in repeats.items())
    line = f"{len(repeats)} of {len(rows)} training problems left out by data.deduplicate"
    contradictions = f"; {others} of them repeat a problem with another answer" if others else ""
    return [row for number, row in enumerate(rows) if number not in repeats], [line + contradictions]


def _filtered(rows: list[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Selection:
    kept, dropped = filter_rows(rows, config.filters)
    if config.filters.prompt_tokens:
        shortest, longest = config.filters.prompt_tokens
        lengths = prompt_lengths(kept, config, tokenizer)
        fitting = [row for row, length in zip(kept, lengths, strict=True) if shortest <= length <= longest]
        dropped["prompt_tokens"] = len(kept) - len(fitting)
        kept = fitting
    return kept, [
        f"{count} of {len(rows)} training problems left out by data.filters.{name}"
        for name, count in dropped.items()
        if count
    ]


def _decontaminated(rows: list[Row], held_out: Sequence[Row], config: DataConfig) -> Selection:
    hits = list(find_contamination(rows, held_out)) if config.contamination != "off" else []
    if not hits:
        return rows, []
    found = contamination_report(hits)
    if config.contamination == "refuse":
        raise ValueError(f"{found}\nLeave them out with data.contamination=drop, or accept them with warn")
    if config.contamination == "warn":
        return rows, [f"warning: {found}\nLeave them out with data.contamination=drop"]
    contaminated = {(hit.train.source, hit.train.id) for hit in hits}
    return [row for row in rows if (row.source, row.id) not in contaminated], [f"left out: {found}"]
