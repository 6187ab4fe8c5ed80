"""The local engine: continuous batching over the same forward that the trainer runs.

    engine = Engine(policy.to_working_dtype(), RolloutConfig())
    sampling = SamplingParams(max_new_tokens=64)
    completions = engine.generate([Request(0, prompt_ids, num_samples=8, sampling=sampling, seed=0)])

A step is one forward: a token for every sequence that decodes, and pieces of those that have to catch up. All state of
sequences lives in arrays indexed by slot, so a step costs the same few array operations whatever the batch. No draw
depends on the batch (design A1, A8).

One thread steps, or is in `generate`. All other verbs may be called from other threads, and wait for one step at most.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import ops
from policy.cache import CacheView
from policy.digest import tensor_digest, weights_digest
from policy.names import export_tensors, load_tensors
from policy.routing import Routing
from policy.transformer import Policy
from rollout.budget import Budget
from rollout.check import check_ids, check_request
from rollout.config import RolloutConfig
from rollout.decode_graph import DecodeGraphs
from rollout.drawing import Rows, draw_and_record
from rollout.expert_log import ExpertLog
from rollout.memory import BlockPool, SlotPool
from rollout.prefix_cache import PrefixCache
from rollout.request import Completion, Request
from rollout.running import Running
from rollout.scheduler import Batch, Scheduler, Waiting
from rollout.stop_strings import Decode
from rollout.turns import Turns


class Engine:
    """decode: token ids to text, for requests with stop strings."""

    def __init__(
        self, policy: Policy, config: RolloutConfig, policy_version: int = 0, decode: Decode | None = None
    ) -> None:
        if policy.device.type == "cpu":
            ops.keep_freed_memory()
        self.policy, self.config, self.decode = policy, config, decode
        self.device, self.chunk_size = policy.device, policy.config.chunk_size
        self.budget = Budget.of(policy, config)
        self.expert_log = None if config.routing_replay == "none" else ExpertLog(policy.config, config)
        self._uses_graphs = config.decode_graphs and not self.expert_log and ops.can_record(policy.device)
        self.pools = self.budget.allocate(policy, spare=int(self._uses_graphs))
        self._graphs = self._new_graphs()
        self.blocks, self.slots = BlockPool(self.budget.blocks), SlotPool(config.max_batch)
        self.running = Running(config.max_batch, policy.config)
        self.cache: PrefixCache | None = None
        if self.budget.keeps_prefixes:
            self.cache = PrefixCache(self.blocks, self.budget.snapshots, self.chunk_size)
        self.scheduler = Scheduler(
            self.running,
            self.pools,
            self.slots,
            self.blocks,
            self.cache,
            config.prefill_tokens,
            self.chunk_size,
            config.speculative_tokens,
            decode,
            self.expert_log,
        )
        self.scheduler.policy_version = policy_version
        self.seconds, self.tokens, self.drafted_tokens, self.accepted_tokens = 0.0, 0, 0, 0
        self.is_paused = False
        self._turns = Turns()
        self._unanswered: dict[int, int] = {}  # samples of each request that have not ended
        self._aborted: list[Completion] = []  # to be handed over by the next step

    @property
    def policy_version(self) -> int:
        return self.scheduler.policy_version

    @property
    def has_work(self) -> bool:
        """Something is unanswered, or not handed over yet."""
        return bool(self._unanswered or self._aborted)

    def submit(self, request: Request) -> None:
        """Raises ValueError when the request could never run, or when an unanswered one has its id."""
        with self._turns.verb():
            self._check([request])
            self._queue(request)

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Computes one batch; returns what ended, or was aborted since the last step. Computes nothing while paused."""
        with self._turns.step():
            start = time.perf_counter()
            ended, self._aborted = self._aborted, []
            batch = None if self.is_paused else self.scheduler.next_batch()
            if batch:
                ended += self._compute(batch)
            self.seconds += time.perf_counter() - start
        return ended

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Runs until all requests are answered; completions by request, then by sample.

        Raises ValueError, with nothing submitted, when a request could never run or when earlier ones still do.
        """
        if self.has_work:
            raise ValueError("generate() while earlier requests run; step() until has_work is False, or abort them")
        place = {request.request_id: index for index, request in enumerate(requests)}
        with self._turns.verb():
            self._check(requests)
            for request in requests:
                self._queue(request)
        completions: list[Completion] = []
        while self.has_work:
            completions += self.step()
            if self.is_paused:
                self._turns.wait_for_a_verb()
        return sorted(completions, key=lambda c: (place[c.request_id], c.sample))

    def abort(self, request_id: int) -> None:
        """Ends a request at once. The next step hands over its unfinished samples, with what they have, as "abort"."""
        with self._turns.verb():
            dropped = self.scheduler.drop(request_id)
            self._answer(dropped)
            self._aborted += dropped

    def pause(self) -> None:
        """Returns when no step is running; none computes anything until `resume`."""
        with self._turns.verb():
            self.is_paused = True

    def resume(self) -> None:
        with self._turns.verb():
            self.is_paused = False

    def load_weights(self, tensors: dict[str, Tensor], policy_version: int) -> None:
        """Takes the family's tensors as the weights of `policy_version`. Raises ValueError when they do not fit.

        Sequences that run go on under the new weights, from what they cached or after computing that again: as
        rollout.on_new_weights says.
        """
        with self._turns.verb():
            load_tensors(self.policy, tensors)
            self.scheduler.policy_version = policy_version
            self.scheduler.forget_prefixes()
            if self.config.on_new_weights == "reprefill":
                self.scheduler.preempt_all()

    def weights_digest(self) -> str:
        with self._turns.verb():
            tensors = export_tensors(self.policy)
        return weights_digest({name: tensor_digest(tensor) for name, tensor in tensors.items()})

    def peek(self, request_id: int, known: Sequence[int] = ()) -> list[Completion]:
        """What the unfinished samples of a request have beyond their first known[sample] tokens (0 where `known` is
        shorter), as "running". Samples without a new token are left out."""
        with self._turns.verb():
            return [
                sequence.completion(records, "running", seen)
                for sequence, records in self.scheduler.begun(request_id)
                if len(records["tokens"]) - len(sequence.request.prompt_ids)
                > (seen := known[sequence.sample] if sequence.sample < len(known) else 0)
            ]

    def describe(self) -> dict[str, object]:
        return {
            "engine": "local",
            "policy_version": self.policy_version,
            "dtype": str(self.policy.dtype).removeprefix("torch."),
            **self.budget.describe(),
            "block_tokens": self.chunk_size,
            "running": int(self.running.active.sum()),
            "waiting": sum(len(item.samples) for item in self.scheduler.waiting),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "preemptions": self.scheduler.preemptions,
            "prefix_hit_rate": self.cache.hit_rate if self.cache else 0.0,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "acceptance_rate": self.accepted_tokens / max(1, self.drafted_tokens),
        }

    def _compute(self, batch: Batch) -> list[Completion]:
        hidden = self._forward(batch)
        drawing = self.scheduler.advance(batch)
        slots, counts = batch.slots[drawing], batch.drafts[drawing] + 1
        firsts = np.cumsum(batch.counts)[drawing] - counts
        for leader in sorted(self.scheduler.leaders & set(slots.tolist())):
            followers = np.array(self.scheduler.fork(leader), dtype=np.int64)
            firsts = np.append(firsts, np.repeat(firsts[slots == leader], len(followers)))
            slots, counts = np.append(slots, followers), np.append(counts, np.ones_like(followers))
        if not len(slots):
            return []
        rows = Rows.of(slots, counts)
        places = firsts[rows.sequence] + rows.offset
        if len(places) < len(hidden) or (places[1:] <= places[:-1]).any():
            hidden = hidden[self._tensor(places)]
        before = int(self.running.length[slots].sum())
        ended = draw_and_record(self.policy, self.running, rows, hidden, self.policy_version)
        self.drafted_tokens += len(places) - len(slots)
        self.accepted_tokens += int(self.running.length[slots].sum()) - before - len(slots)
        return self._answer([self._finish(slot, reason) for slot, reason in ended])

    def _forward(self, batch: Batch) -> Tensor:
        """Final hidden states of the batch's tokens, FP32 [T, D]."""
        running, starts = self.running, self.running.computed[batch.slots]
        owners = np.repeat(batch.slots, batch.counts)
        positions = np.arange(len(owners)) - np.repeat(np.cumsum(batch.counts) - batch.counts - starts, batch.counts)
        used = -(-int((starts + batch.counts).max()) // self.chunk_size)
        ids, table = running.tokens[owners, positions], running.block_table[batch.slots, :used]
        if self._graphs and len(ids) == len(batch.slots):
            return self._graphs.run(ids, batch.slots, table, positions)
        layout = ops.ChunkLayout.build(batch.counts, self.chunk_size, starts, self.device)
        view = CacheView(self.pools, self._tensor(batch.slots), self._tensor(table))
        routing = Routing() if self.expert_log else None
        hidden: Tensor = self.policy(self._tensor(ids), layout, view, routing)
        if self.expert_log and routing:
            self.expert_log.write(batch.slots, layout, routing)
        return hidden

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _new_graphs(self) -> DecodeGraphs | None:
        if not self._uses_graphs:
            return None
        width = -(-self.policy.config.max_position_embeddings // self.chunk_size)
        budget = self.budget
        return DecodeGraphs(self.policy, self.pools, budget.slots, budget.blocks, budget.slots, width, capture=True)

    def _finish(self, slot: int, reason: str) -> Completion:
        sequence = self.scheduler.release(slot)
        return sequence.completion(sequence.records, reason)

    def _answer(self, completions: list[Completion]) -> list[Completion]:
        """Counts them off."""
        for completion in completions:
            self._unanswered[completion.request_id] -= 1
            if not self._unanswered[completion.request_id]:
                del self._unanswered[completion.request_id]
        self.tokens += sum(len(completion.token_ids) for completion in completions)
        return completions

    def _check(self, requests: Sequence[Request]) -> None:
        check_ids(requests, self._unanswered)
        for request in requests:
            check_request(request, self.policy.config, self.budget.blocks, can_decode=self.decode is not None)

    def _queue(self, request: Request) -> None:
        self._unanswered[request.request_id] = request.num_samples
        self.scheduler.waiting.append(Waiting(request, list(range(request.num_samples))))
