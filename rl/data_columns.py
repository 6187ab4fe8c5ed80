"""One record of a data set, in any of the column layouts in common use, to one `Row`.

Problem: `problem`, `question` or `prompt`; text, or a chat: its last user message is the problem, and a policy with a
chat template gets all its messages.
Answer: `answer`, `ground_truth`, `reward_model.ground_truth` (verl), or the last \\boxed{} of `solution`. Where an
answer holds GSM8K's `####`, what follows the last one counts.
Pass rate, if there is one: `pass_rate`, a number from 0 to 1.

Every function raises ValueError with the reason, in words for the person who owns the file.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from reward.extract import extract_answer

PROBLEM_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "ground_truth")
Message = tuple[str, str]
"""Role and content."""
ALL_ANSWER_COLUMNS = "answer, ground_truth, reward_model.ground_truth, solution"


@dataclass(frozen=True)
class Row:
    """A problem and its answer, as text; `id` is unique within `source`: file, dataset or "synthetic/<family>".

    messages: (role, content) of a prompt that came as a chat, else none.
    pass_rate: share of completions that were right when a policy was asked, if that was measured.
    columns: what else the record holds, as JSON values, for a reward function; rows that differ only here are equal.
    """

    id: str
    problem: str
    answer: str
    source: str
    messages: tuple[Message, ...] = ()
    pass_rate: float | None = None
    columns: Mapping[str, object] = field(default_factory=dict, compare=False)


def parse_json(data: bytes) -> object:
    """Strict JSON: UTF-8, no NaN or Infinity, no key twice in an object."""
    try:
        text = data.decode("utf-8-sig")
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("not usable JSON: nested too deeply") from error


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} occurs twice in one object")
    return record


def parse_record(record: object, source: str, number: int) -> Row:
    """The row of a record; `number`, its place in the source, is its id where it has no `id` column."""
    if not isinstance(record, Mapping):
        raise ValueError(f"not an object with named columns but {_shown(record)}")
    id_ = record.get("id")
    return Row(
        id=str(number) if id_ is None else _scalar("id", id_),
        problem=_problem(record),
        answer=_answer(record),
        source=source,
        messages=_chat(record),
        pass_rate=_pass_rate(record.get("pass_rate")),
        columns=_other_columns(record),
    )


def _other_columns(record: Mapping[str, object]) -> dict[str, object]:
    """All but problem, answer and id. What JSON has no type for, such as a date, becomes text."""
    others = {name: value for name, value in record.items() if name not in (*PROBLEM_COLUMNS, *ANSWER_COLUMNS, "id")}
    try:
        columns: dict[str, object] = json.loads(json.dumps(others, default=str)) if others else {}
    except RecursionError as error:
        raise ValueError("not usable as JSON: nested too deeply") from error
    return columns


def _pass_rate(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"column pass_rate must be a number from 0 to 1, got {_shown(value)}")
    return float(value)


def _problem(record: Mapping[str, object]) -> str:
    found = {name: _message(name, record[name]) for name in PROBLEM_COLUMNS if record.get(name) is not None}
    if not found:
        raise ValueError(f"no problem: none of the columns {', '.join(PROBLEM_COLUMNS)} holds a value")
    if len(set(found.values())) > 1:
        raise ValueError(f"columns {' and '.join(found)} hold different problems: keep one")
    return next(iter(found.values()))


def _message(name: str, value: object) -> str:
    """The text of a problem column: the string itself, or the last user message of a chat."""
    if isinstance(value, str):
        return _text(name, value)
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise ValueError(f"column {name} must be text or a list of {{role, content}}, got {_shown(value)}")
    contents = [turn.get("content") for turn in value if turn.get("role") == "user"]
    if not contents or not isinstance(contents[-1], str):
        raise ValueError(f"column {name} is a chat without a user message in plain text")
    return _text(name, contents[-1])


def _chat(record: Mapping[str, object]) -> tuple[Message, ...]:
    """The messages of a problem that is a chat, word for word."""
    for name in PROBLEM_COLUMNS:
        value = record.get(name)
        if isinstance(value, list):
            return tuple(_turn(f"column {name}: message {number}", turn) for number, turn in enumerate(value, start=1))
    return ()


def _turn(place: str, turn: Mapping[str, object]) -> Message:
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{place} needs a role and a content in plain text, got {_shown(dict(turn))}")
    if others := [key for key, value in turn.items() if key not in ("role", "content") and value is not None]:
        raise ValueError(f"{place} also has {', '.join(others)}; only role and content can be used")
    return role, content


def _answer(record: Mapping[str, object]) -> str:
    found = {name: _final(name, record[name]) for name in ANSWER_COLUMNS if record.get(name) is not None}
    truth = _reward_model_truth(record.get("reward_model"))
    if truth is not None:
        found["reward_model.ground_truth"] = _final("reward_model.ground_truth", truth)
    solution = record.get("solution")
    if solution is not None:
        _add_boxed(found, _scalar("solution", solution))
    if not found:
        raise ValueError(f"no answer: none of the columns {ALL_ANSWER_COLUMNS} holds a value")
    if len({comparable_answer(answer) for answer in found.values()}) > 1:
        listed = ", ".join(f"{name} {answer!r}" for name, answer in found.items())
        raise ValueError(f"the columns hold different answers: {listed}")
    return next(iter(found.values()))


def _add_boxed(found: dict[str, str], solution: str) -> None:
    """Add the solution's boxed answer, if it is needed or can contradict the others.

    Beside an answer column only a whole number is compared: 1/2 and \\frac12 differ in text and are the same answer.
    """
    boxed = (extract_answer(solution, "\\boxed") or "").strip()
    if not found and not boxed:
        raise ValueError("column solution has no \\boxed{} answer, and there is no answer column")
    if not found or all(is_whole_number(answer) for answer in (boxed, *found.values())):
        found["solution"] = boxed


def _reward_model_truth(value: object) -> object:
    """`ground_truth` of a `reward_model` column: an object, or JSON text of one."""
    if isinstance(value, str):
        value = parse_json(value.encode())
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"column reward_model must be an object or JSON text of one, got {_shown(value)}")
    return value.get("ground_truth")


def _final(name: str, value: object) -> str:
    answer = _scalar(name, value)
    if "####" not in answer:
        return answer
    answer = (extract_answer(answer, "####") or "").strip()
    if not answer:
        raise ValueError(f"column {name} has nothing after its last ####")
    return answer


def _scalar(name: str, value: object) -> str:
    """A text or number column as text; 204.0, as Parquet stores a column of integers with gaps, becomes 204."""
    if isinstance(value, float) and math.isfinite(value):
        value = int(value) if value.is_integer() else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"column {name} must be text or a number, got {_shown(value)}")
    return _text(name, value)


def _text(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"column {name} holds half a surrogate pair, which is not text") from error
    if not value.strip():
        raise ValueError(f"column {name} is empty")
    return value.strip()


def comparable_answer(answer: str) -> str:
    """An answer such that 025, 25 and $25$ compare equal."""
    plain = re.sub(r"[$,\s]", "", answer)
    return plain.lstrip("0") or "0" if re.fullmatch("[0-9]+", plain) else plain


def is_whole_number(answer: str) -> bool:
    """Whether an answer is an integer as people write them: 25, 025, -3, 2,125, $7$."""
    return re.fullmatch("-?[0-9]+", comparable_answer(answer)) is not None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
