"""Tasks of real text, which RESULTS names."""

import pytest

from tests.harness import local, real


def test_documents_of_real_text_hold_what_they_ask_for(tmp_path, capsys):
    found = real.documents(3)
    assert {name: len(docs) for name, docs in found.items()} == dict.fromkeys(local.TASKS, 3)
    for needle in found["needle"]:
        key = needle["gen_prefix"].split(" mentioned ")[0].rsplit(" ", 1)[1]
        said = f"magic numbers for {key} is: {needle['outputs'][0]}."
        assert said in needle["input"]
    for write in found["write"]:
        assert f"{write['text'].rsplit('def ', 1)[1]}{write['answer']}" in write["text"]
    answers = [one["choices"][one["answer"]] for one in found["choose"]]
    assert len(set(answers)) == 3 and all(len(set(one["choices"])) == 3 for one in found["choose"])
    assert real.documents(3) == found != real.documents(3, seed=1)
    real.main([str(tmp_path), "--count=3"])
    assert (tmp_path / "needle.yaml").exists()
    assert "write.yaml: 3 documents" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--count=9999: there are"):
        real.main([str(tmp_path), "--count=9999"])
