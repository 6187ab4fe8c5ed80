"""`lockstep plan`: what a run needs in memory, on how many GPUs, counted before anything is started.

The policy is built on the meta device, where tensors have shapes and no content, so that every number but the
activations is counted from the code that will run; activations are the widths of what each operator keeps for backward.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from policy.cache import CachePools
from policy.checkpoint import read_config
from policy.config import PolicyConfig
from policy.lora import LoraLinear, add_adapters
from policy.machine import choose_dtype
from policy.transformer import Policy
from rl.config import LoopConfig, PolicySource, Recipe, load_recipe
from rl.data_config import DataConfig
from trainer.config import TrainerConfig
from trainer.optimizer import build_optimizer

GPU = torch.device("cuda")
USABLE = 0.9  # of a GPU; kernels need room to work in, and an allocator some to waste


@dataclass(frozen=True)
class Needs:
    """Bytes, of the whole run unless said otherwise. The trainer's are split over all GPUs, the engine's over some.

    copies: the weights in the working dtype while a step computes; layer: those of the largest layer.
    """

    parameters: int
    active_parameters: int  # that a token meets between embeddings and head
    trainable_parameters: int
    weights: int
    gradients: int
    optimizer: int
    copies: int
    layer: int
    activations: int  # of one micro-batch
    engine_weights: int
    engine_cache: int  # rollout.memory_mb, or what rollout.max_batch of the longest sequences need if that is more
    state_per_request: int
    open_chunk_per_request: int
    kv_per_token: int

    def trainer(self, gpus: int) -> int:
        """On each of `gpus`, which gather the weights layer by layer, the next one while this one computes."""
        gathered = self.copies if gpus == 1 else 2 * self.layer
        return -(-(self.weights + self.gradients + self.optimizer) // gpus) + gathered + self.activations

    def engine(self, split: int) -> int:
        """On each of the GPUs that one engine is split over."""
        return -(-(self.engine_weights + self.engine_cache) // split)

    def split(self, gpus: int, memory: int) -> int | None:
        """The fewest GPUs to split an engine over such that a shard of the trainer fits beside; None if none do."""
        splits = (1 << power for power in range(gpus.bit_length()))
        fitting = (each for each in splits if gpus % each == 0)
        return next((each for each in fitting if self.trainer(gpus) + self.engine(each) <= USABLE * memory), None)


def recipe_to_plan(path: Path, overrides: list[str]) -> Recipe:
    """The recipe in a file, or one with every default for the policy in a folder (or its config.json).

    Raises ValueError as `load_recipe` does, and for overrides of what is no recipe.
    """
    if path.suffix in (".yaml", ".yml"):
        return load_recipe(path, overrides)
    if overrides:
        raise ValueError(f"{' '.join(overrides)}: {path} is no recipe, so there is nothing to override; give a .yaml")
    folder = path.parent if path.name == "config.json" else path
    source = PolicySource(path=str(folder), chunk_size=read_config(folder).chunk_size)
    loop = LoopConfig(steps=1, prompts_per_step=64, group_size=8)
    return Recipe(name="plan", policy=source, data=DataConfig(), loop=loop)


def longest_sequence(recipe: Recipe) -> int:
    """Tokens."""
    return recipe.data.max_prompt_tokens + recipe.rollout.max_new_tokens


def count_needs(recipe: Recipe, config: PolicyConfig) -> Needs:
    dtype, _ = choose_dtype(recipe.policy.dtype, GPU)
    with torch.device("meta"):
        policy = Policy(config, dtype)
        pools = CachePools(config, 1, 1, dtype, torch.device("meta"))
    parameters, active = policy.num_parameters(), policy.num_active_parameters()
    layer = max(sum(each.numel() for each in block.parameters()) for block in policy.layers) * dtype.itemsize
    if recipe.lora:
        add_adapters(policy, recipe.lora, recipe.seed)
    trained = [each for each in policy.parameters() if each.requires_grad]
    states = sum(state.nbytes for state, _, _ in pools.linear.values())
    blocks = -(-longest_sequence(recipe) // config.chunk_size)
    per_sequence = CachePools.bytes_per_slot(config, dtype) + blocks * CachePools.bytes_per_block(config, dtype)
    return Needs(
        parameters=parameters,
        active_parameters=active,
        trainable_parameters=sum(each.numel() for each in trained),
        weights=sum(each.nbytes for each in policy.parameters()),
        gradients=sum(each.nbytes for each in trained),
        optimizer=_optimizer_bytes(policy, recipe.trainer),
        copies=_copied_bytes(policy),
        layer=layer,
        activations=recipe.trainer.token_budget * activation_bytes(config, dtype, dtype),
        engine_weights=parameters * dtype.itemsize,
        engine_cache=max(recipe.rollout.memory_mb * 2**20, recipe.rollout.max_batch * per_sequence),
        state_per_request=states,
        open_chunk_per_request=CachePools.bytes_per_slot(config, dtype) - states,
        kv_per_token=CachePools.bytes_per_block(config, dtype) // config.chunk_size,
    )


def _copied_bytes(policy: Policy) -> int:
    """Of the weights that are stored in another dtype than they are multiplied in, or merged with adapters."""
    merged = [module.weight for module in policy.modules() if isinstance(module, LoraLinear)]
    masters = [
        each for name, each in policy.named_parameters() if ".adapters." not in name and each.dtype != policy.dtype
    ]
    return sum(each.numel() for each in (*merged, *masters)) * policy.dtype.itemsize


def _optimizer_bytes(policy: Policy, config: TrainerConfig) -> int:
    states = build_optimizer(policy, config).state.values()
    return sum(tensor.nbytes for state in states for tensor in state.values())


def activation_bytes(config: PolicyConfig, dtype: torch.dtype, queries: torch.dtype) -> int:
    """What the operators keep of one token for backward. queries: dtype of the rotated q, FP32 on a CPU."""
    return sum(
        _layer_bytes(config, layer, dtype.itemsize, queries.itemsize) for layer in range(config.num_hidden_layers)
    )


def _layer_bytes(config: PolicyConfig, layer: int, size: int, queries: int) -> int:
    """FP32: the residual stream, what norms and the router read, attention's output and states."""
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    key_value = 2 * config.kv_heads(layer) * config.head_dim
    total = 2 * 4 * hidden + size * hidden  # both norms, the operand of q, k, v
    total += size * (width + 2 * key_value) + queries * width  # before and after rotation
    total += 4 * width + size * width  # output, operand
    if not config.is_softmax(layer):
        states = 4 * width * config.head_dim // config.chunk_size
        total += states + size * (hidden + width)  # the gate's operand and value
    mlp = _mlp_bytes(hidden, config.intermediate_size, size)
    return total + (_moe_bytes(config, size) if config.is_moe(layer) else mlp)


def _mlp_bytes(hidden: int, width: int, size: int) -> int:
    return size * (hidden + 3 * width)


def _moe_bytes(config: PolicyConfig, size: int) -> int:
    """Each chosen expert keeps its input, gate, up, their product, and its output."""
    hidden = config.hidden_size
    chosen = _mlp_bytes(hidden, config.moe_intermediate_size, size) + size * hidden
    shared = _mlp_bytes(hidden, config.moe_shared_expert_intermediate_size, size) * config.num_shared_experts
    return 4 * (hidden + config.num_experts) + config.num_experts_per_tok * chosen + shared
