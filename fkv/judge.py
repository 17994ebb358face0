"""What a policy costs: the loss of a text, and the receipt of an answer.

print(fkv.loss(model, text, policy="snapkv", budget=1024))
answer = fkv.generate(model, prompt, policy="snapkv", budget=1024)[0][0]
print(fkv.receipt(model, answer).table())
"""

import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from fkv import kinds
from fkv.api import sample_key
from fkv.cache.cadence import Cadence
from fkv.engine.answers import Generation, Origin
from fkv.errors import UserError
from fkv.evaluation.losses import Loss, loss_of
from fkv.evaluation.receipts import Receipt, receipt_of
from fkv.models import texts
from fkv.models.named import Model
from fkv.models.prompts import Prompt, encode
from fkv.policies.base import Policy
from fkv.policies.fitting import for_model

__all__ = ["loss", "receipt"]


def loss(
    model: Model,
    text: Prompt,
    policy: str | Policy = "full",
    budget: int = 1024,
    interval: int = 256,
    prompt: Prompt | int = 0,
    full: bool = True,
    seed: int = 0,
    chat: bool = False,
    protect_prompt: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Loss:
    """How likely a text is under a policy, as if it had been written token by token.

    Args:
      text: text, token ids or chat messages; with a `prompt`, what follows it.
      policy, budget, interval, protect_prompt: as of `fkv.generate`.
      prompt: what comes before and is not counted: text, ids or messages; or a whole number: so
        many of the text's first tokens. After none, all tokens count but the first.
      full: also with the full cache.
      seed: of policies that draw.
      chat: put the prompt, or without one the text, into the chat template.
      chat_template_kwargs: as of `fkv.generate`.

    Returns:
      Losses of all counted tokens; printed, their mean, the ratio to the full cache's and the
      difference with its interval.

    Raises:
      UserError: the text is invalid, empty or leaves no token to count, the policy is unknown, or a
        size is out of range.
    """
    kinds.check("full", full, kinds.SWITCH)
    cadence = Cadence(budget, interval, protect_prompt)
    if isinstance(prompt, int | np.integer) and not isinstance(prompt, bool):
        ids = encode(model, text, chat, "the text", chat_template_kwargs)
        kinds.check("prompt", int(prompt), kinds.whole(0))
        if prompt >= len(ids):
            raise UserError(
                f"prompt = {prompt} leaves none of the text's {len(ids)} tokens to count"
            )
        given, told = ids[:prompt], ids[prompt:]
    else:
        given = encode(model, cast(Prompt, prompt), chat, "the prompt", chat_template_kwargs)
        if isinstance(text, str) and text and model.tokenizer is not None:
            text = texts.tokenize(model.tokenizer, text, continued=False)
        told = encode(model, text, what="the text")
    if warning := model.config.beyond(len(given) + len(told), "prompt + text"):
        warnings.warn(f"model {model.name}: {warning}", stacklevel=2)
    chosen = for_model(policy, model, cadence)
    key = sample_key(seed, 0, 0)
    return loss_of(model.lm, Origin(model.full_name, given, chosen, cadence, key), told, full)


def receipt(model: Model, generation: Generation) -> Receipt:
    """Where an answer that was written under eviction leaves what the full cache would say.

    The same tokens are read twice: under the policy, with evictions where they were, and with the
    full cache.

    Args:
      model: that wrote it.
      generation: of `fkv.generate`, or of `Context.ask`.

    Raises:
      UserError: it is of another model, has no tokens, or its origin is not known.
    """
    if not isinstance(generation, Generation):
        raise UserError(
            f"{kinds.said(generation)} is not a Generation: give one of fkv.generate's, as "
            "fkv.generate(...)[0][0]"
        )
    origin = generation.origin
    if origin is None:
        raise UserError(
            "the generation does not say how it was made: give one of fkv.generate's or of "
            "Context.ask's"
        )
    if origin.model != model.full_name:
        raise UserError(f"the generation is of model {origin.model}, not of {model.full_name}")
    if not len(generation.tokens):
        raise UserError("the generation has no tokens: there is nothing to compare")
    return receipt_of(model.lm, origin, generation.tokens, model.tokenizer)
