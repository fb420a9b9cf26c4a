"""API keys: who may ask. Kept as digests, compared in constant time, never shown."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from ktransformers.errors import KTransformersError


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Keys:
    """The keys of a file, one a line, and those of a text with commas between them. Without either all may ask."""

    def __init__(self, file: str | Path | None = None, text: str = "") -> None:
        self._file = Path(file) if file else None
        self._given = [key.strip() for key in text.split(",") if key.strip()]
        self._digests: list[bytes] = []
        self.reload()

    @property
    def needed(self) -> bool:
        """Whether anybody has to show a key."""
        return bool(self._digests)

    def reload(self) -> int:
        """Read the file again; returns how many keys there are. Raises KTransformersError for a file that cannot be
        read or has no key; the keys before stay in force."""
        self._digests = [_digest(key) for key in (*self._given, *self._read())]
        return len(self._digests)

    def _read(self) -> Iterable[str]:
        if self._file is None:
            return []
        try:
            lines = [line.strip() for line in self._file.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is not UTF-8"
            raise KTransformersError(f"--api-key-file {self._file}: cannot be read: {reason}. Check it.") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise KTransformersError(f"--api-key-file {self._file}: has no key, expected one on each line. Add one.")
        return keys

    def allow(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request with these headers, in lower case, may be answered. All keys are compared, always."""
        shown = _digest(_shown(headers))
        hits = [hmac.compare_digest(shown, digest) for digest in self._digests]
        return not self._digests or any(hits)


def _shown(headers: Mapping[bytes, bytes]) -> str:
    """The key of `Authorization: Bearer`, as OpenAI's clients send it, or of `x-api-key`, as Anthropic's do."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    found = key.strip() if scheme.lower() == b"bearer" and key.strip() else headers.get(b"x-api-key", b"").strip()
    return found.decode("utf-8", "surrogateescape")
