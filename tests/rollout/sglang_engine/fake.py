"""A server that speaks SGLang's language and can be told to speak it badly; it computes nothing."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from rollout.sglang_engine.weights import checksums

Reply = dict[str, Any] | tuple[int, bytes]
Behaviour = Callable[["Fake", dict[str, Any]], Reply]


class Fake:
    """behaviours: what it does in place of its usual answer, by path."""

    def __init__(self) -> None:
        self.behaviours: dict[str, Behaviour] = {}
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[str | None] = []
        self.weights: dict[str, Tensor] = {}
        self.version, self.session = "default", False
        self.records_experts = True
        self.running, self.aborted = threading.Event(), set[str]()
        self.gate = threading.Event()  # closed while paused
        self.gate.set()
        self.group: Any = None
        self.server = _Server(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]

    def answer(self, path: str, body: dict[str, Any]) -> Reply:
        self.seen.append((path, body))
        if path in self.behaviours:
            return self.behaviours[path](self, body)
        return getattr(self, path.strip("/"), lambda body: (404, b'{"detail":"Not Found"}'))(body)

    def health(self, body: dict[str, Any]) -> Reply:
        return 200, b""

    def server_info(self, body: dict[str, Any]) -> Reply:
        info = {"device": "cpu", "max_req_input_len": 508, "tp_size": 1, "skip_tokenizer_init": True}
        return info | {"enable_return_routed_experts": self.records_experts}

    def model_info(self, body: dict[str, Any]) -> Reply:
        return {"weight_version": self.version}

    def weights_checker(self, body: dict[str, Any]) -> Reply:
        return {"success": True, "ranks": [{"checksums": checksums(self.weights, torch.float32)}]}

    def pause_generation(self, body: dict[str, Any]) -> Reply:
        self.gate.clear()
        return {"status": "ok"}

    def continue_generation(self, body: dict[str, Any]) -> Reply:
        self.gate.set()
        return {"status": "ok"}

    def abort_request(self, body: dict[str, Any]) -> Reply:
        self.aborted.add(body["rid"])
        return 200, b""

    def update_weights_from_disk(self, body: dict[str, Any]) -> Reply:
        self.weights = {k: v.clone() for k, v in load_file(Path(body["model_path"]) / "model.safetensors").items()}
        self.version = body["weight_version"]
        return {"success": True, "message": ""}

    def init_weights_update_group(self, body: dict[str, Any]) -> Reply:
        self.group = join(body)
        return {"success": True, "message": ""}

    def begin_weight_update(self, body: dict[str, Any]) -> Reply:
        self.session = True
        return {"success": True, "message": ""}

    def end_weight_update(self, body: dict[str, Any]) -> Reply:
        self.session = False
        return {"success": True, "message": ""}

    def update_weights_from_distributed(self, body: dict[str, Any]) -> Reply:
        if not self.session:
            return 400, b'{"success":false,"message":"must run between begin and end"}'
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            self.weights[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(self.weights[name], 0).wait()
        self.version = body["weight_version"]
        return {"success": True, "message": ""}

    def generate(self, body: dict[str, Any]) -> Reply:
        """Counts upwards from the prompt's last token, with log-prob -0.5, until max_new_tokens."""
        self.running.set()
        return self.counted(body, body["sampling_params"]["max_new_tokens"], {"type": "length"})

    def until_aborted(self, body: dict[str, Any]) -> Reply:
        """Three tokens, and no more until it is aborted."""
        self.running.set()
        while body["rid"] not in self.aborted:
            time.sleep(0.005)
        return self.counted(body, 3, {"type": "abort", "message": "Aborted"})

    def counted(self, body: dict[str, Any], count: int, finish_reason: dict[str, Any]) -> dict[str, Any]:
        ids = [body["input_ids"][-1] + 1 + index for index in range(count)]
        spans = [{"version": self.version, "start": 0, "end": count}]
        meta = {
            "finish_reason": finish_reason,
            "weight_versions": spans,
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
        }
        return {"output_ids": ids, "meta_info": meta}


def join(body: dict[str, Any]) -> Any:
    """As rank 1 of a group that the engine leads. Torch knows groups by name, and the engine in this process has the
    one of that name; so what torch makes of a name, prefixes in a store, is made by hand."""
    timeout = timedelta(seconds=20)
    address = f"tcp://{body['master_address']}:{body['master_port']}"
    store, _, _ = next(dist.rendezvous(address, 1, body["world_size"], timeout=timeout))
    for prefix in (body["group_name"], f"{body['group_name']}/", "cpu/"):
        store = dist.PrefixStore(prefix, store)
    return dist.ProcessGroupGloo(store, 1, body["world_size"], timeout)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some tests are about; others than that fail in their own thread."""


def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._respond({})

        def do_POST(self) -> None:
            self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _respond(self, body: dict[str, Any]) -> None:
            fake.headers.append(self.headers["Authorization"])
            reply = fake.answer(self.path, body)
            status, content = reply if isinstance(reply, tuple) else (200, json.dumps(reply).encode())
            if not status:  # the connection ends without an answer
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def fake_server() -> Iterator[Fake]:
    fake = Fake()
    try:
        yield fake
    finally:
        fake.server.shutdown()
        fake.server.server_close()
