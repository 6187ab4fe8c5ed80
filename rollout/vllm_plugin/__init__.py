"""Lockstep's policy network inside vLLM, with log-probs that equal the trainer's bit for bit.

The entry point `vllm.general_plugins` calls `register` in every process of vLLM. A Ring-linear policy is then served as
it is; the other families keep vLLM's own class unless the aligned one is asked for:

    LLM(folder, hf_overrides={"architectures": ["LockstepForCausalLM"]}, logprobs_mode="raw_logits")

Log-probs come out in the mode raw_logits, at temperature 1 whatever the draw's: vLLM's other modes normalise once more,
which moves the last bit. `VllmEngine` with rollout.vllm_aligned also draws as the local engine does, and has every
temperature.
"""

HYBRID_CLASS = "BailingMoeLinearV2ForCausalLM"  # what its config.json asks for; vLLM has none of that name
ALIGNED_CLASS = "LockstepForCausalLM"  # for policies of softmax attention only


def register() -> None:
    """Makes the classes known to vLLM, and Ring-linear's config.json to transformers. May be called again."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from policy.families import RING_LINEAR
    from rollout.vllm_plugin.config import RingLinearConfig

    make_modules_readable()
    AutoConfig.register(RING_LINEAR, RingLinearConfig, exist_ok=True)
    ModelRegistry.register_model(HYBRID_CLASS, "rollout.vllm_plugin.model:HybridModel")
    ModelRegistry.register_model(ALIGNED_CLASS, "rollout.vllm_plugin.model:SoftmaxModel")


def make_modules_readable() -> None:
    """vLLM 0.32 on a CPU looks into the `__dict__` of all that any module holds, and ends where it is no dict. That of
    llvmlite's library, which Numba loads for our operators, is a function: the library answers to every name."""
    from llvmlite.binding import ffi

    ffi.lib._fntab["__dict__"] = {}
