"""The embedded reasoning task, and where its reasoner lies."""

from pathlib import Path

REASONER = Path(__file__).parent / "reasoner"
