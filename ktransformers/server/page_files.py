"""The files of the page at `/`, read once: a path is one of them or nothing, so none leads out of the folder."""

from pathlib import Path

from fastapi import Request, Response

FOLDER = Path(__file__).resolve().parent / "page"
"""index.html and what it needs, by relative addresses. No page is served while there is no such folder."""

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Not `mimetypes`, which asks the system: one that has .js for plain text would leave the page without scripts."""

_HEADERS = {
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
}
"""Everything from here alone, nothing in line; no text may become HTML, whatever a script does."""


class Page:
    """Path of an address -> file. `/` is index.html."""

    def __init__(self, folder: Path = FOLDER) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in KINDS)
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
        kind = KINDS[Path(path).suffix or ".html"]
        return Response(self._files[path], media_type=kind, headers=_HEADERS)
