"""The notebooks of `colab`, run as a browser runs them, in their trial mode.

By nbclient itself, which nbmake runs them by, since what the cells show is looked at here.
"""

import base64
import configparser
import json
import re
from pathlib import Path

import jax
import nbclient
import nbformat
import pytest
import tokenizers
import transformers

from fkv import models
from fkv.models import ModelConfig

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
PICTURES = {
    "see_eviction_think": 6, "train_your_own_scorer": 1, "write_your_own_policy": 0,
    "your_model": 3,
}  # fmt: skip


def read(path):
    return nbformat.read(path, as_version=4)


def save_babbler(path):
    """A small random model that speaks bytes and never stops."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.train_from_iterator(
        [],
        tokenizers.trainers.BpeTrainer(
            special_tokens=["<|eos|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|eos|>")
    tokenizer.save_pretrained(path)
    config = ModelConfig(
        "qwen3", len(tokenizer), 16, 2, 2, 1, 8, 16, qk_norm=True, tied_embeddings=True
    )
    params = jax.device_get(models.init(jax.random.key(0), config))
    models.save(path, models.LM(params, config))
    (path / "generation_config.json").write_text('{"eos_token_id": []}')


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("FKV_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # The first two have the same sizes in trial mode: the second finds programs of the first.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if path.stem == "your_model":
        save_babbler(tmp_path / "babbler")
        monkeypatch.setenv("FKV_MODEL", str(tmp_path / "babbler"))
    book = read(path)
    nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == PICTURES[path.stem]
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    said = "".join(o.text for o in outputs if o.output_type == "stream")
    shown = "".join(o.data["text/html"] for o in outputs if "text/html" in o.get("data", {}))
    if path.stem == "see_eviction_think":
        assert "<b>full</b>: right" in shown and "<b>foresight</b>" in shown
        assert "full: 2 of 2 right" in said
    elif path.stem == "write_your_own_policy":
        ratios = dict(re.findall(r"^(\S+) +(\d\.\d{3}) ± ", said, re.M))
        assert {"h2o", "strided:stride=8", "peaked", "loud", "prompt(loud):tokens=16"} < set(ratios)
        assert all(float(ratio) > 1 for ratio in ratios.values())
        assert "full, 0 evictions: " in said and "ada(peaked), " in said
    elif path.stem == "your_model":
        assert "babbles" in said and "full: 64 tokens, 0 evictions" in said
        # 76 tokens of prompt and 63 that are read again, in 32 + 16 slots
        assert "foresight: 64 tokens, 6 evictions" in said
        assert "gap closed" in said  # the table of losses
        names = ["golden", "foresight", "h2o"]  # that hold tokens; and whose answers are shown
        assert re.findall("<b>(.*?)</b>", shown) == [*names, "full", "foresight"]
        assert shown.count("<span style") > 3 * 96
    else:
        assert "my-scorers" in said and "scorer.safetensors" in said


def test_notebooks_are_stored_with_what_they_show():
    assert [path.stem for path in NOTEBOOKS] == sorted(PICTURES)
    readme, install = (ROOT / "colab" / "README.md").read_text(), set()
    for path in NOTEBOOKS:
        book = read(path)
        nbformat.validate(book)
        assert json.loads(path.read_text())["nbformat"] == 4
        assert all(re.fullmatch(r"[a-z-]+", cell.id) for cell in book.cells)
        install.add(next(cell.source for cell in book.cells if cell.id == "install"))
        assert f"]({path.name})" in readme
        cells = [cell for cell in book.cells if cell.cell_type == "code"]
        outputs = [output for cell in cells for output in cell.outputs]
        assert [cell.execution_count for cell in cells] == list(range(1, 1 + len(cells)))
        assert {o.output_type for o in outputs} <= {"stream", "display_data", "execute_result"}
        assert sum("image/png" in o.get("data", {}) for o in outputs) == PICTURES[path.stem]
        assert path.stat().st_size < 1_000_000
        assert not re.search(r"/tmp/|/root/|/home/", path.read_text())
    (source,) = install  # the same in each
    address = re.search(r'REPOSITORY = "https://github.com/([^"]+)"', source)[1]
    assert readme.count(f"colab.research.google.com/github/{address}/blob/") == len(NOTEBOOKS)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert (
        f"Repository = https://github.com/{address}\n" in setup["metadata"]["project_urls"] + "\n"
    )
