"""What jobs share: the settings that may change when one goes on, and the model they load."""

from configs import tiny
from fkv.jobs import common


def test_other_jobs_are_the_groups_of_the_config_that_a_job_does_not_read():
    config = tiny.get_config()
    assert all(name in config for name in common.JOBS)
    assert "sft" not in common.other_jobs("sft")
    assert {*common.other_jobs("sft"), "sft"} == {*common.JOBS, "model_axis"}
    # What several jobs read is not among them.
    assert not {"data", "task", "scorer", "eval", "budget", "seed"} & set(common.JOBS)


def test_every_way_to_the_model_has_the_cache_that_is_asked_for():
    config = tiny.get_config()
    config.cache_dtype = "int8"
    assert common.load_model(config)[0].cache_dtype == "int8"
    assert common.load_language_model(config).config.cache_dtype == "int8"
    assert common.model_config(config).cache_dtype == "int8"
