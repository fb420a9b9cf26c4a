"""These tests need the extra `serve` and an HTTP client; without them the folder is left out, and said to be."""

from importlib.util import find_spec

MISSING = [name for name in ("fastapi", "uvicorn", "prometheus_client", "llguidance", "httpx") if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        terminalreporter.write_line(f"tests/server was left out: {', '.join(MISSING)} not installed")
