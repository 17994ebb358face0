"""The server of a config: real models, its command, and what it refuses before it loads."""

import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

import fkv
from configs import tiny
from fkv import models
from fkv.errors import UserError
from fkv.jobs import common, serve
from tests import oracles, test_api

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

PROMPT = "start fan tol men ox gol well <think>"
MESSAGES = [
    {"role": "system", "content": "w1 w2"},
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": "w4"},
    {"role": "user", "content": "w5 w6 " * 12},
]
SEED = 7


def recipe(**change):
    config = tiny.get_config()
    with config.unlocked():
        config.budget, config.interval = 32, 8
        config.serve.update(
            budgets=(16,), rows=4, length=128, port=0, every=8, logprobs=2, sessions=1
        )
        config.serve.update(**change)
    return config


@pytest.fixture(scope="module")
def of_words(tmp_path_factory):
    """A tiny Qwen3, with its tokenizer and template."""
    directory = test_api.save_words(tmp_path_factory.mktemp("tiny-qwen3"), test_api.TEMPLATE)
    assert models.read(directory) == oracles.make_lm().config
    return directory


@pytest.fixture(scope="module", params=["embedded", "qwen3"])
def served(request, of_words):
    from fkv.serve.app import App
    from fkv.serve.server import Background

    config = recipe()
    if request.param == "qwen3":
        config.serve.policies = ("snapkv",)
        config.model = str(of_words)
    model = common.load_language_model(config)
    lanes = serve.lanes_of(config, serve.policies_of(config))
    service = serve.service(config, model, lanes)
    with Background(App(service).starlette(), service) as one:
        with openai.OpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0) as client:
            yield model, client, service


def test_texts_are_those_of_the_library(served):
    model, client, service = served
    embedded = model.name == "embedded"
    settings = {"seed": SEED, "temperature": 0.8, "top_p": 0.9, "max_tokens": 40, "n": 4}
    more = {"top_k": 7, "min_p": 0.01}
    for name in service.lanes:
        policy = name.split("/")[1].split("-")[0]
        if embedded:
            prompt, create = PROMPT, client.completions.create
            given = {"prompt": prompt, "logprobs": 2}
        else:
            prompt, create = MESSAGES, client.chat.completions.create
            given = {"messages": prompt, "logprobs": True, "top_logprobs": 2}
        [want] = fkv.generate(
            model, prompt, policy, 16, 8, 40, samples=4, temperature=0.8, top_p=0.9, seed=SEED,
            logprobs=True, top_logprobs=2, **more,
        )  # fmt: skip
        reply = create(model=name, **given, **settings, extra_body=more)
        for one, choice in zip(want, reply.choices, strict=True):
            text = choice.text if embedded else choice.message.content
            if "</think>" in one.text and not embedded:
                continue
            assert text == one.text and choice.finish_reason == one.finish
            said = choice.logprobs
            found = said.token_logprobs if embedded else [x.logprob for x in said.content]
            assert found == pytest.approx(one.logprobs.tolist(), abs=1e-4)
        assert reply.usage.prompt_tokens == want[0].prompt_tokens
        assert reply.usage.completion_tokens == sum(len(one.tokens) for one in want)
        # In pieces, and cut by a stop string that straddles two tokens.
        whole = want[0].text.split()
        stop = " ".join(whole[5:7])
        settings_of_one = settings | {"n": 1}
        pieces = create(
            model=name, **given, **settings_of_one, extra_body=more, stream=True, stop=stop
        )
        shown = [x.choices[0] for x in pieces]
        text = "".join((x.text if embedded else x.delta.content) or "" for x in shown)
        assert text == want[0].text[: want[0].text.index(stop)]
        assert [x.finish_reason for x in shown if x.finish_reason] == ["stop"]
    if embedded:
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            client.chat.completions.create(
                model=service.name, messages=[{"role": "user", "content": "x"}]
            )


def test_a_session_gets_the_answers_of_one_that_reads_all(served):
    model, client, service = served
    if model.name != "embedded":
        pytest.skip("its chats are tested below")
    settings = {"model": f"{service.name}/full", "temperature": 0, "max_tokens": 9}
    session = settings | {"extra_body": {"session": "me"}}
    first = client.completions.create(prompt=PROMPT, **session)
    longer = f"{PROMPT} {first.choices[0].text} so 4 ox"
    again = client.completions.create(prompt=longer, **session)
    used = again.usage.prompt_tokens_details.cached_tokens
    assert used == len(f"{PROMPT} {first.choices[0].text}".split()) - 1
    plain = client.completions.create(prompt=longer, **settings)
    assert plain.usage.prompt_tokens_details.cached_tokens == 0
    assert again.choices[0].text == plain.choices[0].text


def test_a_chat_goes_on_where_its_template_writes_answers_in_another_way(served):
    """Under eviction, from the cache at the end of the prompt, whose last chunk can be cut."""
    model, client, service = served
    if model.name == "embedded":
        pytest.skip("it has no chat template")
    create = client.chat.completions.create
    settings = {"temperature": 0, "max_tokens": 30, "extra_body": {"session": "me"}}
    first = create(model=service.name, messages=MESSAGES, **settings)
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    more = [*MESSAGES, answer, {"role": "user", "content": "w7"}]
    again = create(model=service.name, messages=more, **settings)
    # All of the first prompt but `<bot>`.
    assert again.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1
    assert service.sessions.reused == 1 and service.sessions.bytes > 0


def test_a_full_queue_refuses_and_loses_nothing(served, monkeypatch):
    model, client, service = served
    monkeypatch.setattr(service, "limits", dataclasses.replace(service.limits, queue=1))
    settings = {"model": next(iter(service.lanes)), "prompt": [3, 4, 5], "max_tokens": 20}
    settings |= {"seed": SEED, "stream": True}
    [want] = fkv.generate(
        model, [3, 4, 5], "snapkv", 16, 8, 20, samples=4, temperature=0.6, seed=SEED
    )
    gate = threading.Event()
    batcher = service._engine._lanes[settings["model"].split("/")[1]].batcher
    step = batcher.step
    monkeypatch.setattr(batcher, "step", lambda tokens: gate.wait(60) and step(tokens))
    running = client.completions.create(**settings, n=4)
    waiting = client.completions.create(**settings)
    for n in (1, 2):
        with pytest.raises(openai.RateLimitError, match="5 answers are running") as refused:
            client.completions.create(**settings, n=n)
        assert refused.value.code == "queue_full"
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    gate.set()
    for stream, count in ((running, 4), (waiting, 1), (None, 1)):
        stream = stream or client.completions.create(**settings)
        shown = [piece.choices[0] for piece in stream]
        texts = ["".join(x.text for x in shown if x.index == i) for i in range(count)]
        assert texts == [one.text for one in want[:count]]
    assert service.pending == 0


def test_the_command_serves_and_ends_with_zero(tmp_path):
    """With a key from the environment, which is written nowhere."""
    key = "a-key-that-nobody-guesses"
    command = [
        sys.executable, "-m", "launch.serve", "--config=tiny", f"--workdir={tmp_path}/run",
        "--config.serve.port=0", "--config.serve.policies=('snapkv',)", "--config.serve.rows=2",
        "--config.serve.key_variable=FKV_TEST_KEY",
    ]  # fmt: skip
    environment = os.environ | {"FKV_TEST_KEY": key}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if "serving " in line:
                break
        url = said[-1].split(" at ")[1].split(",")[0]
        client = openai.OpenAI(base_url=url, api_key=key)
        assert [x.id for x in client.models.list()] == ["embedded/snapkv-64"]
        reply = client.completions.create(model="embedded", prompt="start fan", max_tokens=3)
        assert reply.usage.completion_tokens == 3
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="another").models.list()
        process.send_signal(signal.SIGTERM)
        said += process.stdout
        assert process.wait(60) == 0, said
    assert said[-2] == "served all that was running\n" and said[-1].startswith("serve: done in ")
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"config.json", "commit.txt"}
    assert not any(key.encode() in path.read_bytes() for path in written)
    assert key not in "".join(said)


# ---- what is refused


@pytest.fixture
def nothing_loads(monkeypatch):
    def loaded(*_):
        raise AssertionError("a model is being loaded")

    monkeypatch.setattr(common, "load_language_model", loaded)


REFUSED = {
    "no policies": (dict(policies=()), "serve.policies and serve.scorers are empty"),
    "no budgets": (dict(policies=("h2o",), budgets=()), "serve.budgets is empty"),
    "a budget that is none": (dict(budgets=(20,)), "serve.budgets: budget = 20 must be a multiple"),
    "an unknown policy": (dict(policies=("snapvk",)), "serve.policies: .* 'snapvk' is not known"),
    "scorers without a name": (dict(scorers=("runs/x",)), "must be of the form name=workdir"),
    "no scorers there": (
        dict(scorers=("a=no/run",)),
        "'a=no/run': no/run: no such",
    ),
    "no key": (dict(key_variable="FKV_NO_KEY"), "'FKV_NO_KEY' is not set: it must hold 16 to"),
    "a short key": (dict(key_variable="FKV_SHORT"), "'FKV_SHORT' is no good key"),
    "no such host": (dict(host="no.such.host.invalid"), "serve.host = 'no.such.host.invalid'"),
    "someone else's host": (dict(host="192.0.2.1"), "serve.host = '192.0.2.1', .* can't listen"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_t_be_served_is_refused_first(name, tmp_path, monkeypatch, nothing_loads):
    monkeypatch.setenv("FKV_SHORT", "short")
    change, says = REFUSED[name]
    config = recipe()
    with config.unlocked():
        config.serve.update(change)
    with pytest.raises(UserError, match=says) as refused:
        serve.run(config, str(tmp_path / "run"))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_a_port_in_use_is_refused_first(tmp_path, nothing_loads):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = recipe()
        config.serve.port = taken.getsockname()[1]
        with pytest.raises(UserError, match=r"serve\.port = \d+: can't listen there \(Address al"):
            serve.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_is_not_installed_is_named(tmp_path, monkeypatch, nothing_loads):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name)
    )
    with pytest.raises(UserError, match=r"launch\.serve needs uvicorn: pip install"):
        serve.run(recipe(), str(tmp_path / "run"))
