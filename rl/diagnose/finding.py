"""What a check has found: the cause in words, the numbers that show it, and what to change."""

from dataclasses import dataclass, field

Number = float | int | str


@dataclass(frozen=True)
class Finding:
    """name: of the cause, the same for every run that has it. what: one sentence. setting: the suspect."""

    name: str
    what: str
    setting: str
    remedy: str
    numbers: dict[str, Number] = field(default_factory=dict)
