"""Model cards: what the hub reads of them, and that the code in them runs; uploads."""

import re

import huggingface_hub
import jax
import pytest
import yaml

import fkv
from configs import tiny
from fkv import policies
from fkv.errors import UserError
from fkv.jobs import export
from fkv.policies import scorer
from fkv.runs import sharing

TABLES = "| policy | loss ratio |\n|---|---|\n| foresight | 1.1 |"
ABOUT = {"model": "owner/name", "revision": "abc", "budget": 64, "interval": 16}


@pytest.fixture(scope="module")
def scorers():
    config, rules = fkv.load().config, scorer.ScorerConfig(norm="rms")
    params = jax.device_get(scorer.init(jax.random.key(0), config, rules))
    return policies.Foresight(params, rules)


def parts(directory):
    """The metadata, and the text."""
    _, front, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_hub_reads_the_metadata(scorers, tmp_path):
    about = ABOUT | {"license": "apache-2.0", "datasets": ["a/b", "c: d"], "data": "x|y"}
    sharing.export(scorers, tmp_path, about, TABLES, "me/scorers")
    front, text = parts(tmp_path)
    assert front == {
        "library_name": "fkv", "base_model": "owner/name", "license": "apache-2.0",
        "datasets": ["a/b", "c: d"], "metrics": ["loss_ratio"], "pipeline_tag": "text-generation",
        "tags": ["kv-cache-eviction", "foresightkv"],
    }  # fmt: skip
    assert huggingface_hub.ModelCard.load(tmp_path / "README.md").data.base_model == "owner/name"
    assert f"## Results\n\n{TABLES}\n" in text and "| data | x\\|y |" in text
    assert 'fkv.load("owner/name", revision="abc")' in text and "chat=True" in text
    assert 'fkv.load_scorer("me/scorers")' in text and "| norm | rms |" in text
    # No repository of the hub: shipped, a path on another machine, or not known.
    for model in ("embedded", "/scratch/models/Qwen3-1.7B", "runs/pretrain_tiny/model", None):
        sharing.export(scorers, tmp_path, {"model": model} if model else {})
        front, text = parts(tmp_path)
        assert not {"base_model", "license", "datasets", "metrics"} & front.keys(), model
        assert "## Results" not in text and "None" not in text


def test_the_code_in_the_card_runs(scorers, tmp_path, monkeypatch, capsys):
    sharing.export(scorers, tmp_path, {"model": "embedded", "budget": 64, "interval": 16})
    (code,) = re.findall(r"```python\n(.*?)```", parts(tmp_path)[1], re.S)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="does not know"):  # the reasoner's words are few
        exec(code.replace("policy=policy,", "policy=policy, new_tokens=100,"), {})
    assert re.search(r"^[0-9]+ evictions$", capsys.readouterr().out, re.M)


@pytest.fixture
def config(scorers, tmp_path):
    sharing.export(scorers, tmp_path / "given", ABOUT)
    config = tiny.get_config()
    config.export.scorer = str(tmp_path / "given")
    config.export.push, config.export.license = "me/mine", "mit"
    config.export.datasets = "a/b,c"
    return config


def test_scorers_are_uploaded(config, tmp_path, monkeypatch, capsys):
    asked = []

    class Hub:
        def create_repo(self, hub_id, **options):
            asked.append((hub_id, options))
            return f"https://huggingface.co/{hub_id}"

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            asked.append((repo_id, sorted(allow_patterns), folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    export.run(config, str(tmp_path / "out"))
    files = ["README.md", "scorer.json", "scorer.safetensors"]
    assert asked == [
        ("me/mine", {"private": False, "exist_ok": True}), ("me/mine", files, tmp_path / "out"),
    ]  # fmt: skip
    assert "uploaded to https://huggingface.co/me/mine: " in capsys.readouterr().out
    front, text = parts(tmp_path / "out")
    assert front["license"] == "mit" and front["datasets"] == ["a/b", "c"]
    assert 'load_scorer("me/mine")' in text


def test_an_upload_that_fails_is_one_line(config, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    says = r"export.push: me/mine: .*\(OSError: no network\): check the network, and that .hf"
    with pytest.raises(UserError, match=says):
        export.run(config, str(tmp_path / "out"))
    assert fkv.load_scorer(tmp_path / "out") is not None
    config.export.datasets = "a/b, c"
    with pytest.raises(UserError, match=r"export.datasets = 'a/b, c' must be comma-separated"):
        export.run(config, str(tmp_path / "new"))
    config.export.datasets, config.export.push = "", "mine"
    with pytest.raises(UserError, match="'mine' must be a hub id, owner/name"):
        export.run(config, str(tmp_path / "new"))
    config.export.push, config.export.layout = "me/mine", "released"
    with pytest.raises(UserError, match="uploads layout fkv, not released"):
        export.run(config, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
