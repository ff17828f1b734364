"""/v1/sessions: conversations that are kept, forked, rewound and carried about as files."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from receptance.server import http
from receptance.server.conversations import as_json
from receptance.server.errors import ApiError, bad
from receptance.server.hub import Hub
from receptance.server.schemas import ForkRequest, RewindRequest, SessionPatch, SessionRequest
from receptance.server.state_view import state_report
from receptance.server.store import Session

Id = Annotated[str, Path(pattern=r"^[a-z0-9._-]{1,128}$")]
Tag = Annotated[str | None, Query(max_length=100)]
After = Annotated[str | None, Query(pattern=r"^[a-z0-9._-]{1,128}$")]


class File(Response):
    media_type = "application/octet-stream"


def routes(hub: Hub) -> APIRouter:
    router = APIRouter(prefix="/v1/sessions")
    kept = hub.conversations
    store, call = kept.store, kept.call

    async def full(session: Session) -> dict[str, Any]:
        return as_json(session, await call(store.turns, session.head))

    @router.post("", status_code=201)
    async def create(body: SessionRequest, request: Request) -> Response:
        model = hub.models[body.model]
        model.start(body.state)
        if body.system and len(body.system) > hub.config.limits.prompt_bytes:
            raise bad("the system prompt is too long", "system")
        session = Session(http.owner(request), model.name, body.title, tuple(body.tags), body.system, body.state)
        return http.answer(await full(await call(store.create, session)), 201)

    @router.get("")
    async def listing(
        request: Request, tag: Tag = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100, after: After = None
    ) -> Response:
        found = await call(store.find, http.owner(request), tag, limit + 1, after)
        data = [as_json(session) for session in found[:limit]]
        return http.answer({"object": "list", "data": data, "has_more": len(found) > limit})

    @router.post("/import", status_code=201)
    async def read_file(request: Request) -> Response:
        hub.models.check_open()
        data = await request.body()
        session = await kept.read_file(data, http.owner(request), lambda name: hub.models[name])
        return http.answer(await full(session), 201)

    @router.get("/{id}")
    async def get(id: Id, request: Request) -> Response:
        return http.answer(await full(await call(store.get, http.owner(request), id)))

    @router.patch("/{id}")
    async def patch(id: Id, body: SessionPatch, request: Request) -> Response:
        tags = None if body.tags is None else tuple(body.tags)
        return http.answer(as_json(await call(store.patch, http.owner(request), id, body.title, tags)))

    @router.delete("/{id}")
    async def delete(id: Id, request: Request) -> Response:
        await call(store.delete, http.owner(request), id)
        return http.answer({"id": id, "object": "session.deleted", "deleted": True})

    @router.post("/{id}/fork", status_code=201)
    async def fork(id: Id, request: Request, body: ForkRequest | None = None) -> Response:
        turn = None if body is None else body.turn
        return http.answer(await full(await call(store.fork, http.owner(request), id, turn)), 201)

    @router.post("/{id}/rewind")
    async def rewind(id: Id, body: RewindRequest, request: Request) -> Response:
        return http.answer(await full(await call(store.rewind, http.owner(request), id, body.turn)))

    @router.get("/{id}/export", response_class=File)
    async def export(id: Id, request: Request) -> Response:
        session = await call(store.get, http.owner(request), id)
        data = await kept.export(session, hub.models[session.model])
        disposition = f'attachment; filename="{session.id}.safetensors"'
        return File(data, headers={"Content-Disposition": disposition})

    @router.get("/{id}/state")
    async def state(id: Id, request: Request, turn: Annotated[int | None, Query(ge=0, le=1 << 40)] = None) -> Response:
        session = await call(store.get, http.owner(request), id)
        model = hub.models[session.model]
        depth = session.depth if turn is None else turn
        if session.head is None or not 1 <= depth <= session.depth:
            raise ApiError(404, f"there is no state after turn {depth} of {session.depth}", code="turn_not_found")
        now = await kept.state(await call(store.ancestor, session.head, depth), model)
        if now is None:
            message = (
                "the state after this turn is not kept any more; it is made again when the session goes on from it"
            )
            raise ApiError(404, message, code="state_not_kept")
        before = model.start(session.start)
        if depth > 1:
            before = await kept.state(await call(store.ancestor, session.head, depth - 1), model)
        return http.answer(await state_report(now, before, depth == 1, model))

    return router
