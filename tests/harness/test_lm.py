"""The adapter to lm-evaluation-harness, beside lm-eval's own `hf` model on the same weights."""

import pytest

pytest.importorskip("lm_eval")

import fkv
from fkv import policies
from fkv.cache.cadence import Cadence
from fkv.harness import tasks
from fkv.harness.asking import Subject
from fkv.harness.lm import EvictedLM
from tests.harness import local

CADENCE = Cadence(32, 16)
SHORT = tasks.Settings(num_fewshot=-1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return local.save_checkpoint(tmp_path_factory.mktemp("checkpoint"), begin=True)


@pytest.fixture(scope="module")
def include(tmp_path_factory):
    return local.write_tasks(tmp_path_factory.mktemp("tasks"), local.documents(4))


def hf(saved, **settings):
    """lm-eval's own model."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(
        pretrained=saved, device="cpu", batch_size=2, dtype="float32", **settings
    )


def evicted(saved, policy="full", cadence=CADENCE, **settings):
    model = fkv.load(saved)
    return EvictedLM(Subject(model, policies.get(policy), cadence, rows=4), **settings)


def answers(lm, include, settings, limit=None):
    """Of all requests of all tasks, by task; each call of lm-eval's by itself."""
    loaded = tasks.load(local.TASKS, include, settings, "")
    found = {}
    for name, task in loaded.leaves.items():
        requests = tasks.requests(name, task, lm, settings)
        found[name] = getattr(lm, requests[0].request_type)(requests)
    return found


def alike(ours, theirs):
    for name, some in theirs.items():
        for a, b in zip(ours[name], some, strict=True):
            if name in ("needle", "write"):
                assert a == b, name
            elif name == "choose":
                assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
            else:
                assert a == pytest.approx(b, abs=1e-3 * max(1, abs(b) / 100))


@pytest.mark.parametrize("chat", [False, True])
def test_the_full_cache_answers_as_lm_eval_s_own_model(saved, include, chat):
    settings = tasks.Settings(chat=chat, system="Be brief." if chat else "")
    alike(answers(evicted(saved), include, settings), answers(hf(saved), include, settings))


def test_what_is_too_long_loses_its_beginning(saved, include):
    """And a text in windows has more of them."""
    lm = evicted(saved, max_length=64)
    alike(answers(lm, include, SHORT), answers(hf(saved, max_length=64), include, SHORT))
