"""The HTTP server: OpenAI's endpoints over a worker.  What a request may say is protocol.py's, what is said back
replies.py's; here requests are authorised, queued, listened to, and given up when their client leaves.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from ..llm import LLM
from .call import Call, Event, Reading
from .connection import Bodies, ClientLeftError, EventStream, left, within
from .door import Door, Options
from .fields import MOST, ApiError, Fields, flag, listing, text, whole
from .metrics import Metrics
from .prompting import continues, encoded, text_of
from .protocol import Ask, Finished, Piece, chat_ask, completion_ask
from .refusals import no_session
from .replies import Replies
from .worker import Worker

ALIVE = 1.0  # seconds of silence, after which a waiting client gets a comment
RENDERERS = 2  # requests that are turned into tokens at the same time
PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Server:
    """The routes, and what they need.  `app` is the ASGI application."""

    def __init__(self, llm: LLM, worker: Worker, metrics: Metrics, options: Options) -> None:
        self.llm, self.worker, self.metrics, self.options = llm, worker, metrics, options
        self.ready = False
        self._bodies = Bodies(options.max_body)
        self._rendering = asyncio.Semaphore(RENDERERS)
        self._created = int(time.time())
        self._fingerprint = "fp_" + sha256(json.dumps(_settings(llm), sort_keys=True).encode()).hexdigest()[:12]
        self._page = PAGE.read_bytes()
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "queue": ("Answers that wait for a row", lambda: worker.waiting),
            "rows_busy": ("Rows that draw or read", lambda: worker.running),
            "rows": ("Rows that there are", lambda: len(worker.engine.rows)),
            "sessions": ("Sessions that are kept", lambda: len(worker.sessions)),
            "memory_planned_bytes": ("What the process was planned to hold", lambda: _bytes(llm, "planned")),
            "memory_peak_bytes": ("What it held at most", lambda: _bytes(llm, "peak")),
            "cache_bytes": ("The cache, allocated at start", lambda: llm.cache.nbytes),
            "bodies_bytes": ("Requests that are being read or turned into tokens", lambda: self._bodies.held),
        }
        for name, (meaning, ask) in gauges.items():
            metrics.gauge(name, meaning, ask)
        self.app = self._application()

    # --- small answers ---

    async def page(self, request: Request) -> Response:  # noqa: ARG002
        """The chat page."""
        headers = {"content-security-policy": PAGE_POLICY, "referrer-policy": "no-referrer"}
        return Response(self._page, media_type="text/html; charset=utf-8", headers=headers)

    async def health(self, request: Request) -> Response:
        """Alive if this answers; ready (/health/ready) if a request would be taken."""
        ready = self.ready and self.worker.is_alive() and not self.worker.draining
        status = 200 if ready or not request.url.path.endswith("ready") else 503
        return JSONResponse({"status": "ok" if ready else "not ready", "live": True, "ready": ready}, status)

    async def measures(self, request: Request) -> Response:  # noqa: ARG002
        """For Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The one model, with what its cache is like."""
        plan, config = self.llm.plan, self.llm.checkpoint.config
        facts = {
            "slots": plan.slots,
            "budget": str(plan.budget),
            "policy": plan.policy.name,
            "context": config.max_position_embeddings,
            "cache_bytes": self.llm.cache.nbytes,
            "rows": len(self.worker.engine.rows),
            "has_template": self.llm.checkpoint.template is not None,
        }
        model = {"id": self.options.name, "object": "model", "created": self._created, "owned_by": "minillm"}
        model |= {"max_model_len": None if plan.evicts else plan.retention.slots, "minillm": facts}
        asked = request.path_params.get("name")
        if asked is None:
            return JSONResponse({"object": "list", "data": [model]})
        if asked != self.options.name:
            raise ApiError(
                404, f"the model {asked[:60]!r} is not served here", "not_found_error", "model", "model_not_found"
            )
        return JSONResponse(model)

    async def tokenizer_info(self, request: Request) -> Response:  # noqa: ARG002
        """What lm-evaluation-harness asks for."""
        tokenizer = self.llm.checkpoint.tokenizer
        named = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
        told = {name: None if token is None else tokenizer.piece(token) for name, token in named.items()}
        template = self.llm.checkpoint.template
        told |= {"pad_token": None, "chat_template": None if template is None else template.source}
        return JSONResponse({"name": self.options.name, "vocab_size": tokenizer.vocab_size, **told})

    async def tokenize(self, request: Request) -> Response:
        """{"prompt": text, "add_special_tokens": true} -> {"tokens": ids, "count": n}, as vLLM has it."""
        async with self._bodies.json(request.receive) as body:
            fields = Fields(body)
            prompt, special = fields.need("prompt", text), fields.get("add_special_tokens", flag)
            async with self._rendering:
                ids = await asyncio.to_thread(self._tokenize, prompt, special is not False)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": None})

    async def detokenize(self, request: Request) -> Response:
        """{"tokens": ids} -> {"prompt": text}."""
        async with self._bodies.json(request.receive) as body:
            ids = Fields(body).need("tokens", listing(whole(0, self.options.limits.real_vocab - 1), 0, MOST))
            prompt = await asyncio.to_thread(self.llm.checkpoint.tokenizer.decode, ids)
        return JSONResponse({"prompt": prompt})

    async def session(self, request: Request) -> Response:
        """GET what is remembered of a session, or DELETE it."""
        name = request.path_params["name"]
        if request.method == "DELETE":
            await asyncio.wrap_future(self.worker.ask(lambda: self.worker.forget(name)))
            return JSONResponse({"id": name, "deleted": True})
        return JSONResponse(await asyncio.wrap_future(self.worker.ask(lambda: self.worker.describe(name))))

    # --- answers of the model ---

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """/v1/chat/completions"""
        await self._answer(chat_ask, scope, receive, send)

    async def complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """/v1/completions"""
        await self._answer(completion_ask, scope, receive, send)

    async def _answer(self, read: Callable[..., Ask], scope: Scope, receive: Receive, send: Send) -> None:
        async with self._bodies.json(receive) as body:
            ask = await asyncio.to_thread(read, body, self.options.limits, self.llm.checkpoint.sampling_defaults)
            del body
            call, events = await self._call(ask)
        head = scope["state"]["request_id"]
        replies = Replies(
            ask,
            id=("chatcmpl-" if ask.kind == "chat" else "cmpl-") + head.removeprefix("req_"),
            created=int(time.time()),
            model=self.options.name,
            fingerprint=self._fingerprint,
            token_bytes=self.llm.checkpoint.tokenizer.token_bytes,
        )
        self.worker.submit(call)
        say = self._stream if ask.stream else self._whole
        telling = asyncio.ensure_future(say(call, events, replies, send))
        leaving = asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait((telling, leaving), return_when=asyncio.FIRST_COMPLETED)
            if telling.done():
                telling.result()
            else:
                raise ClientLeftError
        except ClientLeftError:
            self.metrics.left.labels("client").inc()
            raise
        finally:
            self.worker.leave(call)
            for task in (telling, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _call(self, ask: Ask) -> tuple[Call, asyncio.Queue[Event]]:
        """A request as the worker takes it, and where its events will come."""
        notes, seconds = None, min(ask.timeout or self.options.seconds, self.options.seconds)
        if ask.session is not None:
            name = ask.session
            notes = await asyncio.wrap_future(self.worker.ask(lambda: self.worker.session_notes(name)))
            if notes is None and ask.resume:
                raise no_session(name)
        async with self._rendering:
            prompts = await asyncio.to_thread(encoded, self.llm, ask, notes)
            texts = [text_of(self.llm, prompt) for prompt in ask.prompts] if ask.echo else []
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left
                loop.call_soon_threadsafe(events.put_nowait, event)

        call = Call(
            ask,
            prompts,
            emit,
            continuation=continues(self.llm, ask),
            deadline=time.monotonic() + seconds,
            texts=texts,
            goes_on=notes is not None,
            notes=_notes(ask) if notes is None else None,
        )
        return call, events

    async def _stream(self, call: Call, events: asyncio.Queue[Event], replies: Replies, send: Send) -> None:
        """Tell every event as it comes; what goes wrong before the first one has a status of its own."""
        stream = EventStream(send)
        unfinished, told, opened = len(call.prompts) * call.ask.n, 0.0, False
        while unfinished:
            try:
                event = await within(ALIVE, events.get())
            except asyncio.TimeoutError:
                await stream.comment("waiting")
                continue
            if isinstance(event, Reading):
                if time.monotonic() - told > ALIVE:
                    told = time.monotonic()
                    await stream.comment(f"reading {event.read}/{event.tokens}")
                continue
            if isinstance(event, ApiError):
                if not stream.begun:
                    raise event
                await stream.event(event.body())
                break
            if not opened:
                opened = True
                await stream.event(*replies.opening())
            await stream.event(*replies.chunk(event))
            unfinished -= isinstance(event, Finished)
        else:
            await stream.event(*replies.closing())
        await stream.done()

    async def _whole(self, call: Call, events: asyncio.Queue[Event], replies: Replies, send: Send) -> None:
        """Collect everything, and say it at once."""
        unfinished = len(call.prompts) * call.ask.n
        while unfinished:
            event = await events.get()
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, (Piece, Finished)):
                replies.add(event)
                unfinished -= isinstance(event, Finished)
        response = JSONResponse(replies.whole())
        for message in (
            {"type": "http.response.start", "status": 200, "headers": response.raw_headers},
            {"type": "http.response.body", "body": response.body},
        ):
            await send(message)

    def _tokenize(self, text: str, special: bool) -> list[int]:
        return self.llm.checkpoint.tokenizer.encode(text, bos=special)

    # --- around all of them ---

    def _application(self) -> ASGIApp:
        """Routes inside of `Door`, with permission for pages elsewhere where that was asked for."""
        routes = [
            Route("/", self.page),
            *(Route(path, self.health) for path in ("/health", "/health/live", "/health/ready")),
            Route("/metrics", self.measures),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/v1/sessions/{name}", self.session, methods=["GET", "DELETE"]),
            Route("/v1/chat/completions", _Raw(self.chat), methods=["POST"]),
            Route("/v1/completions", _Raw(self.complete), methods=["POST"]),
        ]
        app: ASGIApp = Door(Router(routes), self.metrics, self.options)
        if self.options.origins:
            methods, headers = ["GET", "POST", "DELETE"], ["authorization", "content-type", "x-request-id"]
            app = CORSMiddleware(app, self.options.origins, allow_methods=methods, allow_headers=headers)
        return app


class _Raw:
    """An endpoint at the level of ASGI, which Starlette tells from a function by its being none."""

    def __init__(self, run: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._run(scope, receive, send)


def _notes(ask: Ask) -> dict[str, Any]:
    """What a session is begun with, for the turns that follow."""
    messages = ask.prompts[0] if ask.kind == "chat" else ()
    system = [message["content"] for message in messages if isinstance(message, dict) and message["role"] == "system"]
    return {"system": system[0]} if system else {}


def _settings(llm: LLM) -> dict[str, Any]:
    """What makes two servers answer alike."""
    return {
        "version": __version__,
        "model": llm.checkpoint.digest,
        "computed_by": llm.checkpoint.computed_by,
        "weights": None if llm.checkpoint.scheme is None else llm.checkpoint.scheme.name,
        "chunk": llm.chunk,
        "cache": llm.plan.summary(),
    }


def _bytes(llm: LLM, which: str) -> float:
    return float((llm.memory.to_dict()[which] if llm.memory else None) or 0)
