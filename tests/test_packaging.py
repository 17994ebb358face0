"""What is installed: the packages of the wheel, and the command `fkv <job>`."""

import ast
import configparser
import runpy
import sys
from pathlib import Path

import pytest

import fkv
from fkv.errors import UserError
from fkv.jobs import READS
from launch import __main__ as console
from launch import flags

ROOT = Path(fkv.__file__).parents[1]


def test_the_wheel_has_every_package():
    """`configs` and `launch` are in `fkv` there."""
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("fkv/**/*.py")}
    found = {".".join(folder.parts) for folder in folders} | {"fkv.configs", "fkv.launch"}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert found == set(setup["options"]["packages"].split())


def test_nothing_in_the_wheel_needs_the_packages_by_their_names_in_a_clone():
    """Recipes may: `launch.flags` provides `configs` to them."""
    for folder in ("fkv", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                assert not {x.partition(".")[0] for x in names} & {"configs", "launch"}, path


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `fkv ...`: its code, what it prints, and its error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["/bin/fkv", *arguments])
        code = 0
        try:
            console.main()
        except SystemExit as end:
            code = end.code or 0
        return (code, *capsys.readouterr())

    return run


def test_the_command_lists_all_jobs_in_a_line_each(command):
    code, told, _ = command()
    assert code == 0 and command("--help")[1] == told
    jobs = dict(line.split(None, 1) for line in told.splitlines() if line.startswith("  "))
    assert set(READS) | {"sweep"} <= set(jobs) == set(console.jobs())
    assert jobs["serve"] == "Serves a model under eviction policies to clients of OpenAI's API."
    assert command("--version")[1] == f"fkv {fkv.__version__}\n"


@pytest.mark.parametrize(
    ("job", "says"),
    [("sfft", "did you mean sft?"), ("app", "choose from "), ("--config=tiny", "choose from ")],
)
def test_an_unknown_job_is_one_line(command, job, says):
    code, _, error = command(job, "--config=tiny")
    assert code == 2 and error.startswith(f"error: fkv has no job {job!r}: {says}")
    assert error.count("\n") == 1


def test_the_command_runs_the_module_of_the_job(command, monkeypatch):
    asked = []
    monkeypatch.setattr(runpy, "run_module", lambda *given, **_: asked.append((given, sys.argv)))
    command("sft", "--config=tiny", "--workdir=x")
    assert asked == [(("launch.sft",), ["/bin/fkv", "--config=tiny", "--workdir=x"])]
    monkeypatch.undo()
    code, told, _ = command("export", "--config=tiny", "--help")
    assert code == 0 and told.startswith("usage: python -m launch.export ")


def test_recipes_import_packaged_ones_and_those_beside_them(tmp_path, monkeypatch):
    """Where `configs` is no package that Python finds, too, as where a wheel is installed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "beside.py").write_text("BUDGET = 96\n")
    (tmp_path / "mine.py").write_text(
        "from configs import beside, tiny\n\n\ndef get_config():\n"
        "    config = tiny.get_config()\n    config.budget = beside.BUDGET\n    return config\n"
    )
    monkeypatch.setattr(sys, "path", [x for x in sys.path if Path(x or ".").resolve() != ROOT])
    for name in [x for x in sys.modules if x.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    for config, budget in (("mine", 96), ("tiny", 64), ("mine", 96)):
        assert flags.parse(["sft.py", f"--config={config}"])[0].budget == budget
    assert fkv.recipe("mine").budget == 96 and fkv.recipe("r1_qwen:2k").budget == 2048
    with pytest.raises(UserError, match=r"config file tinny not found: did you mean tiny\?"):
        fkv.recipe("tinny")
    (tmp_path / "configs" / "base.py").write_text("raise AssertionError('of the user')\n")
    assert flags.parse(["sft.py", "--config=tiny"])[0].budget == 64
