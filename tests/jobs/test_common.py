"""What jobs share: the settings that may change when one goes on, and the model they load."""

import jax
import pytest

from configs import tiny
from fkv.errors import UserError
from fkv.jobs import common


def test_other_jobs_are_the_groups_of_the_config_that_a_job_does_not_read():
    config = tiny.get_config()
    assert all(name in config for name in common.JOBS)
    assert "sft" not in common.other_jobs("sft")
    assert {*common.other_jobs("sft"), "sft"} == {*common.JOBS, "model_axis", "attention_kernel"}
    # What several jobs read is not among them.
    assert not {"data", "task", "scorer", "eval", "budget", "seed"} & set(common.JOBS)


def test_models_decode_with_the_kernel_of_the_config(monkeypatch):
    config = tiny.get_config()
    assert common.load_model(config)[0].kernel == "plain"
    config.attention_kernel = "pallas"
    for load in (common.load_model, common.load_language_model):
        with pytest.raises(UserError, match="attention_kernel 'pallas' needs a GPU or a TPU"):
            load(config)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert common.load_model(config)[0].kernel == "pallas"
    assert common.load_language_model(config).config.kernel == "pallas"
    config.model_axis = 2
    with pytest.raises(UserError, match="attention_kernel: 'pallas' does not go with model_axis"):
        common.load_model(config)


def test_every_way_to_the_model_has_the_cache_that_is_asked_for():
    config = tiny.get_config()
    config.cache_dtype = "int8"
    assert common.load_model(config)[0].cache_dtype == "int8"
    assert common.load_language_model(config).config.cache_dtype == "int8"
    assert common.model_config(config).cache_dtype == "int8"
