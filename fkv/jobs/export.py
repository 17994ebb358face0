"""Scorers of a run, exported to be shared, with a model card."""

from ml_collections import ConfigDict

from fkv import files, kinds, models
from fkv.errors import UserError
from fkv.jobs import common, groups
from fkv.policies import Foresight
from fkv.runs import parallel, sharing

LAYOUTS = ("fkv", "released")


def run(config: ConfigDict, workdir: str) -> None:
    """Writes the scorers of `export.scorer` to `workdir`, in the layout `export.layout`.

    `fkv`: safetensors, their settings, and a model card with the run's tables: losses ± one
    standard error and, where it has them, answers with their intervals.
    `released`: the base model with the scorers inside, for the PyTorch code of ForesightKV.
    """
    groups.check(config, "export")
    settings = config.export
    kinds.check("export.layout", settings.layout, kinds.one_of(LAYOUTS))
    what = f"scorers of {settings.scorer}", f"layout {settings.layout}"
    common.announce("export", config, workdir, what=what)
    parallel.on_first(lambda: _write(config, workdir), f"export to {workdir}")
    common.say(f"written to {workdir}: fkv.load_scorer({str(workdir)!r}) reads it")


def _write(config: ConfigDict, workdir: str) -> None:
    scorer, released = config.export.scorer, config.export.layout == "released"
    sharing.check_directory(workdir, released)  # before a model is downloaded
    with common.scorers_of(f"export.scorer = {scorer!r}", scorer):
        policy, about = sharing.load(scorer)
    if released and not isinstance(policy, Foresight):
        raise UserError(f"export.scorer = {scorer!r}: its method has no layout `released`")
    if released:
        base = models.find(common.model_path(config), common.revision(config))
        sharing.export_released(policy, base, workdir)
    else:
        tables = [files.expand(scorer) / x for x in ("loss_ratio.md", "answers/accuracy.md")]
        metrics = "\n\n".join(files.read_text(table) for table in tables if table.exists())
        sharing.export(policy, workdir, about, metrics)
