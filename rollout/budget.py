"""How rollout.memory_mb is shared out: slots first, then snapshots for the prefix cache, blocks from all the rest."""

from dataclasses import dataclass

import ops
from policy.cache import CachePools
from policy.transformer import Policy
from rollout.config import RolloutConfig

SNAPSHOT_SHARE = 4  # one part in so many of what the slots leave may hold snapshots


@dataclass(frozen=True)
class Budget:
    slots: int
    snapshots: int | None  # None: the policy has no lightning layer, whose state one would hold
    blocks: int
    slot_bytes: int
    snapshot_bytes: int
    block_bytes: int
    keeps_prefixes: bool

    @classmethod
    def of(cls, policy: Policy, config: RolloutConfig) -> "Budget":
        """Raises ValueError when rollout.memory_mb is too little for rollout.max_batch sequences."""
        slots = config.max_batch
        slot_bytes, snapshot_bytes = (
            CachePools.bytes_per_slot(policy.config, policy.dtype),
            CachePools.bytes_per_snapshot(policy.config),
        )
        block_bytes = CachePools.bytes_per_block(policy.config, policy.dtype)
        left = config.memory_mb * 2**20 - slots * slot_bytes
        spare = left - slots * block_bytes
        if spare < 0:
            least = -(-(slots * (slot_bytes + block_bytes)) // 2**20)
            raise ValueError(
                f"rollout.memory_mb = {config.memory_mb}: {slots} sequences need at least {least} MiB of "
                "states and key-value blocks; raise it or lower rollout.max_batch"
            )
        snapshots: int | None = None
        if snapshot_bytes:
            wanted = slots if config.prefix_cache and not _state_is_of_last_token(config) else 0
            snapshots = min(wanted, left // SNAPSHOT_SHARE // snapshot_bytes, spare // snapshot_bytes)
        return cls(
            slots,
            snapshots,
            (left - (snapshots or 0) * snapshot_bytes) // block_bytes,
            slot_bytes,
            snapshot_bytes,
            block_bytes,
            config.prefix_cache and snapshots != 0,
        )

    def allocate(self, policy: Policy, spare: int) -> CachePools:
        """spare: further slots and blocks, beyond the budget."""
        slots, blocks = self.slots + spare, self.blocks + spare
        return CachePools(policy.config, slots, blocks, policy.dtype, policy.device, self.snapshots or 0)

    def describe(self) -> dict[str, object]:
        return {
            "max_batch": self.slots,
            "blocks": self.blocks,
            "snapshots": self.snapshots or 0,
            "slot_bytes": self.slots * self.slot_bytes,
            "block_bytes": self.blocks * self.block_bytes,
            "snapshot_bytes": (self.snapshots or 0) * self.snapshot_bytes,
        }


def _state_is_of_last_token(config: RolloutConfig) -> bool:
    """The fast form of lightning attention keeps no state at the last chunk boundary, so nothing can go on from there.
    Raises ValueError for what needs it."""
    fast = ops.is_fast("lightning_attention")
    if fast and config.speculative_tokens:
        raise ValueError(
            f"rollout.speculative_tokens = {config.speculative_tokens} with the fast form of lightning_attention, "
            "whose state cannot forget a wrong draft; set it to 0 or take lightning_attention from ops.fast"
        )
    return fast
