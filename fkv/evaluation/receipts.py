"""A receipt of an answer that was written under eviction: where the full cache would differ."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fkv import files
from fkv.engine.answers import Origin
from fkv.evaluation import drawing, losses
from fkv.learning.tokens import low_entropy, of_logits
from fkv.models import LM
from fkv.policies.base import name_of

_BLOCK = 128  # tokens whose logits, of both caches, are computed at a time


@dataclasses.dataclass(frozen=True, repr=False)
class Receipt:
    """An answer under a policy beside the full cache that reads the same tokens.

    Arrays are over its n tokens; each entry is about predicting that token from those before.

    Attributes:
      policy: its name, with the budget and interval.
      tokens: ids, int32 [n].
      pieces: their texts; empty without a tokenizer.
      nll, full_nll: of the tokens, under the policy and with the full cache, nats.
      kl: KL(full || policy) of the predictions, nats.
      entropy: of the full cache's prediction, nats.
      likeliest, full_likeliest: ids of the likeliest tokens.
      low: which tokens are low-entropy: all but the fifth of highest `entropy`.
      broken: low-entropy tokens at which the policy's likeliest is not the full cache's.
      divergence: index of the first token at which the two likeliest differ, or None.
    """

    policy: str
    tokens: np.ndarray
    pieces: tuple[str, ...]
    nll: np.ndarray
    full_nll: np.ndarray
    kl: np.ndarray
    entropy: np.ndarray
    likeliest: np.ndarray
    full_likeliest: np.ndarray
    low: np.ndarray
    names: tuple[tuple[int, str], ...] = ()

    @property
    def differs(self) -> np.ndarray:
        return self.likeliest != self.full_likeliest

    @property
    def broken(self) -> np.ndarray:
        return self.low & self.differs

    @property
    def divergence(self) -> int | None:
        return int(np.argmax(self.differs)) if self.differs.any() else None

    def _said(self, token: int) -> str:
        return repr(dict(self.names).get(int(token), int(token)))

    def __repr__(self) -> str:
        first = "never" if self.divergence is None else f"first at token {self.divergence}"
        return (
            f"Receipt({len(self.tokens)} tokens, {self.policy}: the likeliest differ at "
            f"{int(self.differs.sum())}, {first}; {int(self.broken.sum())} of "
            f"{int(self.low.sum())} low-entropy tokens broken; KL {self.kl.mean():.4f} nats, loss "
            f"{self.nll.mean():.4f}, full cache {self.full_nll.mean():.4f})"
        )

    def table(self, most: int = 20) -> str:
        """The receipt as text: a summary, and the tokens at which the likeliest differ.

        Args:
          most: so many of these, those of largest KL, in order.
        """
        rows = np.flatnonzero(self.differs)
        rows = np.sort(rows[np.argsort(-self.kl[rows], kind="stable")[:most]])
        head = ("token", "written", "policy's", "full cache's", "NLL", "full", "KL", "")
        lines = [
            (
                str(i), self._said(self.tokens[i]), self._said(self.likeliest[i]),
                self._said(self.full_likeliest[i]), f"{self.nll[i]:.3f}", f"{self.full_nll[i]:.3f}",
                f"{self.kl[i]:.3f}", "broken" if self.broken[i] else "",
            )
            for i in rows
        ]  # fmt: skip
        width = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        text = [
            "  ".join(x.ljust(n) for x, n in zip(line, width, strict=True)).rstrip()
            for line in ([head, *lines] if lines else [])
        ]
        return "\n".join([repr(self), *text])

    def plot(self) -> Any:
        """A matplotlib figure: KL of every token, and the loss that eviction has added so far."""
        with drawing.figure(None, (8, 4.5), (2, 1), self.policy, "token of the answer") as axes:
            self._draw(*axes[:, 0])
        return drawing.figure_of(axes)

    def _draw(self, above, below) -> None:
        at = np.arange(len(self.tokens))
        above.vlines(at, 0, self.kl, color=drawing.COLOURS["snapkv"], linewidth=0.8)
        some = np.flatnonzero(self.broken)
        mark = {"color": drawing.LEARNED["foresight"], "label": "broken low-entropy token"}
        above.sharex(below)
        above.plot(some, self.kl[some], "x", **mark)
        above.set_ylabel("KL(full || policy), nats")
        below.plot(at, np.cumsum(self.nll - self.full_nll), color="black")
        below.set_ylabel("added loss, summed, nats")
        if self.divergence is not None:
            for i, axis in enumerate((above, below)):
                label = None if i else "first divergence"
                axis.axvline(self.divergence, color="gray", linestyle="--", label=label)

    def save(self, directory: str | Path) -> None:
        """Writes `receipt.txt`, `receipt.jsonl` (a line per token), `receipt.png` and its PDF."""
        path = files.expand(directory)
        path.mkdir(parents=True, exist_ok=True)
        files.write_text(path / "receipt.txt", self.table() + "\n")
        arrays = {
            name: getattr(self, name).tolist()
            for name in (
                "tokens", "nll", "full_nll", "kl", "entropy", "likeliest", "full_likeliest", "low",
                "broken",
            )
        }  # fmt: skip
        if self.pieces:
            arrays["piece"] = self.pieces
        lines = [dict(zip(arrays, row, strict=True)) for row in zip(*arrays.values(), strict=True)]
        files.write_text(path / "receipt.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
        drawing.save(self.plot(), path / "receipt.png")


def receipt_of(lm: LM, origin: Origin, tokens: np.ndarray, tokenizer: Any) -> Receipt:
    """The receipt of an answer: a replay under its policy, and one pass with the full cache.

    Memory is linear in the tokens of prompt and answer; logits are computed a block at a time.
    """
    ours = losses.states(lm, origin, tokens)
    theirs = losses.states(lm, losses.without_evictions(origin), tokens)
    found = _compare(lm, *map(losses.in_blocks, (ours, theirs, tokens)))
    found = {name: np.asarray(x)[0, : len(tokens)] for name, x in found.items()}
    losses.check_finite(found["kl"])
    counted = np.ones((1, len(tokens)), bool)
    low = np.asarray(low_entropy(jnp.asarray(found["entropy"])[None], jnp.asarray(counted), 0.2))[0]
    known = sorted({int(x) for x in (*tokens, *found["likeliest"], *found["full_likeliest"])})
    names = () if tokenizer is None else tuple((x, tokenizer.decode([x])) for x in known)
    pieces = tuple(dict(names)[int(x)] for x in tokens) if names else ()
    name = name_of(origin.policy)
    if origin.policy.evicts:
        name += f", B = {origin.cadence.budget}, L = {origin.cadence.interval}"
    return Receipt(name, tokens, pieces, **found, low=low, names=names)


@jax.jit
def _compare(lm, ours, theirs, target):
    def compare(logits, theirs, target):
        ours, full = jax.nn.log_softmax(logits, axis=-1), losses.unembed(lm, theirs)
        p = jnp.exp(full)

        def of(x):
            return -jnp.take_along_axis(x, target[..., None], axis=-1)[..., 0]

        return {
            "nll": of(ours),
            "full_nll": of(full),
            "kl": (p * (full - ours)).sum(-1),
            "entropy": -(p * full).sum(-1),
            "likeliest": ours.argmax(-1),
            "full_likeliest": full.argmax(-1),
        }

    return of_logits(lm, compare, ours, theirs, target, blocks=(_BLOCK, _BLOCK))
