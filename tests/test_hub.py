"""Libraries are imported without irrelevant advice."""

import os
import sys

from fkv import hub


def test_transformers_comes_without_advice(tmp_path, monkeypatch):
    (tmp_path / "transformers.py").write_text(
        "import os\nadvice = os.environ.get('TRANSFORMERS_NO_ADVISORY_WARNINGS')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    real = {name: sys.modules.pop(name) for name in [*sys.modules] if name == "transformers"}
    try:
        for before in (None, "0"):
            if before is not None:
                monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", before)
            assert hub.transformers().advice == "1"
            assert os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS") == before
            del sys.modules["transformers"]
    finally:
        sys.modules.update(real)
