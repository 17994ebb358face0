"""All stages one after the other in one directory, from a reasoner to answers."""

import functools

from ml_collections import ConfigDict

from fkv import files
from fkv.errors import UserError
from fkv.jobs import common, evaluate, fields, grpo, pretrain, sft
from fkv.runs import rundir

JOBS = {"pretrain": pretrain, "sft": sft, "grpo": grpo, "evaluate": evaluate}
# The scorers of a reinforcement stage that was asked for more steps answer anew.
STAGES = {name: job.run for name, job in JOBS.items()} | {
    "evaluate": functools.partial(evaluate.run, anew=("grpo",))
}


def run(config: ConfigDict, workdir: str) -> None:
    """Runs the stages named in `pipeline.stages`, each in `workdir/<stage>`.

    A stage takes the model and the scorers of those before it, and what `pipeline.changes.<stage>`
    says otherwise than the config. Done stages are opened again and not repeated, an interrupted
    one goes on where it stopped.
    """
    stages = plan(config, workdir)
    for stage, part in stages.items():  # what is wrong with the last is found out before the first
        fields.check(part, stage)
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
    """The config of every stage, in order.

    Raises:
      UserError: a stage is unknown, comes twice or too early, or is changed where it is not named.
    """
    fields.check(config, "pipeline")
    stages, changes = config.pipeline.stages, config.pipeline.changes
    for stage in stages:
        if stage not in STAGES:
            raise UserError(f"pipeline.stages: no stage {stage!r}: there are {', '.join(STAGES)}")
    if list(stages) != [name for name in STAGES if name in stages]:
        raise UserError(f"pipeline.stages = {stages} must be in the order {', '.join(STAGES)}")
    root, found = files.expand(workdir), {}
    for stage in stages:
        part = ConfigDict(config).copy_and_resolve_references()
        if "pretrain" in stages and stage != "pretrain":
            part.model = str(root / "pretrain" / "model")
        if "sft" in stages and stage == "grpo" and "grpo" in part:
            part.grpo.scorer = str(root / "sft")
        before = [name for name in ("sft", "grpo") if name in stages]
        if before and stage == "evaluate" and "evaluate" in part:
            names = {"sft": "supervised", "grpo": "grpo"}
            part.evaluate.scorers = tuple(f"{names[name]}={root / name}" for name in before)
        try:
            part.update(changes.get(stage, {}))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"pipeline.changes.{stage}: {error}") from error
        found[stage] = part.lock()
    return found
