"""The embedded reasoning task, and the path of its reasoner."""

from pathlib import Path

REASONER = Path(__file__).parent / "reasoner"
