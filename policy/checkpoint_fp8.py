"""Blockwise FP8 in checkpoints, as the Ring-linear exporter and DeepSeek-V3 write it.

A weight [N, K] lies there as e4m3 values [N, K] and, under NAME_scale_inv, FP32 [ceil(N / 128), ceil(K / 128)]: what
each block of 128 x 128 is multiplied by. The matrix products of attention and MLP are quantised. Router, output gate,
norms, embeddings and head are not.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import ops
from policy.checkpoint_read import Entry

FP8 = "fp8"
BLOCK = 128
FLOOR = 1e-4  # the least max |w| of a block that a scale is made from
CONVERTED = ("query_key_value", "q_proj", "k_proj", "v_proj", "dense", "o_proj", "gate_proj", "up_proj", "down_proj")
E4M3, PLAIN = "F8_E4M3", ("BF16", "F32")  # safetensors' names


def is_converted(name: str) -> bool:
    return name.endswith(tuple(f".{part}.weight" for part in CONVERTED))


def scale_name(name: str) -> str:
    return f"{name}_scale_inv"


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((size + BLOCK - 1) // BLOCK for size in shape)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> e4m3 values [N, K], scales FP32 [ceil(N / 128), ceil(K / 128)]."""
    quantized = ops.quantize_weight(weight.float(), floor=FLOOR).rows
    return quantized.values[:, : weight.shape[1]].contiguous(), quantized.scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """FP32 [N, K], each value times its block's scale; `quantize` of it gives the same values and scales again."""
    rows, columns = values.shape
    padded = torch.zeros(rows, scale.shape[1] * BLOCK, dtype=torch.uint8)
    padded[:, :columns] = values.view(torch.uint8)
    return ops.Quantized(padded.view(values.dtype), scale).dequantize(columns)


def weight_shapes(entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """The tensors a folder holds, without the scales of those in FP8."""
    scales = {scale_name(name) for name, entry in entries.items() if entry.dtype == E4M3}
    return {name: entry.shape for name, entry in entries.items() if name not in scales}


def dtype_problems(entries: Mapping[str, Entry], names: Mapping[str, object]) -> list[str]:
    """Tensors among `names` whose numbers cannot be read: an unknown dtype, or FP8 without scales that fit."""
    problems = []
    for name in names.keys() & entries.keys():
        entry, scale = entries[name], entries.get(scale_name(name))
        if entry.dtype in PLAIN:
            continue
        if entry.dtype != E4M3:
            problems.append(f"{name} is {entry.dtype}, not BF16, F32 or F8_E4M3 (in {entry.file})")
        elif scale is None:
            problems.append(f"missing {scale_name(name)}, the scales of a F8_E4M3 weight (in {entry.file})")
        elif (scale.dtype, scale.shape) != ("F32", scale_shape(entry.shape)):
            want = f"F32 {list(scale_shape(entry.shape))}"
            problems.append(f"{scale_name(name)} is {scale.dtype} {list(scale.shape)}, not {want} (in {scale.file})")
    return sorted(problems)


def quantization_config(views: Mapping[str, Tensor]) -> dict[str, Any]:
    """config.json's quantization_config, in the words that transformers, vLLM and SGLang read."""
    kept = [name for name, view in views.items() if view.ndim == 2 and not is_converted(name)]
    return {
        "quant_method": FP8,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [name.removesuffix(".weight") for name in kept],
    }


def check_quantization(fields: Any) -> None:
    """Raises ValueError for a quantization_config that is not this form of FP8."""
    want = {"quant_method": FP8, "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    got = fields if isinstance(fields, dict) else {}
    odd = [f"{key} = {got.get(key)!r}, not {value!r}" for key, value in want.items() if got.get(key, value) != value]
    if odd or "quant_method" not in got:
        raise ValueError(
            f"quantization_config: {'; '.join(odd) or 'quant_method is missing'}. BF16, FP32 and blockwise FP8 are "
            "read; give the checkpoint that this one was quantised from"
        )
