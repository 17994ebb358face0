"""What policies with weights from elsewhere share."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fkv.errors import UserError
from fkv.policies.base import Policy, name_of


def check_arrays(policy: Policy, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a policy whose `params` are not finite floats by these names, of these shapes.

    Raises:
      UserError: one line that names the array and both shapes.
    """
    trained = getattr(policy, "trained", None)
    where = (trained and trained.source) or name_of(policy)
    params = getattr(policy, "params", None)
    if not isinstance(params, Mapping) or params.keys() != shapes.keys():
        has = ", ".join(map(str, params)) if isinstance(params, Mapping) else repr(params)[:60]
        raise UserError(f"{where}: params must hold {', '.join(shapes)}, not {has or 'nothing'}")
    for name, shape in shapes.items():
        x = params[name]
        if getattr(x, "shape", None) != shape or not jnp.issubdtype(x.dtype, jnp.floating):
            is_array = hasattr(x, "shape") and hasattr(x, "dtype")
            given = f"{x.dtype} {list(x.shape)}" if is_array else type(x).__name__
            raise UserError(
                f"{where}: {name} is {given}, but this model needs floats {list(shape)}"
            )
        here = not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
        if here and hasattr(x, "__array__") and not np.isfinite(np.asarray(x, np.float32)).all():
            raise UserError(f"{where}: {name} holds numbers that are not finite")
