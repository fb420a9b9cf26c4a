"""The files of the page at `/`, as they are served."""

import re

import pytest

from ktransformers.server.page_files import FOLDER, KINDS
from tests.server.support import ask, listening, service
from tests.server.test_sockets import raw

FILES = sorted(path.name for path in FOLDER.iterdir())



@pytest.mark.parametrize("name", ["", *FILES])
def test_each_file_is_served_as_what_it_is_and_may_only_use_its_own(name):
    response = ask(service(), f"/{name}")
    assert response.status_code == 200 and response.content == (FOLDER / (name or "index.html")).read_bytes()
    kind = KINDS["." + (name or "index.html").rpartition(".")[2]]
    assert response.headers["content-type"].partition(";")[0] == kind
    assert response.headers["x-content-type-options"] == "nosniff" and response.headers["referrer-policy"] == "no-referrer"
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'" and policy["frame-ancestors"] == policy["object-src"] == policy["base-uri"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'" and not set(policy) & {"script-src", "style-src", "connect-src", "img-src"}


def test_nothing_comes_from_elsewhere_and_nothing_is_in_line():
    page = (FOLDER / "index.html").read_text("utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page)
    used = set(re.findall(r'(?:src|href)="([^"#][^"]*)"', page))
    for name in FILES:
        text = (FOLDER / name).read_text("utf-8")
        if name.endswith(".js"):
            assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|DOMParser|srcdoc|eval|Function)\b|document\.write", text), name
            used |= {name.removeprefix("./") for name in re.findall(r'^(?:import|export) .* from "([^"]+)";$', text, re.M)}
        if name.endswith(".css"):
            assert "url(" not in text and "@import" not in text
        links = {link for link in re.findall(r"https?://[\w.]+", text) if link != "http://www.w3.org"}  # a name of SVG, no address
        assert not links, name
    assert used == set(FILES) - {"index.html"}, "a file is missing, or nobody asks for it"


def test_no_path_leads_out_of_the_folder():
    paths = [
        "/../app.py", "/page/../app.py", "/..%2fapp.py", "/%2e%2e/app.py", "/%2e%2e%2fapp.py", "//app.py", "/./index.html/../../app.py", "/..\\app.py",
        "/main.js/../../keys.py", "/main.js%00", "/app.py", "/page/index.html", "/__init__.py", "/.", "/..", "/main.js/", "/MAIN.JS",
    ]  # fmt: skip
    with listening(service()) as url:
        for path in paths:
            with raw(url) as connection:
                connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
                data = b"".join(iter(lambda: connection.recv(65536), b""))
            assert data.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), path


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(scheme):
    blocks = re.findall(r":root \{(.*?)\}", (FOLDER / "style.css").read_text("utf-8"), re.S)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    pairs = [(text, back) for text in ("text", "muted", "accent") for back in ("back", "surface")]
    pairs += [("on-accent", "accent"), ("text", "user"), ("muted", "raised"), ("muted", "code"), ("wrong", "wrong-back"), ("wrong", "surface")]
    pairs += [(f"d{i}", "surface") for i in range(8)]
    for text, back in pairs:
        bright, dim = sorted((luminance(colours[text]), luminance(colours[back])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, back)
