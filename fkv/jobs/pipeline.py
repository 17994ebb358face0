"""Several stages in one directory, from pretraining a reasoner to evaluating it."""

import functools

from ml_collections import ConfigDict

from fkv import files
from fkv.errors import UserError
from fkv.jobs import common, evaluate, groups, grpo, pretrain, sft
from fkv.runs import rundir

JOBS = {"pretrain": pretrain, "sft": sft, "grpo": grpo, "evaluate": evaluate}
# Scorers that the reinforcement stage has trained further answer anew.
STAGES = {name: job.run for name, job in JOBS.items()} | {
    "evaluate": functools.partial(evaluate.run, anew=("grpo",))
}


def run(config: ConfigDict, workdir: str) -> None:
    """Runs `pipeline.stages`, each in `workdir/<stage>`.

    A stage gets the model and the scorers of those before it, and `pipeline.changes.<stage>` sets
    fields for it alone. Finished stages are not repeated, an interrupted one resumes.
    """
    stages = plan(config, workdir)
    for stage, part in stages.items():  # all are checked before the first starts
        groups.check(part, stage)
    for stage, part in stages.items():
        rundir.check_run(f"{workdir}/{stage}", part, JOBS[stage].MAY_DIFFER)
    if "evaluate" in stages and "pretrain" not in stages:  # else there is no model yet
        own = {str(files.expand(workdir) / stage) for stage in stages}
        entries = [x.partition("=") for x in stages["evaluate"].evaluate.scorers]
        later = [name for name, _, place in entries if place in own]
        evaluate.check(stages["evaluate"], f"{workdir}/evaluate", later)
    common.announce("pipeline", config, workdir, what=[f"stages {', '.join(stages)}"])
    for stage, part in stages.items():
        common.say("")
        STAGES[stage](part, f"{workdir}/{stage}")


def plan(config: ConfigDict, workdir: str) -> dict[str, ConfigDict]:
    """The config of every stage, in order; UserError for bad stages or changes."""
    groups.check(config, "pipeline")
    stages = config.pipeline.stages
    if list(stages) != [name for name in STAGES if name in stages]:
        known = ", ".join(STAGES)
        raise UserError(f"pipeline.stages = {stages} must be some of {known}, in this order")
    root, found = files.expand(workdir), {}
    scorers = [f"supervised={root / 'sft'}"] * ("sft" in stages)
    scorers += [f"grpo={root / 'grpo'}"] * ("grpo" in stages)
    for stage in stages:
        part = ConfigDict(config).copy_and_resolve_references()
        if "pretrain" in stages and stage != "pretrain":
            part.model = str(root / "pretrain" / "model")
        if "sft" in stages and stage == "grpo" and "grpo" in part:
            part.grpo.scorer = str(root / "sft")
        if scorers and stage == "evaluate" and "evaluate" in part:
            part.evaluate.scorers = tuple(scorers)
        try:
            part.update(config.pipeline.changes.get(stage, {}))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"pipeline.changes.{stage}: {error}") from error
        found[stage] = part.lock()
    if "sft" in found and found["sft"].sft.variants:  # their scorers are in sft/<name>
        where = str(root / "sft")
        read = {"grpo": [found["grpo"].grpo.scorer]} if "grpo" in found else {}
        if "evaluate" in found:
            read["evaluate"] = [x.partition("=")[2] for x in found["evaluate"].evaluate.scorers]
        for stage, places in read.items():
            if where in places:
                field = {"grpo": "grpo.scorer", "evaluate": "evaluate.scorers"}[stage]
                raise UserError(
                    f"sft.variants: {where} holds several scorers, in a directory each: set "
                    f"pipeline.changes.{stage}.{field} to one of them"
                )
    return found
