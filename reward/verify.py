"""Compares an answer with the gold one: integers exactly, in microseconds; everything else with math-verify.

`verify_symbolic` may run for ever or eat all memory on a hostile answer, so only `reward.worker` calls it in a run.
"""

import re
import time

from reward.extract import extract_answer
from reward.result import Reason, RewardResult

# Beyond this no answer is one; parsing it would only burn the time limit.
MAX_ANSWER_CHARS = 4096

# Commas as `1,234` or, in LaTeX, `1{,}234`, `1,\!234`, `1\,234`. ASCII digits only.
_INTEGER = re.compile(r"([+-]?)([0-9]++|[0-9]{1,3}(?:(?:,(?:\\!)?|\{,\}|\\,)[0-9]{3})++)\.?")
_NUMBERS_SIDE_BY_SIDE = re.compile(r"[0-9](?:\s|\\[,;:! ])+[0-9]")
_MATH_DELIMITER = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")

# What sympy and the LaTeX parser are known to raise on odd input. MemoryError is not here: it must end the worker.
_VERIFIER_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    NotImplementedError,
)


def verify_fast(completion: str, gold: str, marker: str) -> RewardResult | None:
    """Decide without symbolic algebra, or return None if that is what it takes.

    Decided here: an empty gold, no answer, an answer that is too long, and any pair of integers of whatever length.
    """
    start = time.perf_counter()
    extracted = extract_answer(completion, marker)
    reason = _reason_fast(extracted, gold)
    return RewardResult.of(reason, extracted, _milliseconds_since(start)) if reason else None


def verify_symbolic(extracted: str, gold: str) -> RewardResult:
    """Compare two LaTeX or plain expressions with math-verify. No time or memory limit: the process sets them."""
    start = time.perf_counter()
    return RewardResult.of(_reason_symbolic(extracted, gold), extracted, _milliseconds_since(start))


def _milliseconds_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def _reason_fast(extracted: str | None, gold: str) -> Reason | None:
    if not gold.strip():
        return Reason.BAD_GOLD
    if extracted is None:
        return Reason.NO_ANSWER
    gold_integer, integer = _canonical_integer(gold), _canonical_integer(extracted)
    if gold_integer is not None and integer is not None:
        return Reason.CORRECT_INTEGER if integer == gold_integer else Reason.WRONG_INTEGER
    return Reason.UNPARSABLE_ANSWER if len(extracted) > MAX_ANSWER_CHARS else None


def _canonical_integer(text: str) -> str | None:
    """`073`, `$73$`, `+73` and `73.` give `73`; None if not an integer. Text, as int() refuses over 4300 digits."""
    match = _INTEGER.fullmatch(text.strip().strip("$").strip())
    if match is None:
        return None
    digits = re.sub(r"[^0-9]", "", match[2]).lstrip("0") or "0"
    return "-" + digits if match[1] == "-" and digits != "0" else digits


def _reason_symbolic(extracted: str, gold: str) -> Reason:
    from math_verify import verify  # here, so that a run of integers never pays for importing sympy

    try:
        gold_parsed = _parse(gold)
        if not gold_parsed:
            return Reason.BAD_GOLD
        answer_parsed = _parse(extracted)
        if not answer_parsed:
            return Reason.UNPARSABLE_ANSWER
        # 0 disables math-verify's own limit, which needs SIGALRM and the main thread.
        equal = verify(gold_parsed, answer_parsed, timeout_seconds=0, raise_on_error=True)
    except _VERIFIER_ERRORS:
        return Reason.VERIFIER_ERROR
    return Reason.CORRECT_SYMBOLIC if equal else Reason.WRONG_SYMBOLIC


def _parse(text: str) -> list[object]:
    """Parse the whole text as one expression, or return []: no picking of a likely number out of prose."""
    from math_verify import LatexExtractionConfig, parse

    # The LaTeX grammar reads `5 6` as 5 + 6, like a mixed number.
    if _NUMBERS_SIDE_BY_SIDE.search(text):
        return []
    content = _MATH_DELIMITER.sub("", text).strip().removesuffix(".")
    config = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)
    parsed: list[object] = parse(
        f"\\boxed{{{content}}}",
        [config],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=0,
        raise_on_error=True,
    )
    return parsed
