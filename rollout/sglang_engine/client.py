"""Talks to an SGLang server: every way in which that can fail is one of two errors."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

import httpx

from rollout.verbs import EngineDied

T = TypeVar("T")
SHOWN = 500  # characters of an answer in an error
# SGLang closes a connection that was idle for 5 seconds; one that is used just then looks like a dead server.
IDLE_SECONDS = 1.0


class Client:
    """Its methods may be called from any thread.

    They raise ValueError when the server refuses or gives an answer that is none, EngineDied when there is no answer.
    answer_seconds: the longest wait for one.
    """

    def __init__(self, url: str, api_key: str | None, answer_seconds: float) -> None:
        self.url = url
        self._settings: dict[str, Any] = {
            "base_url": url,
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "timeout": httpx.Timeout(answer_seconds, connect=min(10.0, answer_seconds), pool=None),
            "limits": httpx.Limits(keepalive_expiry=IDLE_SECONDS),
            "trust_env": False,  # a proxy has no part in this
        }
        self._http = httpx.Client(**self._settings)

    def close(self) -> None:
        self._http.close()

    def get(self, path: str) -> dict[str, Any]:
        try:
            return _content(self._http.get(path), path)
        except httpx.HTTPError as error:
            raise self._died(path, error) from None

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return _content(self._http.post(path, json=body), path)
        except httpx.HTTPError as error:
            raise self._died(path, error) from None

    def command(self, path: str, body: dict[str, Any]) -> None:
        """One that the server must say it has carried out."""
        answer = self.post(path, body)
        if answer.get("success", answer.get("status") == "ok") is not True:
            raise ValueError(f"SGLang refused {path}: {_shown(answer)}")

    def command_in_background(self, path: str, body: dict[str, Any]) -> Future[None]:
        return in_background(lambda: self.command(path, body))

    async def post_at_once(self, session: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """As `post`, in a session of `session`, where many may wait at once."""
        try:
            return _content(await session.post(path, json=body), path)
        except httpx.HTTPError as error:
            raise self._died(path, error) from None

    def session(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS)
        return httpx.AsyncClient(**self._settings | {"limits": limits})

    def is_healthy(self) -> bool:
        try:
            return bool(self._http.get("/health", timeout=10.0).is_success)
        except httpx.HTTPError:
            return False

    def _died(self, path: str, error: httpx.HTTPError) -> EngineDied:
        return EngineDied(f"the SGLang server at {self.url} does not answer {path}: {type(error).__name__} {error}")


def in_background(function: Callable[[], T]) -> Future[T]:
    """In a thread that nothing waits for, not even the end of the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except (ValueError, RuntimeError, OSError) as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _content(response: httpx.Response, path: str) -> dict[str, Any]:
    if not response.is_success:
        raise ValueError(f"SGLang refused {path} (HTTP {response.status_code}): {response.text[:SHOWN]}")
    if not response.content:  # of commands that cannot fail
        return {}
    try:
        answer = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        answer = None
    if not isinstance(answer, dict):
        raise ValueError(f"SGLang answered {path} with what is no JSON object: {response.text[:SHOWN]}")
    return answer


def _shown(answer: dict[str, Any]) -> str:
    return str(answer.get("message", answer))[:SHOWN]
