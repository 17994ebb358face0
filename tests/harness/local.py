"""Tasks of lm-evaluation-harness as YAML and JSONL, and a small checkpoint of PyTorch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

TASKS = "pages", "choose", "needle", "write"
# As lm-eval's own `ruler`: a metric for each length, -1 for documents of another.
UTILS = """
def process_results(doc, results):
    found = sum(x in results[0] for x in doc["outputs"]) / len(doc["outputs"])
    return dict.fromkeys(LENGTHS, -1.0) | {str(doc["max_length"]): found}


def mean(values):
    values = [x for x in values if x != -1]
    return sum(values) / len(values) if values else -1
"""
YAML = {
    "pages": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "choose": """
output_type: multiple_choice
fewshot_split: train
num_fewshot: 2
doc_to_text: "{{notes}}Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "needle": """
output_type: generate_until
doc_to_text: "{{input}}"
doc_to_target: "{{outputs}}"
gen_prefix: "{{gen_prefix}}"
target_delimiter: " "
process_results: !function utils.process_results
generation_kwargs:
  do_sample: false
  temperature: 0.0
  max_gen_toks: 12
  until: []
metric_list:
""",
    "write": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n", "."]
  max_gen_toks: 10
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
filter_list:
  - name: first
    filter:
      - function: remove_whitespace
      - function: take_first
  - name: word
    filter:
      - function: regex
        regex_pattern: "(\\\\w+)"
      - function: take_first
""",
}


# Of the needle, for each length.
METRIC = """
  - metric: "{}"
    aggregation: !function utils.mean
    higher_is_better: true
"""


def write_tasks(
    path: Path, documents: dict[str, list[dict]], lengths: tuple[int, ...] = (128, 256)
) -> str:
    """Writes tasks, their documents beside them; returns the directory.

    Args:
      documents: of each task, of which the first four are also examples.
      lengths: of the needle's documents.
    """
    path.mkdir(exist_ok=True, parents=True)
    (path / "utils.py").write_text(f"LENGTHS = {list(map(str, lengths))}\n{UTILS}")
    for name, docs in documents.items():
        for split, some in (("train", docs[:4]), ("test", docs)):
            lines = "".join(json.dumps(one) + "\n" for one in some)
            (path / f"{name}_{split}.jsonl").write_text(lines)
        files = {split: str(path / f"{name}_{split}.jsonl") for split in ("train", "test")}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n"
        head += f"  cache_dir: {path / 'cache'}\n  data_files:\n"
        head += "".join(f"    {split}: {file}\n" for split, file in files.items())
        head += "training_split: train\ntest_split: test\n"
        tail = "".join(METRIC.format(x).lstrip("\n") for x in lengths) if name == "needle" else ""
        (path / f"{name}.yaml").write_text(head + YAML[name].lstrip("\n") + tail)
    return str(path)


def sentences(rng: np.random.Generator, count: int) -> str:
    """Made-up sentences of few words."""
    words = "the of and sun moon tree river stone bird sings falls over under green old".split()
    return " ".join(" ".join(rng.choice(words, 6)).capitalize() + "." for _ in range(count))


def documents(count: int = 5) -> dict[str, list[dict]]:
    """Documents for each task, of many lengths."""
    rng = np.random.default_rng(0)
    found = {name: [] for name in TASKS}
    for i in range(count):
        found["pages"].append({"page": sentences(rng, 12 if i % 2 else 6)})
        number = int(rng.integers(100, 1000))
        found["choose"].append({
            "notes": sentences(rng, 2 * (i % 2)) + "\n", "question": f"What is bird {number}?",
            "choices": ["old", "green stone", "the sun falls"], "answer": i % 3,
        })  # fmt: skip
        text = f"{sentences(rng, 3)} The number is {number}. {sentences(rng, 1 + 3 * (i % 2))}"
        found["needle"].append({
            "input": text + "\nWhich is it?", "outputs": [str(number)],
            "gen_prefix": "The number is", "max_length": 128 if i % 2 else 256,
        })  # fmt: skip
        found["write"].append({"text": sentences(rng, 5 if i % 2 else 2), "answer": "sun"})
    return found


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if not loop.last or add_generation_prompt %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(path: Path, begin: bool = False) -> int:
    """A byte-level BPE tokenizer with a chat template; returns the size of its vocabulary.

    Args:
      begin: it puts a BOS before a text.
    """
    import tokenizers
    import transformers

    special = ["<|end|>", "<|begin|>", "<|user|>", "<|assistant|>", "<|system|>"]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([sentences(np.random.default_rng(1), 400)], trainer)
    if begin:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", additional_special_tokens=special[2:],
        **({"bos_token": "<|begin|>"} if begin else {}),
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return len(fast)


def save_checkpoint(path: Path, begin: bool = False) -> str:
    """A random Llama of PyTorch with a tokenizer; returns its directory."""
    pytest.importorskip("torch")
    from tests.models import torch_model

    size = save_tokenizer(path, begin)
    model = torch_model("llama", vocab_size=size, max_position_embeddings=256, eos_token_id=0)
    model.generation_config.eos_token_id = 0
    model.generation_config.do_sample = False
    model.save_pretrained(path)
    return str(path)


def copied(path: str, to: Path) -> Path:
    return Path(shutil.copytree(path, to))
