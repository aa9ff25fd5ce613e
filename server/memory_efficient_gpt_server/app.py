"""The ASGI application: its parts, its routes, its life.

Purpose: put the server together from settings and a catalog of models.
Does not know: sockets, signals, processes (the command line has those).
Invariant: every route is in a router with an access rule; nothing is global.

For whoever runs it: on SIGTERM call `lifecycle_of(app).begin_drain()`, then await its `drained(timeout_s)`,
then stop the server; the application's shutdown closes the models.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI

from memory_efficient_gpt import __version__
from memory_efficient_gpt_server.admission import Admission, AdmissionLimits
from memory_efficient_gpt_server.deps import KeyRing, Server
from memory_efficient_gpt_server.errors import install_error_handlers
from memory_efficient_gpt_server.lifecycle import Lifecycle
from memory_efficient_gpt_server.metrics import Metrics
from memory_efficient_gpt_server.middleware import RequestScope
from memory_efficient_gpt_server.models import ModelCatalog
from memory_efficient_gpt_server.routes import (
    admin,
    admin_changes,
    admin_events,
    admin_operations,
    chat,
    completions,
    health,
    models,
    tokenize,
)
from memory_efficient_gpt_server.settings import Settings
from memory_efficient_gpt_server.text import TextPool

logger = logging.getLogger(__name__)

ROUTERS: Final = (
    completions.router,
    chat.router,
    models.router,
    tokenize.router,
    admin.router,
    admin_operations.router,
    admin_events.router,
    admin_changes.router,
    health.open_router,
    health.metrics_router,
    health.about_router,
)


def create_app(settings: Settings, catalog: ModelCatalog) -> FastAPI:
    """The application. Its lifespan starts `catalog` and closes it."""
    admission = Admission(
        AdmissionLimits(
            max_sequences=settings.max_sequences,
            max_reserved_tokens=settings.max_reserved_tokens,
            max_sequences_per_key=settings.max_sequences_per_key if settings.has_keys else None,
        )
    )
    server = Server(
        settings=settings,
        catalog=catalog,
        admission=admission,
        lifecycle=Lifecycle(),
        metrics=Metrics(catalog, admission),
        text_pool=TextPool(settings.tokenizer_threads),
        keys=KeyRing(settings),
    )
    app = FastAPI(
        title="Memory-Efficient GPT",
        version=__version__,
        lifespan=_lifespan,
        routes=[route for router in ROUTERS for route in router.routes],
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.megpt = server
    install_error_handlers(app)
    app.add_middleware(RequestScope, metrics=server.metrics)
    return app


def lifecycle_of(app: FastAPI) -> Lifecycle:
    """The part of `app` that drains it."""
    server: Server = app.state.megpt
    return server.lifecycle


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    server: Server = app.state.megpt
    server.catalog.start()
    logger.info("Serving %s.", ", ".join(model.id for model in server.catalog) or "no models")
    try:
        yield
    finally:
        await server.catalog.close()
        server.text_pool.close()
