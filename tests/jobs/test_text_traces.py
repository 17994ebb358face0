"""Plain text as traces: what is written, apart, and again."""

import json
import re

import datasets
import pyarrow.parquet as pq
import pytest
import tokenizers
import transformers

from configs import tiny
from fkv.data import documents, sources
from fkv.data import traces as data
from fkv.errors import UserError
from fkv.jobs import common, dry_run, traces
from fkv.models import texts
from tests.jobs.test_traces import rows

WORDS = ["<unk>", "<bos>", "<|im_end|>", "<|endoftext|>", *map(str, range(1000))]
IDS = {word: i for i, word in enumerate(WORDS)}


@pytest.fixture(autouse=True)
def no_files_at_home(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tokenizer of numbers, which puts a BOS before a text; no weights are needed."""
    path = tmp_path_factory.mktemp("numbers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(IDS, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<|im_end|>", unk_token="<unk>"
    ).save_pretrained(path)
    about = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": len(WORDS),
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 1, "intermediate_size": 16, "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "hidden_act": "silu", "max_position_embeddings": 64,
        "tie_word_embeddings": True, "attention_bias": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(about))
    return str(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """60 documents of 10 to 69 numbers each, in three kinds: files, HTML, and rows."""
    path, made = tmp_path_factory.mktemp("text"), []
    for i in range(60):
        words = " ".join(str((7 * i + j) % 1000) for j in range(10 + i))
        made.append(words)
        if i % 3 == 0:
            (path / f"{i}.txt").write_text(words)
        if i % 3 == 1:
            (path / f"{i}.html").write_text(f"<body><p>{words}</p>")
    (path / "copy.txt").write_text(made[30] + "\n")
    lines = [json.dumps({"body": made[i]}) + "\n" for i in range(2, 60, 3)]
    (path / "rows.jsonl").write_text("".join(lines))
    return path


def recipe(model, folder, **changes):
    config = tiny.get_config()
    config.model, config.budget, config.interval = model, 8, 4
    for name, value in dict(
        text=(f"plain={folder}/*.txt", f"page={folder}/*.html", f"row={folder}/rows.jsonl"),
        text_column="body", length=16, count=20, held_out=0.3, held_out_count=6,
    ).items():  # fmt: skip
        config.traces[name] = value
    for name, value in changes.items():
        config.traces[name] = value
    return config


def below(path):
    """The traces of every folder, in order."""
    found = {}
    for folder in sorted(path.glob("*/*")):
        found["/".join(folder.parts[-2:])] = rows(folder)
    return found


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fkv.jobs.text_traces.ROWS", 4)
        assert traces.run(recipe(model, text), str(path)) == 78
    return path


def test_traces_are_pieces_of_the_text_in_their_kinds(finished, text):
    found = below(finished)
    kinds = ("page", "plain", "row")
    assert [*found] == [f"{split}/{kind}" for split in ("heldout", "train") for kind in kinds]
    for folder, some in found.items():
        split, kind = folder.split("/")
        assert len(some) == (6 if split == "heldout" else 20)
        for row in some:
            assert row["kind"] == kind and row["tokens"] == len(row["input_ids"]) == 16
            file, _, number = row["source"].partition(":")
            words = (text / file).read_text()
            if kind == "row":
                words = json.loads(words.splitlines()[int(number)])["body"]
            words = re.sub("<[a-z/]*>", "", words)
            ids = [IDS[word] for word in words.split()]
            start = row["sample"] * 15
            assert row["input_ids"] == [1, *ids[start : start + 15]]
            document = documents.Document(kind, "", words)
            assert row["id"] == document.id
            assert documents.split(document, 0.3, 0.0) == split
        keys = [(row["id"], row["sample"]) for row in some]
        assert len({*keys}) == len(keys)


def test_no_document_is_on_both_sides(finished):
    train, held_out = (
        {row["id"] for name, some in below(finished).items() if split in name for row in some}
        for split in ("train", "heldout")
    )
    assert train and held_out and not train & held_out


def test_documents_to_tune_on_are_apart_from_both(finished, model, text, tmp_path):
    traces.run(recipe(model, text, dev=0.3, dev_count=4), str(tmp_path))
    found, before = below(tmp_path), below(finished)
    assert len(found["dev/row"]) == 4 and found["heldout/row"] == before["heldout/row"]
    ids = {folder: {row["id"] for row in some} for folder, some in found.items()}
    assert not ids["dev/row"] & (ids["train/row"] | ids["heldout/row"])
    assert ids["dev/row"] <= {row["id"] for row in before["train/row"]}


def test_training_reads_all_kinds_in_turn_or_one(finished, text, model):
    config = recipe(model, text)
    config.data.path, config.data.prompt_column = f"{finished}/train", "prompt_tokens"
    found = common.load_traces(config, "train", 24, 8, len(WORDS))
    kinds = sources.open_file(config.data.path)["kind"][:24]
    assert [*kinds] == (["page"] * 4 + ["plain"] * 4 + ["row"] * 4) * 2  # files of four traces
    assert found.length_n.tolist() == [16] * 24 and not found.prompt_n.any()
    config.data.eval_path = f"{finished}/heldout/plain"
    found = common.load_traces(config, "eval", 99, 8, len(WORDS))
    assert found.token_nt[:, :16].tolist() == [
        r["input_ids"] for r in below(finished)["heldout/plain"]
    ]
    config.data.eval_path = str(finished)  # of both
    with pytest.raises(UserError, match=r"this directory has no \.parquet files"):
        common.load_traces(config, "eval", 99, 8, len(WORDS))
    config.data.eval_path = f"{finished}/none/heldout/plain"
    with pytest.raises(UserError, match=rf"`python -m .* --workdir={finished}/none` writes"):
        common.load_traces(config, "eval", 99, 8, len(WORDS))


def test_the_card_says_what_the_traces_are_made_of(finished, text):
    card = (finished / "README.md").read_text()
    found = below(finished)
    for folder, some in found.items():
        split, kind = folder.split("/")
        assert f"| {split} | {kind} | {len(some)} | {16 * len(some)} | " in card
    assert f"| plain | `{text}/*.txt` | files | 21 | 20 | " in card
    assert f"| row | `{text}/rows.jsonl` | files | 1 | 20 | " in card
    settings = json.loads(re.search(r"Settings: `(.*)`", card)[1])
    assert settings["length"] == 16 and settings["seed"] == 0
    file = finished / "train/row/traces-00000.parquet"
    assert json.loads(pq.read_schema(file).metadata[b"fkv"])["traces"]["held_out"] == 0.3


def test_the_same_again_resumed_and_with_more(finished, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("fkv.jobs.text_traces.ROWS", 4)
    config, write, calls = recipe(model, text), data.write, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(data, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        traces.run(config, str(tmp_path))
    monkeypatch.setattr(data, "write", write)
    done = sum(map(len, below(tmp_path).values()))
    assert 0 < done < 78
    assert traces.run(config, str(tmp_path)) == 78 - done
    assert below(tmp_path) == below(finished)
    assert (tmp_path / "README.md").read_text() == (finished / "README.md").read_text()
    assert traces.run(config, str(tmp_path)) == 0
    few = recipe(model, text, count=3, held_out_count=2)
    assert traces.run(few, str(tmp_path / "few")) == 15
    few.traces.count, few.traces.held_out_count = 20, 6
    assert traces.run(few, str(tmp_path / "few")) == 63
    assert below(tmp_path / "few") == below(finished)
    few.traces.count = 3
    with pytest.raises(UserError, match=r"traces-0000\d.parquet .* more traces than are asked for"):
        traces.run(few, str(tmp_path / "few"))
    for wrong, message in (
        (dict(length=12), r"another config \(traces.length: 16 -> 12\)"),
        (dict(text=(f"plain={text}/*.txt",)), "another config"),
    ):
        with pytest.raises(UserError, match=message):
            traces.run(recipe(model, text, **wrong), str(tmp_path))
    config.seed = 1
    assert traces.run(config, str(tmp_path / "seed")) == 78
    other = below(tmp_path / "seed")
    assert other["train/row"] != below(finished)["train/row"]
    assert {r["id"] for r in other["heldout/row"]}.isdisjoint(
        r["id"] for r in below(finished)["train/row"]
    )


def test_text_that_has_changed_is_refused(model, tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(" ".join(map(str, range(i, i + 40))))
    config = recipe(model, "", text=(str(tmp_path / "*.txt"),), held_out=0.0, count=0)
    assert traces.run(config, str(tmp_path / "out")) == 18  # of the kind "text", all there are
    assert [*below(tmp_path / "out")] == ["train/text"]
    (tmp_path / "3.txt").write_text("1 2 3")
    with pytest.raises(UserError, match=r"have changed since \(traces.text: documents\)"):
        traces.run(config, str(tmp_path / "out"))


def test_what_a_run_writes_is_no_text_of_it(model, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(" ".join(map(str, range(i, i + 40))))
    config = recipe(model, "", text=(str(tmp_path),), held_out=0.0, count=0)
    assert traces.run(config, str(tmp_path / "out")) == 6
    assert traces.run(config, str(tmp_path / "out")) == 0


def test_words_that_the_tokenizer_does_not_know_are_warned_of_once(model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one " * 20)
    (tmp_path / "b.txt").write_text("1 2 3 4 " * 9)
    places = (f"x={tmp_path}/a.txt", f"y={tmp_path}/b.txt")
    config = recipe(model, "", text=places, held_out=0.0)
    traces.run(config, str(tmp_path / "out"))
    [said] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
    assert said.startswith(f"warning: {tmp_path}/a.txt: 20 of its 20 tokens are '<unk>'")
    assert said.endswith("(likewise in 1 of 2 kinds)")


def test_packed_documents_have_an_end_between_them(model, text, tmp_path):
    config = recipe(model, text, documents="packed", count=0, prompt_tokens=5)
    traces.run(config, str(tmp_path))
    ids = [r["input_ids"] for r in below(tmp_path)["train/row"]]
    assert all(len(x) == 16 and x[0] == 1 for x in ids)
    stream = [x for row in ids for x in row[1:]]
    assert IDS["<|im_end|>"] not in stream
    documents_ = " ".join(map(str, stream)).split(f" {IDS['<|endoftext|>']} ")
    lines = (text / "rows.jsonl").read_text().splitlines()
    wanted = {" ".join(str(IDS[x]) for x in json.loads(y)["body"].split()) for y in lines}
    assert len(documents_) > 5 and {*documents_[:-1]} < wanted
    assert {r["prompt_tokens"] for r in below(tmp_path)["train/row"]} == {5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(text=("plain=none.txt",)), "'plain=none.txt': none.txt: no such file or directory"),
        (dict(text=("x/y=none.txt",)), "'x/y=none.txt': x/y=none.txt: no such file"),
        (dict(text=("a b={}/*.txt",)), "the kind 'a b' must be a word: it names a folder"),
        (dict(text=("a=",)), "'a=': no file, directory or pattern after the kind"),
        (dict(text=("..={}/*.txt",)), "the kind '..' must be a word"),
        (dict(text=("x={}/3.txt", "y={}/3.txt")), "'y=.*3.txt': 1 files with 1 texts that were"),
        (dict(text=("x={}/rows.jsonl",), text_column="q"), "no column 'q'; it has body"),
        (dict(length=7), "traces.length = 7 must be a whole number from 8"),
        (dict(prompt_tokens=16), "traces.prompt_tokens = 16 must be below traces.length = 16"),
        (dict(documents="all"), "traces.documents = 'all' must be one of pieces, first, packed"),
        (dict(held_out=1.0), "traces.held_out = 1.0 must be a number of at least 0 and below 1"),
        (dict(held_out=0.001), r"kind 'plain' none is in heldout, .*dev = 0.0: raise the former"),
        (dict(dev=0.001), r"kind 'plain' none is in dev, .*dev = 0.001: raise the latter"),
        (dict(held_out=0.999), r"none is in train, with traces.held_out = 0.999 .*: lower both"),
        (dict(held_out=0.5, dev=0.5), "dev = 0.5 leave no documents to train on: lower them"),
        (
            dict(length=80),
            r"none of the \d+ train documents of kind 'plain' has traces.length = 80",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(model, text, tmp_path, changes, message):
    if "text" in changes:
        changes = changes | {"text": tuple(x.format(text) for x in changes["text"])}
    with pytest.raises(UserError, match=message) as caught:
        traces.run(recipe(model, text, **changes), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_of_somebody_else_are_named(finished, model, text, tmp_path):
    config = recipe(model, text)
    path = tmp_path / "out"
    traces.run(config, str(path))
    file = path / "train/row/traces-00000.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"traces-00000.parquet can't be read .*: delete it"):
        traces.run(config, str(path))
    file.unlink()
    assert traces.run(config, str(path)) == 16
    file.rename(file.with_name("traces-00009.parquet"))
    with pytest.raises(UserError, match=r"traces-00009.parquet is not one of this run's files"):
        traces.run(config, str(path))


def test_short_traces_are_warned_of_and_there_is_no_dry_run(model, text, tmp_path, capsys):
    config = recipe(model, text)
    config.interval = 8
    traces.run(config, str(tmp_path))
    said = capsys.readouterr().out
    assert "warning: traces.length = 16 is not above budget + interval = 16: no token" in said
    with pytest.raises(UserError, match=r"no dry run for traces\.text, which runs no model"):
        dry_run.run("traces", config)


def test_the_end_of_a_text_is_not_that_of_a_message(model):
    tokenizer = texts.load_tokenizer(common.files.expand(model))
    assert texts.end_of_text(tokenizer) == IDS["<|endoftext|>"]
    assert texts.front(tokenizer) == [IDS["<bos>"]]
