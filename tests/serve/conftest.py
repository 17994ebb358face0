"""A model whose tokens are words, and a server over a fake batcher."""

import contextlib
import dataclasses

import pytest

from fkv import models
from fkv.engine.sampling import Sampling
from fkv.models.named import Model
from tests import oracles
from tests.models.test_texts import IDS, WORDS, make
from tests.serve import fake

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eot> {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% if enable_thinking is not defined or enable_thinking %}"
    " <think>{% endif %}{% endif %}"
)
ROWS, QUEUE, LENGTH, KEY = 4, 8, 64, "k" * 16


@pytest.fixture(scope="session")
def words():
    """A model without weights; `</s>` and `<eot>` end an answer."""
    config = dataclasses.replace(oracles.make_model()[0], vocab_size=len(WORDS))
    return Model(models.LM({}, config), make(CHAT), (IDS["</s>"], IDS["<eot>"]), "words")


@pytest.fixture(scope="session")
def serving(words):
    """A function that serves the model with a fake batcher, as a context."""
    from fkv.serve.app import App
    from fkv.serve.server import Background
    from fkv.serve.service import Limits, Service

    @contextlib.contextmanager
    def serve(key="", script=None, sessions=2, gate=None, origins=(), **limits):
        made = []

        def batcher():
            made.append(fake.Batcher(len(WORDS), ROWS, LENGTH, 5, script))
            made[-1].gate = gate
            return made[-1]

        settings = {"rows": ROWS, "queue": QUEUE, "length": LENGTH, "every": 4} | limits
        service = Service(
            words, "words", {"snapkv-16": batcher, "full": batcher},
            Sampling(0.6, 20, 0.95), Limits(**settings), sessions,
        )  # fmt: skip
        with Background(App(service, key).starlette(origins), service) as served:
            served.service, served.made = service, made
            headers = {"authorization": f"Bearer {key}"} if key else {}
            with httpx.Client(base_url=served.url, headers=headers, timeout=20) as client:
                served.client = client
                yield served

    return serve


@pytest.fixture(scope="module")
def served(serving):
    """One server for many tests."""
    with serving() as one:
        yield one
