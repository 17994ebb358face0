"""One thread owns the batchers; others submit requests and cancel them through a queue."""

import dataclasses
import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from fkv.errors import UserError


@dataclasses.dataclass(frozen=True)
class Failed:
    """Comes in place of an event: the request is over.

    Attributes:
      message: one line.
      clients: the request could never run; otherwise the server is to blame.
    """

    message: str
    clients: bool = False


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request that was submitted.

    Attributes:
      lane: the batcher's name.
      request: of `batcher.Request`.
      listener: takes its events, `batcher.Event` or `Failed`; called where `deliver` calls it.
      id, over: the engine's.
      began, counted, evictions: the service's.
    """

    lane: str
    request: Any
    listener: Callable[[Any], None]
    id: int | None = None
    over: bool = False
    began: bool = False
    counted: bool = False
    evictions: int = 0


class _Lane:
    """A batcher, and the tickets that it works on."""

    def __init__(self, make: Callable[[], Any]):
        self.make, self.batcher, self.tickets = make, make(), {}

    @property
    def busy(self) -> bool:
        return bool(self.batcher.waiting or self.batcher.live)


class Engine:
    """Runs several batchers in turns.

    Args:
      make: of each lane's name, what makes its batcher; also in place of one that failed.
      every: tokens of a step.
      deliver: is called in the engine's thread with the (listener, event) pairs of a step.
    """

    def __init__(
        self,
        make: Mapping[str, Callable[[], Any]],
        every: int,
        deliver: Callable[[list[tuple[Callable, Any]]], None],
    ):
        self._lanes = {name: _Lane(one) for name, one in make.items()}
        self._every, self._deliver = every, deliver
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fkv engine", daemon=True)
        self._stopping = self._failed = False

    def start(self) -> None:
        self._thread.start()

    def warm(self, request: Any) -> None:
        """Answers a request in every lane, before `start`: programs are compiled then."""
        for lane in self._lanes.values():
            lane.batcher.submit(request)
            while lane.busy:
                lane.batcher.step(self._every)

    def stop(self, seconds: float) -> None:
        """Ends the thread after its step; what it still works on is lost."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def submit(self, ticket: Ticket) -> None:
        """From any thread."""
        self._inbox.put(("submit", ticket))
        if self._failed:
            self._refuse()

    def cancel(self, ticket: Ticket) -> None:
        """From any thread: its row is free at the next step; no event follows."""
        self._inbox.put(("cancel", ticket))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def counts(self) -> dict[str, dict[str, int]]:
        """What waits in each lane, and its rows in use."""
        return {
            name: {"queue": lane.batcher.waiting, "rows_in_use": lane.batcher.live}
            for name, lane in self._lanes.items()
        }

    def _run(self) -> None:
        try:
            self._turns()
        except BaseException:  # nothing answers any more: `alive` tells
            traceback.print_exc()
            self._failed = True
            for lane in self._lanes.values():
                self._end([*lane.tickets.values()], Failed("the server has failed"))
            self._refuse()

    def _refuse(self) -> None:
        """Ends what came in and is not submitted any more."""
        while True:
            try:
                told = self._inbox.get_nowait()
            except queue.Empty:
                return
            if told is not None and told[0] == "submit":
                self._end([told[1]], Failed("the server has failed"))

    def _turns(self) -> None:
        while not self._stopping:
            self._listen(wait=not any(lane.busy for lane in self._lanes.values()))
            for name, lane in self._lanes.items():
                self._listen(wait=False)
                if lane.busy and not self._stopping:
                    self._step(name, lane)

    def _listen(self, wait: bool) -> None:
        """Takes what came in; waits for the first of it if there is nothing else to do."""
        while True:
            try:
                told = self._inbox.get(block=wait)
            except queue.Empty:
                return
            if told is None:
                return
            what, ticket = told
            (self._submit if what == "submit" else self._cancel)(ticket)
            wait = False

    def _submit(self, ticket: Ticket) -> None:
        lane = self._lanes[ticket.lane]
        if ticket.over:
            return
        try:
            ticket.id = lane.batcher.submit(ticket.request)
        except UserError as error:
            self._end([ticket], Failed(str(error), clients=True))
        except Exception:
            traceback.print_exc()
            self._end([ticket], Failed("the request could not be started"))
        else:
            lane.tickets[ticket.id] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        ticket.over = True
        lane = self._lanes[ticket.lane]
        if lane.tickets.get(ticket.id) is ticket:
            del lane.tickets[ticket.id]
            lane.batcher.cancel(ticket.id)

    def _step(self, name: str, lane: _Lane) -> None:
        try:
            events = lane.batcher.step(self._every)
        except Exception as error:
            # Its arrays may have been given away in the middle: only a new one is sound.
            traceback.print_exc()
            told = str(error) if isinstance(error, UserError) else "generation failed"
            tickets, lane.tickets = [*lane.tickets.values()], {}
            self._end(tickets, Failed(told))
            lane.batcher = lane.make()
            return
        pairs = []
        for event in events:
            ticket = lane.tickets.get(event.id)
            if ticket is None:  # cancelled
                continue
            if event.finish is not None:
                del lane.tickets[event.id]
                ticket.over = True
            pairs.append((ticket.listener, event))
        if pairs:
            self._deliver(pairs)

    def _end(self, tickets: list[Ticket], failed: Failed) -> None:
        for ticket in tickets:
            ticket.over = True
        self._deliver([(ticket.listener, failed) for ticket in tickets])
