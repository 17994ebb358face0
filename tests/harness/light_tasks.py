"""Tasks of lighteval from the files of `local`, read from the directory in $FKV_LIGHT_TASKS."""

import os

from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

ROOT = os.environ["FKV_LIGHT_TASKS"]


def pages(line, task_name):
    return Doc(line["page"], choices=None, gold_index=None, task_name=task_name)


def choose(line, task_name):
    query = f"{line['notes']}Question: {line['question']}\nAnswer:"
    choices = [f" {x}" for x in line["choices"]]
    return Doc(query, choices=choices, gold_index=line["answer"], task_name=task_name)


def write(line, task_name):
    return Doc(line["text"], choices=[line["answer"]], gold_index=0, task_name=task_name)


def task(name, prompt, metric, **more):
    return LightevalTaskConfig(
        name=name, prompt_function=prompt, hf_repo=f"{ROOT}/{name}", hf_subset="default",
        metrics=[metric], hf_avail_splits=["test"], evaluation_splits=["test"], **more,
    )  # fmt: skip


TASKS_TABLE = [
    task("pages", pages, Metrics.word_perplexity),
    task("choose", choose, Metrics.loglikelihood_acc),
    task("write", write, Metrics.exact_match, generation_size=10, stop_sequence=["\n", "."]),
]
