"""SGLang behind the verbs of a rollout engine, by its native HTTP server.

Its kernels are its own, so its log-probs are near the trainer's and not equal to them; whoever uses it measures the
difference and corrects for it. Exact are the weights that drew each token, and that no prefix of older ones is read.
"""

import asyncio
import os
import secrets
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from policy.config import PolicyConfig
from policy.names import check_tensors
from policy.transformer import Policy
from rollout.config import RolloutConfig
from rollout.request import Completion, Request
from rollout.sglang_engine.client import Client
from rollout.sglang_engine.launch import Server, refuse_unserved, wait_until_healthy
from rollout.sglang_engine.samples import completion_of, refuse_unserved_sampling, sample_body
from rollout.sglang_engine.weights import Send, check_version, check_weights, send_by_broadcast, send_by_disk
from rollout.verbs import EngineDied

NO_WEIGHTS = -1  # policy version before the first
API_KEY = "LOCKSTEP_SGLANG_API_KEY"
RESERVED_TOKENS = 4  # SGLang's max_req_input_len leaves them, so that something can be answered
LOOK_SECONDS = 0.1  # how soon generate() sees an abort or a failed update


class SglangEngine:
    """One thread at a time is in `generate`; the other verbs may come from any.

    folder: a Hugging Face folder with the config.json of the policy, and its tokenizer where requests have stop
    strings. Weights come with `load_weights`; before, and after an update that failed, `generate` refuses. Any verb
    raises EngineDied when the server is gone.
    """

    def __init__(
        self, config: PolicyConfig, folder: Path, dtype: torch.dtype, rollout: RolloutConfig, device: torch.device
    ) -> None:
        refuse_unserved(config, rollout)
        self.config, self.dtype, self.rollout = config, dtype, rollout
        with torch.device("meta"):
            self._layout = Policy(config, dtype)
        settings, cuda = rollout.sglang, device.type == "cuda"
        self.server = None if settings.url else Server(config, folder, dtype, rollout, cuda)
        if self.server is not None:
            weakref.finalize(self, self.server.stop)
        url = self.server.url if self.server else settings.url or ""
        self._client = Client(url, os.environ.get(API_KEY), settings.answer_seconds)
        weakref.finalize(self, self._client.close)
        wait_until_healthy(self._client, self.server, settings.start_seconds)
        info = self._client.get("/server_info")
        self._on_cpu = info.get("device") == "cpu"
        self._recorded = None if rollout.routing_replay == "none" else config
        if self._recorded and info.get("enable_return_routed_experts") is not True:
            raise ValueError(
                f"rollout.routing_replay = {rollout.routing_replay}: the SGLang server at {url} records no experts; "
                "start it with --enable-return-routed-experts, or set rollout.routing_replay to none"
            )
        self.max_sequence = min(config.max_position_embeddings, _count(info, "max_req_input_len") + RESERVED_TOKENS)
        self._has_tokenizer = info.get("skip_tokenizer_init") is False
        self._send: Send = (
            send_by_disk(self._client, settings)
            if settings.weights == "disk"
            else send_by_broadcast(self._client, settings, not self._on_cpu, _count(info, "tp_size"))
        )
        self._nonce, self._generates = secrets.token_hex(4), 0
        self._paused, self._generating, self._aborted = False, False, set[int]()
        self._running = set[str]()  # names of samples
        self._verbs = threading.RLock()  # held by whoever changes what the server does
        self._failure = "it has no weights yet"
        self.policy_version, self._digest = NO_WEIGHTS, ""
        self.tokens, self.seconds = 0, 0.0

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        assert len({request.request_id for request in requests}) == len(requests), "two requests have one id"
        with self._verbs:
            self._refuse_if_failed()
            if self._generating:
                raise ValueError("generate() while earlier requests run; wait for them, or abort them")
            for request in requests:
                self._check(request)
            self._generating, self._aborted = True, set()
            self._generates += 1
        start = time.perf_counter()
        try:
            completions = asyncio.run(self._answers(requests))
        except EngineDied as error:
            self._refuse_if_failed()
            raise self._epitaph(error) from None
        finally:
            self._generating = False
        self.seconds += time.perf_counter() - start
        self.tokens += sum(len(each.token_ids) for each in completions)
        return completions

    async def _answers(self, requests: Sequence[Request]) -> list[Completion]:
        """In order of request and sample. Looks now and then whether another thread has aborted something."""
        free = asyncio.Semaphore(self.rollout.max_batch)
        async with self._client.session() as session:
            tasks = {
                asyncio.create_task(self._answer(session, free, each, sample)): (each.request_id, sample)
                for each in requests
                for sample in range(each.num_samples)
            }
            pending = set(tasks)
            try:
                while pending:
                    done, pending = await asyncio.wait(pending, timeout=LOOK_SECONDS)
                    self._refuse_if_failed()
                    for task in done:
                        task.result()
                    for request_id, sample in [tasks[task] for task in pending if tasks[task][0] in self._aborted]:
                        name = self._name(request_id, sample)
                        await self._client.post_at_once(session, "/abort_request", {"rid": name})
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return [task.result() for task in tasks]

    async def _answer(
        self, session: httpx.AsyncClient, free: asyncio.Semaphore, request: Request, sample: int
    ) -> Completion:
        """free: no more are sent than the server runs at once, so that the last ones begin with the newest weights."""
        async with free:
            while request.request_id not in self._aborted:
                salt_version = self.policy_version
                answer = await self._post(session, request, sample)
                completion = completion_of(request, sample, answer, self._recorded)
                if completion.finish_reason == "abort" and request.request_id not in self._aborted:
                    raise ValueError(f"request {request.request_id}: SGLang aborted it, and nobody had asked for that")
                if not self._began_stale(completion, salt_version):
                    return completion
        return Completion.unstarted(request, sample)

    async def _post(self, session: httpx.AsyncClient, request: Request, sample: int) -> dict[str, Any]:
        name, policy = self._name(request.request_id, sample), self.config
        body = sample_body(request, sample, name, self._cache_salt(), policy.stop_token_ids, policy.vocab_size)
        if self._recorded:
            body["return_routed_experts"] = True
        self._running.add(name)
        try:
            return await self._client.post_at_once(session, "/generate", body)
        finally:
            self._running.remove(name)

    def _began_stale(self, completion: Completion, salt_version: int) -> bool:
        """Whether it waited for its turn while weights arrived, and no cache was emptied: its prompt may then have been
        read from the older ones. So it is asked again, whatever it says."""
        waited = len(completion.policy_versions) > 0 and completion.policy_versions[0] != salt_version
        return self.rollout.on_new_weights == "continue" and bool(waited)

    def abort(self, request_id: int) -> None:
        """Samples of a paused engine come back when it goes on."""
        self._aborted.add(request_id)  # where `generate` looks

    def pause(self) -> None:
        with self._verbs:
            self._paused = True
            self._client.command("/pause_generation", {"mode": "in_place"})
            self._client.get("/server_info")  # answered between two steps, and so after the last one

    def resume(self) -> None:
        with self._verbs:
            self._paused = False
            self._client.command("/continue_generation", {})

    def load_weights(self, tensors: dict[str, Tensor], policy_version: int) -> None:
        """A failure, of whatever kind, is final: the model may be half replaced, so the engine refuses all further
        work, and a server of its own is stopped. Raises ValueError when the weights do not fit or SGLang refuses."""
        with self._verbs:
            if self.policy_version != NO_WEIGHTS:
                self._refuse_if_failed()
            succeeded = False
            try:
                check_tensors(self._layout, {name: tensor.shape for name, tensor in tensors.items()})
                self._replace(tensors, policy_version)
                succeeded = True
            except EngineDied as error:
                raise self._epitaph(error) from None
            finally:
                if not succeeded:
                    self._failure = f"the update to the weights of version {policy_version} failed"
                    if self.server is not None:
                        self.server.stop()

    def _replace(self, tensors: dict[str, Tensor], policy_version: int) -> None:
        """With "reprefill" the server puts running samples back into its queue, which frees their caches, and empties
        what prefixes it has; with "continue" they stay, and only the salt keeps later samples from their prefixes."""
        reprefill = self.rollout.on_new_weights == "reprefill"
        self._client.command("/pause_generation", {"mode": "retract" if reprefill else "in_place"})
        digest = self._send(tensors, policy_version, reprefill)
        check_version(self._client, policy_version)
        if self._on_cpu:
            check_weights(self._client, tensors, self.dtype)
        self.policy_version, self._digest, self._failure = policy_version, digest, ""
        if not self._paused:
            self._client.command("/continue_generation", {})

    def weights_digest(self) -> str:
        """Of what was read where the server read it, or of what was broadcast; on a CPU found to be in its layers."""
        self._refuse_if_failed()
        return self._digest

    def describe(self) -> dict[str, object]:
        return {
            "engine": "sglang",
            "url": self._client.url,
            "server_pid": self.server and self.server.pid,
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
            raise ValueError(f"the SGLang engine cannot work: {self._failure}")

    def _epitaph(self, error: EngineDied) -> EngineDied:
        return error if self.server is None else self.server.epitaph(error)

    def _name(self, request_id: int, sample: int) -> str:
        """Of a sample, on a server that others may use too."""
        return f"{self._nonce}-{self._generates}-{request_id}-{sample}"

    def _cache_salt(self) -> str:
        """SGLang shares a cached prefix only between requests of the same salt."""
        return f"{self._nonce} policy version {self.policy_version}"

    def _check(self, request: Request) -> None:
        refuse_unserved_sampling(request)
        name, prompt, new_tokens = f"request {request.request_id}", request.prompt_ids, request.sampling.max_new_tokens
        vocab_size = self.config.vocab_size
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise ValueError(
                f"{name}: prompt token ids from {prompt.min()} to {prompt.max()}, the policy has 0 to {vocab_size - 1}"
                "; encode prompts with the policy's own tokenizer"
            )
        if len(prompt) + new_tokens > self.max_sequence:
            raise ValueError(
                f"{name}: prompt {len(prompt)} + max_new_tokens {new_tokens} exceeds {self.max_sequence} tokens, which "
                f"is what the policy's {self.config.max_position_embeddings} positions and SGLang's memory leave; "
                "shorten one of them or raise rollout.memory_mb"
            )
        if request.sampling.stop_strings and not self._has_tokenizer:
            raise ValueError(f"{name}: stop_strings need a tokenizer, and SGLang has none")


def _count(info: dict[str, Any], field: str) -> int:
    value = info.get(field)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"SGLang's /server_info has {field} = {value!r}, not a count; is it SGLang 0.5.23 or later?")
    return value
