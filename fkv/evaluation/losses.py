"""The loss of one text under a policy, beside the full cache's, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fkv import models, policies
from fkv.cache.cadence import Cadence
from fkv.engine import compressed
from fkv.engine.answers import Origin
from fkv.engine.batch import rounded
from fkv.errors import UserError
from fkv.evaluation import scoring
from fkv.learning.tokens import of_logits
from fkv.models import LM
from fkv.policies.base import name_of

_CONFIDENCE = 0.95
_BLOCK = 128  # tokens whose logits are computed at a time


@dataclasses.dataclass(frozen=True, repr=False)
class Loss:
    """The loss of a text; arrays over its n counted tokens, nats.

    Attributes:
      policy, cadence: under which it was read.
      tokens: ids, int32 [n].
      nll: of each token given those before, under the policy, float32 [n].
      greedy: whether it is the likeliest, bool [n].
      full: the same as `nll` with the full cache; None unless asked for.
      mean: of `nll`; `perplexity` is its exponential.
      ratio: of the mean losses, policy over full cache; None without the latter.
      difference: of the mean losses, and half of its 95 % interval (`mean_interval`); likewise.
    """

    policy: str
    cadence: Cadence
    tokens: np.ndarray
    nll: np.ndarray
    greedy: np.ndarray
    full: np.ndarray | None = None

    @property
    def mean(self) -> float:
        return float(self.nll.mean(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.mean))

    @property
    def full_mean(self) -> float | None:
        return None if self.full is None else float(self.full.mean(dtype=np.float64))

    @property
    def ratio(self) -> float | None:
        return None if self.full is None else self.mean / self.full_mean

    @property
    def difference(self) -> tuple[float, float] | None:
        return None if self.full is None else mean_interval(self.nll - self.full)

    def __repr__(self) -> str:
        at = f", B = {self.cadence.budget}, L = {self.cadence.interval}"
        beside = ""
        if self.full is not None:
            value, half = self.difference
            beside = (
                f"; full cache {self.full_mean:.4f}, ratio {self.ratio:.4f}, "
                f"difference {value:+.4f} ± {half:.4f}"
            )
        where = f"{self.policy}{'' if self.policy == 'full' else at}"
        return f"Loss({self.mean:.4f} nats per token, {len(self.nll)} tokens, {where}{beside})"


def mean_interval(x_n: np.ndarray) -> tuple[float, float]:
    """The mean of a text's tokens, and half of its 95 % confidence interval.

    What tokens lose goes together with what their neighbours lose, so the error is that of the
    means of about sqrt(n) blocks of consecutive tokens, by Student's t; NaN for fewer than 4.
    """
    from scipy import stats  # takes a second

    x = np.asarray(x_n, np.float64)
    count = round(len(x) ** 0.5)
    if count < 2:
        return float(x.mean()), float("nan")
    blocks = np.array_split(x, count)
    size = np.array(list(map(len, blocks)), np.float64)
    # Blocks differ in length by one: weighted by it.
    off = np.array([block.mean() - x.mean() for block in blocks]) * size / size.mean()
    error = (off @ off / (count - 1) / count) ** 0.5
    return float(x.mean()), float(stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1) * error)


def loss_of(lm: LM, origin: Origin, tokens: np.ndarray, full: bool = True) -> Loss:
    """The loss of tokens that follow a prompt, read as if they had been written one by one.

    Args:
      origin: prompt, policy and cadence, and maybe a context. An empty prompt leaves the first
        token out, which nothing predicts.
      tokens: ids [n].
      full: also with the full cache.

    Raises:
      UserError: no token is left to be scored, or the logits are NaN or infinite.
    """
    prompt = max(len(origin.prompt), 1)
    whole = np.concatenate([origin.prompt, tokens]).astype(np.int32)
    if len(whole) <= prompt:
        raise UserError(f"the text has {len(whole)} tokens, {prompt} of them given: add more")
    counted = whole[prompt:]
    nll, greedy = _likelihood(lm, states(lm, origin, tokens), counted)
    beside = None
    if full and origin.policy.evicts:
        beside, _ = _likelihood(lm, states(lm, without_evictions(origin), tokens), counted)
    elif full:
        beside = nll
    return Loss(name_of(origin.policy), origin.cadence, counted, nll, greedy, beside)


def without_evictions(origin: Origin) -> Origin:
    """The same with a full cache."""
    return dataclasses.replace(origin, policy=policies.get("full"), context=None)


def states(lm: LM, origin: Origin, tokens: np.ndarray) -> Array:
    """Last hidden states [n, m] that predict tokens after a prompt: of each the one before it.

    Memory is linear in the tokens.
    """
    prompt, context = len(origin.prompt), origin.context
    if context is not None and origin.policy.evicts:
        question = origin.prompt[len(context.tokens) :]
        after = np.concatenate([question, tokens]).astype(np.int32)
        hidden = compressed.read_on(lm, context, after, len(question), origin.key)
        return hidden[len(question) - 1 : -1]
    whole = np.concatenate([origin.prompt, tokens]).astype(np.int32)
    [one] = scoring.passes(origin.policy, origin.cadence, [whole], [prompt], 1)
    hidden = scoring.last_hidden(lm, one.policy, origin.cadence, one.batch, origin.key[None])
    start = int(one.batch.padding_b[0])
    return hidden[0, start + max(prompt, 1) - 1 : start + len(whole) - 1]


def in_blocks(x_n: np.ndarray | Array) -> Array:
    """[1, n, ...] with n rounded up, so that few programs are compiled."""
    more = rounded(len(x_n), _BLOCK) - len(x_n)
    return jnp.pad(x_n, [(0, more), *[(0, 0)] * (x_n.ndim - 1)])[None]


def _likelihood(lm, hidden_nm, tokens):
    found = _program(lm, in_blocks(hidden_nm), in_blocks(tokens))
    nll, greedy = (np.asarray(x)[0, : len(tokens)] for x in found)
    check_finite(nll)
    return nll, greedy


@jax.jit
def _program(lm, hidden, target):
    return of_logits(lm, scoring.likelihood, hidden, target, blocks=(_BLOCK, _BLOCK))


def check_finite(x: np.ndarray) -> None:
    """Refuses losses of a model whose logits are no numbers."""
    if not np.isfinite(x).all():
        raise UserError("the model's logits are NaN or infinite: check its weights and dtype")


def unembed(lm: LM, hidden_btm: Array) -> Array:
    """Log-probabilities [b, t, v] of states."""
    return jax.nn.log_softmax(models.unembed(lm, hidden_btm), axis=-1)
