"""Seeds for engines that draw from a generator of their own, addressed as our draws are (design A8)."""

import hashlib
import struct

from rollout.request import Request


def sample_seed(request: Request, sample: int) -> int:
    """The seed of a sample's generator, 63 bits of a hash of its address: which engine draws it does not matter."""
    address = struct.pack("<QIII", request.seed, request.step, request.prompt, sample)
    return int.from_bytes(hashlib.sha256(address).digest()[:8], "little") >> 1
