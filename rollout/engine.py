"""The local engine: continuous batching over the same forward that the trainer runs.

    engine = Engine(policy.to_working_dtype(), RolloutConfig())
    sampling = SamplingParams(max_new_tokens=64)
    completions = engine.generate([Request(0, prompt_ids, num_samples=8, sampling=sampling, seed=0)])

Each step computes some prompt pieces, then one token for every running sample. All per-sample state lives in arrays
indexed by slot, so a step costs the same few array operations whatever the batch. No draw depends on the batch
(design A1, A8).
"""

import time

import numpy as np
import torch
from torch import Tensor

import ops
from policy.cache import CachePools, CacheView, key_dtype
from policy.names import load_tensors
from policy.transformer import Policy
from rollout.config import RolloutConfig
from rollout.memory import BlockPool, SlotPool
from rollout.request import Completion, Request
from rollout.running import Running
from rollout.scheduler import Group, Piece, Scheduler


class Engine:
    def __init__(self, policy: Policy, config: RolloutConfig, policy_version: int = 0) -> None:
        self.policy, self.config, self.policy_version = policy, config, policy_version
        self.device = policy.device
        self.num_blocks = _blocks_in_budget(policy, config)
        self.pools = CachePools(policy.config, config.max_batch, self.num_blocks, policy.dtype, policy.device)
        self.blocks, self.slots = BlockPool(self.num_blocks), SlotPool(config.max_batch)
        self.scheduler = Scheduler(self.slots, self.blocks, policy.config.chunk_size, config.prefill_tokens)
        self.running = Running(config.max_batch, policy.config)
        self.seconds, self.tokens = 0.0, 0

    def submit(self, request: Request) -> None:
        """Raises ValueError when the request could never run. Its id names it until its last sample has ended."""
        self._check(request)
        self._queue(request)

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Computes prompt pieces and one token for each running sample; returns what ended."""
        start = time.perf_counter()
        self.pools.reset_slots([group.slots[0] for group in self.scheduler.admit()])
        if pieces := self.scheduler.next_pieces():
            self._prefill(pieces)
        if len(rows := self.running.rows()):
            self._decode(rows)
        ended = self._collect()
        self.seconds += time.perf_counter() - start
        return ended

    def generate(self, requests: list[Request]) -> list[Completion]:
        """Runs until all requests are answered; completions by request, then by sample.

        Raises ValueError, with nothing submitted, when a request could never run or when earlier ones still do.
        """
        if self.has_work:
            raise ValueError("generate() while earlier requests run; step() until has_work is False, or abort them")
        place = {request.request_id: index for index, request in enumerate(requests)}
        assert len(place) == len(requests), "two requests have one id"
        for request in requests:
            self._check(request)
        for request in requests:
            self._queue(request)
        completions: list[Completion] = []
        while self.has_work:
            completions += self.step()
        return sorted(completions, key=lambda c: (place[c.request_id], c.sample))

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.prefilling or len(self.running.rows()))

    def abort(self, request_id: int) -> list[Completion]:
        """Ends a request at once. Its unfinished samples come back with what they have, if anything, as "abort"."""
        dropped = self.scheduler.drop(request_id)
        self.running.abort(request_id)
        return [Completion.unstarted(group.request, s) for group in dropped for s in group.samples] + self._collect()

    def load_weights(self, tensors: dict[str, Tensor], policy_version: int) -> None:
        """Takes the family's tensors as the weights of `policy_version`. Raises ValueError when they do not fit."""
        if self.has_work:
            raise ValueError("weights arrived while requests run; finish or abort them first")
        load_tensors(self.policy, tensors)
        self.policy_version = policy_version

    def describe(self) -> dict[str, object]:
        return {
            "engine": "local",
            "policy_version": self.policy_version,
            "dtype": str(self.policy.dtype).removeprefix("torch."),
            "max_batch": self.config.max_batch,
            "blocks": self.num_blocks,
            "block_tokens": self.policy.config.chunk_size,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def _queue(self, request: Request) -> None:
        for first in range(0, request.num_samples, self.config.max_batch):
            samples = range(first, min(first + self.config.max_batch, request.num_samples))
            self.scheduler.waiting.append(Group(request, samples))

    def _check(self, request: Request) -> None:
        name, prompt, new_tokens = f"request {request.request_id}", request.prompt_ids, request.sampling.max_new_tokens
        limit, vocab_size = self.policy.config.max_position_embeddings, self.policy.config.vocab_size
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise ValueError(
                f"{name}: prompt token ids from {prompt.min()} to {prompt.max()}, the policy has 0 to {vocab_size - 1}"
                "; encode prompts with the policy's own tokenizer"
            )
        if len(prompt) + new_tokens > limit:
            raise ValueError(
                f"{name}: prompt {len(prompt)} + max_new_tokens {new_tokens} exceeds the policy's {limit} positions; "
                "shorten one of them"
            )
        shared, own = self.scheduler.blocks_needed(request)
        needed = shared + own * min(request.num_samples, self.config.max_batch)
        if needed > self.num_blocks:
            raise ValueError(
                f"{name}: needs {needed} blocks of key-value memory, the engine has {self.num_blocks}; "
                "raise rollout.memory_mb, or lower rollout.max_batch or max_new_tokens"
            )

    def _prefill(self, pieces: list[Piece]) -> None:
        ids = np.concatenate([piece.group.request.prompt_ids[piece.begin : piece.end] for piece in pieces])
        layout = ops.ChunkLayout.build(
            [piece.end - piece.begin for piece in pieces],
            self.policy.config.chunk_size,
            [piece.begin for piece in pieces],
            self.device,
        )
        table = np.zeros((len(pieces), self.running.block_table.shape[1]), dtype=np.int64)
        for row, piece in enumerate(pieces):
            blocks = self.scheduler.block_row(piece.group, 0)
            table[row, : len(blocks)] = blocks
        slots = torch.tensor([piece.group.slots[0] for piece in pieces], device=self.device)
        hidden = self.policy(self._tensor(ids), layout, CacheView(self.pools, slots, self._tensor(table)))
        last = {id(piece.group): row for piece, row in zip(pieces, layout.last_tokens().tolist(), strict=True)}
        done = self.scheduler.advance(pieces)
        if done:
            for group in done:
                self._fork(group)
            slots_of = np.concatenate([group.slots for group in done])
            rows = np.concatenate([[last[id(group)]] * len(group.slots) for group in done])
            self._sample(slots_of, hidden[self._tensor(rows)])

    def _fork(self, group: Group) -> None:
        """Every sample of the group starts from the prompt computed in the first one's slot."""
        self.pools.copy_slot(group.slots[0], group.slots[1:])
        if len(group.request.prompt_ids) % self.policy.config.chunk_size:
            self.pools.copy_block(group.own_blocks[0][0], [own[0] for own in group.own_blocks[1:]])
        for index, slot in enumerate(group.slots):
            self.running.start(slot, group, index, self.scheduler.block_row(group, index))

    def _decode(self, slots: np.ndarray) -> None:
        state = self.running
        chunk = self.policy.config.chunk_size
        layout = ops.ChunkLayout.build([1] * len(slots), chunk, state.length[slots] - 1, self.device)
        view = CacheView(self.pools, self._tensor(slots), self._tensor(state.block_table[slots]))
        hidden = self.policy(self._tensor(state.last_token[slots]), layout, view)
        self._sample(slots, hidden)

    def _sample(self, slots: np.ndarray, hidden: Tensor) -> None:
        state = self.running
        tokens, log_probs, rows = ops.sample(
            hidden,
            self.policy.lm_head,
            self._tensor(state.temperature[slots]),
            self._tensor(state.top_p[slots]),
            self._tensor(state.top_k[slots]),
            torch.zeros(len(slots), device=self.device),  # min_p: off
            torch.cat([ops.addressed_uniform(s, a) for s, a in state.addresses_by_seed(slots)]).to(self.device),
            self.policy.lm_head.dtype,  # rounded when the weights were loaded
        )
        state.append(slots, tokens.cpu().numpy(), log_probs.cpu().numpy(), self.policy_version, rows)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _collect(self) -> list[Completion]:
        completions = []
        for slot in self.running.ended():
            group, index = self.running.group[slot], self.running.index[slot]
            assert group is not None
            completions.append(self.running.finish(slot))
            self.scheduler.release(group, index)
        self.tokens += sum(len(completion.token_ids) for completion in completions)
        return completions


def _blocks_in_budget(policy: Policy, config: RolloutConfig) -> int:
    kept = key_dtype(policy.dtype, policy.device)
    slot_bytes = CachePools.bytes_per_slot(policy.config, kept) * config.max_batch
    # Without a softmax layer blocks hold nothing but are still counted, so their size must not be zero.
    block_bytes = max(CachePools.bytes_per_block(policy.config, kept), 1024)
    blocks = (config.memory_mb * 2**20 - slot_bytes) // block_bytes
    if blocks < config.max_batch:
        least = -(-(slot_bytes + config.max_batch * block_bytes) // 2**20)
        raise ValueError(
            f"rollout.memory_mb = {config.memory_mb}: {config.max_batch} sequences need at least {least} MiB of "
            "states and key-value blocks; raise it or lower rollout.max_batch"
        )
    return int(blocks)
