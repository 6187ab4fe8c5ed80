"""The trainer: gradients from samples, and optimizer steps from gradients.

A step comes in two halves. `compute` runs forward and backward and hands back the log-probabilities; only `apply`
changes weights. Between the two the caller can compare the log-probabilities with the engine's record, and `discard`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ops import ChunkLayout, clip_gradients, gradient_norm, keep_freed_memory
from policy.config import PolicyConfig
from policy.routing import Routing
from policy.transformer import Policy
from trainer.batch import ExpertArray, FloatArray, IntArray, PackedBatch, TrainSample
from trainer.config import TrainerConfig, require_one_weighing
from trainer.correction import CorrectionSums, correction_weights
from trainer.correction_config import CorrectionConfig
from trainer.loss import LossSums, policy_loss
from trainer.optimizer import Schedule, build_optimizer, warmup_constant
from trainer.packing import pack_under_budget


@dataclass(frozen=True, eq=False)
class StepResult:
    """What `Trainer.compute` found. log_probs: float32 [completion length] for each sample, in sample order.

    entropies: float32 [completion length] for each sample, in nats, of the distribution each token was drawn from.
    routed_experts: int16 [tokens - 1, mixture layers, k] for each sample, ascending, what the trainer's own router
    chose, beside what the sample says of the engine's; None for samples that say nothing of it.
    """

    log_probs: list[FloatArray]
    entropies: list[FloatArray]
    metrics: dict[str, float]
    tokens: int
    routed_experts: list[ExpertArray | None]


@dataclass(frozen=True)
class _PassSums:
    """What a micro-batch adds to the metrics of its step. entropy: in nats, summed over tokens."""

    loss: LossSums
    correction: CorrectionSums
    entropy: float

    def __add__(self, other: _PassSums) -> _PassSums:
        return _PassSums(self.loss + other.loss, self.correction + other.correction, self.entropy + other.entropy)

    def metrics(self, corrected: bool) -> dict[str, float]:
        tokens = self.loss.tokens
        return {
            "policy/loss": self.loss.loss,
            "policy/entropy": self.entropy / tokens,
            "policy/clip_fraction": self.loss.clipped / tokens,
            "policy/approx_kl": self.loss.kl / tokens,
            "policy/ratio_max": self.loss.ratio_max,
            **(self.correction.metrics() if corrected else {}),
        }


class Trainer:
    """Trains `policy` (float32 master parameters) in this process.

    temperature: the one the completions were sampled under. schedule: learning rate by finished steps; by default the
    warmup and constant rate of `config`. Bitwise repeatable gradients need `torch.use_deterministic_algorithms(True)`
    and a fixed thread count, both of which belong to the process and are set by whoever starts it.
    """

    def __init__(
        self, policy: Policy, config: TrainerConfig, temperature: float, schedule: Schedule | None = None
    ) -> None:
        if policy.device.type == "cpu":
            keep_freed_memory()
        self.policy = policy
        self.config = config
        self.temperature = temperature
        self.optimizer = build_optimizer(policy, config)
        self.set_correction(config.correction)
        self._schedule = schedule or warmup_constant(config.learning_rate, config.warmup_steps)
        self._policy_version = 0
        self._gradients_ready = False

    @property
    def policy_version(self) -> int:
        """Optimizer steps taken; also the position in the learning-rate schedule."""
        return self._policy_version

    def set_correction(self, correction: CorrectionConfig) -> None:
        """From the next `compute` on. "auto" stands for none: who knows the engine says what it resolves to.

        Raises ValueError when the ratio to the engine's record would count twice.
        """
        correction = correction.resolved(agrees=True)
        require_one_weighing(self.config.old_log_probs, correction)
        self.correction = correction

    @property
    def recomputes_old_log_probs(self) -> bool:
        """Whether the clipped ratio is to the trainer's own log-probs (Eq. 6), not to the engine's record (Eq. 5)."""
        return self.config.old_log_probs == "recomputed" or self.correction.weighs

    def compute(self, samples: Sequence[TrainSample]) -> StepResult:
        """Forward and backward over all samples. The gradients wait for `apply` or `discard`; no weight changes.

        A sample of advantage 0 has gradient 0, so it goes through the forward only.
        """
        self._start_gradients(samples)
        tokens = sum(sample.completion_length for sample in samples)
        log_probs: dict[int, FloatArray] = {}
        entropies: dict[int, FloatArray] = {}
        experts: dict[int, ExpertArray] = {}
        sums = _PassSums(LossSums(), CorrectionSums(), 0.0)
        for has_signal in (True, False):
            chosen = [index for index, sample in enumerate(samples) if (sample.advantage != 0.0) == has_signal]
            for places, batch in self._micro_batches([samples[index] for index in chosen]):
                with torch.set_grad_enabled(has_signal):
                    batch_log_probs, batch_entropies, batch_experts, batch_sums = self._policy_pass(batch, tokens)
                indices = [chosen[place] for place in places]
                log_probs.update(zip(indices, batch.split_completions(batch_log_probs), strict=True))
                entropies.update(zip(indices, batch.split_completions(batch_entropies), strict=True))
                experts.update(zip(indices, batch_experts, strict=bool(batch_experts)))
                sums = sums + batch_sums
        self._gradients_ready = True
        return StepResult(
            [log_probs[index] for index in range(len(samples))],
            [entropies[index] for index in range(len(samples))],
            sums.metrics(self.correction.is_active),
            tokens,
            [None if sample.routed_experts is None else experts[index] for index, sample in enumerate(samples)],
        )

    def apply(self) -> dict[str, float]:
        """Clips the gradients that `compute` left, takes one optimizer step and counts it.

        Raises FloatingPointError, with weights, moments and policy_version as they were, when the norm is not finite.
        """
        assert self._gradients_ready, "apply() without compute()"
        gradients = [parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None]
        norm = gradient_norm(gradients)
        if not math.isfinite(norm.item()):
            self.discard()
            raise FloatingPointError(
                f"gradient norm is {norm.item()} at step {self._policy_version + 1}; no weight was changed. "
                "Lower trainer.learning_rate and go on from the last checkpoint"
            )
        clip_gradients(gradients, self.config.clip_grad_norm, norm)
        learning_rate = self._schedule(self._policy_version)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.discard()
        self._policy_version += 1
        return {"policy/grad_norm": norm.item(), "policy/learning_rate": learning_rate}

    def discard(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self._gradients_ready = False

    @torch.no_grad()
    def log_probs(self, samples: Sequence[TrainSample]) -> list[FloatArray]:
        """Log-probabilities under the current weights: float32 [completion length] for each sample, in order."""
        found: dict[int, FloatArray] = {}
        for indices, batch in self._micro_batches(samples):
            log_probs, _ = self._predict(batch, batch.routing())
            found.update(zip(indices, batch.split_completions(log_probs), strict=True))
        return [found[index] for index in range(len(samples))]

    @torch.no_grad()
    def full_log_probs(self, sample: TrainSample) -> FloatArray:
        """Log-probabilities of the whole vocabulary, float32 [completion length, V], with the sample packed alone."""
        batch = PackedBatch.pack([sample], self.policy.device)
        rows, _ = batch.predictions()
        full: FloatArray = (
            self.policy.full_log_probs(self._hidden(batch, batch.routing())[rows], self.temperature).cpu().numpy()
        )
        return full

    def supervised_step(self, demonstrations: Sequence[tuple[IntArray, int]]) -> dict[str, float]:
        """One optimizer step of imitation. A demonstration: (input_ids int64 [prompt + completion], prompt_length)."""
        samples = [TrainSample.demonstration(input_ids, prompt_length) for input_ids, prompt_length in demonstrations]
        self._start_gradients(samples)
        tokens = sum(sample.completion_length for sample in samples)
        loss = sum(self._supervised_backward(batch, tokens) for _, batch in self._micro_batches(samples))
        self._gradients_ready = True
        return {"supervised/loss": loss, "supervised/tokens": float(tokens), **self.apply()}

    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor a checkpoint needs, by name; the live tensors, not copies.

        `policy.*`: parameters and buffers, tied ones once, frozen ones not: those are still where they were loaded
        from. `step.*`, `exp_avg.*`, `exp_avg_sq.*`: AdamW's state.
        """
        tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.policy.state_dict(keep_vars=True).items():
            if id(tensor) in seen or (isinstance(tensor, nn.Parameter) and not tensor.requires_grad):
                continue
            seen.add(id(tensor))
            tensors[f"policy.{name}"] = tensor.detach()
            if tensor in self.optimizer.state:
                tensors |= {f"{kind}.{name}": value for kind, value in self.optimizer.state[tensor].items()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], policy_version: int) -> None:
        """Takes over what `state_tensors` gave, name by name, and the steps taken by then."""
        own = self.state_tensors()
        assert own.keys() == tensors.keys(), "check names before load_state"
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self._policy_version = policy_version
        self.discard()

    def _start_gradients(self, samples: Sequence[TrainSample]) -> None:
        assert samples, "a step needs at least one sample"
        assert not self._gradients_ready, "apply() or discard() the gradients of the step before"
        self.discard()  # Partial sums of a backward pass that raised.

    def _micro_batches(self, samples: Sequence[TrainSample]) -> Iterator[tuple[list[int], PackedBatch]]:
        _check_experts(samples, self.policy.config)
        lengths = [len(sample.input_ids) for sample in samples]
        for indices in pack_under_budget(lengths, self.config.token_budget):
            yield indices, PackedBatch.pack([samples[index] for index in indices], self.policy.device)

    def _hidden(self, batch: PackedBatch, routing: Routing | None) -> Tensor:
        layout = ChunkLayout.build(batch.lengths, self.policy.config.chunk_size, device=self.policy.device)
        hidden: Tensor = self.policy(batch.input_ids, layout, routing=routing)
        return hidden

    def _predict(self, batch: PackedBatch, routing: Routing | None) -> tuple[Tensor, Tensor]:
        rows, targets = batch.predictions()
        return self.policy.log_probs(self._hidden(batch, routing)[rows], targets, self.temperature)

    def _policy_pass(
        self, batch: PackedBatch, num_tokens_global: int
    ) -> tuple[Tensor, Tensor, list[ExpertArray], _PassSums]:
        """Forward, and backward where gradients are enabled: log_probs and entropies [N], what the router chose for
        each sequence (nothing where no sample has a record), sums."""
        routing = batch.routing()
        log_probs, entropy = self._predict(batch, routing)
        mask = batch.response_mask
        rollout_log_probs, advantages = batch.rollout_log_probs[mask], batch.advantages[mask]
        weights, corrected = None, CorrectionSums()
        if self.correction.is_active:
            weights, corrected = correction_weights(
                log_probs, rollout_log_probs, advantages, batch.completion_lengths, self.correction
            )
        loss, sums = policy_loss(
            log_probs,
            # One update for each batch: the weights before it are those of this forward.
            log_probs.detach() if self.recomputes_old_log_probs else rollout_log_probs,
            advantages,
            num_tokens_global,
            self.config.clip_ratio_low,
            self.config.clip_ratio_high,
            weights,
        )
        if loss.requires_grad:
            loss.backward()
        experts = batch.split_experts(routing.chosen()) if routing else []
        pass_sums = _PassSums(sums, corrected, entropy.double().sum().item())
        return log_probs.detach(), entropy.detach(), experts, pass_sums

    def _supervised_backward(self, batch: PackedBatch, num_tokens_global: int) -> float:
        """Cross-entropy against the demonstrated tokens, in nats per token of the step."""
        rows, targets = batch.predictions()
        row_weights = torch.full((len(targets),), 1 / num_tokens_global, device=targets.device)
        loss = self.policy.cross_entropy(self._hidden(batch, batch.routing())[rows], targets, row_weights)
        loss.backward()
        return loss.item()


def _check_experts(samples: Sequence[TrainSample], config: PolicyConfig) -> None:
    recorded = [sample.routed_experts for sample in samples if sample.routed_experts is not None]
    if not recorded:
        return
    layers = [config.is_moe(layer) for layer in range(config.num_hidden_layers)].count(True)
    shape = (layers, config.num_experts_per_tok)
    for experts in recorded:
        if experts.shape[1:] != shape or experts.max() >= config.num_experts:
            raise ValueError(
                f"routed_experts of shape {list(experts.shape)} up to {experts.max()}; the policy has {layers} mixture "
                f"layers with {shape[1]} of {config.num_experts} experts a token: the engine runs another policy"
            )
