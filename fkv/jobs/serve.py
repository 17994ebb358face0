"""A model under eviction policies, for clients of OpenAI's API."""

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from fkv import api, kinds, policies
from fkv.cache.cadence import FULL, Cadence
from fkv.engine.batcher import Batcher
from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from fkv.jobs import common, groups
from fkv.kinds import said
from fkv.policies.base import Policy
from fkv.runs.rundir import open_run

_KEY = kinds.Kind(
    "16 to 512 characters of ASCII without spaces",
    lambda x: isinstance(x, str) and 16 <= len(x) <= 512 and x.isascii() and x.isprintable()
    and " " not in x,
)  # fmt: skip


def run(config: ConfigDict, workdir: str) -> None:
    """Serves until SIGTERM or Ctrl-C; the run directory gets the config."""
    groups.check(config, "serve")
    _check_installed()
    key = api_key(config.serve.key_variable)
    named = policies_of(config)
    at = common.cadences(config, "serve.budgets")
    shape = common.model_config(config)
    common.check_policies(config, shape, named, at)
    lanes = lanes_of(config, named)
    common.announce("serve", config, workdir, shape, [*lanes])
    if jax.process_count() > 1:
        raise UserError("launch.serve runs in one process: start one for each replica")
    common.warn_of_length(shape, config.serve.length, "serve.length")
    from fkv.serve import server  # with what `_check_installed` asks for

    listening = server.listen(config.serve.host, config.serve.port)
    opened = open_run(workdir, config, tuple(config))
    model = common.load_language_model(config)
    one = service(config, model, lanes)
    one.warm()
    application = _app(one, key, config.serve.origins)
    where = server.address_of(listening)
    common.say(f"serving {', '.join(one.lanes)} at {where}/v1, until Ctrl-C or SIGTERM")
    if not key and config.serve.host not in ("127.0.0.1", "localhost", "::1"):
        common.say("warning: whoever reaches this address may use it: set serve.key_variable")
    server.Server(application, one).run(sockets=[listening])
    opened.close()
    common.say("served all that was running")


def _app(one, key, origins):
    from fkv.serve.app import App

    return App(one, key).starlette(origins)


def service(
    config: ConfigDict, model: api.Model, lanes: Mapping[str, tuple[Policy, Cadence]]
) -> Any:
    """The `Service` of a config."""
    from fkv.serve.service import Limits, Service

    s = config.serve
    limits = Limits(
        s.rows, s.queue, s.length, s.logprobs, s.every, s.seconds, s.body_kib * 1024, s.drain
    )
    make = {name: _maker(model, s, *lane) for name, lane in lanes.items()}
    name = s.name or os.path.basename(config.model.rstrip("/")) or config.model
    return Service(model, name, make, Sampling.of(s), limits, s.sessions)


def _maker(model: api.Model, s: ConfigDict, policy: Policy, cadence: Cadence) -> Callable:
    return functools.partial(Batcher, model.lm, policy, cadence, s.rows, s.length, top=s.logprobs)


def lanes_of(config: ConfigDict, named: Mapping[str, Policy]) -> dict[str, tuple[Policy, Cadence]]:
    """Policies at their budgets, by the name in model lists; the first is the default."""
    found = {}
    for name, policy in named.items():
        for budget in config.serve.budgets if policy.evicts else (FULL,):
            lane = f"{name}-{budget}" if budget else name
            found[lane] = policy, common.cadence(config, budget)
    if not found:
        raise UserError("serve.budgets is empty: give at least one")
    return found


def policies_of(config: ConfigDict) -> dict[str, Policy]:
    """The policies that are served, by name, scorers first."""
    found = {}
    for entry in config.serve.scorers:
        name, equals, workdir = entry.partition("=")
        if not equals or not name:
            raise UserError(f"serve.scorers: {entry!r} must be of the form name=workdir")
        with common.scorers_of(f"serve.scorers = {entry!r}", workdir):
            found[name] = api.load_scorer(workdir, any_interval=config.serve.any_interval)
    for name in config.serve.policies:
        if name in found:
            raise UserError(
                f"serve.policies: {name!r} is also the name of scorers: rename these in "
                "serve.scorers"
            )
        with common.of_field("serve.policies"):
            found[name] = policies.get(name)
    if not found:
        raise UserError("serve.policies and serve.scorers are empty: nothing to serve")
    return found


def api_key(variable: str) -> str:
    """The key that clients must send, from the environment; it is written nowhere."""
    if not variable:
        return ""
    key = os.environ.get(variable, "")
    if not _KEY.fits(key):
        what = "not set" if not key else "no good key"
        raise UserError(
            f"serve.key_variable: the environment variable {said(variable)} is {what}: it must "
            f"hold {_KEY.said}"
        )
    return key


def _check_installed() -> None:
    missing = [x for x in ("starlette", "uvicorn") if importlib.util.find_spec(x) is None]
    if missing:
        raise UserError(
            f"launch.serve needs {' and '.join(missing)}: pip install 'starlette' 'uvicorn', or "
            'pip install -e ".[serve]"'
        )
