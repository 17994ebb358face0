"""What a notebook needs: load a model and its tokenizer, generate with a bounded cache.

model = fkv.load("Qwen/Qwen3-1.7B")
out = fkv.generate(model, "Why is the sky blue?", policy="snapkv", budget=1024, chat=True)
print(out[0][0].text)
"""

import dataclasses
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fkv import decoding, models, policies, sharing, tasks
from fkv.decoding import Sampling
from fkv.errors import UserError
from fkv.keys import Purpose, key_of
from fkv.models import ModelConfig
from fkv.policies.base import Policy

EMBEDDED = "embedded"


@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen language model with what belongs to it.

    Attributes:
      config, params: the decoder.
      tokenizer: of `transformers`, or None where the directory has none.
      stop: ids of the tokens that end an answer.
      name: where it came from.
    """

    config: ModelConfig
    params: models.Params
    tokenizer: Any
    stop: tuple[int, ...]
    name: str


@dataclasses.dataclass(frozen=True)
class Generation:
    """One sampled continuation.

    Attributes:
      text: decoded without special tokens; empty when the model has no tokenizer.
      tokens: ids, the stop token included.
      truncated: the limit on new tokens came before a stop token.
      evictions: how many evictions a head went through that a later token could notice.
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
) -> Model:
    """Loads a Qwen3, Qwen2 or Llama model and its tokenizer.

    Args:
      path_or_hub_id: a Hugging Face directory, a hub id, or `embedded` for the small reasoner
        that is shipped.
      dtype: float32, bfloat16 or float16; None keeps the stored one.
      revision: branch, tag or commit on the hub.
      mesh: devices that the decoder is split over, see `models.load`; by default it has one.
      cache_dtype: of cached keys and values: empty for the model's, or `int8`.

    Raises:
      UserError: the model is absent, damaged or not supported.
    """
    path = tasks.REASONER if str(path_or_hub_id) == EMBEDDED else path_or_hub_id
    directory = models.find(path, revision)
    config, params = models.load(directory, dtype, mesh=mesh)
    config = dataclasses.replace(config, cache_dtype=cache_dtype)
    tokenizer = _tokenizer(directory)
    return Model(config, params, tokenizer, _stop(directory, tokenizer), str(path_or_hub_id))


def _tokenizer(directory: Path) -> Any:
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    import transformers  # takes seconds

    try:
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{directory}: its tokenizer can't be loaded ({error})") from error


def _stop(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """End-of-text ids: of the generation config where there is one, else of the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        try:
            found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error})") from None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    eos = getattr(tokenizer, "eos_token_id", None)
    return () if eos is None else (eos,)


def encode(model: Model, prompt: str | Sequence[int], chat: bool = False) -> np.ndarray:
    """Token ids of a prompt, int32.

    Args:
      prompt: text, or ids that are taken as they are.
      chat: put the text into the model's chat template as the user's message.

    Raises:
      UserError: there is no tokenizer or no chat template.
    """
    if not isinstance(prompt, str):
        return np.asarray(prompt, np.int32)
    if model.tokenizer is None:
        raise UserError(f"model {model.name} has no tokenizer: give prompts as token ids")
    if not chat:
        return np.asarray(model.tokenizer(prompt)["input_ids"], np.int32)
    if not model.tokenizer.chat_template:
        raise UserError(
            f"model {model.name} has no chat template: give the whole prompt as text, chat off"
        )
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.asarray(ids, np.int32)


def decode(model: Model, tokens: Sequence[int], special: bool = False) -> str:
    """Text of token ids, without special tokens unless asked for."""
    if model.tokenizer is None:
        return ""
    return model.tokenizer.decode(np.asarray(tokens), skip_special_tokens=not special)


def sample_key(seed: int, prompt: int, sample: int) -> jax.Array:
    """The PRNG key of one sample of one prompt, whatever batch it is in."""
    return key_of(seed, Purpose.ANSWER, prompt, sample)


def _policy(policy: str | Policy) -> Policy:
    return policies.get(policy) if isinstance(policy, str) else policy


def generate(
    model: Model,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
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
) -> list[list[Generation]]:
    """Continues prompts with a cache bounded by a policy; all of them in one batch.

    Args:
      prompts: one text, or several texts or lists of token ids, of any mix of lengths.
      policy: a name from `fkv.policies.names()`, or a policy such as `fkv.load_scorer(DIR)`.
      budget, interval: B and L, KV pairs per head.
      new_tokens: at most this many are added.
      samples: continuations of each prompt.
      temperature, top_k, top_p: see `Sampling`; the defaults are the paper's.
      seed: same seed, same samples.
      chat: put texts into the chat template.

    Returns:
      For each prompt its samples.

    Raises:
      UserError: a prompt is empty, the policy is unknown, or a size is wrong.
    """
    one = isinstance(prompts, str)
    ids = [encode(model, prompt, chat) for prompt in ([prompts] if one else prompts)]
    if samples < 1:
        raise UserError(f"samples = {samples} must be at least 1")
    rows = [(i, j) for i in range(len(ids)) for j in range(samples)]
    policy = _policy(policy)
    out = decoding.generate(
        model.config,
        model.params,
        policy,
        [ids[i] for i, _ in rows],
        jax.numpy.stack([sample_key(seed, i, j) for i, j in rows]) if rows else None,
        new_tokens,
        budget,
        interval,
        Sampling(temperature, top_k, top_p),
        model.stop,
    )
    found = [[] for _ in ids]
    for (i, _), tokens in zip(rows, out, strict=True):
        found[i].append(finished(model, policy, len(ids[i]), tokens, budget, interval))
    return found


def finished(
    model: Model, policy: Policy, prompt: int, tokens: np.ndarray, budget: int, interval: int
) -> Generation:
    """What is known of a continuation of a prompt of that many tokens."""
    fired = decoding.evictions(prompt, len(tokens), budget, interval) if policy.evicts else 0
    truncated = not len(tokens) or int(tokens[-1]) not in model.stop
    return Generation(decode(model, tokens), tokens, truncated, fired)


def stream(
    model: Model,
    prompt: str | Sequence[int],
    policy: str | Policy = "full",
    budget: int = 1024,
    interval: int = 256,
    new_tokens: int = 4096,
    temperature: float = 0.6,
    top_k: int = 20,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
) -> Generator[str, None, Generation]:
    """The text of one continuation as it comes, a piece for every `L` tokens.

    The pieces together are what `generate` gives for the same arguments; the generator returns
    the whole of it.
    """
    if model.tokenizer is None:
        raise UserError(f"model {model.name} has no tokenizer: there is no text to stream")
    policy, ids = _policy(policy), encode(model, prompt, chat)
    chunks = decoding.stream(
        model.config,
        model.params,
        policy,
        [ids],
        sample_key(seed, 0, 0)[None],
        new_tokens,
        budget,
        interval,
        Sampling(temperature, top_k, top_p),
        model.stop,
    )
    tokens, said = [], ""
    for chunk in chunks:
        tokens += chunk[0][: new_tokens - len(tokens)].tolist()
        text = decode(model, tokens)
        # Half of a character at the end waits for the other half.
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and text.startswith(said):
            yield text[len(said) :]
            said = text
    one = finished(model, policy, len(ids), np.asarray(tokens, np.int32), budget, interval)
    yield one.text[len(said) :]
    return one


def load_scorer(source: str | Path, revision: str | None = None) -> policies.Foresight:
    """Trained scorers, as a policy.

    Args:
      source: the workdir of a run, a directory that `launch.export` wrote, a checkpoint of the
        released PyTorch code, or the hub id of one of the last two.
      revision: branch, tag or commit of a hub id.

    Raises:
      UserError: there are no scorers, or they are damaged.
    """
    return sharing.load(source, revision)[0]
