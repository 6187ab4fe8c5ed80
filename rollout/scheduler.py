"""Who runs next: sequences wait for a slot and for the memory that they need now; it grows with them.

When memory runs out, the youngest gives up its slot and its blocks, keeps its tokens with all that was recorded of
them, and waits at the head of the queue. Later its cache is computed again; what it draws then does not depend on that
(design A1, A8). The oldest is never stopped, so every request ends.

A group is admitted with as many of its samples as fit. The first computes the prompt and the others start from it; what
did not fit starts later from the prefix cache.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from policy.cache import CachePools
from rollout.drafts import draft
from rollout.expert_log import ExpertLog
from rollout.memory import BlockPool, SlotPool
from rollout.prefix_cache import Match, PrefixCache
from rollout.request import Completion, Request
from rollout.running import Running
from rollout.sequence import Sequence
from rollout.stop_strings import Decode, StopStrings


@dataclass
class Waiting:
    """Samples of a request without a token, or one that was stopped."""

    request: Request
    samples: list[int]
    stopped: Sequence | None = None


@dataclass(frozen=True)
class Batch:
    """What one step computes: tokens computed[slot] .. computed[slot] + counts - 1, of which the last may be drafts."""

    slots: np.ndarray  # [S] those that decode first
    counts: np.ndarray  # [S]
    drafts: np.ndarray  # [S]


class Scheduler:
    def __init__(
        self,
        running: Running,
        pools: CachePools,
        slots: SlotPool,
        blocks: BlockPool,
        cache: PrefixCache | None,
        prefill_tokens: int,
        chunk_size: int,
        speculative_tokens: int = 0,
        decode: Decode | None = None,
        expert_log: ExpertLog | None = None,
    ) -> None:
        self.running, self.pools, self.slots, self.blocks, self.cache = running, pools, slots, blocks, cache
        self.prefill_tokens, self.chunk_size = prefill_tokens, chunk_size
        self.speculative_tokens, self.decode, self.expert_log = speculative_tokens, decode, expert_log
        self.waiting: deque[Waiting] = deque()
        self.preemptions = 0
        self.policy_version = 0
        self.leaders: set[int] = set()  # slots of sequences with followers
        self._to_cache: dict[int, list[int]] = {}  # of a slot: lengths at which its beginning goes into the cache

    def next_batch(self) -> Batch | None:
        """Decides, and takes the memory for it."""
        self._grow()
        missing = self.running.length - self.running.computed
        decoding = np.flatnonzero(self.running.active & (missing == 1))
        drafts = np.zeros_like(decoding)
        if self.speculative_tokens and len(decoding):
            drafts = draft(self.running, decoding, self.speculative_tokens, self.chunk_size)
        oldest_first = self.running.by_age()
        pieces = self._pieces(oldest_first[missing[oldest_first] > 1].tolist())
        if not len(decoding) and not pieces:
            return None
        slots, counts = np.array(list(pieces), np.int64), np.array(list(pieces.values()), np.int64)
        return Batch(
            np.concatenate([decoding, slots]),
            np.concatenate([drafts + 1, counts]),
            np.concatenate([drafts, np.zeros_like(slots)]),
        )

    def advance(self, batch: Batch) -> np.ndarray:
        """Records that a batch was computed; returns which of its sequences draw, bool [S]."""
        self.running.computed[batch.slots] += batch.counts - batch.drafts
        for slot in self._to_cache.keys() & set(batch.slots.tolist()) if self._to_cache else ():
            self._keep(slot)
        drawing: np.ndarray = self.running.computed[batch.slots] == self.running.length[batch.slots]
        return drawing

    def fork(self, slot: int) -> list[int]:
        """Starts the followers of a sequence whose prompt is computed: they share its full blocks and get copies of the
        open one and of the state. Returns their slots; a follower without memory waits again."""
        leader = self.running.sequence[slot]
        assert leader is not None
        request, followers = leader.request, leader.followers
        full, is_open = divmod(len(request.prompt_ids), self.chunk_size)
        count = min(len(followers), self.blocks.num_free) if is_open else len(followers)
        held = self.running.blocks(slot)
        own = self.blocks.take(count) if is_open else []
        self.blocks.hold(held[:full], count)
        for index, (sample, target) in enumerate(followers[:count]):
            sequence = Sequence.unstarted(request, sample, self._stop_strings(request))
            self.running.start(target, sequence, held[:full] + own[index : index + 1], len(request.prompt_ids))
        targets = [target for _, target in followers[:count]]
        self.leaders.discard(slot)
        self._dismiss(leader, followers[count:])
        if targets:
            self.pools.copy_slot(slot, targets)
            if self.expert_log:
                self.expert_log.fork(slot, targets)
        if own:
            self.pools.copy_block(held[full], own)
        return targets

    def preempt(self, slot: int) -> None:
        """The sequence waits at the head of the queue."""
        sequence = self.release(slot)
        request = sequence.request
        if len(sequence.records["tokens"]) > len(request.prompt_ids):
            self.waiting.appendleft(Waiting(request, [sequence.sample], sequence))
        else:
            self._wait_again(request, [sequence.sample])

    def preempt_all(self) -> None:
        for slot in reversed(self.running.by_age().tolist()):
            self.preempt(slot)

    def release(self, slot: int) -> Sequence:
        """Gives back all that a sequence held; its followers wait again."""
        self._to_cache.pop(slot, None)
        self.leaders.discard(slot)
        self.blocks.give_back(self.running.blocks(slot))
        self.slots.give_back(slot)
        sequence = self.running.stop(slot)
        if self.expert_log:
            sequence.routes = self.expert_log.take(slot, len(sequence.records["tokens"]) - 1)
        self._dismiss(sequence, sequence.followers)
        return sequence

    def drop(self, request_id: int) -> list[Completion]:
        """Takes out what a request has waiting or running; its samples with what they have, as "abort"."""
        dropped = []
        for slot in self.running.slots()[self.running.request_id[self.running.slots()] == request_id].tolist():
            sequence = self.release(slot)
            dropped.append(sequence.completion(sequence.records, "abort"))
        for item in [item for item in self.waiting if item.request.request_id == request_id]:
            self.waiting.remove(item)
            if item.stopped:
                dropped.append(item.stopped.completion(item.stopped.records, "abort"))
            else:
                dropped += [Completion.unstarted(item.request, sample) for sample in item.samples]
        return dropped

    def begun(self, request_id: int) -> Iterator[tuple[Sequence, Mapping[str, np.ndarray]]]:
        """The unfinished samples of a request that may have tokens, with their records."""
        slots = self.running.slots()
        for slot in slots[self.running.request_id[slots] == request_id].tolist():
            sequence = self.running.sequence[slot]
            assert sequence is not None
            yield sequence, self.running.records(slot)
        for item in self.waiting:
            if item.stopped and item.request.request_id == request_id:
                yield item.stopped, item.stopped.records

    def forget_prefixes(self) -> None:
        """Under new weights: nothing computed so far is read by another sequence, nor will be."""
        self._to_cache.clear()
        if self.cache:
            self.cache.clear()

    def _grow(self) -> None:
        """A block for every sequence whose next token begins one."""
        needed = (self.running.length - 1) // self.chunk_size + 1
        short = self.running.active & (needed > self.running.num_blocks)
        if not short.any():
            return
        if self.blocks.num_free >= (count := int(short.sum())):
            for slot, block in zip(np.flatnonzero(short).tolist(), self.blocks.take(count), strict=True):
                self.running.add_blocks(slot, [block])
            return
        oldest_first = self.running.by_age()
        for slot in oldest_first[short[oldest_first]].tolist():
            while self.running.active[slot] and not self.blocks.num_free:
                self.preempt(int(self.running.by_age()[-1]))
                self.preemptions += 1
            if self.running.active[slot]:
                self.running.add_blocks(slot, self.blocks.take(1))

    def _pieces(self, prefilling: list[int]) -> dict[int, int]:
        """Tokens to compute now of each sequence that has to catch up, under the budget of a step; admits more of
        them while it lasts."""
        room, pieces = self.prefill_tokens, {}
        for slot in prefilling:
            if room:
                pieces[slot] = self._piece(slot, room)
                room -= pieces[slot]
        while room and (admitted := self._admit()) is not None:
            pieces[admitted] = self._piece(admitted, room)
            room -= pieces[admitted]
        return pieces

    def _piece(self, slot: int, room: int) -> int:
        """Ends where a state is to be kept, if it would be gone behind that place."""
        begin = int(self.running.computed[slot])
        end = begin + min(room, int(self.running.length[slot]) - begin)
        if self.cache and self.cache.needs_snapshots:
            for length in self._to_cache.get(slot, ())[:1]:
                if length < end // self.chunk_size * self.chunk_size:
                    end = length
        return end - begin

    def _admit(self) -> int | None:
        """Gives the next that waits a slot and the blocks of the tokens that it has, if that leaves a block for each
        one that runs: else they would soon have to stop it. A group takes slots for all samples that fit."""
        if not self.waiting or not self.slots.num_free:
            return None
        item = self.waiting[0]
        ids = item.stopped.records["tokens"] if item.stopped else item.request.prompt_ids
        match = self.cache.match(ids, self.policy_version) if self.cache else Match()
        needed = -(-len(ids) // self.chunk_size) - len(match.chunks)
        busy = int(self.running.active.sum())
        spare = self.blocks.num_free - self.blocks.num_idle(match.blocks) - needed - busy
        if spare < 0 and busy:
            return None
        count = 1 + min(len(item.samples) - 1, self.slots.num_free - 1, max(spare, 0))
        slot, *others = self.slots.take(count)
        sequence = item.stopped or Sequence.unstarted(item.request, item.samples[0], self._stop_strings(item.request))
        sequence.followers = list(zip(item.samples[1:count], others, strict=True))
        del item.samples[:count]
        if not item.samples:
            self.waiting.popleft()
        if others:
            self.leaders.add(slot)
        self._begin(slot, sequence, match, needed)
        return slot

    def _begin(self, slot: int, sequence: Sequence, match: Match, needed: int) -> None:
        computed, ids = len(match.chunks) * self.chunk_size, sequence.records["tokens"]
        if self.cache:
            self.cache.use(match, len(ids))
            last_full = (len(sequence.request.prompt_ids) - 1) // self.chunk_size * self.chunk_size
            lengths = sorted({match.shared, last_full})
            self._to_cache[slot] = [length for length in lengths if computed < length <= len(ids)]
        if self.expert_log and match.chunks:
            self.expert_log.put(slot, np.concatenate([chunk.routes for chunk in match.chunks]))
        if match.snapshot is None:
            self.pools.reset_slots([slot])
        else:
            self.pools.restore_state(match.snapshot, slot)
        self.running.start(slot, sequence, match.blocks + self.blocks.take(needed), computed)

    def _keep(self, slot: int) -> None:
        """Puts the beginning of a sequence into the cache when it has the length for it."""
        assert self.cache is not None
        lengths = self._to_cache[slot]
        while lengths and lengths[0] <= self.running.computed[slot]:
            length = lengths.pop(0)
            blocks = self.running.block_table[slot, : length // self.chunk_size]
            routes = self.expert_log.rows(slot, length) if self.expert_log else None
            snapshot = self.cache.insert(self.running.tokens[slot, :length], blocks, self.policy_version, routes)
            if snapshot is not None:
                self.pools.keep_state(slot, snapshot)
        if not lengths:
            del self._to_cache[slot]

    def _dismiss(self, leader: Sequence, followers: list[tuple[int, int]]) -> None:
        """The slots kept for followers are free; those given wait again."""
        leader.followers = []
        for _, slot in followers:
            self.slots.give_back(slot)
        self._wait_again(leader.request, [sample for sample, _ in followers])

    def _wait_again(self, request: Request, samples: list[int]) -> None:
        """Samples without a token, at the head of the queue."""
        if samples:
            self.waiting.appendleft(Waiting(request, samples))

    def _stop_strings(self, request: Request) -> StopStrings | None:
        strings = request.sampling.stop_strings
        return StopStrings(strings, self.decode) if strings and self.decode else None
