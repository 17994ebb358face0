"""Which settings a job may find changed when it goes on."""

from configs import tiny
from fkv.jobs import common


def test_other_jobs_are_the_groups_of_the_config_that_a_job_does_not_read():
    config = tiny.get_config()
    assert all(name in config for name in common.JOBS)
    assert "sft" not in common.other_jobs("sft")
    assert {*common.other_jobs("sft"), "sft"} == {*common.JOBS, "model_axis"}
    # What several jobs read is not among them.
    assert not {"data", "task", "scorer", "eval", "budget", "seed"} & set(common.JOBS)
