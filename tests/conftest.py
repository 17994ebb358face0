"""Strict numerics for every test, and the fixtures that several share."""

from pathlib import Path

import jax
import pytest

# An accidental [n] + [b, n] is a bug, and full precision makes tolerances mean the same anywhere.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """The folder of vectors made by the released PyTorch code."""
    path = Path(__file__).parents[2] / "shared" / "reference"
    if not path.is_dir():
        pytest.skip(f"no reference vectors at {path}")
    return path
