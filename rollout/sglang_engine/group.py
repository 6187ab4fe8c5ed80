"""A broadcast of weights that a server's refusal cannot hang.

A server that refuses does not join, and whoever waits for it in the broadcast then waits for ever. So the request is
made in one thread, the broadcast starts without waiting, and whichever says more first is believed.
"""

import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from rollout.sglang_engine.client import Client, in_background
from rollout.verbs import EngineDied

POLL_SECONDS = 0.002


class UpdateGroup:
    """This process is rank 0, the server's ranks follow.

    world_size: all of them; seconds: the longest wait for the server to join. Raises ValueError when it refuses.
    """

    def __init__(self, client: Client, backend: str, world_size: int, seconds: float) -> None:
        self._client, self._seconds = client, seconds
        host, port = address_towards(client.url)
        self.name = f"lockstep-{port}"
        joined = in_background(lambda: _join(backend, f"tcp://{host}:{port}", world_size, self.name, seconds))
        body = {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": world_size,
            "group_name": self.name,
            "backend": backend,
        }
        answer = client.command_in_background("/init_weights_update_group", body)
        self._wait("/init_weights_update_group", answer, joined.done)
        self._group = joined.result()

    def send(self, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        """The server has to be between /begin_weight_update and /end_weight_update. Raises ValueError when it refuses,
        EngineDied when it does not take part in time; the group is then of no more use."""
        body = {
            "names": list(tensors),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "group_name": self.name,
            **fields,
        }
        answer = self._client.command_in_background("/update_weights_from_distributed", body)
        works = [self._group.broadcast(tensor, 0) for tensor in tensors.values()]
        self._wait("/update_weights_from_distributed", answer, lambda: all(work.is_completed() for work in works))
        for work in works:
            work.wait()

    def _wait(self, path: str, answer: Future[None], done: Callable[[], bool]) -> None:
        """Until the server has said yes and our side is done; a no is raised at once."""
        limit = time.monotonic() + self._seconds
        while not (answer.done() and done()):
            if answer.done():
                answer.result()
            if time.monotonic() > limit:
                raise EngineDied(f"the SGLang server at {self._client.url} did not join {path} in {self._seconds:g} s")
            time.sleep(POLL_SECONDS)
        answer.result()


def _join(backend: str, address: str, world_size: int, name: str, seconds: float) -> Any:
    """A group beside torch's own, of which an engine's process may have none; the public way makes only subgroups of
    that one. The prefix is what SGLang joins under."""
    timeout = timedelta(seconds=seconds)
    store, _, _ = next(dist.rendezvous(address, 0, world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = c10d._new_process_group_helper(
        world_size, 0, [], backend, dist.PrefixStore(name, store), group_name=c10d.GroupName(name), timeout=timeout
    )
    return group


def address_towards(url: str) -> tuple[str, int]:
    """Of this machine as the server sees it, with a free port."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect((parts.hostname, parts.port or 80))  # of datagrams: nothing is sent
        host: str = route.getsockname()[0]
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return host, port
