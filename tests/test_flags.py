"""The command line: overrides, defaults, and errors in one line."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import tiny
from fkv.errors import UserError
from fkv.jobs import READS
from launch import app, fields, flags

CONFIG = """
import ml_collections

def get_config(size="small"):
    return ml_collections.ConfigDict({
        "steps": 10, "lr": 0.1, "greedy": False, "size": size,
        "model": {"widths": (1, 2), "rates": (0.5,)}, "names": [1],
    })
"""


@pytest.fixture(autouse=True)
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/toy.py").write_text(CONFIG)
    Path("configs/other.py").write_text(CONFIG.replace('size="small"', "size"))
    Path("configs/fixed.py").write_text(
        CONFIG.replace('size="small"', "").replace('"size": size,', "")
    )
    Path("configs/empty.py").write_text("")


def parse(*arguments):
    return flags.parse(["/somewhere/launch/sft.py", *arguments])


def test_overrides_and_defaults():
    config, workdir = parse(
        "--config=configs/toy.py:big",
        "--config.steps=3",
        "--config.lr=1e-3",
        "--config.model.widths=(4, 5, 6)",
        "--config.model.rates=(1, .1)",
        "--config.greedy",
        "--config.steps=4",
    )
    assert config.to_dict() == {
        "steps": 4, "lr": 1e-3, "greedy": True, "size": "big",
        "model": {"widths": (4, 5, 6), "rates": (1, 0.1)}, "names": [1],
    }  # fmt: skip
    assert config.is_locked
    assert workdir == "runs/sft_toy_big"
    config, workdir = parse(
        "--config", "configs/toy.py", "--workdir", "here", "--config.steps", "3"
    )
    assert (config.size, config.steps, workdir) == ("small", 3, "here")
    assert parse("--config=configs/toy.py")[1] == "runs/sft_toy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no config given: add --config=<name>, for example --config=tiny"),
        (["--config=configs/toyy.py"], r"configs/toyy.py not found: did you mean toy\?"),
        (
            ["--config=configs/x.py"],
            "x.py not found: choose from empty, fixed, leaderboard, other, qwen3_1p7b, ",
        ),
        (["--config=nowhere/x.py"], "config file nowhere/x.py not found$"),
        (["--config=configs/empty.py"], r"empty.py has no get_config\(\)"),
        (["--config=configs/fixed.py:big"], "takes no argument: give --config=configs/fixed.py$"),
        (["--config=configs/other.py"], "needs an argument: give --config=configs/other.py:<arg"),
        (["--config"], "expected one argument"),
        (["--config=configs/toy.py", "--config.step=1"], r"no field 'step': did you mean steps\?"),
        (
            ["--config=configs/toy.py", "--config.model.x=1"],
            "config.model has no field 'x': choose from rates, widths",
        ),
        (["--config=configs/toy.py", "--config.lr.x=1"], "config.lr has no field 'x'"),
        (
            ["--config=configs/toy.py", "--config.model={}"],
            "group of fields: set one of rates, widths",
        ),
        (["--config=configs/toy.py", "--config.steps=1.5"], r"config.steps=1\.5"),
        (["--config=configs/toy.py", "--config.lr=fast"], "config.lr=fast"),
        (["--config=configs/toy.py", "--config.greedy=maybe"], "config.greedy=maybe"),
        (["--config=configs/toy.py", "--config.steps"], "config.steps"),
        (
            ["--config=configs/toy.py", "--config.model.widths=(1, 'a')"],
            "config.model.widths holds 'a': its entries must be int",
        ),
        (["--config=configs/toy.py", "--config.names=[2]"], "names cannot be set from here: edit"),
        (["--config=configs/toy.py", "--wrkdir=x"], r"--wrkdir: did you mean --workdir\?$"),
        (["--config=configs/toy.py", "--zzz=x"], r"unknown option --zzz \(see --help\)$"),
        (["--config=configs/toy.py", "x"], r"cannot parse 'x' \(see --help\)$"),
        (["--config=toy", "--steps=64"], r"--steps: did you mean --config.steps=64\?$"),
        (["--config=toy", "--steps", "64"], r"option --steps: did you mean --config.steps\?$"),
        (["--config=toy", "-steps=64"], r"option --steps: did you mean --config.steps=64\?$"),
        (["--config=toy", "--stesp=64"], r"option --stesp: did you mean --config.steps=64\?$"),
        (["--config=toy", "steps=64"], r"'steps=64': did you mean --config.steps=64\?$"),
        (["--config=toy", "config.steps=64"], r"did you mean --config.steps=64\?$"),
        (["--config=toy", "--model.widths=(3,)"], r"mean --config.model.widths=\(3,\)\?$"),
        (["--config=toy", "--widths=(3,)"], r"did you mean --config.model.widths=\(3,\)\?$"),
        (["--config=toy", "--config", "steps=64"], "is set by --config.steps=64$"),
        (["--confg=configs/toy.py"], r"unknown option --confg: did you mean --config\?$"),
        (["configs/toy.py"], r"no config given: did you mean --config=configs/toy.py\?$"),
        (["--config=~nosuchuser/x.py"], "no home directory is known for ~nosuchuser"),
        (["--config=toy", "--workdir=~nosuchuser/x"], "no home directory is known for ~nosuchu"),
        (["--config=configs/"], "configs/ not found: choose from empty, .*, other, .*, toy$"),
        (["--config=configs"], "configs not found: choose from empty, .*, other, .*, toy$"),
        (["--config=/"], "config file / not found"),
        ([f"--config={'x' * 5000}"], r"'xxx.*' can't be a path here \(File name too long\)"),
        ([f"--config={'x' * 254}"], "config file xxx.* not found"),
        (["--config=toy", "--workdir="], "--workdir is empty: name a directory"),
        (["--config=toy", "--workdir", " "], "--workdir is empty: name a directory"),
        (["--config=toy", f"--workdir={'x' * 256}"], r"'xxx.*' can't be a path here"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(*arguments)


@pytest.mark.parametrize("name", ["configs/toy", "toy", "toy.py", "~/toy", "~/toy.py", "./~x/toy"])
def test_a_config_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for folder in ("me", "~x"):
        Path(folder).mkdir()
        Path(folder, "toy.py").write_text(CONFIG)
    config, workdir = parse(f"--config={name}:big")
    assert config.size == "big" and workdir == "runs/sft_toy_big"


@pytest.mark.parametrize("name", ["tiny", "tiny.py", "configs/tiny", "configs/tiny.py"])
def test_packaged_recipes_are_found_anywhere(name):
    assert parse(f"--config={name}", "--config.budget=32")[0].budget == 32
    assert parse("--config=r1_qwen:2k")[1] == "runs/sft_r1_qwen_2k"
    with pytest.raises(UserError, match="takes no argument"):
        parse(f"--config={name}:2k")
    Path("configs/tiny.py").write_text(CONFIG)
    assert parse(f"--config={name}:big")[0].size == "big"


@pytest.mark.parametrize("job", READS)
def test_help_lists_the_fields_of_the_job(job, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.parse([f"launch/{job}.py", "--config.budget=32", "--help"], "What it does.")
    told = capsys.readouterr().out
    assert not stopped.value.code and told.startswith(f"usage: python -m launch.{job} ")
    assert "\n\nWhat it does.\n\n" in told and "--workdir DIR" in told
    shown = set(re.findall(r"^  ([a-z][\w.]*)=", told, re.MULTILINE))
    stages = ("pipeline", "sft", "grpo", "evaluate") if job == "pipeline" else ()
    shared = {"dry_run", "target", "dry_run_json"}
    reads = {*shared, *READS[job], *stages, *(x for stage in stages for x in READS[stage])}
    names = [name for name, _ in fields.leaves(tiny.get_config())]
    assert shown == {n for n in names if any(f"{n}.".startswith(f"{read}.") for read in reads)}
    assert "budget=32  " in told or job == "export"


def test_help_is_quick():
    """It imports nothing that it does not need, also beside a package named configs."""
    Path("configs/__init__.py").touch()
    command = [sys.executable, "-X", "importtime", "-m", "launch.sft", "--help"]
    there = {**os.environ, "PYTHONPATH": str(Path(flags.__file__).parents[1])}
    done = subprocess.run(command, env=there, capture_output=True, text=True)
    assert "sft.steps=400  " in done.stdout and "optimiser steps" in done.stdout
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    heavy = {"jax", "transformers", "datasets", "orbax", "flax", "optax", "pandas", "scipy"}
    assert "ml_collections" in imported and not heavy & imported


def test_what_is_suggested_works():
    with pytest.raises(UserError, match=r"did you mean (.*)\?") as error:
        parse("--config=configs/toyy.py")
    suggested = str(error.value).partition("did you mean ")[2].rstrip("?")
    assert parse(f"--config={suggested}")[0].steps == 10
    Path("mine").mkdir()
    Path("mine/toy.py").write_text(CONFIG)
    with pytest.raises(UserError, match=r"mine/toyy not found: did you mean mine/toy\?"):
        parse("--config=mine/toyy")
    assert parse("--config=mine/toy")[0].steps == 10


def test_home_is_where_a_shell_has_it(tmp_path, monkeypatch, compilation_cache):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert parse("--config=toy", "--workdir=~/run")[1] == f"{tmp_path}/me/run"
    for given, used in ((None, "me/.cache/fkv/jax"), ("~/jax", "me/jax")):
        jax.config.update("jax_compilation_cache_dir", given)
        app.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == f"{tmp_path}/{used}"
    # In a container nobody may know where it is: then nothing is kept, rather than below ./~.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    jax.config.update("jax_compilation_cache_dir", None)
    app.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.fixture
def compilation_cache():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_user_errors_are_one_line(capsys, compilation_cache):
    def main(config, workdir):
        raise UserError(f"the trace is\ntoo short for {config.steps} steps")

    with pytest.raises(SystemExit) as stopped:
        app.run(main, ["sft.py", "--config=configs/toy.py"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: the trace is too short for 10 steps\n"


def test_a_full_disk_is_one_line(capsys):
    def main(argv):
        Path("/dev/full").write_text("no room here")

    with pytest.raises(SystemExit) as stopped:
        app.guard(main, [])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: [Errno 28] No space left on device: free disk space and")
    assert told.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        app.guard(lambda argv: Path("nowhere/at/all").write_text(""), [])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_nothing_is_one_line(code, capsys):
    def main(argv):
        raise OSError(code, os.strerror(code), "x")

    with pytest.raises(SystemExit) as stopped:
        app.guard(main, [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: [Errno {code}] {os.strerror(code)}: 'x': ")


def test_a_pipe_that_nobody_reads_is_one_line():
    code = "from launch import app; app.guard(lambda _: [print('x' * 99) for _ in range(999)], [])"
    command = [sys.executable, "-c", code]
    here = Path(flags.__file__).parents[1]
    with subprocess.Popen(
        command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        job.stdout.close()
        told = job.stderr.read()
    assert job.returncode == 2
    assert told.startswith("error: the output pipe is closed") and told.count("\n") == 1


def test_what_a_terminal_has_no_letters_for_is_escaped(monkeypatch):
    """Tables have a plus-minus sign, and paths any bytes."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    app.guard(lambda argv: print("1 \u00b1 2 in \udcff"), [])
    assert shown.buffer.getvalue() == b"1 \\xb1 2 in \\udcff\n"


def test_ctrl_c_is_one_line(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        app.guard(main, [])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted by SIGINT: rerun the same command to resume\n"


def test_processes_join_when_asked_to(monkeypatch, capsys, compilation_cache):
    """By a flag where JAX finds out who is who, or by what the environment says."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: joined.append(given))

    def run(*arguments, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        app.run(lambda config, workdir: None, ["sft.py", "--config=configs/toy.py", *arguments])

    def refused(*arguments, **environment):
        with pytest.raises(SystemExit):
            run(*arguments, **environment)
        return capsys.readouterr().err

    run()
    assert joined == []
    run("--distributed")
    assert joined[0]["num_processes"] is joined[0]["process_id"] is None
    run(JAX_COORDINATOR_ADDRESS="host:1234", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    assert joined[1]["num_processes"] == 2 and joined[1]["process_id"] == 1
    assert refused(JAX_PROCESS_ID="x") == "error: JAX_PROCESS_ID = 'x' must be a number\n"

    def nobody(**given):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    assert "set JAX_COORDINATOR_ADDRESS=host:port" in refused(JAX_PROCESS_ID="1")


def test_a_job_in_its_own_process():
    """Nothing but the job's own output on success; other exceptions keep their traceback."""
    Path("job.py").write_text(
        "import jax\n"
        "from launch import app\n"
        "def main(config, workdir):\n"
        "    print(workdir, jax.config.jax_compilation_cache_dir, 1 // config.steps)\n"
        "if __name__ == '__main__':\n"
        "    app.run(main)\n"
    )
    environment = {
        "PATH": "",
        "HOME": "/home/me",
        "PYTHONPATH": str(Path(flags.__file__).parents[1]),
    }

    def job(*arguments):
        command = [sys.executable, "job.py", "--config=configs/toy.py", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = job("--config.steps=1")
    assert (done.returncode, done.stderr) == (0, "")
    first, last = done.stdout.splitlines()
    assert first == "runs/job_toy /home/me/.cache/fkv/jax 1" and last.startswith("job: done in ")
    failed = job("--config.steps=0")
    assert failed.returncode == 1
    assert failed.stderr.startswith("Traceback") and "ZeroDivisionError" in failed.stderr
