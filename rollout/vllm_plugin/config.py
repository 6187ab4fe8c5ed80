"""What vLLM asks of a Ring-linear config.json before there is a model: which layers keep keys and values."""

from typing import Any

from transformers import PretrainedConfig

from policy.config import PolicyConfig
from policy.families import RING_LINEAR


class RingLinearConfig(PretrainedConfig):
    model_type = RING_LINEAR

    def __init__(self, num_hidden_layers: int = 4, layer_group_size: int = 4, **fields: Any) -> None:
        shape = PolicyConfig(1, num_hidden_layers=num_hidden_layers, layer_group_size=layer_group_size)
        self.num_hidden_layers, self.layer_group_size = num_hidden_layers, layer_group_size
        self.layers_block_type = ["attention" if shape.is_softmax(i) else "mamba" for i in range(num_hidden_layers)]
        super().__init__(**fields)
