"""What kernels are meant to reach on an H200, to be shown beside what they reach."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.operators.case import Case

H800_BYTES_PER_SECOND = 3.35e12

Measure = Literal["times the first peer's speed", "FLOP/s", "of copy bandwidth", "of linghe's speed, by bandwidth"]
PEER: Measure = "times the first peer's speed"
FLOPS: Measure = "FLOP/s"
BANDWIDTH: Measure = "of copy bandwidth"
LINGHE: Measure = "of linghe's speed, by bandwidth"


@dataclass(frozen=True)
class Target:
    """For cases of this operator and name whose shape contains `shape`; reached when the measure is at least `least`.

    microseconds: what linghe's page gives for an H800 at 8192 tokens and a width of 2048.
    """

    operator: str
    name: str
    measure: Measure
    least: float
    shape: str = ""
    microseconds: float = 0.0

    def fits(self, case: Case) -> bool:
        return (self.operator, self.name) == (case.operator, case.name) and self.shape in case.shape


TARGETS = (
    Target("linear", "forward", PEER, 0.95),
    Target("linear", "forward and backward", PEER, 0.95),
    Target("linear", "decode", PEER, 0.90),
    Target("linear", "FP32 forward", LINGHE, 1.0, microseconds=61.6),
    Target("fp8", "matmul", FLOPS, 1.2e15, shape="M8192 N8192 K8192"),
    Target("fp8", "quantize rows", BANDWIDTH, 0.85),
    Target("fp8", "rms_norm + quantize", BANDWIDTH, 0.85),
    Target("fp8", "rms_norm + quantize", LINGHE, 1.0, microseconds=72.4),
    Target("fp8", "swiglu + quantize", BANDWIDTH, 0.85),
    Target("linear_attention", "forward and backward", PEER, 1.5),
    Target("linear_attention", "decode", PEER, 1.3, shape="B64"),
    Target("softmax_attention", "forward", FLOPS, 500e12),
    Target("rms_norm", "forward", BANDWIDTH, 0.85),
    Target("rms_norm", "forward and backward", BANDWIDTH, 0.85),
    Target("rms_norm", "gated forward", BANDWIDTH, 0.85),
    Target("rms_norm", "gated forward", LINGHE, 1.0, microseconds=46.9),
    Target("rms_norm", "gated both", BANDWIDTH, 0.85),
    Target("rope", "forward", BANDWIDTH, 0.85),
    Target("rope", "forward", LINGHE, 1.0, microseconds=59.1, shape="H16 K16"),
    Target("rope", "both", BANDWIDTH, 0.85),
    Target("swiglu", "forward", BANDWIDTH, 0.85),
    Target("swiglu", "both", BANDWIDTH, 0.85),
    Target("router", "forward", BANDWIDTH, 0.85, shape="T8192"),
    Target("gradients", "norm", BANDWIDTH, 0.85),
    Target("gradients", "clip", BANDWIDTH, 0.85),
)


def reached(
    case: Case, milliseconds: float, first_peer: float | None, peaks: Mapping[str, float]
) -> list[dict[str, object]]:
    """{"measure", "wanted", "reached", "met"} for each target of the case; None where there is nothing to compare with.

    first_peer: the milliseconds of the peer that targets are stated against.
    """
    values: dict[Measure, float | None] = {
        PEER: first_peer and first_peer / milliseconds,
        FLOPS: case.flops / milliseconds * 1e3,
        BANDWIDTH: case.bytes / milliseconds * 1e3 / peaks["copy"],
    }
    found: list[dict[str, object]] = []
    for target in (target for target in TARGETS if target.fits(case)):
        theirs = target.microseconds / 1e3 * H800_BYTES_PER_SECOND / peaks["copy"]
        value = theirs / milliseconds if target.measure == LINGHE else values[target.measure]
        met = None if value is None else value >= target.least
        found.append({"measure": target.measure, "wanted": target.least, "reached": value, "met": met})
    return found
