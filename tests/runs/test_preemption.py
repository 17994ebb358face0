"""SIGTERM is noted where work can be saved, and obeyed at once elsewhere."""

import errno
import signal
import threading

import pytest

from fkv.runs import parallel, preemption


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_terminal_that_goes_away_are_noted_alike(number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(preemption.Preempted) as ended, preemption.noticed() as asked_to_end:
        signal.raise_signal(number)
        assert asked_to_end()
        raise preemption.Preempted("all is saved")
    assert ended.value.code == 128 + number and signal.getsignal(number) is before
    told = f"ended by {number.name}: all is saved; rerun the same command to resume\n"
    assert capsys.readouterr().out == told


def test_a_terminal_that_is_gone_is_told_nothing(monkeypatch):
    def gone(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(preemption.Preempted) as ended, preemption.noticed():
        signal.raise_signal(signal.SIGHUP)
        raise preemption.Preempted("all is saved")
    assert ended.value.code == 128 + signal.SIGHUP


def test_the_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), preemption.noticed() as asked_to_end:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # schedulers may repeat it
        assert asked_to_end()
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second was noted like the first")


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemption.noticed() as asked_to_end:
            signal.raise_signal(signal.SIGHUP)
            assert not asked_to_end()
    finally:
        signal.signal(signal.SIGHUP, before)


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
