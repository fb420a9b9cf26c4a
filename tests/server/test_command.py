"""`kt serve`: what is wrong is said before anybody is let in, and what is asked for reaches the server."""

import json

import pytest
from typer.testing import CliRunner

from ktransformers import cli
from ktransformers.cli import serve
from ktransformers.cli.serve import ServeOptions
from ktransformers.server import serving


def invoke(*arguments):
    return CliRunner().invoke(cli.app, arguments)


@pytest.fixture
def started(monkeypatch):
    """Servers that were started; each ends at once."""
    seen = []

    def answer(server, open_model):
        server._bound.close()
        seen.append(server)

    monkeypatch.setattr(serving.Server, "answer", answer)
    return seen


@pytest.mark.parametrize("name", ["serve", "run"])
def test_options_reach_the_server_and_the_port_is_told(started, tmp_path, monkeypatch, name):
    (tmp_path / "keys").write_text("sesame")
    monkeypatch.setenv("KT_API_KEYS", "other")
    ran = invoke(
        name, "--port", "0", "--json", "--served-name", "a", "--served-name", "b", "--strict-names", "--cors", "https://x",
        "--api-key-file", str(tmp_path / "keys"), "--request-timeout", "5", "--log-prompts", "--drain-timeout", "3",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    found, server = json.loads(ran.stdout), started[0]
    assert found["url"].startswith("http://127.0.0.1:") and not found["url"].endswith(":0")
    assert found["names"] == ["a", "b", "embedded"] and found["keys"] is True
    settings = server.service.settings
    assert settings.strict_names and settings.cors == ("https://x",) and settings.log_prompts
    assert settings.limits.request_seconds == 5 and server._drain_seconds == 3
    for key in (b"sesame", b"other"):
        assert server.service.keys.allow({b"x-api-key": key})
    assert "sesame" not in ran.output and "other" not in ran.output


def test_without_json_it_says_where_in_words(started):
    ran = invoke("serve", "--port", "0")
    assert ran.exit_code == 0 and "embedded on http://127.0.0.1:" in ran.stdout and "/v1" in ran.stdout


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name in ("fastapi", "llguidance") else object())
    ran = invoke("serve")
    assert ran.exit_code == 1 and len(ran.stderr.splitlines()) == 1
    assert "fastapi, llguidance are not installed" in ran.stderr and "pip install 'ktransformers[serve]'" in ran.stderr


def test_keys_of_the_environment_are_shown_by_no_command(monkeypatch):
    monkeypatch.setenv("KT_API_KEYS", "sesame")
    for arguments in (("config",), ("config", "--json")):
        ran = invoke(*arguments)
        assert ran.exit_code == 0 and "KT_API_KEYS" in ran.output and "sesame" not in ran.output


def test_a_model_is_called_by_its_folder_or_file(tmp_path):
    for path, name in (("", "embedded"), (tmp_path / "Big-Q4.gguf", "Big-Q4"), (tmp_path / "Model-1.5", "Model-1.5")):
        assert serve._own_name(ServeOptions(str(path))) == name
