"""One finding of `lockstep doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """detail: what was found. remedy: what to do about it, kept only when the check did not pass.

    A soft check warns and never fails the machine.
    """

    name: str
    passed: bool
    detail: str
    remedy: str = ""
    soft: bool = False

    def __post_init__(self) -> None:
        assert self.passed or self.remedy, f"{self.name} did not pass and does not say what to do"
        if self.passed:
            object.__setattr__(self, "remedy", "")

    @property
    def status(self) -> str:
        """ok, warn or fail."""
        return "ok" if self.passed else "warn" if self.soft else "fail"
