"""The server's process: its socket, its signals, and its end."""

import asyncio
import signal
import socket
import threading

import uvicorn
from starlette.applications import Starlette

from fkv.errors import UserError
from fkv.serve.service import Service


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is refused before anything is loaded.

    Args:
      port: 0 for any that is free.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"serve.host = {host!r}, serve.port = {port}: can't listen there ({why})"
        ) from None
    return found


def address_of(listening: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Serves until SIGTERM or Ctrl-C, then finishes what runs; a second signal ends it at once.

    While it finishes, new requests get 503.
    """

    def __init__(self, app: Starlette, service: Service):
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="on",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=1,  # seconds for what is still sent
            )
        )
        self._service = service

    def handle_exit(self, sig: int, frame) -> None:
        """In place of uvicorn's, which closes the door first, and ends by the signal itself."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
        self._service.draining = True

    def drain(self) -> None:
        """As a signal does, from any thread."""
        self.handle_exit(signal.SIGTERM, None)

    async def main_loop(self) -> None:
        """uvicorn's, and the end of draining."""
        waiting = asyncio.ensure_future(self._drained())
        try:
            await super().main_loop()
        finally:
            waiting.cancel()

    async def _drained(self) -> None:
        while not self._service.draining:
            await asyncio.sleep(0.05)
        loop = asyncio.get_running_loop()
        last = loop.time() + self._service.limits.drain
        while self._service.pending and loop.time() < last:
            await asyncio.sleep(0.02)
        self.should_exit = True


class Background:
    """A server in a thread, for notebooks and tests; ends with the `with`."""

    def __init__(self, app: Starlette, service: Service, host: str = "127.0.0.1", port: int = 0):
        self._socket, self.server = listen(host, port), Server(app, service)
        self.url = address_of(self._socket)
        self._thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )

    def __enter__(self) -> "Background":
        self._thread.start()
        while not self.server.started and self._thread.is_alive():
            self._thread.join(0.01)
        return self

    def __exit__(self, *_) -> None:
        self.server.drain()
        self._thread.join()
