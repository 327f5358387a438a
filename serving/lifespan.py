"""Runs a service beside an ASGI application: started when the application has started, stopped before it stops."""

from __future__ import annotations

from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Service(Protocol):
    """What is started and stopped with the application; `start` raises when it cannot."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class WithService:
    """ASGI wrapper that knows only the lifespan protocol, so any application and server will do."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        running = False

        async def received() -> Message:
            nonlocal running
            message = await receive()
            if message["type"] == "lifespan.shutdown" and running:
                running = False
                await self._service.stop()  # first: its requests need what the application closes
            return message

        async def sent(message: Message) -> None:
            nonlocal running
            if message["type"] == "lifespan.startup.complete":
                await self._service.start()
                running = True
            await send(message)

        await self.app(scope, received, sent)
