"""The files of the page at `/`, read once: a path is one of them or nothing, so none leads out of the folder."""

import mimetypes
from pathlib import Path

from fastapi import Request, Response

FOLDER = Path(__file__).resolve().parent / "page"
"""index.html and what it needs, by relative addresses. No page is served while there is no such folder."""

_HEADERS = {
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src *; frame-ancestors 'none'",
}
"""Scripts only from here. The page may be pointed at another server."""


class Page:
    """Path of an address -> file. `/` is index.html."""

    def __init__(self, folder: Path = FOLDER) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
        self._files = {f"/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}
        if "/index.html" in self._files:
            self._files["/"] = self._files["/index.html"]

    @property
    def paths(self) -> frozenset[str]:
        """All addresses, which need no key: a page has to load before it can ask for one."""
        return frozenset(self._files)

    async def file(self, request: Request) -> Response:
        """The endpoint of each of them."""
        path = request.url.path
        kind = "text/html" if path == "/" else mimetypes.guess_type(path)[0] or "application/octet-stream"
        return Response(self._files[path], media_type=kind, headers=_HEADERS)
