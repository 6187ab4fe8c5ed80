"""The experts of a sequence, as SGLang sends them."""

import base64
import binascii

import numpy as np

from policy.config import PolicyConfig
from policy.routing import UNKNOWN


def routed_experts(encoded: str | None, tokens: int, config: PolicyConfig) -> np.ndarray:
    """int16 [tokens, mixture layers, k], from base64 of int32 [tokens, all layers, k].

    Raises ValueError when that does not fit, or cannot have been recorded: SGLang has zeros where nothing was.
    """
    mixtures = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    shape = tokens, config.num_hidden_layers, config.num_experts_per_tok
    try:
        content = base64.b64decode(encoded or "", validate=True)
    except binascii.Error as error:
        raise ValueError(f"SGLang's routed_experts are no base64 ({error})") from None
    if len(content) != 4 * np.prod(shape):
        raise ValueError(f"SGLang's routed_experts have {len(content)} bytes, not those of int32 {list(shape)}")
    experts = np.frombuffer(content, dtype="<i4").reshape(shape)[:, mixtures]
    ordered = np.sort(experts, axis=-1)
    if (ordered < 0).any() or (ordered >= config.num_experts).any() or (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(f"SGLang's routed_experts are not {shape[2]} different ones of {config.num_experts} each")
    return experts.astype(np.int16)


def unknown_experts(tokens: int, config: PolicyConfig) -> np.ndarray:
    """Of a sequence whose experts SGLang did not send."""
    mixtures = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    return np.full((tokens, mixtures, config.num_experts_per_tok), UNKNOWN, dtype=np.int16)
