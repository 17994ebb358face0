"""Decoding and labels at Qwen3-4B's shape on one accelerator of 80 GB.

python -m launch.benchmark --config=speed   10 minutes

Random weights in bfloat16, so no checkpoint is needed. Seconds of labels up to 32K; time per token
of the full cache of 8K, 16K and 32K tokens and of the scorers at B = 1024, 2048 and 4096, at the
largest batch that fits and at batches 1 and 64, against the roofline. After nine minutes no
measurement starts; the tables name the missing ones.
"""

from ml_collections import ConfigDict

from configs import qwen3_4b


def get_config() -> ConfigDict:
    """The recipe of `configs.qwen3_4b`, decoding and labels only, with random weights."""
    config = qwen3_4b.get_config()
    config.benchmark.random_weights = True
    config.benchmark.minutes = 9.0
    config.benchmark.compile_threads = 8
    config.benchmark.repeats = 2
    config.benchmark.sections = ("labels", "largest_batch", "decode")
    config.benchmark.policies = ("full", "foresight")
    config.benchmark.new_tokens = 256
    config.benchmark.label_lengths = (8192, 32_768)
    return config
