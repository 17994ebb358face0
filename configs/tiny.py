"""The embedded reasoner: 0.45 M parameters, the ledger walk, everything on a laptop.

python -m launch.sft --config=configs/tiny.py        the scorers and the table, about 2 minutes
python -m launch.grpo --config=configs/tiny.py --config.budget=48   reinforcement after it
python -m launch.evaluate --config=configs/tiny.py   answers of every policy
python -m launch.pipeline --config=configs/tiny.py   these three in one directory
python -m launch.traces --config=configs/tiny.py     the reasoner's own answers, as traces
python -m launch.generate --config=configs/tiny.py   one answer, as it is written
python -m launch.export --config=configs/tiny.py     the scorers in a form to share
python -m launch.benchmark --config=configs/tiny.py  what everything costs, under three minutes
python -m launch.pretrain --config=configs/tiny.py   the reasoner itself, which is shipped
"""

from ml_collections import ConfigDict

from fkv.data import benchmarks

# R-KV with what does best on this task, of 20 settings tried on traces of their own.
TUNED_RKV = "rkv:mix=0.05,kernel=1"
RULES = (
    "rkv", TUNED_RKV, "snapkv", "h2o", "tova", "streaming_llm", "knorm", "keydiff",
    "expected_attention", "lagkv", "pyramid", "ada", "random",
)  # fmt: skip


def get_config() -> ConfigDict:
    """The recipe; B = `budget`, L = `interval`."""
    config = ConfigDict()
    config.seed = 0
    config.model = "embedded"  # or a Hugging Face directory or hub id
    config.revision = ""  # branch, tag or commit of a hub id
    config.dtype = "float32"  # of the language model
    config.cache_dtype = ""  # of cached keys and values: the model's, or "int8"
    # Of a token over the cache while decoding: or "pallas", one kernel for GPUs and TPUs.
    config.attention_kernel = "plain"
    config.model_axis = 1  # devices that share one copy of the language model
    config.budget = 64
    config.interval = 16
    config.dry_run = False  # only say what the job would take: memory, operations, time

    config.task = ConfigDict()  # inclusive ranges, see fkv.tasks.ledger.Spec
    config.task.facts = (16, 28)
    config.task.hops = (12, 20)
    config.task.remarks = (2, 6)
    config.task.marks = (2, 3)
    config.task.fillers = (1, 3)

    config.pretrain = ConfigDict()
    config.pretrain.model = ConfigDict()
    config.pretrain.model.width = 128
    config.pretrain.model.layers = 3
    config.pretrain.model.heads = 4
    config.pretrain.model.kv_heads = 2
    config.pretrain.model.head_dim = 32
    config.pretrain.model.mlp_width = 256
    config.pretrain.model.max_positions = 2048
    # RMS-normalised queries and keys of 32 dimensions can't attend sharply with gains of 1, and a
    # model that can't attend sharply can't be served from a small cache.
    config.pretrain.qk_gain = 2.0
    config.pretrain.learning_rate = 3e-3
    config.pretrain.warmup = 100
    config.pretrain.cycles = (1700, 900, 600)  # steps from warm-up to the end of the cosine
    config.pretrain.weight_decay = 0.01
    config.pretrain.clip = 1.0
    config.pretrain.log_every = 20
    config.pretrain.checkpoint_every = 200
    config.pretrain.eval_problems = 512
    config.pretrain.eval_batch = 128
    config.pretrain.temperature = 0.6  # the paper's
    # A curriculum: the look-up is not learned from large ledgers; the last two mix all sizes.
    config.pretrain.stages = ConfigDict()
    config.pretrain.stages.a = ConfigDict(
        dict(steps=400, batch=32, facts=(4, 8), hops=(3, 6), remarks=(0, 1), marks=(0, 1))
    )
    config.pretrain.stages.b = ConfigDict(
        dict(steps=300, batch=24, facts=(6, 16), hops=(4, 10), remarks=(0, 3), marks=(0, 2))
    )
    config.pretrain.stages.c = ConfigDict(
        dict(steps=1900, batch=16, facts=(8, 30), hops=(6, 22), remarks=(0, 8), marks=(0, 3))
    )
    # The third mark is rare so far: in a quarter of the problems, and once in each.
    config.pretrain.stages.d = ConfigDict(
        dict(steps=600, batch=16, facts=(8, 30), hops=(6, 22), remarks=(0, 8), marks=(2, 3))
    )

    config.data = ConfigDict()
    # A .parquet or .jsonl file of traces, or a directory of Parquet files; empty for the embedded
    # task.
    config.data.path = ""
    config.data.eval_path = ""  # held-out traces, likewise
    config.data.column = "input_ids"
    config.data.prompt_column = ""  # of prompt lengths, whose tokens no loss counts
    config.data.traces = 2048
    config.data.buckets = 1  # lengths that traces are padded to: the longest, half of it, ...
    config.data.strict = False  # rows that can't be used end the run, and are not just named

    config.traces = ConfigDict()
    config.traces.questions = "embedded"  # or a .jsonl or .parquet file, or a hub id
    config.traces.split = "train"
    config.traces.subset = ""
    config.traces.question = "problem"
    config.traces.response = ""  # column of answers that are there already; empty to sample them
    config.traces.instruction = benchmarks.INSTRUCTION
    config.traces.chat = True
    config.traces.count = 256  # questions, 0 for all
    config.traces.samples = 1  # answers to each
    config.traces.new_tokens = 0  # as many as the task can need
    config.traces.temperature = 0.6
    config.traces.top_k = 20
    config.traces.top_p = 0.95
    config.traces.batch = 64

    config.scorer = ConfigDict()
    config.scorer.hidden = 16
    config.scorer.inputs = "both"
    config.scorer.norm = "rms"
    config.scorer.form = "windowed"

    config.sft = ConfigDict()
    config.sft.steps = 400
    config.sft.batch = 8
    config.sft.at_once = 0  # of these, so that they fit; the gradient is the same; 0 for all
    config.sft.learning_rate = 3e-3
    config.sft.warmup = 10
    config.sft.clip = 1.0
    config.sft.margin = 1.0
    # Plain pairs are the paper's; weighting them by the gap in future score does better here.
    config.sft.weighting = "sqrt_gap"
    config.sft.log_every = 10
    config.sft.checkpoint_every = 100

    config.grpo = ConfigDict()
    config.grpo.scorer = "runs/sft_tiny"  # workdir of the supervised run to start from
    config.grpo.steps = 100
    config.grpo.traces = 8  # a step
    config.grpo.traces_at_once = 0  # of these, likewise
    config.grpo.rollouts = 16  # of each trace
    config.grpo.rollouts_at_once = 0  # of all on a device, likewise
    config.grpo.epochs = 1
    config.grpo.learning_rate = 1e-3
    config.grpo.warmup = 10
    config.grpo.clip_norm = 1.0
    config.grpo.temperature = 0.3
    config.grpo.reward = "low_large_squared"
    config.grpo.eta = 0.05  # nats; the paper's 1.5 suits the losses of real models
    config.grpo.high_fraction = 0.2  # in tables of losses, too
    config.grpo.clip = 0.2
    config.grpo.kl_weight = 0.02
    config.grpo.kl_steps = 100  # all of them: left alone, the scorers drift
    config.grpo.log_prob = "plackett_luce"
    config.grpo.log_every = 1
    config.grpo.checkpoint_every = 25
    config.grpo.answers = 128  # problems that both scorers answer in the end; 0 for none

    config.eval = ConfigDict()
    config.eval.budgets = (48, 64, 96)
    config.eval.traces = 64
    config.eval.batch = 32
    config.eval.policies = (
        "rkv", TUNED_RKV, "keydiff", "snapkv", "h2o", "tova", "streaming_llm", "random",
    )  # fmt: skip

    config.evaluate = ConfigDict()
    config.evaluate.scorers = ("foresight=runs/sft_tiny",)  # name=workdir of sft or grpo runs
    config.evaluate.any_interval = False  # scorers may run at another interval than they trained at
    config.evaluate.action = "top"  # or "sample", as in the paper, or "multinomial"
    config.evaluate.action_temperature = 0.3  # of the last two; what the scorers were trained with
    config.evaluate.policies = ("full", *RULES)
    config.evaluate.budgets = (48, 64, 96)
    # Or aime24, aime25, math500, gsm8k, gpqa; or a .jsonl or .parquet file or a hub id, with its
    # split, subset and columns in the next fields.
    config.evaluate.benchmark = "embedded"
    config.evaluate.split = "test"
    config.evaluate.subset = ""
    config.evaluate.question = "problem"
    config.evaluate.answer = "answer"
    config.evaluate.instruction = benchmarks.INSTRUCTION
    config.evaluate.chat = True
    config.evaluate.problems = 512  # 0 for all of a benchmark
    config.evaluate.samples = 1
    config.evaluate.new_tokens = 0  # as many as the task can need
    config.evaluate.temperature = 0.6
    config.evaluate.top_k = 20
    config.evaluate.top_p = 0.95
    config.evaluate.batch = 128
    config.evaluate.deadline = 10.0  # seconds to check one answer
    config.evaluate.traces = 64  # held-out traces for loss ratios; 0 for none
    config.evaluate.compare = ""  # workdir of another evaluation of the same problems

    config.pipeline = ConfigDict()
    config.pipeline.stages = ("sft", "grpo", "evaluate")  # before them "pretrain", to start afresh
    config.pipeline.changes = ConfigDict()  # what a stage does otherwise than said above
    config.pipeline.changes.grpo = ConfigDict(dict(budget=48, grpo=dict(answers=0)))
    config.pipeline.changes.evaluate = ConfigDict(
        dict(evaluate=dict(problems=128, policies=("full", TUNED_RKV, "snapkv", "h2o", "lagkv")))
    )

    config.benchmark = ConfigDict()
    # And "largest_batch" and "peers", which take minutes.
    config.benchmark.sections = ("decode", "growth", "prefill", "labels", "steps")
    config.benchmark.random_weights = False  # no checkpoint: only the model's shape is needed
    config.benchmark.layers = 0  # of random weights, how many layers; 0 for all
    # What the device can do: measured on the spot, or the name of one whose data sheet is known.
    config.benchmark.peaks = "measured"
    config.benchmark.memory_gib = 0.0  # that a program may hold; 0 for what there is
    config.benchmark.minutes = 0.0  # after which nothing more is begun; 0 for no end
    config.benchmark.repeats = 3
    # Decoding programs compiled at once; with more than one, their seconds say little.
    config.benchmark.compile_threads = 1
    # Of attention, side by side in the section "decode"; empty for attention_kernel alone.
    config.benchmark.kernels = ()
    config.benchmark.policies = ("full", "snapkv", "h2o")
    config.benchmark.budgets = (64,)
    config.benchmark.batches = (1, 8)
    config.benchmark.lengths = (512, 2048)  # tokens that a context has in the end
    config.benchmark.new_tokens = 128  # decoded in every repeat
    config.benchmark.temperature = 0.6
    config.benchmark.top_k = 20
    config.benchmark.top_p = 0.95
    config.benchmark.growth_tokens = 4096  # generated in one go
    config.benchmark.growth_batch = 1
    config.benchmark.prefill_batches = (1,)
    config.benchmark.prefill_lengths = (2048,)
    config.benchmark.label_lengths = (512, 1024, 2048)
    config.benchmark.step_length = 512
    config.benchmark.step_traces = 1
    config.benchmark.step_rollouts = 4
    config.benchmark.largest_limit = 64  # none above is tried
    config.benchmark.largest_within = 0.125  # how close the search comes
    # The section "peers" decodes beside others, each in an environment of its own: the Python of
    # one with torch and transformers, and of one with kvpress; empty to leave it out.
    config.benchmark.peers = ConfigDict(dict(transformers="", kvpress=""))
    config.benchmark.peer_policies = ("snapkv", "knorm", "full")  # the first that evicts compares
    config.benchmark.peer_batches = (1, 8)
    config.benchmark.peer_prompt = 64
    config.benchmark.peer_tokens = 512

    config.export = ConfigDict()
    config.export.scorer = "runs/sft_tiny"  # workdir of an sft or grpo run
    config.export.layout = "fkv"  # or "released", which takes scorer.norm = "none"

    config.generate = ConfigDict()
    config.generate.prompt = ""  # the embedded model gets a problem of its task when empty
    config.generate.policy = "snapkv"
    config.generate.scorer = ""  # workdir of an sft or grpo run, for the policy "foresight"
    config.generate.any_interval = False  # as of evaluate
    config.generate.new_tokens = 512
    config.generate.temperature = 0.6
    config.generate.top_k = 20
    config.generate.top_p = 0.95
    config.generate.chat = False
    return locked(config)


def locked(config: ConfigDict) -> ConfigDict:
    """With no more fields than there are, but for what is open: what a stage does otherwise, and
    the stages of the curriculum."""
    config.lock()
    config.pipeline.changes.unlock()
    if "pretrain" in config:
        config.pretrain.stages.unlock()
    return config
