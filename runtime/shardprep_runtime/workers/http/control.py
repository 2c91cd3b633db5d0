"""Answer who runs the server: whether the model is healthy, what it has done, who its workers are; and drain it."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from ...errors import ShardprepError
from ..transport import Health
from .openai import RequestError

if TYPE_CHECKING:
    from .app import Front

RETRY_AFTER: Final = 1
"""Seconds after which who was sent away may come again."""

LATER: Final = {"Retry-After": str(RETRY_AFTER)}
"""Headers of an answer that may be another one soon."""

HEALTH_SECONDS: Final = 10.0
"""Seconds for which /health waits for the stages; a lost worker's place may take longer to fill."""


class Control:
    """What a front end says of itself, and its draining."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._probe: asyncio.Task[list[Health]] | None = None

    async def health(self, _: Any) -> Any:
        from starlette.responses import JSONResponse

        pipeline = self._front.generator.pipeline
        said: dict[str, Any] = {
            "status": "ok",
            "model": self._front.model,
            "manifest_digest": pipeline.manifest_digest,
        }
        if self._front.is_draining:
            return JSONResponse({**said, "status": "draining"}, status_code=503, headers=LATER)
        try:
            found = await asyncio.wait_for(self.probed(), HEALTH_SECONDS)
        except TimeoutError:
            why = f"the stages have not all answered in {HEALTH_SECONDS:g} seconds"
            return JSONResponse({**said, "status": "unhealthy", "error": why}, status_code=503, headers=LATER)
        except ShardprepError as error:
            return JSONResponse(
                {**said, "status": "unhealthy", "error": str(error)}, status_code=503, headers=LATER
            )
        stages = [
            {
                "stage": each.info.pp_rank,
                "layers": each.info.layers,
                "worker": each.info.name,
                "proven": each.proven,
                "seconds": each.seconds,
            }
            for each in found
        ]
        return JSONResponse({**said, "is_fallback": pipeline.is_fallback, "stages": stages})

    async def probed(self) -> list[Health]:
        """What a forward of every stage says; who asks while one is under way shares it."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(asyncio.to_thread(self._front.generator.pipeline.health))
            self._probe.add_done_callback(
                lambda done: done.cancelled() or done.exception()
            )  # all may have gone
        return await asyncio.shield(self._probe)

    async def metrics_text(self, _: Any) -> Any:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
        from starlette.responses import Response

        text = await asyncio.to_thread(generate_latest, self._front.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def workers(self, _: Any) -> Any:
        from starlette.responses import JSONResponse

        pipeline = self._front.generator.pipeline
        return JSONResponse(
            {
                "route": pipeline.route,
                "is_fallback": pipeline.is_fallback,
                "is_draining": self._front.is_draining,
                "running": self._front.running,
                "waiting": self._front.waiting,
                "workers": [asdict(each) for each in pipeline.workers()],
                "events": [asdict(each) for each in pipeline.events],
                "counters": pipeline.counters,
            }
        )

    async def probe(self, _: Any) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse({"stages": [asdict(each) for each in await self.probed()]})

    async def drain(self, _: Any) -> Any:
        from starlette.responses import JSONResponse

        self._front.is_draining = True
        return JSONResponse(
            {"status": "draining", "running": self._front.running, "waiting": self._front.waiting}
        )


# ---------------------------------------------------------------------------------------------------------- who may ask
def bearer(what: str, expected: str | None) -> Callable[[Any], None]:
    """Let pass who sends `Authorization: Bearer EXPECTED`.

    Args:
        what: What is sent, for messages.
        expected: What it must be; None: everybody may pass.
    """

    def check(request: Any) -> None:
        if expected is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given:
            raise RequestError(
                f"{what} is needed; send the header Authorization: Bearer ...", status=401, code="no_api_key"
            )
        if not hmac.compare_digest(given.strip().encode("latin-1"), expected.encode()):
            status = 401 if what == "the API key" else 403  # as OpenAI's clients expect of a key
            raise RequestError(f"{what} is another one", status=status, code="invalid_api_key")

    return check


def nobody(why: str) -> Callable[[Any], None]:
    def check(_: Any) -> None:
        raise RequestError(why, status=403, code="no_secret")

    return check
