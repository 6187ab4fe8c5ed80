"""`lockstep serve` as OpenAI's own client sees it: the same tokens and log-probs as the engine gives, bit for bit."""

import concurrent.futures
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from rl.serve.app import MAX_BODY_BYTES, Server
from rollout.request import Completion, Request, SamplingParams
from tests.rl.serve.conftest import MAX_OPEN, POSITIONS

PROMPT = "So the answer is"
PATIENCE_SECONDS = 30.0


def wait_until(holds: Callable[[], bool]) -> None:
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < PATIENCE_SECONDS
        time.sleep(0.02)


def idle(server: Server) -> bool:
    """Nothing is open, and the engine holds nothing."""
    engine = server.worker.engine
    return server.worker.num_open == 0 and not engine.has_work and engine.slots.num_free == engine.config.max_batch


def ask(client: OpenAI, **changes: Any) -> Any:
    return client.completions.create(**({"model": "tiny", "prompt": PROMPT, "seed": 5, "max_tokens": 24} | changes))


@pytest.fixture(scope="module")
def direct(server: Server) -> Callable[..., list[Completion]]:
    """What an engine of its own makes of a prompt."""
    from rollout.config import RolloutConfig
    from rollout.engine import Engine

    engine = Engine(server.worker.engine.policy, RolloutConfig(max_batch=8, memory_mb=8))

    def generate(prompt: str, seed: int, samples: int = 1, **sampling: Any) -> list[Completion]:
        ids = np.array(server.prompts.tokenizer(prompt)["input_ids"], dtype=np.int64)
        params = SamplingParams(**({"max_new_tokens": 24} | sampling))
        return engine.generate([Request(0, ids, samples, params, seed=seed)])

    return generate


def test_completions_are_the_engines_bit_for_bit(client: OpenAI, server: Server, direct: Any) -> None:
    answer = ask(client, n=3, logprobs=4, temperature=0.8, top_p=0.9)
    want = direct(PROMPT, 5, samples=3, temperature=0.8, top_p=0.9, top_log_probs=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice, completion in zip(answer.choices, want, strict=True):
        decoded = server.prompts.tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        assert (choice.text, choice.finish_reason) == (decoded, completion.finish_reason)
        assert choice.logprobs.token_logprobs == completion.log_probs.tolist()
        likeliest = [max(top.values()) for top in choice.logprobs.top_logprobs]
        assert completion.top_log_probs is not None and likeliest == completion.top_log_probs[:, 0].tolist()
    tokens = sum(len(completion.token_ids) for completion in want)
    prompt = len(server.prompts.tokenizer(PROMPT)["input_ids"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, tokens)
    assert answer.usage.total_tokens == prompt + tokens


@pytest.mark.parametrize("stop", [[], ["e"], ["an", "th"]])
def test_a_stream_adds_up_to_the_whole_answer(client: OpenAI, stop: list[str]) -> None:
    """Untrained, the policy breaks characters apart: what is streamed must still be the text of all tokens."""
    asked: dict[str, Any] = {"n": 2, "max_tokens": 80, "logprobs": 2, "stop": stop}
    whole = ask(client, **asked)
    texts, log_probs, reasons = ["", ""], [[], []], [None, None]
    usage = None
    for event in ask(client, stream=True, stream_options={"include_usage": True}, **asked):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.text
            log_probs[choice.index] += choice.logprobs.token_logprobs
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert log_probs == [choice.logprobs.token_logprobs for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert not any(string in text for string in stop for text in texts)


def test_tokens_arrive_while_others_are_still_to_come(client: OpenAI) -> None:
    events = list(ask(client, stream=True, max_tokens=100, seed=1, extra_body={"min_tokens": 100}))
    assert len(events) > 10
    assert events[0].choices[0].finish_reason is None and events[-1].choices[0].finish_reason == "length"


def test_several_prompts_in_one_request(client: OpenAI, server: Server) -> None:
    ids = server.prompts.tokenizer("naive")["input_ids"]
    answer = ask(client, prompt=[PROMPT, "Oil"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == ask(client).choices[0].text
    assert ask(client, prompt=ids).choices[0].text == ask(client, prompt="naive").choices[0].text


def test_a_seed_gives_the_same_answer_alone_and_in_a_crowd(client: OpenAI) -> None:
    def one(seed: int) -> tuple[str, list[float]]:
        choice = ask(client, seed=seed, logprobs=0).choices[0]
        return choice.text, choice.logprobs.token_logprobs

    alone = one(0)
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        crowd = list(pool.map(one, range(24)))
    assert crowd[0] == alone
    assert len({text for text, _ in crowd}) > 12
    assert len({ask(client, seed=None).choices[0].text for _ in range(4)}) > 1


def test_chat_without_a_template_takes_one_question(client: OpenAI, server: Server) -> None:
    """In the prompt that the policy was trained on."""
    asked = {"model": "tiny", "seed": 2, "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 3}
    question = {"role": "user", "content": [{"type": "text", "text": "What is 2+2?"}]}
    answer = client.chat.completions.create(messages=[question], **asked)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    for entry in choice.logprobs.content:
        assert "\ufffd" in entry.token if entry.bytes is None else bytes(entry.bytes).decode() == entry.token
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
    streamed = client.chat.completions.create(messages=[question], stream=True, **asked)
    assert "".join(event.choices[0].delta.content for event in streamed) == choice.message.content
    with pytest.raises(BadRequestError, match="has no chat template, so it takes one user message"):
        client.chat.completions.create(messages=[{"role": "system", "content": "Be brief."}, question], model="tiny")


def test_chat_goes_through_the_template(client: OpenAI, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    monkeypatch.setattr(server.prompts.tokenizer, "chat_template", template)
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(messages=messages, model="tiny", seed=9, max_tokens=8)
    text = ask(client, prompt="<system>Be brief.\n<user>Hi\n<assistant>", seed=9, max_tokens=8).choices[0].text
    assert answer.choices[0].message.content == text


def test_models_and_health(client: OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    health = httpx.get(f"{url}/health").json()
    assert health["status"] == "ok" and health["engine"] == "local"
    with pytest.raises(NotFoundError, match="this server has 'tiny'"):
        ask(client, model="gpt-5")


WRONG = [
    ({"temperature": -1}, "temperature = -1"),
    ({"temperature": "hot"}, "temperature = 'hot'"),
    ({"top_p": 0}, "top_p = 0"),
    ({"n": 0}, "n = 0"),
    ({"n": 1000}, "n = 1000"),
    ({"max_tokens": 0}, "max_tokens = 0"),
    ({"max_tokens": POSITIONS}, f"exceed the policy's {POSITIONS} positions"),
    ({"prompt": ""}, "no token is left of it"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [10**6]}, "prompt: token id 1000000, the policy has 0 to"),
    ({"prompt": "a" * 3000}, "exceed"),
    ({"logprobs": 21}, "logprobs = 21"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"seed": 1.5}, "seed = 1.5"),
    ({"temprature": 1}, "unknown field 'temprature': did you mean 'temperature'?"),
    ({"logit_bias": {"5": 3}}, "logit_bias = {'5': 3}: not supported, and it would change the answer"),
    ({"frequency_penalty": 0.5}, "frequency_penalty = 0.5: not supported"),
    ({"best_of": 4}, "best_of = 4: not supported"),
    ({"echo": True}, "echo = True: not supported"),
    ({"min_tokens": 30}, "min_tokens = 30: more than the 24 allowed"),
    ({"stream_options": {"usage": True}}, "stream_options.usage"),
]


@pytest.mark.parametrize(
    ("change", "message"), WRONG, ids=[next(iter(change)) + str(n) for n, (change, _) in enumerate(WRONG)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_malformed_request_gets_the_reason(url: str, change: dict[str, Any], message: str, stream: bool) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "stream": stream} | change
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and message in error["message"]


def test_fields_that_change_nothing_are_taken(client: OpenAI) -> None:
    neutral = {"user": "me", "frequency_penalty": 0, "logit_bias": {}, "best_of": 1, "stop": None, "n": None}
    assert ask(client, **neutral).choices[0].text == ask(client).choices[0].text


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{not json", {}, 400),
        (b"[1]", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"x" * (MAX_BODY_BYTES + 1), {}, 413),
    ],
)
def test_a_body_that_is_none_gets_a_4xx(url: str, content: bytes, headers: dict[str, str], status: int) -> None:
    answer = httpx.post(f"{url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_unknown_routes_and_methods(url: str) -> None:
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"
    assert httpx.get(f"{url}/v1/completions").status_code == 405


def test_a_prompt_of_a_megabyte_is_refused_and_the_server_goes_on(client: OpenAI, server: Server) -> None:
    with pytest.raises(BadRequestError, match="exceed"):
        ask(client, prompt="So the answer is 42. " * 50_000)
    assert ask(client).choices[0].text
    wait_until(lambda: idle(server))


def test_clients_that_vanish_leave_nothing_behind(client: OpenAI, server: Server, url: str) -> None:
    long = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "min_tokens": 200, "n": 4}
    for _ in range(3):
        with httpx.stream("POST", f"{url}/v1/completions", json={**long, "stream": True}) as answer:
            assert "data: " in next(answer.iter_text())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=long, timeout=httpx.Timeout(5, read=0.05))
    wait_until(lambda: idle(server))
    assert ask(client).choices[0].text


def test_sixty_four_clients_at_once(client: OpenAI, server: Server, url: str) -> None:
    """Half of them stream, a quarter hang up early."""

    def one(number: int) -> str:
        if number % 4 == 0:
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, "stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
                return next(answer.iter_text())
        if number % 2:
            return "".join(event.choices[0].text for event in ask(client, seed=7, stream=True))
        return ask(client, seed=7).choices[0].text

    expected = ask(client, seed=7).choices[0].text
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(one, range(64)))
    assert {text for number, text in enumerate(answers) if number % 4} == {expected}
    wait_until(lambda: idle(server))


def test_too_many_requests_are_told_to_come_back(url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.worker, "max_open", 0)
    answer = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": PROMPT})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert MAX_OPEN > 64
    assert json.loads(answer.text)["error"]["code"] == "busy"
