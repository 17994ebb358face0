"""One answer, streamed to the terminal and written to the run directory."""

import time
import warnings

from ml_collections import ConfigDict

from fkv import api, policies
from fkv.cache.cadence import said_budget
from fkv.errors import UserError
from fkv.files import write_text
from fkv.jobs import common, groups
from fkv.policies.base import name_of, trained_at
from fkv.runs import parallel, sharing
from fkv.runs.rundir import open_run
from fkv.tasks import ledger


def run(config: ConfigDict, workdir: str) -> str:
    """Answers `generate.prompt` under one policy; returns the answer."""
    groups.check(config, "generate")
    settings = config.generate
    cadence = common.cadence(config)
    if settings.scorer and settings.policy not in sharing.METHODS:
        methods = ", ".join(sharing.METHODS)
        raise UserError(f"generate.scorer needs a generate.policy with weights: one of {methods}")
    if settings.scorer:
        with common.scorers_of(f"generate.scorer = {settings.scorer!r}", settings.scorer):
            policy = api.load_scorer(settings.scorer, any_interval=settings.any_interval)
            if (found := name_of(policy)) != settings.policy:
                raise UserError(f"its weights are of {found}: set generate.policy to {found}")
    else:
        policy = policies.get(settings.policy)
    shape = common.model_config(config)
    budget = said_budget(config.budget, config.protect_prompt)
    label = f"{settings.policy}, B = {budget}, L = {config.interval}"
    common.announce("generate", config, workdir, shape, [label])
    common.check_policies(config, shape, {settings.policy: policy}, [cadence])
    model = common.load_language_model(config)
    problem, prompt = None, settings.prompt
    if not prompt and config.model == api.EMBEDDED:
        problem = ledger.problem(config.seed, "eval", 0, common.spec(config))
        prompt = " ".join(problem.prompt)
    if not prompt.strip():
        raise UserError("generate.prompt is empty: give a text")
    ids = api.encode(model, prompt, settings.chat, "generate.prompt")
    common.warn_of_unknown(model, [("generate.prompt", prompt, ids)])
    longest, what = len(ids) + settings.new_tokens, "prompt + generate.new_tokens"
    common.warn_of_length(model.config, longest, what)

    own = "generate", "budget", "interval", "protect_prompt", "seed"
    may_differ = (*own, *common.other_jobs("generate"))
    run = open_run(workdir, config, may_differ)
    common.say(f"{prompt}\n")
    start = time.perf_counter()
    sizes = config.budget, config.interval, settings.new_tokens
    sampling = settings.temperature, settings.top_k, settings.top_p, config.seed
    more = {"protect_prompt": config.protect_prompt, "min_p": settings.min_p}
    pieces, one = api.stream(model, ids, policy, *sizes, *sampling, **more), None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*max_position_embeddings")  # said above
        while one is None:
            try:
                piece = next(pieces)
                if parallel.first():
                    print(piece, end="", flush=True)
            except StopIteration as end:
                one = end.value
    seconds = time.perf_counter() - start
    if parallel.first():
        write_text(run.path / "answer.txt", one.text + "\n")
    trained = trained_at(policy, config.interval)
    common.say(
        f"\n\n{label}: {len(ids)} + {len(one.tokens)} tokens{', cut off' * one.truncated}, "
        f"{one.evictions} evictions, {seconds:.1f} s with compilation"
        f"{trained and f', scorers trained at B = {trained}'}"
    )
    if problem is not None:
        common.say(f"the right answer: {' '.join(problem.answer[1:-1])}")
    run.close()
    return one.text
