"""A policy as users name it, made to fit a model and a cadence."""

import warnings

from fkv.cache.cadence import Cadence
from fkv.errors import UserError
from fkv.models.named import Model
from fkv.policies.base import Policy, check, get


def for_model(policy: str | Policy, model: Model, cadence: Cadence, level: int = 3) -> Policy:
    """The policy, which must fit the model.

    Args:
      policy: a name for `get`, or a policy.
      level: of the stack, of whom warnings are about.

    Warns:
      UserWarning: its scorers were trained with another model.

    Raises:
      UserError: it is unknown or does not fit.
    """
    if isinstance(policy, str):
        policy = get(policy)
    trained = getattr(policy, "trained", None)
    try:
        check(policy, model.config, cadence)
    except UserError as error:
        raise UserError(f"model {model.name}: {error}" if trained else str(error)) from None
    if trained and (other := trained.other_model(model.name, model.revision)):
        warnings.warn(other, stacklevel=level)
    return policy
