"""The part of `python -m launch.<job> --help` that lists the job's fields."""

import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from fkv import recipes
from fkv.jobs import READS

BASE = recipes.PACKAGED / "base.py"
# Lines of `configs.base`: a group, its docstring, a field with a comment, a comment above a field.
_LINE = re.compile(
    r'def (?P<group>\w+)\(.*|    """(?P<about>.+)"""'
    r"|    config\.(?P<field>[\w.]+) = [^#]+(# (?P<behind>.+))?|    # (?P<above>.+)"
)
_COLUMN = 34


def describe(job: str, config: ConfigDict, name: str) -> str:
    """The fields that a job reads of the config `name`, with values and meanings."""
    reads = {"dry_run", "target", "dry_run_json", *READS.get(job, config)}
    if job == "pipeline" and "pipeline" in config:
        stages = [READS.get(stage, ()) for stage in config.pipeline.stages]
        reads = reads.union(["pipeline"], *stages)
    about, comment = comments()
    order = list(comment)

    def documented(field):
        """The field, or the open group it is in."""
        while field and field not in order:
            field = field.rpartition(".")[0]
        return field or order[-1]

    lines = [f"fields that {job} reads, as in {name}; --config.<field>=<value> sets one:"]
    group = None
    for field, value in sorted(leaves(config), key=lambda x: order.index(documented(x[0]))):
        if not any(f"{field}.".startswith(f"{read}.") for read in reads):
            continue
        if group != (group := field.split(".")[0] if "." in field else "shared"):
            lines += ["", about.get(group, group)]
        shown, meaning = f"  {field}={value!r}", comment.pop(documented(field), "")
        if meaning and len(shown) > _COLUMN:
            lines.append(shown)
            shown = ""
        lines.append(f"{shown:<{_COLUMN}}  {meaning}".rstrip())
    return "\n".join(lines)


def comments() -> tuple[dict[str, str], dict[str, str]]:
    """Descriptions of the groups of `configs.base`, and of their fields."""
    about, meaning, group, above = {}, {}, "", ""
    # Parsed, not imported: the user may have a package named configs.
    for line in BASE.read_text().splitlines():
        found = match.groupdict() if (match := _LINE.fullmatch(line)) else {}
        group = found.get("group") or group
        if found.get("about"):
            about[group] = found["about"]
        if found.get("field") and (found["behind"] or above):
            prefix = "" if group == "shared" else f"{group}."
            meaning[prefix + found["field"]] = found["behind"] or above
        above = found.get("above")
    return about, meaning


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all fields."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
