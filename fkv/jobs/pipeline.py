"""Several stages in one directory, from training a reasoner to its answers."""

import functools

from ml_collections import ConfigDict

from fkv import files
from fkv.errors import UserError
from fkv.jobs import common, evaluate, groups, grpo, pretrain, sft
from fkv.runs import rundir

JOBS = {"pretrain": pretrain, "sft": sft, "grpo": grpo, "evaluate": evaluate}
# When the reinforcement stage has been asked for more steps, its scorers answer anew.
STAGES = {name: job.run for name, job in JOBS.items()} | {
    "evaluate": functools.partial(evaluate.run, anew=("grpo",))
}


def run(config: ConfigDict, workdir: str) -> None:
    """Runs `pipeline.stages`, each in `workdir/<stage>`.

    A stage takes the model and the scorers of those before it, and the values that
    `pipeline.changes.<stage>` changes. Done stages are not repeated, an interrupted one resumes.
    """
    stages = plan(config, workdir)
    for stage, part in stages.items():  # all are refused before the first starts
        groups.check(part, stage)
    for stage, part in stages.items():
        rundir.check_run(f"{workdir}/{stage}", part, JOBS[stage].MAY_DIFFER)
    if "evaluate" in stages and "pretrain" not in stages:  # which makes the model
        own = {str(files.expand(workdir) / stage) for stage in stages}
        entries = [x.partition("=") for x in stages["evaluate"].evaluate.scorers]
        later = [name for name, _, place in entries if place in own]
        evaluate.check(stages["evaluate"], f"{workdir}/evaluate", later)
    common.announce("pipeline", config, workdir, what=f"stages {', '.join(stages)}")
    for stage, part in stages.items():
        common.say("")
        STAGES[stage](part, f"{workdir}/{stage}")


def plan(config: ConfigDict, workdir: str) -> dict[str, ConfigDict]:
    """The config of every stage, in order; UserError if stages or their changes are wrong."""
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
    return found
