"""The reward of a completion: the weighted sum of the components that the recipe names, each kept apart.

A component that could not be measured (a verifier that was killed, a gold answer that is none, a user's function
that raised) has no value, and then the completion has no reward: it is never taken for a 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from reward.components import format_value, language_value, overlong_value, repetition_value
from reward.config import FormatConfig, FunctionConfig, RewardConfig
from reward.function_file import require_unchanged
from reward.pool import RewardPool
from reward.result import CallResult, Reason, RewardResult

FORMAT_FUNCTION = "reward.components:format_value"
# Larger rewards would leave the range in which the variance of a group can be computed.
MAX_VALUE = 1e6


@dataclass(frozen=True)
class RewardInput:
    """One completion and all that its reward may depend on.

    prompt: the text that the policy was given. answer: the gold one. num_tokens: of the completion, its end token
    counted. truncated: whether it was cut at its greatest length. columns: the row's other columns, JSON values.
    """

    completion: str
    prompt: str
    answer: str
    num_tokens: int
    truncated: bool
    columns: Mapping[str, Any] = field(default_factory=dict)

    def keywords(self) -> dict[str, Any]:
        """The arguments of a user's function; no column can hide one of ours."""
        return {
            **self.columns,
            "completion": self.completion,
            "prompt": self.prompt,
            "answer": self.answer,
            "num_tokens": self.num_tokens,
            "truncated": self.truncated,
        }


@dataclass(frozen=True)
class Reward:
    """What a completion earned.

    total: the weighted sum; None if a component that counts has no value.
    components: value by name, before weighting; None where it could not be measured.
    verdict: on the answer, whatever it weighs.
    reason: the verdict's, or that of the component which failed. message: what a failed function said, or empty.
    """

    total: float | None
    components: Mapping[str, float | None]
    verdict: RewardResult
    reason: Reason
    message: str = ""

    @property
    def is_failure(self) -> bool:
        """True when there is no reward, which says nothing about the completion."""
        return self.total is None


@dataclass(frozen=True)
class _Part:
    """A component's value, or the reason why there is none."""

    value: float | None
    reason: Reason | None = None
    message: str = ""


class CompositeReward:
    """Scores completions by the components of a recipe, on the workers of a pool that the caller opens and closes."""

    def __init__(self, config: RewardConfig, pool: RewardPool) -> None:
        self._config, self._pool = config, pool
        self._weights = config.components.weights()

    def score(self, inputs: Sequence[RewardInput]) -> list[Reward]:
        """One reward for each input, in order; it depends on that input alone."""
        verdicts = self._pool.score([(each.completion, each.answer) for each in inputs])
        columns = self._measure(inputs, verdicts)
        rows = zip(*columns.values(), strict=True)
        return [
            self._add_up(verdict, dict(zip(columns, row, strict=True)))
            for verdict, row in zip(verdicts, rows, strict=True)
        ]

    def _measure(self, inputs: Sequence[RewardInput], verdicts: Sequence[RewardResult]) -> dict[str, list[_Part]]:
        """Every component that is named: its part for each input."""
        named = self._config.components
        parts = {"correctness": [_of_verdict(verdict) for verdict in verdicts]}
        if named.format:
            parts["format"] = self._format(inputs, named.format)
        if named.overlong:
            parts["overlong"] = [_Part(overlong_value(each.num_tokens, named.overlong)) for each in inputs]
        if named.language:
            parts["language"] = [_Part(language_value(each.completion, named.language)) for each in inputs]
        if named.repetition:
            parts["repetition"] = [_Part(repetition_value(each.completion, named.repetition)) for each in inputs]
        if named.function:
            parts["function"] = self._function(inputs, named.function)
        return parts

    def _format(self, inputs: Sequence[RewardInput], config: FormatConfig) -> list[_Part]:
        asked = {**config.model_dump(exclude={"weight"}), "marker": self._config.answer_marker}
        items = [{"completion": each.completion, "prompt": each.prompt, **asked} for each in inputs]
        if config.pattern is None:
            return [_Part(format_value(**item)) for item in items]
        # A regular expression may take for ever, so it is held to the limits of a user's function.
        return [_of_call(result) for result in self._pool.call(FORMAT_FUNCTION, items)]

    def _function(self, inputs: Sequence[RewardInput], config: FunctionConfig) -> list[_Part]:
        require_unchanged(config)  # a worker that has to be replaced would load another function than its fellows
        results = self._pool.call(config.path, [each.keywords() for each in inputs])
        return [_of_call(within_range(result)) for result in results]

    def _add_up(self, verdict: RewardResult, parts: Mapping[str, _Part]) -> Reward:
        values = {name: part.value for name, part in parts.items()}
        for name, part in parts.items():
            if part.value is None and self._weights[name]:
                assert part.reason is not None
                return Reward(None, values, verdict, part.reason, part.message)
        total = sum(weight * (values[name] or 0.0) for name, weight in self._weights.items())
        return Reward(total, values, verdict, verdict.reason)


def _of_verdict(verdict: RewardResult) -> _Part:
    return _Part(None, verdict.reason) if verdict.is_failure else _Part(verdict.score)


def _of_call(result: CallResult) -> _Part:
    return _Part(result.value, result.reason, result.message)


def within_range(result: CallResult) -> CallResult:
    """The result of a user's function, or an error in its place if the value is beyond what a reward may be."""
    if result.value is None or abs(result.value) <= MAX_VALUE:
        return result
    message = f"returned {result.value:g}; a reward must lie between -{MAX_VALUE:g} and {MAX_VALUE:g}"
    return replace(result, value=None, reason=Reason.USER_ERROR, message=message)
