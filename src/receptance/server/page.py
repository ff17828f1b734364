"""The page at `/`: the files of `web/`, read once, so that no request can name another file."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
        "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
WEB = Path(__file__).parent / "web"


def page_routes(folder: Path = WEB) -> list[Route]:
    """A route for each file; none where the page was not built."""
    if not (folder / "index.html").is_file():
        return []
    found = []
    for file in sorted(folder.rglob("*")):
        if file.suffix in TYPES and file.is_file() and not file.is_symlink():
            name = file.relative_to(folder).as_posix()
            found.append(_route("/" if name == "index.html" else f"/{name}", file.read_bytes(), TYPES[file.suffix]))
    return found


def _route(path: str, data: bytes, kind: str) -> Route:
    async def give(_: Request) -> Response:
        return Response(data, media_type=kind, headers=HEADERS)

    return Route(path, give, methods=["GET", "HEAD"])
