"""An OpenAI-compatible HTTP endpoint over the local engine: models, completions, chat, streams and log-probs.

`logprobs` are those of the policy at the request's temperature, before top-p, top-k and min-p, bit for bit the ones a
trainer computes; the token that ended the text is among them. A request with a `seed` gets the same answer whatever
else the server does (design A8).
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from rl.serve.answers import Answer, tail, usage
from rl.serve.errors import RequestError, parse_body
from rl.serve.prompts import Prompts, draw_seed
from rl.serve.schema import Body, ChatBody, CompletionBody
from rl.serve.text import TextStream, cut_at_stop
from rl.serve.worker import EngineThread
from rollout.request import Completion
from rollout.request import Request as EngineRequest

MAX_BODY_BYTES = 8 * 2**20
GONE_CHECK_SECONDS = 0.25


@dataclass(frozen=True)
class Server:
    """model: the name that clients call the policy by. api_key: what they must send as a bearer token, if any."""

    worker: EngineThread
    prompts: Prompts
    model: str
    api_key: str | None = None

    def app(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.worker.stop)

        app = FastAPI(title="Lockstep", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        app.add_exception_handler(RequestError, _refuse)  # type: ignore[arg-type]
        app.add_exception_handler(HTTPException, _refuse_route)  # type: ignore[arg-type]
        app.middleware("http")(self._guard)
        app.get("/health")(self.health)
        app.get("/v1/models")(self.models)
        app.post("/v1/completions")(self.completions)
        app.post("/v1/chat/completions")(self.chat)
        return app

    async def health(self) -> dict[str, Any]:
        return {"status": "ok", "open_requests": self.worker.num_open, **self.worker.engine.describe()}

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.model, "object": "model", "created": 0, "owned_by": "lockstep"}]}

    async def completions(self, http: Request) -> Response:
        body = await self._body(http, CompletionBody)
        prompts = body.prompts()
        ids = [await asyncio.to_thread(self.prompts.completion_ids, prompt) for prompt in prompts]
        return await self._respond(http, body, ids)

    async def chat(self, http: Request) -> Response:
        body = await self._body(http, ChatBody)
        return await self._respond(http, body, [await asyncio.to_thread(self.prompts.chat_ids, body.messages)])

    async def _body(self, http: Request, kind: type[Body]) -> Any:
        try:
            given = json.loads(await http.body())
        except ValueError as error:
            raise RequestError(400, f"the body is no JSON: {error}") from None
        body = parse_body(kind, given)
        if body.model != self.model:
            raise RequestError(
                404, f"model {body.model!r}: this server has {self.model!r}", param="model", code="model_not_found"
            )
        return body

    async def _respond(self, http: Request, body: Body, ids: list[list[int]]) -> Response:
        seed = draw_seed(body.seed)
        requests = [self.prompts.request(body, each, seed, index) for index, each in enumerate(ids)]
        answer = Answer(isinstance(body, ChatBody), self.model, self.prompts.tokenizer, body.top_log_probs())
        opened = await self._open(requests, body.stream)
        if body.stream:
            events = self._events(answer, body, requests, opened)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return JSONResponse(await self._whole(http, answer, body, requests, opened))

    async def _open(self, requests: list[EngineRequest], streams: bool) -> list[AsyncIterator[Completion]]:
        """All of them, or none."""
        opened: list[Any] = []
        try:
            for request in requests:
                opened.append(await self.worker.open(request, streams))
        except BaseException:
            for each in opened:
                await each.aclose()
            raise
        return opened

    async def _whole(
        self, http: Request, answer: Answer, body: Body, requests: list[EngineRequest], opened: list[Any]
    ) -> dict[str, Any]:
        async def finish(index: int, completions: AsyncIterator[Completion]) -> list[tuple[int, Completion]]:
            return [(index * body.n + completion.sample, completion) async for completion in completions]

        tasks = asyncio.gather(*(finish(index, each) for index, each in enumerate(opened)))
        found = await _unless_gone(http, tasks)
        ended = sorted(((place, each) for several in found for place, each in several), key=lambda pair: pair[0])
        choices = [answer.choice(place, self._text(each, body), each) for place, each in ended]
        return answer.whole(choices, _usage(requests, [each for _, each in ended]))

    async def _events(
        self, answer: Answer, body: Body, requests: list[EngineRequest], opened: list[Any]
    ) -> AsyncIterator[str]:
        """Server-sent events; an error after the first goes into the stream, as the status is sent already."""
        ended: list[Completion] = []
        try:
            async with _merged(opened) as parts:
                streams = {
                    place: _Sample(TextStream(self.prompts.tokenizer, body.stop))
                    for place in range(body.n * len(opened))
                }
                async for index, completion in parts:
                    place = index * body.n + completion.sample
                    if completion.finish_reason != "running":
                        ended.append(completion)
                    if part := streams[place].part(answer, place, completion):
                        yield _event(answer.event([part]))
            if body.stream_options.include_usage:
                yield _event(answer.usage_event(_usage(requests, ended)))
        except RequestError as error:
            yield _event(error.body())
        yield "data: [DONE]\n\n"

    def _text(self, completion: Completion, body: Body) -> str:
        text = str(self.prompts.tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True))
        return cut_at_stop(text, body.stop)

    async def _guard(self, http: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        """Size and key, before anything is read."""
        length = http.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES or "transfer-encoding" in http.headers:
            return await _refuse(
                http, RequestError(413, f"send a body of a stated length, at most {MAX_BODY_BYTES} bytes; got {length}")
            )
        if self.api_key is not None and http.url.path != "/health":
            given = http.headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), self.api_key.encode()):
                return await _refuse(http, RequestError(401, "send the server's key as a bearer token", code="bad_key"))
        return await go_on(http)


class _Sample:
    """One sample of a stream: its text and how many tokens of it were sent."""

    def __init__(self, text: TextStream) -> None:
        self.text, self.sent = text, 0

    def part(self, answer: Answer, place: int, completion: Completion) -> dict[str, Any] | None:
        """completion: new tokens while it runs, all of them when it ends. None where nothing is certain yet."""
        if completion.finish_reason != "running":
            text = self.text.finish(completion.token_ids.tolist())
            return answer.part(place, text, tail(completion, self.sent), completion.finish_reason)
        text = self.text.add(completion.token_ids.tolist())
        if not text and answer.top is None:
            return None
        self.sent += len(completion.token_ids)
        return answer.part(place, text, completion, None)


@asynccontextmanager
async def _merged(sources: list[Any]) -> AsyncIterator[AsyncIterator[tuple[int, Completion]]]:
    """What any of the sources yields, with its number; leaving closes all of them."""
    queue: asyncio.Queue[tuple[int, Completion | BaseException | None]] = asyncio.Queue()

    async def pump(number: int, source: Any) -> None:
        try:
            async for item in source:
                queue.put_nowait((number, item))
            queue.put_nowait((number, None))
        except RequestError as error:
            queue.put_nowait((number, error))
        finally:
            await source.aclose()

    async def items() -> AsyncIterator[tuple[int, Completion]]:
        left = len(sources)
        while left:
            number, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            left -= item is None
            if item is not None:
                yield number, item

    tasks = [asyncio.create_task(pump(number, source)) for number, source in enumerate(sources)]
    try:
        yield items()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _unless_gone(http: Request, work: "asyncio.Future[Any]") -> Any:
    """The result of `work`, which is cancelled when the client hangs up."""
    try:
        while not (await asyncio.wait([work], timeout=GONE_CHECK_SECONDS))[0]:
            if await http.is_disconnected():
                raise RequestError(499, "the client has gone")
        return work.result()
    finally:
        if not work.done():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


def _usage(requests: list[EngineRequest], ended: list[Completion]) -> dict[str, int]:
    return usage(sum(len(each.prompt_ids) for each in requests), sum(len(each.token_ids) for each in ended))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _refuse(_: Request, error: RequestError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _refuse_route(http: Request, error: HTTPException) -> JSONResponse:
    return await _refuse(http, RequestError(error.status_code, f"{http.method} {http.url.path}: {error.detail}"))
