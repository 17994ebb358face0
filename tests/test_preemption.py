"""SIGTERM is noted where work can be saved, and obeyed elsewhere."""

import signal
import threading

import pytest

from fkv import parallel, preemption


@pytest.fixture
def obeyed():
    """Signals that reached the handler from before."""
    found = []
    before = signal.signal(signal.SIGTERM, lambda *_: found.append("obeyed"))
    yield found
    signal.signal(signal.SIGTERM, before)


def test_noted_within_and_obeyed_after(obeyed):
    with pytest.raises(preemption.Preempted) as ended, preemption.noticed() as asked_to_end:
        assert not asked_to_end()
        signal.raise_signal(signal.SIGTERM)
        assert asked_to_end() and parallel.anywhere(asked_to_end())
        raise preemption.Preempted("all is saved")
    assert ended.value.code == 143 and obeyed == []
    signal.raise_signal(signal.SIGTERM)
    assert obeyed == ["obeyed"]


def test_what_nobody_heeded_is_obeyed_in_the_end(obeyed):
    with preemption.noticed():
        signal.raise_signal(signal.SIGTERM)
        assert obeyed == []
    assert obeyed == ["obeyed"]


def test_other_threads_leave_signals_alone(obeyed):
    found = []

    def work():
        with preemption.noticed() as asked_to_end:
            found.append(asked_to_end())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    signal.raise_signal(signal.SIGTERM)
    assert found == [False] and obeyed == ["obeyed"]
