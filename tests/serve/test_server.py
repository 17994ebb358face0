"""The server over a fake batcher: what clients get, and what becomes of clients that misbehave."""

import contextlib
import json
import socket
import threading
import time

import httpx
import numpy as np
import pytest

from fkv.api import sample_key
from fkv.engine.requests import Request
from fkv.models.chat import Thoughts
from tests.models.test_texts import IDS, WORDS
from tests.serve import fake
from tests.serve.conftest import KEY, LENGTH, QUEUE, ROWS

TEXT = {"model": "words", "prompt": "one two", "seed": 5, "max_tokens": 12}
CHAT = {"model": "words", "messages": [{"role": "user", "content": "six"}], "seed": 5}


def expected(prompt, seed, i, j, limit, stop=(IDS["</s>"], IDS["<eot>"])):
    """The words of an answer, from the batcher alone."""
    prompt = np.array([IDS[x] for x in prompt.split()], np.int32)
    request = Request(prompt, sample_key(seed, i, j), limit, stop=stop)
    return fake.Batcher(len(WORDS), 1, 99).drawn(request)


def text_of(tokens):
    silent = ("<unk>", "<s>", "</s>", "<eot>")
    return " ".join(WORDS[x] for x in tokens if WORDS[x] not in silent)


def events(response):
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def settled(served, rows=0):
    """Waits until that many answers are pending."""
    for _ in range(500):
        if served.service.pending == rows:
            return
        time.sleep(0.01)
    raise AssertionError(f"{served.service.pending} answers are pending")


def refusal(response, status):
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


# ---- answers


def test_models_are_policies_at_their_budgets(served):
    found = served.client.get("/v1/models").json()["data"]
    assert [x["id"] for x in found] == ["words/snapkv-16", "words/full"]
    assert served.client.get("/v1/models/words/full").json()["id"] == "words/full"
    refusal(served.client.get("/v1/models/words/nope"), 404)
    body = TEXT | {"model": "words/ful"}
    error = refusal(served.client.post("/v1/completions", json=body), 404)
    assert error["code"] == "model_not_found" and "did you mean words/full?" in error["message"]


def test_completions_are_those_of_their_seeds(served):
    body = TEXT | {"prompt": ["one two", "six"], "n": 3}
    reply = served.client.post("/v1/completions", json=body).json()
    assert [x["index"] for x in reply["choices"]] == list(range(6))
    made = 0
    for i, prompt in enumerate(body["prompt"]):
        for j in range(3):
            tokens, choice = expected(prompt, 5, i, j, 12), reply["choices"][3 * i + j]
            assert choice["text"] == text_of(tokens) and choice["logprobs"] is None
            ended = tokens[-1] in (IDS["</s>"], IDS["<eot>"])
            assert choice["finish_reason"] == ("stop" if ended else "length")
            made += len(tokens)
    assert reply["usage"]["prompt_tokens"] == 3 and reply["usage"]["completion_tokens"] == made
    same = served.client.post("/v1/completions", json=TEXT | {"prompt": [8, 9]}).json()
    assert same["choices"][0]["text"] == reply["choices"][0]["text"]
    assert same["usage"]["total_tokens"] == 2 + len(expected("one two", 5, 0, 0, 12))


def test_pieces_are_the_whole(served):
    body = TEXT | {"n": 2, "max_tokens": 30, "logprobs": 2}
    whole = served.client.post("/v1/completions", json=body).json()
    assert len(events(served.client.post("/v1/completions", json=body | {"stream": True}))) > 2
    more = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = events(served.client.post("/v1/completions", json=body | more))
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for i, choice in enumerate(whole["choices"]):
        mine = [x["choices"][0] for x in pieces if x["choices"][0]["index"] == i]
        assert "".join(x["text"] for x in mine) == choice["text"]
        assert [x["finish_reason"] for x in mine if x["finish_reason"]] == [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [y for x in mine for y in x["logprobs"][name]] == values


def test_a_chat_splits_its_thought_off(served, serving):
    script = [IDS[x] for x in "one two </think> six six </s>".split()]
    with serving(script=script) as one:
        reply = one.client.post("/v1/chat/completions", json=CHAT).json()
        message = reply["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("one two", "six six")
        assert one.made[0].seen[-1].prompt.tolist() == [
            IDS[x] for x in "<user> six <eot> <bot> <think>".split()
        ]
        body = CHAT | {"stream": True}
        pieces = [x["choices"][0]["delta"] for x in events(
            one.client.post("/v1/chat/completions", json=body))]  # fmt: skip
        assert pieces[0] == {"role": "assistant", "content": ""}
        assert "".join(x.get("content", "") for x in pieces) == "six six"
        assert "".join(x.get("reasoning_content", "") for x in pieces) == "one two"
        # A control token in a message is not one.
        talk = [{"role": "user", "content": "six </s> two"}]
        one.client.post("/v1/chat/completions", json=CHAT | {"messages": talk})
        assert one.made[0].seen[-1].prompt.tolist() == [
            IDS[x] for x in "<user> six <unk> two <eot> <bot> <think>".split()
        ]
        # A switch for the template; without a thought, nothing is split.
        body = CHAT | {"chat_template_kwargs": {"enable_thinking": False}, "logprobs": True}
        choice = one.client.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert choice["message"] == {
            "role": "assistant", "content": "one two </think> six six"
        }  # fmt: skip
        said = choice["logprobs"]["content"]
        assert [x["token"] for x in said][:2] == ["one", "two"] and len(said) == 6
        assert said[0]["bytes"] == list(b"one") and said[0]["top_logprobs"] == []


def test_a_stop_string_ends_an_answer_and_frees_its_row(served):
    answers = ((i, expected("one two", i, 0, 0, 40)) for i in range(99))
    seed, tokens = next(x for x in answers if len(text_of(x[1]).split()) > 20)
    words = text_of(tokens).split()
    stop = " ".join(words[6:8])
    body = TEXT | {"seed": seed, "max_tokens": 40, "stop": stop}
    whole = text_of(tokens)
    want = whole[: whole.index(stop)]
    choice = served.client.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (want, "stop")
    pieces = events(served.client.post("/v1/completions", json=body | {"stream": True}))
    assert "".join(x["choices"][0]["text"] for x in pieces) == want
    settled(served)


# ---- the official client


@pytest.fixture(scope="module")
def client(served):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_the_official_client(client):
    openai = pytest.importorskip("openai")
    messages = [{"role": "user", "content": [{"type": "text", "text": "six"}]}]
    settings = {"model": "words/full", "messages": messages, "seed": 3, "max_tokens": 20}
    prompt = "<user> six <eot> <bot> <think>"
    chat = client.chat.completions.create(**settings, n=4, logprobs=True, top_logprobs=3)
    assert len(chat.choices) == 4 and chat.model == "words/full"
    for j, choice in enumerate(chat.choices):
        tokens = expected(prompt, 3, 0, j, 20)
        thought, text = Thoughts(opened=True).add(text_of(tokens), last=True)
        assert choice.message.content == text
        assert getattr(choice.message, "reasoning_content", "") == thought
        assert len(choice.logprobs.content) == len(tokens)
        assert {len(x.top_logprobs) for x in choice.logprobs.content} == {3}
    stream = client.chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert pieces[-1].usage == chat.usage.model_copy(
        update={"completion_tokens": pieces[-1].usage.completion_tokens,
                "total_tokens": pieces[-1].usage.total_tokens}
    )  # fmt: skip
    text = "".join(x.choices[0].delta.content or "" for x in pieces if x.choices)
    assert text == chat.choices[0].message.content
    done = client.completions.create(model="words", prompt="one two", seed=5, max_tokens=12)
    assert done.choices[0].text == text_of(expected("one two", 5, 0, 0, 12))
    more = client.completions.create(
        model="words", prompt="one", max_tokens=3, extra_body={"top_k": 3, "min_p": 0.1}
    )
    assert more.usage.completion_tokens
    assert [x.id for x in client.models.list()] == ["words/snapkv-16", "words/full"]
    with pytest.raises(openai.NotFoundError, match="is not served"):
        client.completions.create(model="gpt-4", prompt="one")
    with pytest.raises(openai.BadRequestError, match="temperature = -1 must be") as caught:
        client.completions.create(model="words", prompt="one", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match=r"tools = .* is not supported"):
        client.chat.completions.create(**settings, tools=[{"type": "function"}])


# ---- what is refused


def test_prompts_that_can_t_be(served):
    def post(**change):
        return served.client.post("/v1/completions", json=TEXT | change)

    for prompt, says in (
        ("", "is empty"), (" ", "is empty"), ([11], "token 11"), ([-1], "token -1"),
        ([2**70], "token 11805"), (["one", ""], "is empty"),
    ):  # fmt: skip
        assert says in refusal(post(prompt=prompt), 400)["message"]
    body = b'{"model": "words", "prompt": "\\ud800"}'
    response = served.client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert "can't read" in refusal(response, 400)["message"]
    error = refusal(post(prompt="one " * LENGTH, max_tokens=None), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    error = refusal(post(max_tokens=LENGTH - 1), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens"
    assert served.client.post("/v1/completions", json=TEXT | {"max_tokens": LENGTH - 2}).is_success
    assert refusal(post(n=ROWS + QUEUE + 1), 400)["param"] == "n"
    assert refusal(post(logprobs=6), 400)["param"] == "logprobs"
    body = CHAT | {"messages": [{"role": "user", "content": " "}]}
    refusal(served.client.post("/v1/chat/completions", json=body), 400)
    settled(served)


def test_bodies_that_can_t_be(served, serving):
    def post(content, kind="application/json", **headers):
        headers = {"content-type": kind, **headers}
        return served.client.post("/v1/completions", content=content, headers=headers)

    for content in (b"", b"{", b"\xff", b"[]", b"[" * 9999, b'{"n": NaN}'):
        refusal(post(content), 400)
    # What a web page sends without asking.
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refusal(post(json.dumps(TEXT), kind), 415)
    assert post(json.dumps(TEXT), "Application/JSON; charset=utf-8").is_success
    with serving(body=1000) as small:
        large = json.dumps(TEXT | {"user": "x" * 1000}).encode()
        headers = {"content-type": "application/json"}
        for content in (large, iter([large[:600], large[600:]])):  # with its length, and without
            response = small.client.post("/v1/completions", content=content, headers=headers)
            assert refusal(response, 413)["code"] == "body_too_large"
    for path, method, status in (("/v1/nothing", "GET", 404), ("/v1/completions", "GET", 405)):
        refusal(served.client.request(method, path), status)


def test_a_key_is_asked_for(serving, capfd):
    with serving(KEY) as one:
        assert one.client.get("/v1/models").is_success
        for value in (None, "", "Bearer", "Bearer x", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer é"):
            headers = {} if value is None else {"authorization": value.encode()}
            with httpx.Client(base_url=one.url, headers=headers) as other:
                refusal(other.get("/v1/models"), 401)
                refusal(other.post("/v1/completions", json=TEXT), 401)
                assert other.get("/health").is_success
        assert KEY not in one.client.get("/metrics").text
    assert KEY not in "".join(capfd.readouterr())


def test_web_pages_may_call_only_if_asked_for(served, serving):
    asks = {"origin": "http://a.b", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in served.client.get("/health", headers=asks).headers
    assert not served.client.options("/v1/completions", headers=asks).is_success
    with serving(origins=("http://a.b",)) as one:
        allowed = one.client.options("/v1/completions", headers=asks).headers
        assert allowed["access-control-allow-origin"] == "http://a.b"


# ---- queue, time, clients that leave


def metric(served, name, model="words/snapkv-16"):
    lines = served.client.get("/metrics").text.splitlines()
    [value] = [x.split()[-1] for x in lines if x.startswith(f'{name}{{model="{model}"}}')]
    return float(value)


def in_background(call, count=1):
    found = []
    threads = [threading.Thread(target=lambda: found.append(call())) for _ in range(count)]
    for one in threads:
        one.start()
    return threads, found


def test_a_full_queue_asks_to_come_again(serving):
    gate = threading.Event()
    with serving(gate=gate) as one:
        body = TEXT | {"n": ROWS}
        threads, found = in_background(
            lambda: one.client.post("/v1/completions", json=body), (ROWS + QUEUE) // ROWS
        )
        settled(one, ROWS + QUEUE)
        for stream in (False, True):
            response = one.client.post("/v1/completions", json=TEXT | {"stream": stream})
            assert refusal(response, 429)["code"] == "queue_full"
            assert int(response.headers["retry-after"]) >= 1
        # Another policy has a queue of its own.
        gate.set()
        assert one.client.post("/v1/completions", json=TEXT | {"model": "words/full"}).is_success
        for thread in threads:
            thread.join()
        assert all(x.is_success for x in found)
        settled(one)
        assert one.client.post("/v1/completions", json=TEXT).is_success


def test_requests_take_only_so_long(serving):
    gate = threading.Event()
    with serving(gate=gate, seconds=0.2) as one:
        assert refusal(one.client.post("/v1/completions", json=TEXT), 504)["code"] == "timeout"
        response = one.client.post("/v1/completions", json=TEXT | {"stream": True})
        assert "the request took longer than 0.2 s" in response.text
        settled(one)
        gate.set()
        assert one.client.post("/v1/completions", json=TEXT).is_success
        assert not one.made[0].running and metric(one, "fkv_cancelled_total") == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(serving, stream):
    gate = threading.Event()
    with serving(gate=gate) as one:
        body = json.dumps(TEXT | {"n": 3, "stream": stream}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        ).encode()
        with socket.create_connection(one.url.removeprefix("http://").split(":")) as line:
            line.sendall(head + body)
            while not one.made[0].seen:  # steps wait for the gate: nothing is sent
                time.sleep(0.01)
        settled(one, 0)
        gate.set()
        assert one.client.post("/v1/completions", json=TEXT).is_success
        assert not one.made[0].running and not one.made[0].queue
        assert metric(one, "fkv_cancelled_total") == 3
        # In the middle of a body, and after half of one.
        for part in (head, head + body[:10], head[:20]):
            with socket.create_connection(one.url.removeprefix("http://").split(":")) as line:
                line.sendall(part)
        assert one.client.post("/v1/completions", json=TEXT).is_success


def test_failures_are_told_and_the_next_request_runs(serving, capfd):
    with serving() as one:

        def fail(_):
            raise ZeroDivisionError("out of beer")

        one.made[0].step = fail
        error = refusal(one.client.post("/v1/completions", json=TEXT), 500)
        assert error["message"] == "generation failed" and "out of beer" in capfd.readouterr().err
        assert one.client.post("/v1/completions", json=TEXT).is_success
        one.made[-1].step = fail
        response = one.client.post("/v1/completions", json=TEXT | {"stream": True})
        assert '"generation failed"' in response.text
        settled(one)


def test_a_server_that_has_failed_says_so(serving, capfd, monkeypatch):
    gate = threading.Event()
    with serving(gate=gate) as one:
        threads, _ = in_background(lambda: one.client.post("/v1/completions", json=TEXT))
        settled(one, 1)

        def fail(_):
            raise MemoryError("out of beer")

        engine = one.service._engine
        monkeypatch.setattr(engine._lanes["snapkv-16"].batcher, "step", fail)
        monkeypatch.setattr(engine._lanes["snapkv-16"], "make", lambda: fail(0))
        gate.set()
        one.client.post("/v1/completions", json=TEXT)
        for thread in threads:
            thread.join()
        engine._thread.join(20)
        assert one.client.get("/health").status_code == 503
        assert (
            "has failed" in refusal(one.client.post("/v1/completions", json=TEXT), 503)["message"]
        )
        settled(one)
    assert "out of beer" in capfd.readouterr().err


def test_reading_a_prompt_takes_only_so_long(serving, monkeypatch):
    with serving(seconds=0.2) as one:
        prepare = one.service._prepare
        slow = threading.Event()
        monkeypatch.setattr(one.service, "_prepare", lambda asked: slow.wait(20) and prepare(asked))
        for stream in (False, True):
            response = one.client.post("/v1/completions", json=TEXT | {"stream": stream})
            assert refusal(response, 504)["code"] == "timeout"
        slow.set()
        settled(one)


def test_the_end_lets_running_requests_finish(serving):
    gate = threading.Event()
    with serving(gate=gate) as one:
        threads, found = in_background(lambda: one.client.post("/v1/completions", json=TEXT))
        settled(one, 1)
        one.server.drain()
        response = one.client.post("/v1/completions", json=TEXT)
        refusal(response, 503)
        assert "retry-after" in response.headers
        assert one.client.get("/health").status_code == 503
        gate.set()
        threads[0].join()
        assert found[0].json()["choices"][0]["text"] == text_of(expected("one two", 5, 0, 0, 12))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{one.url}/health")


def test_the_end_does_not_wait_for_ever(serving):
    gate = threading.Event()
    with serving(gate=gate, drain=0.2) as one:
        threads, _ = in_background(lambda: _post(one))
        settled(one, 1)
        since = time.monotonic()
        one.server.drain()
        one._thread.join(20)
        assert not one._thread.is_alive() and time.monotonic() - since < 10
        gate.set()
        threads[0].join()


def _post(served):
    with contextlib.suppress(httpx.HTTPError):
        served.client.post("/v1/completions", json=TEXT)


# ---- sessions


def test_a_session_goes_on_from_its_cache(serving):
    talk = [{"role": "user", "content": "six"}]
    script = [IDS[x] for x in "one two <eot>".split()]
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    with serving(script=script, sessions=2) as one:

        def ask(messages, session="me", **more):
            body = CHAT | off | {"messages": messages, "session": session} | more
            return one.client.post("/v1/chat/completions", json=body).json()

        first = ask(talk)
        answer = first["choices"][0]["message"]["content"]
        assert answer == "one two" and first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        more = [*talk, {"role": "assistant", "content": answer}, {"role": "user", "content": "two"}]
        second = ask(more)
        # Of "<user> six <eot> <bot> one two", which the template writes as "<assistant> one two",
        # the user's turn serves: with a full cache, or where no eviction has seen more of it.
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
        assert one.service.sessions.reused == 1 and one.service.sessions.tokens == 3
        one.made[0].least = 4
        ask(more)
        third = ask([*talk, {"role": "user", "content": "two"}])
        assert third["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert one.service.sessions.missed == 1
        one.made[0].least = 1
        # Of a session of another name, and one that was not asked for, nothing is used.
        assert len(one.service.sessions) == 1
        ask(talk, "you")
        ask(talk, "she")
        assert len(one.service.sessions) == 2
        body = CHAT | {"session": "me", "n": 2}
        refusal(one.client.post("/v1/chat/completions", json=body), 400)
        body = TEXT | {"session": "s", "prompt": "six one", "max_tokens": 9}
        one.client.post("/v1/completions", json=body)
        body |= {"prompt": "six one one two <eot> six"}
        reply = one.client.post("/v1/completions", json=body).json()
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 4
        last = one.made[0].seen[-1]
        assert last.kept.tokens.tolist() == last.prompt.tolist()[:4] and last.keep
        # So does what a stop string ended, up to its end.
        cut = {"stop": "two", "prompt": "two six", "session": "cut"}
        assert one.client.post("/v1/completions", json=body | cut).json()["choices"][0][
            "text"
        ].split() == ["one"]
        cut["prompt"] = "two six one two six"
        reply = one.client.post("/v1/completions", json=body | cut).json()
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
        lines = one.client.get("/metrics").text
        assert "\nfkv_sessions 2\n" in lines and "\nfkv_session_bytes 0\n" in lines
        assert f"\nfkv_sessions_reused_total {one.service.sessions.reused}\n" in lines
        assert f"\nfkv_session_tokens_reused_total {one.service.sessions.tokens}\n" in lines
        # What another session holds is nobody else's, whatever its name.
        body |= {"model": "words/full"}
        reply = one.client.post("/v1/completions", json=body).json()
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert one.made[1].seen[-1].kept is None
    with serving(sessions=0) as one:
        body = CHAT | {"session": "me"}
        error = refusal(one.client.post("/v1/chat/completions", json=body), 400)
        assert "keeps no sessions" in error["message"]


# ---- what is counted


def test_metrics_are_prometheus_s(serving):
    with serving() as one:
        for body in (TEXT, TEXT | {"n": 2}, TEXT | {"temperature": -1}):
            one.client.post("/v1/completions", json=body)
        lines = one.client.get("/metrics").text.splitlines()
        kinds = {x.split()[2]: x.split()[3] for x in lines if x.startswith("# TYPE")}
        for line in lines:
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                float(value)
                base = name.partition("{")[0]
                assert base in kinds or base.rpartition("_")[0] in kinds, line
        tokens = sum(len(expected("one two", 5, 0, j, 12)) for j in (0, 0, 1))
        assert metric(one, "fkv_tokens_total") == tokens
        assert metric(one, "fkv_prompt_tokens_total") == 4
        assert metric(one, "fkv_rows") == ROWS
        assert metric(one, "fkv_rows_in_use") == metric(one, "fkv_queue") == 0
        assert metric(one, "fkv_time_to_first_token_seconds_count") == 3
        assert metric(one, "fkv_tokens_per_second") == pytest.approx(tokens / 10)
        assert 'fkv_requests_total{path="/v1/completions",status="400"} 1' in lines
