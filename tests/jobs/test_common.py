"""What jobs share: the settings that may change when one goes on, and the model they load."""

import jax
import pytest

from configs import tiny
from fkv import policies
from fkv.errors import UserError
from fkv.jobs import common
from tests.jobs.test_sft import model_dir, small

__all__ = ["model_dir"]  # a fixture


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


def test_losses_are_measured_after_the_prompt(model_dir):
    config = small(model_dir)
    config.eval.budgets = (16, 56)
    model, params = common.load_model(config)
    held_out = common.load_traces(config, "eval", 4, 56, model.vocab_size)
    named = {"random": policies.get("random")}
    results = common.measure_losses(config, model, params, named, held_out)
    assert [(r.policy, r.budget) for r in results] == [
        (name, budget) for budget in (16, 56) for name in ("full", "golden", "random")
    ]
    lengths = list(zip(held_out.length_n.tolist(), held_out.prompt_n.tolist(), strict=True))
    # At the smaller budget it is the prompt that says where counting begins.
    assert all(16 + 8 < prompt for _, prompt in lengths)
    for r in results:
        counted = [n - max(r.budget + 8, prompt) for n, prompt in lengths]
        assert r.tokens[:, 0].tolist() == counted
