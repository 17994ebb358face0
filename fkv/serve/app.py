"""The server's pages: OpenAI's API, `/health` and `/metrics`."""

import asyncio
import contextlib
import hmac
import json
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from fkv.serve import protocol
from fkv.serve.protocol import Asked, Refused
from fkv.serve.service import Service, Work

_BODY_SECONDS = 30.0  # in which a body must come
_GONE = 499  # the status that is counted for clients that left


class App:
    """The pages of a service.

    Args:
      key: that clients must send as `Authorization: Bearer KEY`, or empty.
    """

    def __init__(self, service: Service, key: str = ""):
        self._service, self._key = service, key.encode()

    def starlette(self, origins: Sequence[str] = ()) -> Starlette:
        """As an ASGI application.

        Args:
          origins: of web pages that may call it; `*` for any.
        """

        def route(path, page, method):
            return Route(path, self._guarded(path, page), methods=[method])

        @contextlib.asynccontextmanager
        async def lifespan(_):
            self._service.start()
            yield
            self._service.stop()

        allowed = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        cors = Middleware(CORSMiddleware, allow_origins=list(origins), **allowed)
        return Starlette(
            routes=[
                route("/v1/models", self._models, "GET"),
                route("/v1/models/{model:path}", self._one_model, "GET"),
                route("/v1/completions", self._completions, "POST"),
                route("/v1/chat/completions", self._chat, "POST"),
                route("/health", self._health, "GET"),
                route("/metrics", self._metrics, "GET"),
            ],
            middleware=[cors] if origins else [],
            exception_handlers={HTTPException: _no_page},
            lifespan=lifespan,
        )

    def _guarded(self, path: str, page: Callable[[Request], Awaitable[Response]]):
        """A page behind the key, with its errors as answers, counted by status."""

        async def guarded(request: Request) -> Response:
            try:
                if path.startswith("/v1/"):
                    self._check_key(request)
                response = await page(request)
            except Refused as refused:
                response = _json(refused.body(), refused.status, refused.headers)
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            except Exception:
                traceback.print_exc()
                error = Refused("the server failed, see its log", 500)
                response = _json(error.body(), error.status)
            self._service.metrics.requests[path, response.status_code] += 1
            return response

        return guarded

    def _check_key(self, request: Request) -> None:
        """Takes the same time whatever is wrong with a key."""
        if not self._key:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._key)
        if not right or scheme.lower() != "bearer":
            raise Refused("the API key is missing or wrong", 401, code="invalid_api_key")

    # ---- pages

    async def _health(self, _: Request) -> Response:
        healthy = self._service.healthy
        status = "ok" if healthy else "draining" if self._service.draining else "failed"
        return _json({"status": status}, 200 if healthy else 503)

    async def _metrics(self, _: Request) -> Response:
        service, sessions = self._service, self._service.sessions
        text = service.metrics.text(
            service.gauges(), sessions=len(sessions), session_bytes=sessions.bytes,
            sessions_reused_total=sessions.reused, sessions_missed_total=sessions.missed,
            session_tokens_reused_total=sessions.tokens,
        )  # fmt: skip
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._said(x) for x in self._service.lanes]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._service.lanes:
            raise Refused("no such model is served", 404, param="model", code="model_not_found")
        return _json(self._said(name))

    def _said(self, name: str) -> dict[str, Any]:
        created = self._service.created
        return {"id": name, "object": "model", "created": created, "owned_by": "fkv"}

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, chat: bool) -> Response:
        service = self._service
        if service.draining:  # whatever the body is
            raise Refused("the server is shutting down", 503, headers={"Retry-After": "10"})
        body = await self._body(request)
        asked = protocol.parse(body, chat, service.defaults)
        try:
            work = await _unless_gone(request, service.begin(asked))
        except TimeoutError:
            raise _too_long(service) from None
        if asked.stream:
            return _Stream(service, work, asked)
        try:
            return await _unless_gone(request, self._whole(work))
        finally:
            service.leave(work)

    async def _whole(self, work: Work) -> Response:
        try:
            async with asyncio.timeout_at(work.deadline):
                async for _ in self._service.pieces(work):
                    pass
        except TimeoutError:
            raise _too_long(self._service) from None
        return _json(work.reply.whole())

    async def _body(self, request: Request) -> bytes:
        """The body, if it is JSON by its header and not too large."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # What a web page can send without asking is refused: it would reach a server on localhost.
        if kind != "application/json":
            raise Refused("the content type must be application/json", 415)
        most, body = self._service.limits.body, bytearray()
        length = request.headers.get("content-length", "0")
        too_large = Refused(f"the body has more than {most} bytes", 413, code="body_too_large")
        if not length.isdecimal() or len(length) > 18 or int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise Refused("the body took longer than 30 s to arrive", 408) from None
        return bytes(body)


class _Stream(Response):
    """Server-sent events of a request, until its answers end or its client leaves."""

    def __init__(self, service: Service, work: Work, asked: Asked):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._service, self._work, self._asked = service, work, asked

    async def __call__(self, scope, receive, send) -> None:
        try:
            await _unless_gone(Request(scope, receive), self._all(send))
        except ClientDisconnect:
            pass
        finally:
            self._service.leave(self._work)

    async def _all(self, send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with asyncio.timeout_at(self._work.deadline):
                await send(start)
                await self._pieces(send)
        except Refused as refused:  # too late for another status
            await self._put(send, refused.body())
        except TimeoutError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._put(send, _too_long(self._service).body())
                    await self._end(send)
            return
        await self._end(send)

    async def _pieces(self, send) -> None:
        reply, usage = self._work.reply, {"usage": None} if self._asked.usage else {}
        if self._asked.chat:
            for index in range(len(reply.choices)):
                await self._put(send, reply.first(index) | usage)
        async for index, thought, text, logprobs, finish in self._service.pieces(self._work):
            await self._put(send, reply.piece(index, thought, text, logprobs, finish) | usage)
        if self._asked.usage:
            await self._put(send, reply.last())

    async def _end(self, send) -> None:
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _put(self, send, data: Any) -> None:
        body = f"data: {json.dumps(data)}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` returns; if the client leaves before, it ends, with `ClientDisconnect`."""

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # ASCII: a client's text may hold halves of surrogates, which are no UTF-8.
    body = json.dumps(data).encode()
    return Response(body, status, headers, media_type="application/json")


def _too_long(service: Service) -> Refused:
    return Refused(
        f"the request took longer than {service.limits.seconds:g} s", 504, code="timeout"
    )


async def _no_page(_: Request, error: HTTPException) -> Response:
    refused = Refused(str(error.detail), error.status_code, code="not_found")
    return _json(refused.body(), error.status_code, dict(error.headers or {}))
