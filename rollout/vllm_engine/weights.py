"""New weights for a running vLLM, and a look at what it then computes with.

On a CPU vLLM packs matrices in an order of its kernels' when they are loaded, and leaves the parameters empty or, at
the LM head, as a copy that nothing reads. So weights enter through vLLM's own loader, never by copying into a
parameter, and are then looked for where the layers compute. The loader of 0.32 leaves two of them behind in silence,
experts and a tied head on a CPU; they are seen to here.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from policy.names import named_views

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

EXPERTS = ".mlp.experts."
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UNIT_ROWS = 1024  # of the unit matrix at once
BITS = {2: torch.int16, 4: torch.int32}
MIX = 0x9E3779B97F4A7C1  # an odd constant


def replace_weights(llm: "LLMEngine", tensors: dict[str, Tensor]) -> None:
    """Takes the family's tensors. Raises ValueError when a layer afterwards computes with anything else; the engine
    must then not be used, nor after any other error: its model may be half replaced."""
    llm.apply_model(_unpack_experts)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
    llm.apply_model(_pack_tied_head)
    different: list[str] = llm.apply_model(lambda model: sorted(differing(model, tensors)))[0]
    if different:
        raise ValueError(
            f"vLLM computes with other weights than it was given: {', '.join(different[:5])} ({len(different)} of "
            f"{len(tensors)} tensors)"
        )


def _unpack_experts(model: Any) -> None:
    """Only a layer without a kernel packs its experts. On a GPU the kernel stays: graphs hold its addresses, and there
    is nothing to pack."""
    for module in model.modules():
        if hasattr(module, "w13_weight") and module.w13_weight.device.type == "cpu":
            module.quant_method.moe_kernel = None


def _pack_tied_head(model: Any) -> None:
    """A head tied to the embeddings is no tensor of its own, so the loader passes over it."""
    if not hasattr(model, "policy") and model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


@torch.inference_mode()
def differing(model: Any, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Names of the tensors that the model's layers do not compute with."""
    if hasattr(model, "policy"):  # an aligned one, which computes with a policy of ours
        views = named_views(model.policy)
        yield from (name for name, tensor in tensors.items() if not torch.equal(views[name].cpu(), tensor))
        return
    tied = {HEAD: tensors[EMBEDDINGS]} if model.config.tie_word_embeddings else {}
    dense = {name: tensor for name, tensor in tensors.items() if EXPERTS not in name}
    for name, tensor in (dense | tied).items():
        found = _rows(model, name)[: len(tensor)].cpu()  # embeddings and head are padded
        if not torch.equal(found, tensor.to(found.dtype)):
            yield name
    for layer, names in groupby((name for name in tensors if EXPERTS in name), lambda name: name.split(EXPERTS)[0]):
        yield from _differing_experts(model.get_submodule(layer), {name: tensors[name] for name in names})


def _rows(model: Any, name: str) -> Tensor:
    """What stands for a tensor in the model, [outputs, inputs] or [width]; q, k and v are one layer there."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    for whole, parts in model.packed_modules_mapping.items():
        if leaf in parts:
            layer = model.get_submodule(f"{parent}.{whole}")
            return effective_weight(layer).split(layer.output_sizes)[parts.index(leaf)]
    return effective_weight(model.get_submodule(f"{parent}.{leaf}" if parent else leaf))


def effective_weight(layer: Any) -> Tensor:
    """Of a linear layer or LM head what it computes with: the unit matrix through it gives every weight exactly. Of
    embeddings and norms the parameter."""
    if not hasattr(layer, "quant_method") or type(layer).__name__ == "VocabParallelEmbedding":
        parameter: Tensor = layer.weight
        return parameter
    inputs: int = layer.input_size if hasattr(layer, "input_size") else layer.embedding_dim
    unit = torch.eye(inputs, dtype=layer.params_dtype, device=layer.weight.device)
    return torch.cat([layer.quant_method.apply(layer, rows) for rows in unit.split(UNIT_ROWS)]).T


def _differing_experts(mlp: Any, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Kernels have experts in orders of their own, so they are compared as collections of numbers."""
    layer = next(module for module in mlp.modules() if hasattr(module, "w13_weight"))
    for parameter, kinds in ((layer.w13_weight, ("gate_proj", "up_proj")), (layer.w2_weight, ("down_proj",))):
        names = [name for name in tensors if name.split(".")[-2] in kinds]
        if _fingerprint(parameter) != sum(_fingerprint(tensors[name].to(parameter.dtype)) for name in names) % 2**64:
            yield from names


def _fingerprint(tensor: Tensor) -> int:
    """Of the numbers in it, whatever their order; zeros count as nothing, which packing may pad with."""
    total = 0
    for part in tensor.detach().flatten().split(2**24):
        bits = part.contiguous().view(BITS[tensor.dtype.itemsize]).long()
        total += int((bits * (bits ^ MIX)).sum())
    return total % 2**64
