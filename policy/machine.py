"""What the machine at hand is good at: the choice of a working dtype when the recipe leaves it open.

It follows from the kind of CPU, not from a measurement: the result of a run must not depend on how busy a machine is.
"""

import torch
from torch import Tensor

import ops
from policy.checkpoint import DTYPES

UNITS = {"tiles": "multiplies it in tiles (AMX)", "pairs": "multiplies it in pairs (AVX-512 BF16)"}
IN_FEATURES, OUT_FEATURES = 512, 512
BIG_BATCH, SMALL_BATCHES = 64, range(1, 41)


def choose_device(setting: str) -> torch.device:
    """Where policies run for the recipe's policy.device: "auto" is a GPU where there is one.

    Raises ValueError for a GPU that is not there.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise ValueError("policy.device = 'cuda': torch sees no GPU here; set policy.device=cpu, or auto")
    return torch.device("cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(setting: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The working dtype for the recipe's policy.dtype on a device, and a sentence that says why.

    "bfloat16" and "float32" are taken as asked. "auto" is bfloat16 on a GPU; on a CPU it is bfloat16 where there are
    units for it, which multiply about twice as fast, and a product keeps its bits for every number of rows under the
    process's current thread count; otherwise float32.
    Raises ValueError for another setting.
    """
    if setting in DTYPES:
        return DTYPES[setting], f"{setting}, as policy.dtype asks."
    if setting != "auto":
        raise ValueError(f"policy.dtype = {setting!r}: must be auto, {' or '.join(DTYPES)}")
    if device.type == "cuda":
        return torch.bfloat16, "bfloat16: what the tensor cores of a GPU multiply."
    unit = UNITS.get(ops.bf16_products())
    if unit is None:
        return torch.float32, "float32: this CPU has no units for bfloat16."
    if (rows := _variant_batch(torch.bfloat16)) is not None:
        return torch.float32, f"float32: in bfloat16 rows change their bits in a batch of {rows}."
    return torch.bfloat16, f"bfloat16: this CPU {unit}, and rows keep their bits in any batch."


def _variant_batch(dtype: torch.dtype) -> int | None:
    """The smallest batch in which the first or last rows of a bigger batch get other bits; None when there is none."""
    x, weight = _cancelling(*_operands(BIG_BATCH, dtype))
    y = ops.linear(x, weight, dtype)
    for rows in SMALL_BATCHES:
        first, last = ops.linear(x[:rows], weight, dtype), ops.linear(x[-rows:], weight, dtype)
        if not (torch.equal(first, y[:rows]) and torch.equal(last, y[-rows:])):
            return rows
    return None


def _cancelling(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Operands whose products sum to zero but for rounding: the output's own rounding would hide most differences."""
    order = torch.randperm(2 * IN_FEATURES, generator=torch.Generator().manual_seed(0))
    return torch.cat([x, x], 1)[:, order].contiguous(), torch.cat([weight, -weight], 1)[:, order].contiguous()


def _operands(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, IN_FEATURES, generator=generator)
    weight = torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator) * IN_FEATURES**-0.5
    return x.to(dtype), weight.to(dtype)
