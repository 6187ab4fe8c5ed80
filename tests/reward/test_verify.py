"""Verdicts, as tables of near misses on both sides. A verdict found wrong becomes a row here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.extract import BOXED, extract_answer
from reward.result import Reason, RewardResult
from reward.verify import MAX_ANSWER_CHARS, verify_fast, verify_symbolic

INTEGERS = [
    (r"\boxed{73}", "73", 1.0, "correct_integer"),
    (r"\boxed{73}", "073", 1.0, "correct_integer"),
    (r"\boxed{073}", "73", 1.0, "correct_integer"),
    (r"\boxed{000}", "0", 1.0, "correct_integer"),
    (r"\boxed{-0}", "0", 1.0, "correct_integer"),
    (r"\boxed{+73}", "73", 1.0, "correct_integer"),
    (r"\boxed{-073}", "-73", 1.0, "correct_integer"),
    (r"\boxed{ 73 }", " 73\n", 1.0, "correct_integer"),
    (r"\boxed{$73$}", "$73$", 1.0, "correct_integer"),
    (r"\boxed{73.}", "73", 1.0, "correct_integer"),
    (r"\boxed{1,234,567}", "1234567", 1.0, "correct_integer"),
    (r"\boxed{1{,}234}", "1234", 1.0, "correct_integer"),
    (r"\boxed{1,\!234}", "1234", 1.0, "correct_integer"),
    (r"\boxed{12\,345}", "12345", 1.0, "correct_integer"),
    (r"\boxed{72} no, \boxed{73}", "73", 1.0, "correct_integer"),
    (r"\boxed{73} no, \boxed{72}", "73", 0.0, "wrong_integer"),
    (r"\boxed{74}", "73", 0.0, "wrong_integer"),
    (r"\boxed{-73}", "73", 0.0, "wrong_integer"),
    (r"\boxed{730}", "73", 0.0, "wrong_integer"),
    (r"\boxed{7}", "73", 0.0, "wrong_integer"),
    (r"\boxed{1,235}", "1234", 0.0, "wrong_integer"),
    (r"\boxed{" + "9" * 5000 + "}", "9" * 5000, 1.0, "correct_integer"),
    (r"\boxed{" + "9" * 5000 + "}", "9" * 5001, 0.0, "wrong_integer"),
    (r"\boxed{" + "9" * 1_000_000 + "}", "73", 0.0, "wrong_integer"),
    ("it is 73", "73", 0.0, "no_answer"),
    (r"\boxed{73", "73", 0.0, "no_answer"),
    (r"\boxed{}", "0", 0.0, "no_answer"),
    ("it is a half", r"\frac{1}{2}", 0.0, "no_answer"),
    (r"\boxed{73}", " ", 0.0, "bad_gold"),
    (r"\boxed{" + "x" * (MAX_ANSWER_CHARS + 1) + "}", "x", 0.0, "unparsable_answer"),
    (r"\boxed{" + "{" * 100_000 + "73" + "}" * 100_000 + "}", "73", 0.0, "unparsable_answer"),
]

SYMBOLIC = [
    # integers in another dress
    (r"\boxed{73.0}", "73", 1.0, "correct_symbolic"),
    (r"\boxed{73.5}", "73", 0.0, "wrong_symbolic"),
    (r"\boxed{\frac{146}{2}}", "73", 1.0, "correct_symbolic"),
    (r"\boxed{\frac{147}{2}}", "73", 0.0, "wrong_symbolic"),
    (r"\boxed{10^3}", "1000", 1.0, "correct_symbolic"),
    (r"\boxed{10^4}", "1000", 0.0, "wrong_symbolic"),
    (r"\boxed{x = 73}", "73", 1.0, "correct_symbolic"),
    (r"\boxed{x = 37}", "73", 0.0, "wrong_symbolic"),
    (r"\boxed{2 + 3 = 5}", "5", 1.0, "correct_symbolic"),
    (r"\boxed{5!}", "120", 1.0, "correct_symbolic"),
    (r"\boxed{\binom{5}{2}}", "10", 1.0, "correct_symbolic"),
    (r"\boxed{\$73}", "73", 1.0, "correct_symbolic"),
    (r"\boxed{73^\circ}", "73", 1.0, "correct_symbolic"),
    (r"\boxed{73 \text{ apples}}", "73", 1.0, "correct_symbolic"),
    (r"\boxed{72 \text{ apples}}", "73", 0.0, "wrong_symbolic"),
    (r"\boxed{\(73\)}", "73", 1.0, "correct_symbolic"),
    ("\\boxed{\u221273}", "-73", 1.0, "correct_symbolic"),
    # more than one number is not the one among them that fits
    (r"\boxed{72, 73}", "73", 0.0, "wrong_symbolic"),
    (r"\boxed{72 \text{ or } 73}", "73", 0.0, "wrong_symbolic"),
    (r"\boxed{\text{either 72 or 73}}", "73", 0.0, "wrong_symbolic"),
    (r"\boxed{about 73}", "73", 0.0, "wrong_symbolic"),
    (r"\boxed{5 6}", "11", 0.0, "unparsable_answer"),
    (r"\boxed{5\ 6}", "11", 0.0, "unparsable_answer"),
    (r"\boxed{\text{final answer is $73$. I hope} 72}", "73", 0.0, "wrong_symbolic"),
    (r"\boxed{)( $\frac{1}{2}$}", r"\frac{1}{2}", 0.0, "unparsable_answer"),
    # fractions and decimals
    (r"\boxed{1/2}", r"\frac{1}{2}", 1.0, "correct_symbolic"),
    (r"\boxed{0.5}", r"\frac12", 1.0, "correct_symbolic"),
    (r"\boxed{\dfrac{2}{4}.}", r"\frac{1}{2}", 1.0, "correct_symbolic"),
    (r"\boxed{2/1}", r"\frac{1}{2}", 0.0, "wrong_symbolic"),
    (r"\boxed{0.333333}", r"\frac13", 1.0, "correct_symbolic"),
    (r"\boxed{0.33}", r"\frac13", 0.0, "wrong_symbolic"),
    (r"\boxed{1\frac12}", "1.5", 1.0, "correct_symbolic"),
    (r"\boxed{1.5 \times 10^3}", "1500", 1.0, "correct_symbolic"),
    (r"\boxed{50\%}", "0.5", 1.0, "correct_symbolic"),
    (r"\boxed{2}", r"\frac{4}{2}", 1.0, "correct_symbolic"),
    # roots and constants
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1.0, "correct_symbolic"),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{8}", 0.0, "wrong_symbolic"),
    (r"\boxed{1.41}", r"\sqrt{2}", 0.0, "wrong_symbolic"),
    (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}", 1.0, "correct_symbolic"),
    (r"\boxed{π}", r"\pi", 1.0, "correct_symbolic"),
    (r"\boxed{3.14}", r"\pi", 0.0, "wrong_symbolic"),
    (r"\boxed{3i + 2}", "2+3i", 1.0, "correct_symbolic"),
    (r"\boxed{3i - 2}", "2+3i", 0.0, "wrong_symbolic"),
    (r"\boxed{\log 2}", r"\ln 2", 0.0, "wrong_symbolic"),
    # expressions, sets, tuples, intervals, matrices, words
    (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0, "correct_symbolic"),
    (r"\boxed{(x+1)^2 + 1}", "x^2+2x+1", 0.0, "wrong_symbolic"),
    (r"\boxed{y}", "x", 0.0, "wrong_symbolic"),
    (r"\boxed{y = 5}", "x = 5", 0.0, "wrong_symbolic"),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1.0, "correct_symbolic"),
    (r"\boxed{\{1, 2, 3\}}", r"\{1, 2\}", 0.0, "wrong_symbolic"),
    (r"\boxed{(1, 2)}", "(1, 2)", 1.0, "correct_symbolic"),
    (r"\boxed{(2, 1)}", "(1, 2)", 0.0, "wrong_symbolic"),
    (r"\boxed{[0, 1)}", "[0,1)", 1.0, "correct_symbolic"),
    (r"\boxed{[0, 1]}", "[0,1)", 0.0, "wrong_symbolic"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1.0, "correct_symbolic"),
    (r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 0.0, "wrong_symbolic"),
    (r"\boxed{\text{(A)}}", "A", 1.0, "correct_symbolic"),
    (r"\boxed{B}", "A", 0.0, "wrong_symbolic"),
    # nothing to compare
    (r"\boxed{\frac{1}{0}}", "73", 0.0, "wrong_symbolic"),
    (r"\boxed{\frac{1}}", "73", 0.0, "unparsable_answer"),
    (r"\boxed{)(}", "73", 0.0, "unparsable_answer"),
    (r"\boxed{\frac12}", r"\frac{", 0.0, "bad_gold"),
    (r"\boxed{\frac12}", "1 2", 0.0, "bad_gold"),
    (r"\boxed{73x}", r"\frac{0}{0}", 0.0, "verifier_error"),
    # characters that look like something else: full-width digits, zero width, right to left, null, lone surrogate
    ("\\boxed{\uff17\uff13}", "73", 0.0, "unparsable_answer"),
    ("\\boxed{\u0667\u0663}", "73", 0.0, "unparsable_answer"),
    ("\\boxed{7\u200b3}", "73", 0.0, "unparsable_answer"),
    ("\\boxed{\u202e37}", "73", 0.0, "unparsable_answer"),
    ("\\boxed{73\x00}", "73", 0.0, "unparsable_answer"),
    ("\\boxed{\ud800}", "73", 0.0, "unparsable_answer"),
]


@pytest.mark.parametrize(("completion", "gold", "score", "reason"), INTEGERS, ids=range(len(INTEGERS)))
def test_fast(completion: str, gold: str, score: float, reason: str) -> None:
    result = verify_fast(completion, gold, BOXED)
    assert result is not None
    assert (result.score, result.reason) == (score, reason)


@pytest.mark.parametrize(("completion", "gold", "score", "reason"), SYMBOLIC, ids=range(len(SYMBOLIC)))
def test_symbolic(completion: str, gold: str, score: float, reason: str) -> None:
    assert verify_fast(completion, gold, BOXED) is None
    extracted = extract_answer(completion, BOXED)
    assert extracted is not None
    result = verify_symbolic(extracted, gold)
    assert (result.score, result.extracted, result.reason) == (score, extracted, reason)


def test_another_marker_is_honoured() -> None:
    result = verify_fast("\\boxed{72}\nAnswer: 73", "73", "Answer:")
    assert result is not None
    assert (result.extracted, result.reason) == ("73", "correct_integer")


@given(st.integers(), st.sampled_from([-1, 0, 0, 1, 10]))
def test_integers_of_any_size_agree_with_python(gold: int, error: int) -> None:
    answer = gold + error
    for written in (f"{answer}", f"{answer:,}", f"{answer:+d}", f"{answer:08d}"):
        for right in (f"{gold}", f"{gold:,}", f"{gold:03d}"):
            result = verify_fast(f"\\boxed{{{written}}}", right, BOXED)
            assert result is not None
            assert result.score == float(error == 0)


@pytest.mark.parametrize("reason", Reason)
def test_only_correct_scores_and_only_the_verifier_fails(reason: Reason) -> None:
    result = RewardResult.of(reason, "73", 1.0)
    assert result.score == (1.0 if reason in {"correct_integer", "correct_symbolic"} else 0.0)
    assert result.is_failure == (reason in {"bad_gold", "timeout", "worker_died", "verifier_error"})
