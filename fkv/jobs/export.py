"""Scorers of a run, exported to be shared, with a model card."""

import re

from ml_collections import ConfigDict

from fkv import files, hub, kinds, models
from fkv.errors import UserError
from fkv.jobs import common, groups
from fkv.policies import Foresight
from fkv.runs import parallel, sharing

LAYOUTS = ("fkv", "released")
_LICENSE = kinds.Kind("'' or an id, as apache-2.0", lambda x: re.fullmatch(r"[\w.-]*", x))
_DATASETS = kinds.Kind(
    "comma-separated hub ids, or ''",
    lambda x: re.fullmatch(rf"|({hub.ID}|\w[\w.-]*)(,({hub.ID}|\w[\w.-]*))*", x),
)


def run(config: ConfigDict, workdir: str) -> None:
    """Writes the scorers of `export.scorer` to `workdir`, in the layout `export.layout`.

    `fkv`: safetensors, their settings, and a model card with the run's tables: losses ± one
    standard error and, where it has them, answers with their intervals.
    With `export.push` they are then uploaded to the hub.
    `released`: the base model with the scorers inside, for the PyTorch code of ForesightKV.
    """
    groups.check(config, "export")
    settings = config.export
    kinds.check("export.layout", settings.layout, kinds.one_of(LAYOUTS))
    if settings.push and not re.fullmatch(hub.ID, settings.push):
        raise UserError(f"export.push = {settings.push!r} must be a hub id, owner/name")
    kinds.check("export.license", settings.license, _LICENSE)
    kinds.check("export.datasets", settings.datasets, _DATASETS)
    if settings.push and settings.layout != "fkv":
        raise UserError(f"export.push uploads layout fkv, not {settings.layout}: set one of them")
    what = f"scorers of {settings.scorer}", f"layout {settings.layout}"
    common.announce("export", config, workdir, what=what)
    parallel.on_first(lambda: _write(config, workdir), f"export to {workdir}")
    common.say(f"written to {workdir}: fkv.load_scorer({str(workdir)!r}) reads it")
    if settings.push:
        parallel.on_first(lambda: _push(config, workdir), f"upload to {settings.push}")


def _write(config: ConfigDict, workdir: str) -> None:
    scorer, released = config.export.scorer, config.export.layout == "released"
    sharing.check_directory(workdir, released)  # before a model is downloaded
    with common.scorers_of(f"export.scorer = {scorer!r}", scorer):
        policy, about = sharing.load(scorer)
    if released and not isinstance(policy, Foresight):
        raise UserError(
            f"export.scorer = {scorer!r}: its weights can't be written in the layout `released`: "
            "set export.layout to fkv"
        )
    if released:
        base = models.find(common.model_path(config), common.revision(config))
        sharing.export_released(policy, base, workdir)
    else:
        tables = [files.expand(scorer) / x for x in ("loss_ratio.md", "answers/accuracy.md")]
        metrics = "\n\n".join(files.read_text(table) for table in tables if table.exists())
        datasets = config.export.datasets.split(",") if config.export.datasets else []
        said = {"license": config.export.license, "datasets": datasets}
        about |= {name: value for name, value in said.items() if value}
        sharing.export(policy, workdir, about, metrics, config.export.push or ".")


def _push(config: ConfigDict, workdir: str) -> None:
    with common.of_field("export.push"):
        address = sharing.push(workdir, config.export.push, config.export.private)
    common.say(f"uploaded to {address}: fkv.load_scorer({config.export.push!r}) reads it")
