"""vLLM behind the verbs of a rollout engine.

With its own kernels its log-probs are near the trainer's and not equal to them; whoever uses it measures the difference
and corrects for it. With rollout.vllm_aligned it computes with our operators (`rollout.vllm_plugin`), and they are
equal. Exact in both: which weights drew a token, and that no prefix of older weights is read.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from policy.config import PolicyConfig
from policy.digest import tensor_digest, weights_digest
from policy.names import check_tensors
from policy.transformer import Policy
from rollout.check import check_ids, check_request
from rollout.config import RolloutConfig
from rollout.request import Completion, Request
from rollout.routes import RouteType
from rollout.turns import Turns
from rollout.vllm_engine.launch import open_vllm
from rollout.vllm_engine.samples import Sample, vllm_params, vllm_prompt
from rollout.vllm_engine.weights import replace_weights

NO_WEIGHTS = -1  # policy version before the first


class VllmEngine:
    """One thread at a time is in `generate`; the other verbs may come from any.

    folder: a Hugging Face folder with the config.json of the policy, and its tokenizer where requests have stop
    strings. Weights come with `load_weights`; before, and after an update that failed, `generate` refuses.
    """

    def __init__(
        self, config: PolicyConfig, folder: Path, dtype: torch.dtype, rollout: RolloutConfig, device: torch.device
    ) -> None:
        self.config, self.dtype, self.rollout = config, dtype, rollout
        with torch.device("meta"):
            self._layout = Policy(config, dtype)
        route_type = None if rollout.routing_replay == "none" else RouteType(config, rollout)
        self._llm = open_vllm(config, folder, dtype, rollout, device)
        if rollout.vllm_aligned:
            from rollout.vllm_plugin.sampler import install
        else:
            from rollout.vllm_engine.sampler import install
        self._sampler = self._llm.collective_rpc(install, args=(route_type,))[0]
        self.max_sequence: int = self._llm.model_config.max_model_len
        self._has_tokenizer = self._llm.tokenizer is not None
        self._turns, self._paused, self._asleep = Turns(), False, False
        self._running: dict[str, Sample] = {}  # by vLLM's id
        self._ended: list[Completion] = []
        self._failure = "it has no weights yet"
        self.policy_version, self._digest = NO_WEIGHTS, ""
        self.tokens, self.seconds = 0, 0.0

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        place = {request.request_id: index for index, request in enumerate(requests)}
        check_ids(requests, ())
        with self._turns.verb():
            self._refuse_if_failed()
            if self._running:
                raise ValueError("generate() while earlier requests run; wait for them, or abort them")
            for request in requests:
                self._check(request)
            self._wake()
            for request in requests:
                for sample in range(request.num_samples):
                    self._submit(Sample(request, sample))
        while self._running:
            self._step()
            if self._paused:
                self._turns.wait_for_a_verb()
        with self._turns.verb():
            self._sleep()
            completions, self._ended = self._ended, []
        return sorted(completions, key=lambda each: (place[each.request_id], each.sample))

    def abort(self, request_id: int) -> None:
        with self._turns.verb():
            found = [name for name, each in self._running.items() if each.request.request_id == request_id]
            self._llm.abort_request(found, internal=True)
            for name in found:
                self._end(name, "abort")

    def pause(self) -> None:
        with self._turns.verb():
            self._paused = True

    def resume(self) -> None:
        with self._turns.verb():
            self._paused = False

    def load_weights(self, tensors: dict[str, Tensor], policy_version: int) -> None:
        """A failure, of whatever kind, is final: the model may be half replaced, so the engine refuses all further
        work. Weights that do not fit raise ValueError; vLLM's own errors pass through."""
        with self._turns.verb():
            if self.policy_version != NO_WEIGHTS:
                self._refuse_if_failed()
            self._failure = f"the update to the weights of version {policy_version} failed"
            check_tensors(self._layout, {name: tensor.shape for name, tensor in tensors.items()})
            self._wake()
            replace_weights(self._llm, tensors)
            self._digest = weights_digest({name: tensor_digest(tensor) for name, tensor in tensors.items()})
            self.policy_version = policy_version
            self._forget_prefixes()
            self._failure = ""

    def weights_digest(self) -> str:
        """Of the tensors that the layers were found to compute with when they arrived."""
        self._refuse_if_failed()
        return self._digest

    def describe(self) -> dict[str, object]:
        return {
            "engine": "vllm",
            "policy_version": self.policy_version,
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_batch": self.rollout.max_batch,
            "max_sequence": self.max_sequence,
            "running": len(self._running),
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def _refuse_if_failed(self) -> None:
        if self._failure:
            raise ValueError(f"the vLLM engine cannot work: {self._failure}")

    def _check(self, request: Request) -> None:
        check_request(request, self.config, self.config.max_position_embeddings, self._has_tokenizer)
        length = len(request.prompt_ids) + request.sampling.max_new_tokens
        if length > self.max_sequence:
            raise ValueError(
                f"request {request.request_id}: prompt + max_new_tokens = {length} tokens, but rollout.memory_mb = "
                f"{self.rollout.memory_mb} holds sequences of {self.max_sequence}; raise it, or shorten one of them"
            )

    def _submit(self, sample: Sample) -> None:
        request = sample.request
        params = vllm_params(request, sample.sample, self.config.stop_token_ids, seeded=not self.rollout.vllm_aligned)
        prompt = vllm_prompt(request, self._cache_salt())
        name = self._llm.add_request(sample.name, prompt, params)
        self._running[name] = sample
        self._sampler.samples[name] = sample

    def _step(self) -> None:
        with self._turns.step():
            self._refuse_if_failed()
            if not self._paused:
                self._compute()

    def _compute(self) -> None:
        start = time.perf_counter()
        outputs = self._llm.step()
        for name, drawn in self._sampler.take().items():
            self._running[name].append(drawn, self.policy_version)
        names = {sample.name: name for name, sample in self._running.items()} if outputs else {}
        for output in outputs:
            name, answer = names[output.request_id], output.outputs[0]
            assert list(answer.token_ids) == self._running[name].token_ids, "vLLM kept other tokens than were recorded"
            self._end(name, answer.finish_reason)
        self.seconds += time.perf_counter() - start

    def _end(self, name: str, finish_reason: str) -> None:
        del self._sampler.samples[name]
        sample, recorder = self._running.pop(name), self._sampler.routes
        completion = sample.finish(finish_reason, recorder and recorder.take(name, sample.computed))
        self.tokens += len(completion.token_ids)
        self._ended.append(completion)

    def _cache_salt(self) -> str:
        """vLLM shares a cached prefix only between requests of the same salt."""
        return f"policy version {self.policy_version}"

    def _forget_prefixes(self) -> None:
        """With "reprefill" all caches are emptied. With "continue" running samples hold theirs, and vLLM can then empty
        none; so samples that have not begun are asked again, under the salt of the new version."""
        if self._sampler.routes:
            self._sampler.routes.forget_places()
        if self.rollout.on_new_weights == "reprefill" or not self._running:
            self._llm.reset_prefix_cache(reset_running_requests=True)
            return
        unstarted = [name for name, sample in self._running.items() if not sample.drawn]
        self._llm.abort_request(unstarted, internal=True)
        for name in unstarted:
            del self._sampler.samples[name]
            if self._sampler.routes:
                self._sampler.routes.take(name, 0)
            self._submit(self._running.pop(name))

    def _sleep(self) -> None:
        if self.rollout.sleep_when_idle:
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
