"""LoRA: a low-rank change beside frozen weights, trained and sampled as one merged weight.

    W' = W + alpha / rank B A      W [out, in], A [rank, in], B [out, rank], in FP32

One function merges, and W' is then treated as any FP32 master is: rounded to the working dtype where it is used, sent
or exported. So trainer and engines compute with the same bits. W itself is kept in the working dtype. An adapter has
the name of the Hugging Face module it changes; where the network keeps several of those in one matrix (gate and up;
q, k and v), it changes their rows of it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from policy.config import PolicyConfig
from policy.lora_config import LoraConfig
from policy.names import name_table
from policy.transformer import Linear, Policy

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # how peft's own wrapper calls the model

Modules = dict[str, tuple[str, slice | None]]
"""Hugging Face name -> our linear layer, and the rows of it that belong to the module; None for all."""


class Adapter(nn.Module):
    """rows: those of the network's matrix that belong to the adapted module."""

    def __init__(self, rows: slice, inputs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.rows = rows
        bound = inputs**-0.5  # as peft: A from Kaiming's uniform distribution with a = sqrt(5), B zero
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, device="cpu").uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(rows.stop - rows.start, rank, device="cpu"))


class LoraLinear(Linear):
    """A linear layer that computes with its merged weight; `weight` itself stays as it was."""

    def __init__(self, linear: Linear, adapters: Mapping[str, Adapter], scale: float) -> None:
        nn.Module.__init__(self)
        self.weight, self.dtype, self.fp8, self.scale = linear.weight, linear.dtype, linear.fp8, scale
        self.adapters = nn.ModuleDict(adapters).to(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.merged_weight())

    def merged_weight(self) -> Tensor:
        """FP32 [out, in]; its gradient goes on to A and B."""
        parts, start = [], 0
        for _, adapter in self.named_adapters():
            rows, change = adapter.rows, self.scale * (adapter.lora_B @ adapter.lora_A)
            parts += [self.weight[start : rows.start].float(), self.weight[rows].float() + change]
            start = rows.stop
        return torch.cat([*parts, self.weight[start:].float()])

    def named_adapters(self) -> Iterator[tuple[str, Adapter]]:
        """In the order of their rows."""
        for module, adapter in self.adapters.items():
            assert isinstance(adapter, Adapter)
            yield module, adapter


def adaptable_modules(config: PolicyConfig) -> Modules:
    """The linear layers of attention, dense MLPs and shared experts."""
    modules: Modules = {}
    for name, (ours, index) in name_table(config).items():
        if ours.endswith(".weight") and not ours.endswith(("norm.weight", "mlp.gate.weight")):
            rows = index[0] if index else None
            assert not isinstance(rows, int)
            modules[name.removesuffix(".weight")] = ours.removesuffix(".weight"), rows
    return modules


def chosen_modules(config: PolicyConfig, lora: LoraConfig) -> Modules:
    """Those of `adaptable_modules` that the targets name. Raises ValueError for a target that names none."""
    modules = adaptable_modules(config)
    kinds = {name.rpartition(".")[2] for name in modules}
    if unknown := [target for target in lora.targets if target not in kinds]:
        raise ValueError(
            f"lora.targets: {', '.join(unknown)}: a {config.model_type} policy can be adapted in "
            f"{', '.join(sorted(kinds))}; name some of these"
        )
    return {name: where for name, where in modules.items() if name.rpartition(".")[2] in lora.targets}


def add_adapters(policy: Policy, lora: LoraConfig, seed: int) -> Policy:
    """Freezes `policy`, in the working dtype, and puts adapters into it; they change nothing until they are trained.

    Raises ValueError as `chosen_modules` does.
    """
    chosen = chosen_modules(policy.config, lora)
    policy.to_working_dtype()
    generator = torch.Generator().manual_seed(seed)
    by_linear: dict[str, dict[str, Adapter]] = {}
    for name, (ours, rows) in chosen.items():
        out, inputs = _linear(policy, ours).weight.shape
        adapter = Adapter(rows or slice(0, out), inputs, lora.rank, generator)
        by_linear.setdefault(ours, {})[name.rpartition(".")[2]] = adapter
    for ours, adapters in by_linear.items():
        parent, _, attribute = ours.rpartition(".")
        merging = LoraLinear(_linear(policy, ours), adapters, lora.alpha / lora.rank)
        setattr(policy.get_submodule(parent), attribute, merging)
    return policy


@torch.no_grad()
def merged(policy: Policy) -> Policy:
    """The policy without adapters, to be sent or exported: it shares what is frozen, and cannot be run.

    A policy that has no adapters is returned as it is.
    """
    linears = _lora_linears(policy)
    if not linears:
        return policy
    state = {name: tensor for name, tensor in policy.state_dict().items() if ".adapters." not in name}
    state |= {f"{name}.weight": linear.merged_weight() for name, linear in linears.items()}
    with torch.device("meta"):
        plain = Policy(policy.config, policy.dtype)
    plain.load_state_dict(state, assign=True)
    return plain


def adapter_tensors(policy: Policy) -> dict[str, Tensor]:
    """A and B of every adapter under peft's names, FP32 on the CPU."""
    linears, tensors = _lora_linears(policy), dict[str, Tensor]()
    for name, (ours, _) in adaptable_modules(policy.config).items():
        adapter = dict(linears[ours].named_adapters()).get(name.rpartition(".")[2]) if ours in linears else None
        if adapter is not None:
            for side, tensor in (("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B)):
                tensors[f"{PEFT_PREFIX}{name}.{side}.weight"] = tensor.detach().cpu().contiguous()
    return tensors


def save_adapter(folder: Path, policy: Policy, lora: LoraConfig, base: str) -> None:
    """Writes what peft reads. base: the folder or name of the policy that the adapter belongs to.

    The modules are listed one by one: a bare gate_proj would mean those of the routed experts too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(policy), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(chosen_modules(policy.config, lora)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def _linear(policy: Policy, name: str) -> Linear:
    module = policy.get_submodule(name)
    assert isinstance(module, Linear)
    return module


def _lora_linears(policy: Policy) -> dict[str, LoraLinear]:
    return {name: module for name, module in policy.named_modules() if isinstance(module, LoraLinear)}
