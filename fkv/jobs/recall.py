"""More than loss: agreement with the full cache's continuations, and look-ups in held-out text."""

import dataclasses
from collections.abc import Sequence

from ml_collections import ConfigDict

from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.jobs import agreement, common, evaluate, groups, lookups
from fkv.jobs.measuring import Job
from fkv.runs import preemption, rundir
from fkv.runs.rundir import open_run

# What a run may be asked for more of; everything else must stay as it was.
MAY_DIFFER = (
    *(name for name in common.other_jobs("recall") if name != "evaluate"),
    *(f"evaluate.{name}" for name in groups.Evaluate.kinds() if not name.startswith("action")),
    "eval", "recall.prompts", "recall.lookups", "recall.batch",
)  # fmt: skip


def run(config: ConfigDict, workdir: str) -> None:
    """Measures every policy at every budget of `evaluate` along continuations and on look-ups.

    Resumes, and adds to earlier results when asked for more. Each of several processes takes a
    batch at a time. Writes `continuations.jsonl`, `agreement.{jsonl,txt,md,csv}`,
    `candidates.jsonl` and `lookups.{jsonl,txt,md,csv}`.
    """
    groups.check(config, "recall")
    settings, budgets = config.recall, config.evaluate.budgets
    named, inputs = evaluate.policies_of(config)
    what = f"{len(named)} policies", common.said_cadence(config, budgets)
    common.announce("recall", config, workdir, common.model_config(config), what)
    if not budgets:
        raise UserError("evaluate.budgets is empty: give at least one")
    at = common.cadences(config, "evaluate.budgets")
    common.check_baseline(config, named)
    _check_sizes(config, at)
    common.check_policies(config, common.model_config(config), named, at)
    rundir.check_run(workdir, config, MAY_DIFFER, inputs)
    model = common.load_language_model(config, separate=bool(settings.prompts))
    inputs |= common.language_inputs(model)
    prompts = agreement.prompts(config, model) if settings.prompts else None
    found = lookups.documents_of(config, model, rundir.check_path(workdir))
    if prompts is not None:
        inputs["data.eval_path: prompts"] = prompts.digests()
    if found:
        inputs["traces.text: documents"] = [document.id for document in found]
    run = open_run(workdir, config, MAY_DIFFER, inputs)
    run.resume({})
    with preemption.noticed() as asked_to_end:
        job = Job(config, run, model, named, asked_to_end)
        if prompts is not None:
            agreement.continue_all(job, prompts)
            job = dataclasses.replace(job, model=common.to_replay(job.model))
            agreement.run(job, prompts, at)
        if found:
            lookups.run(job, found, at)
    run.close()


def _check_sizes(config: ConfigDict, at: Sequence[Cadence]) -> None:
    """Refuses lengths at which nothing would be evicted, or evictions would not be those of use."""
    settings, slots = config.recall, max(cadence.slots for cadence in at)
    for name, asked, least, why in (
        ("prompt_tokens", settings.prompts, slots, "evictions begin within the prompt"),
        ("context", settings.lookups, 2 * slots, "answers, in its first half, are not the newest"),
    ):
        value = settings[name]
        if asked and (value % config.interval or value < least):
            raise UserError(
                f"recall.{name} = {value} must be a multiple of interval = {config.interval} and "
                f"at least {least}, so that {why} at the budgets asked for"
            )
