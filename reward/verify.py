r"""Compares an answer with the gold one without symbolic algebra, in microseconds, wherever the gold answer allows it.

The gold answer chooses how:

- identical text: right, whatever it says.
- integer, number: exact arithmetic. The answer must be a number too, written out: with the gold answer 120, neither
  `5!` nor `\sum_{k=1}^{15} k` earns anything, or a policy would learn to repeat the question. So no completion can
  reach the symbolic verifier on a data set of integers, AIME's for one.
- choice: a letter from A to J, of which `(C)`, `\text{C}`, `C.` and `C) 12` are spellings.
- text: words, compared without regard to case and setting.

Anything else is left to `reward.symbolic`, in a process that can be killed.
"""

import re
import time
from itertools import accumulate

from reward.extract import extract_answer
from reward.number import Number, parse_number, same_number
from reward.result import Method, Reason, RewardResult
from reward.tidy import is_clean, tidy

# Beyond these no answer is one, unless the gold one is as large; parsing it would only burn the time limit. The
# grammar takes seconds for thirty brackets in each other.
MAX_ANSWER_CHARS = 4096
MAX_SYMBOLIC_CHARS = 512
MAX_DEPTH = 16

# Commas as `1,234` or, in LaTeX, `1{,}234`, `1,\!234`, `1\,234`. ASCII digits only.
_INTEGER = re.compile(r"([+-]?)([0-9]++|[1-9][0-9]{0,2}(?:(?:,(?:\\!)?|\{,\}|\\,)[0-9]{3})++)\.?")
_CHOICE = re.compile(r"\(?([A-J])[).]?")
_CHOSEN = re.compile(r"(?:(?:option|choice|answer):? ?)?(?:\(([A-J])\)(.*)|([A-J])(?:[).:](.*))?)", re.IGNORECASE)
_SECOND_CHOICE = re.compile(r"\([A-J]\)|(?:\b(?:or|and)\b|[,/&]) ?\(?[A-J]\b")
# A gold answer that is an equation, not the value of x, f(x) or m + n.
_EQUATION = re.compile(r"[0-9^].*=")
_IN_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")
_ARTICLE = re.compile(r"^(?:the|an?) ")

# Operations that an answer may only name if the gold one does: always, and where there is no variable in it.
_UNDONE = re.compile(
    r"\\(?:i*int|oint|sum|prod|lim)(?![A-Za-z])|\\frac\{(?:d|\\partial)[^{}]*\}\{(?:d|\\partial) ?\\?[a-z]"
)
_UNDONE_ON_NUMBERS = [
    re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?(?![A-Za-z])"),
    re.compile(r"\\(?:log|ln|lg|exp)(?![A-Za-z])"),
    re.compile(r"!|\\[dt]?binom(?![A-Za-z])"),
    re.compile(r"\\(?:max|min|gcd|lcm|det|[bp]?mod|lfloor|lceil|operatorname)(?![A-Za-z])"),
]
_NO_VARIABLE = re.compile(
    r"\\(?:text|operatorname)\{[^{}]*\}|\\(?!(?:alpha|beta|gamma|theta|phi|lambda|omega)(?![A-Za-z]))[A-Za-z]+|[eEi]"
)
_LETTER = re.compile(r"[A-Za-z]")

_Verdict = tuple[Reason, Method, str]


def verify_fast(completion: str, gold: str, marker: str) -> RewardResult | None:
    """Decide without symbolic algebra, or return None if that is what it takes."""
    start = time.perf_counter()
    extracted = extract_answer(completion, marker)
    verdict = _verdict(extracted, gold)
    if verdict is None:
        return None
    reason, method, gold_form = verdict
    milliseconds = (time.perf_counter() - start) * 1000
    return RewardResult.of(reason, extracted, milliseconds, gold_form, method)


def _verdict(extracted: str | None, gold: str) -> _Verdict | None:
    if not gold.strip():
        return Reason.BAD_GOLD, Method.NONE, gold
    if extracted is None:
        return Reason.NO_ANSWER, Method.NONE, gold
    gold_integer, integer = _canonical_integer(gold), _canonical_integer(extracted)
    if gold_integer is not None and integer is not None:
        return _right_if(integer == gold_integer), Method.INTEGER, gold_integer
    if len(extracted) > MAX_ANSWER_CHARS:
        return Reason.UNPARSABLE_ANSWER, Method.NONE, gold
    return _verdict_on_text(tidy(extracted), tidy(gold), is_clean(extracted))


def _verdict_on_text(answer: str, gold: str, clean: bool) -> _Verdict | None:
    """answer, gold: tidy. clean: no character of the answer hides or looks like another."""
    if answer == gold:
        return Reason.CORRECT, Method.IDENTICAL, gold
    if not clean or not answer:
        return Reason.UNPARSABLE_ANSWER, Method.NONE, gold
    if choice := _CHOICE.fullmatch(_IN_TEXT.sub(r"\1", gold)):
        return _right_if(_chosen(answer) == choice[1]), Method.CHOICE, choice[1]
    if (number := parse_number(gold)) is not None and not _EQUATION.search(gold):
        return _reason_number(answer, number), Method.NUMBER, str(number)
    if _is_text(gold):
        return _right_if(_words(answer) == _words(gold)), Method.TEXT, _words(gold)
    if len(answer) > max(MAX_SYMBOLIC_CHARS, 2 * len(gold)) or _depth(answer) > max(MAX_DEPTH, _depth(gold)):
        return Reason.UNPARSABLE_ANSWER, Method.NONE, gold
    return (Reason.WRONG_FORM, Method.SYMBOLIC, gold) if _leaves_work(answer, gold) else None


def _right_if(right: bool) -> Reason:
    return Reason.CORRECT if right else Reason.WRONG


def _canonical_integer(text: str) -> str | None:
    """`073`, `$73$`, `+73` and `73.` give `73`; None if not an integer. Text, as int() refuses over 4300 digits."""
    match = _INTEGER.fullmatch(text.strip().strip("$").strip())
    if match is None:
        return None
    digits = re.sub(r"[^0-9]", "", match[2]).lstrip("0") or "0"
    return "-" + digits if match[1] == "-" and digits != "0" else digits


def _reason_number(answer: str, gold: Number) -> Reason:
    number = parse_number(answer)
    if number is None:
        return Reason.WRONG_FORM
    if not same_number(number, gold):
        return Reason.WRONG
    return Reason.WRONG_FORM if number.undone and not gold.undone else Reason.CORRECT


def _chosen(answer: str) -> str | None:
    """The one letter that the answer names, upper case."""
    match = _CHOSEN.fullmatch(_IN_TEXT.sub(r"\1", answer))
    if match is None or _SECOND_CHOICE.search(match[2] or match[4] or ""):
        return None
    return str(match[1] or match[3]).upper()


def _is_text(gold: str) -> bool:
    """All of it inside \\text{}, or a bare phrase with a word of four letters: xy and abc may be products."""
    bare = _WORDS.fullmatch(gold)
    return bool(_IN_TEXT.fullmatch(gold)) or (bare is not None and max(map(len, gold.split())) >= 4)


def _words(text: str) -> str:
    in_text = _IN_TEXT.fullmatch(text)
    return _ARTICLE.sub("", (in_text[1] if in_text else text).strip(" .").lower())


def _depth(text: str) -> int:
    """How many brackets stand in each other."""
    return max(accumulate((character in "{[(") - (character in "}])") for character in text), default=0)


def _leaves_work(answer: str, gold: str) -> bool:
    """Whether the answer names an operation that the gold one has carried out: an integral, or the sine of a number."""
    operations = [_UNDONE] if _LETTER.search(_NO_VARIABLE.sub("", answer)) else [_UNDONE, *_UNDONE_ON_NUMBERS]
    return any(operation.search(answer) and not operation.search(gold) for operation in operations)
