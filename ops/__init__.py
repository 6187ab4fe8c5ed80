"""The operator library: what the sampler and the learner share. Other folders import from here and nowhere deeper."""

from ops.compiled import has_openmp
from ops.cpu_matmul import bf16_products
from ops.cross_entropy import cross_entropy, cross_entropy_reference
from ops.dispatch import FAST_FORMS, can_record, explain, is_fast, use_fast
from ops.experts import experts, experts_reference, fp8_experts, trained_fp8_experts
from ops.fp8 import (
    Fp8Weight,
    Quantized,
    fp8_linear,
    fp8_matmul,
    quantize_rows,
    quantize_weight,
    rms_norm_fp8_linear,
    rms_norm_quantize,
    swiglu_fp8_linear,
    swiglu_quantize,
)
from ops.gradients import clip_gradients, gradient_norm, gradient_norm_reference
from ops.host_memory import keep_freed_memory
from ops.layout import ChunkLayout
from ops.linear import fp32_linear, linear, linear_reference, pack_weight
from ops.linear_attention import DecayTables, LightningCache, lightning_attention, lightning_attention_reference
from ops.log_probs import full_log_probs, log_probs, log_probs_reference
from ops.recording import Recording
from ops.rms_norm import (
    add_rms_norm,
    grouped_rms_norm_gate,
    grouped_rms_norm_gate_reference,
    rms_norm,
    rms_norm_reference,
)
from ops.rope import qk_norm_rope, qk_norm_rope_reference, rope_reference, rope_table
from ops.router import expert_weights, replayed_weights, route, route_reference
from ops.sampling import addressed_uniform, most_likely, philox, sample, sample_reference
from ops.softmax_attention import PagedCache, softmax_attention, softmax_attention_reference
from ops.swiglu import swiglu, swiglu_reference

__all__ = [
    "FAST_FORMS",
    "ChunkLayout",
    "DecayTables",
    "Fp8Weight",
    "LightningCache",
    "PagedCache",
    "Quantized",
    "Recording",
    "add_rms_norm",
    "addressed_uniform",
    "bf16_products",
    "can_record",
    "clip_gradients",
    "cross_entropy",
    "cross_entropy_reference",
    "expert_weights",
    "experts",
    "experts_reference",
    "explain",
    "fp8_experts",
    "fp8_linear",
    "fp8_matmul",
    "fp32_linear",
    "full_log_probs",
    "gradient_norm",
    "gradient_norm_reference",
    "grouped_rms_norm_gate",
    "grouped_rms_norm_gate_reference",
    "has_openmp",
    "is_fast",
    "keep_freed_memory",
    "lightning_attention",
    "lightning_attention_reference",
    "linear",
    "linear_reference",
    "log_probs",
    "log_probs_reference",
    "most_likely",
    "pack_weight",
    "philox",
    "qk_norm_rope",
    "qk_norm_rope_reference",
    "quantize_rows",
    "quantize_weight",
    "replayed_weights",
    "rms_norm",
    "rms_norm_fp8_linear",
    "rms_norm_quantize",
    "rms_norm_reference",
    "rope_reference",
    "rope_table",
    "route",
    "route_reference",
    "sample",
    "sample_reference",
    "softmax_attention",
    "softmax_attention_reference",
    "swiglu",
    "swiglu_fp8_linear",
    "swiglu_quantize",
    "swiglu_reference",
    "trained_fp8_experts",
    "use_fast",
]
