"""Where math-verify is overruled or cannot say: the reasons. Its verdicts are in `cases.py`."""

import logging

import pytest

from reward.symbolic import verify_symbolic


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off


@pytest.mark.parametrize(
    ("answer", "gold", "reason"),
    [
        ("x+1", "1+x", "correct"),
        ("x+1", "x-1", "wrong"),
        ("x", "\\frac{", "bad_gold"),
        ("x", "1 2", "bad_gold"),
        ("\\frac{", "x", "unparsable_answer"),
        (")(", "x", "unparsable_answer"),
        ("5 6", "\\sqrt{900}", "unparsable_answer"),
        ("73x", "\\frac{0}{0}", "verifier_error"),
        ("\\frac{1}{0}", "\\sqrt{2}", "wrong"),
        ("\\frac{r}{R}", "\\frac{R}{r}", "wrong"),
        ("\\frac{X}{2}", "\\frac{x}{2}", "correct"),
        ("\\{1, 2\\}", "(1, 2)", "wrong"),
        ("x \\in \\{1, 2\\}", "(1, 2)", "wrong"),
        ("\\{1, 2\\} \\cup \\{3\\}", "\\{1, 2, 3\\}", "correct"),
        ("7 = \\sqrt{5}", "\\sqrt{5}", "wrong"),
        ("\\sqrt{20}/2 = \\sqrt{5}", "\\sqrt{5}", "correct"),
        ("(1+i)^2", "2i", "correct"),
        ("2\\pi \\text{ cm}", "2\\pi \\text{ m}", "wrong"),
        ("2\\pi \\text{ million}", "2000000\\pi", "correct"),
        ("3.1415926535897932384626", "\\pi", "correct"),
        ("3.1415926535897932384628", "\\pi", "wrong"),
        ("x = 1 \\pm \\sqrt{2}", "1-\\sqrt{2}, 1+\\sqrt{2}", "correct"),
    ],
)
def test_reason(answer: str, gold: str, reason: str) -> None:
    assert verify_symbolic(answer, gold) == reason
