"""Scorers of a run in a form that can be shared, with a card."""

from ml_collections import ConfigDict

from fkv import files, models, tasks
from fkv.api import EMBEDDED
from fkv.errors import UserError
from fkv.jobs import common, fields
from fkv.runs import parallel, sharing

LAYOUTS = ("fkv", "released")


def run(config: ConfigDict, workdir: str) -> None:
    """Writes the scorers of `export.scorer` to `workdir`, in the layout `export.layout`.

    `fkv`: safetensors, what they are for, and a model card with the run's tables: losses ± one
    standard error and, where it has them, answers with their intervals.
    `released`: the base model with the scorers inside, for the PyTorch code of ForesightKV.
    """
    fields.check(config, "export")
    settings = config.export
    if settings.layout not in LAYOUTS:
        raise UserError(f"export.layout = {settings.layout!r} must be one of {', '.join(LAYOUTS)}")
    what = f"scorers of {settings.scorer}, layout {settings.layout}"
    common.announce("export", config, workdir, what=what)
    parallel.on_first(lambda: _write(config, workdir), f"export to {workdir}")
    common.say(f"written to {workdir}: fkv.load_scorer({str(workdir)!r}) reads it")


def _write(config: ConfigDict, workdir: str) -> None:
    settings = config.export
    sharing.check_directory(workdir, settings.layout == "released")  # before a model is downloaded
    with common.scorers_of(f"export.scorer = {settings.scorer!r}", settings.scorer):
        policy, about = sharing.load(settings.scorer)
    if settings.layout == "released":
        path = tasks.REASONER if config.model == EMBEDDED else config.model
        sharing.export_released(policy, models.find(path, common.revision(config)), workdir)
    else:
        names = ("loss_ratio.md", "answers/accuracy.md")
        tables = [files.expand(settings.scorer) / name for name in names]
        metrics = "\n\n".join(files.read_text(table) for table in tables if table.exists())
        sharing.export(policy, workdir, about, metrics)
