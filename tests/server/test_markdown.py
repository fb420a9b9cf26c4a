"""The page's Markdown, run by node: what models write, half of it, and what hostile ones might."""

import json
import random
import shutil
import subprocess

import pytest

from ktransformers.server.page_files import FOLDER

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="no node here, which runs the page's Markdown without a browser")

TAGS = {*"p ul ol li blockquote hr table thead tbody tr th td strong em del br code pre a h1 h2 h3 h4 h5 h6".split()}

SCRIPT = """
const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const { source, texts } = JSON.parse(Buffer.concat(chunks).toString());
const { parse } = await import("data:text/javascript," + encodeURIComponent(source));
const found = texts.map((text) => {
  const began = performance.now();
  const tree = parse(text);
  return [tree, performance.now() - began];
});
process.stdout.write(JSON.stringify(found));
"""


def parse(texts):
    """(tree, milliseconds) of each."""
    given = json.dumps({"source": (FOLDER / "markdown.js").read_text("utf-8"), "texts": texts})
    ran = subprocess.run([NODE, "--input-type=module", "-e", SCRIPT], input=given.encode(), capture_output=True, timeout=120)
    assert ran.returncode == 0, ran.stderr.decode()
    return json.loads(ran.stdout)


def markup(item):
    """A tree in one line."""
    if isinstance(item, list):
        return "".join(map(markup, item))
    if isinstance(item, str):
        return item
    told = "".join(f" {item[key]}" for key in ("href", "language", "side", "start") if item.get(key))
    return f"<{item['tag']}{told}>{markup(item['children'])}</{item['tag']}>" if item["children"] else f"<{item['tag']}{told}/>"


CASES = {
    "a\nb": "<p>a<br/>b</p>",
    "a\n\nb": "<p>a</p><p>b</p>",
    "# Hi **there** ##": "<h1>Hi <strong>there</strong></h1>",
    "#hashtag": "<p>#hashtag</p>",
    "*a* **b** ***c*** ~~d~~ `e`": "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <del>d</del> <code>e</code></p>",
    "**a *b***": "<p><strong>a <em>b</em></strong></p>",
    "*a **b***": "<p><em>a <strong>b</strong></em></p>",
    "snake_case_name and 5 * 6 * 7 ~1": "<p>snake_case_name and 5 * 6 * 7 ~1</p>",
    "**half of": "<p>**half of</p>",
    "`` a`b `` ```c": "<p><code>a`b</code> ```c</p>",
    r"\*a\* \_ \`": "<p>*a* _ `</p>",
    "&lt;b&gt; &amp; &copy; a<br>b": "<p><b> & &copy; a<br/>b</p>",
    "- a\n- b\n  - c\n    - d\n- e\n\np": "<ul><li>a</li><li>b<ul><li>c<ul><li>d</li></ul></li></ul></li><li>e</li></ul><p>p</p>",
    "3. a\n4. b": "<ol 3><li>a</li><li>b</li></ol>",
    "1. a\n\n   ```sh\n   ls\n   ```\n\n2. b": "<ol><li>a<pre sh>ls</pre></li><li>b</li></ol>",
    "1. a\n- b": "<ol><li>a</li></ol><ul><li>b</li></ul>",
    "- [ ] a\n- [x] b": "<ul><li>☐ a</li><li>☑ b</li></ul>",
    "He was born in\n1986. It": "<p>He was born in<br/>1986. It</p>",
    "| a | b |\n|:-|-:|\n| 1 | `x|y` |\n| 2 |": "<table><thead><tr><th left>a</th><th right>b</th></tr></thead>"
    "<tbody><tr><td left>1</td><td right><code>x|y</code></td></tr><tr><td left>2</td><td right/></tr></tbody></table>",
    "a | b": "<p>a | b</p>",
    "```py\nif a:\n  <b>\n```\nend": "<pre py>if a:\n  <b></pre><p>end</p>",
    "~~~\n```\n~~~": "<pre>```</pre>",
    "```\nstill **open**": "<pre>still **open**</pre>",
    "> a\n> - b\n\nc": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>",
    "a\n***\nb": "<p>a</p><hr/><p>b</p>",
    "[a](https://x.y/z_(q) \"t\")": "<p><a https://x.y/z_(q)>a</a></p>",
    "[**a** b](http://x.y)": "<p><a http://x.y><strong>a</strong> b</a></p>",
    "(see https://x.y/a_(b).)": "<p>(see <a https://x.y/a_(b)>https://x.y/a_(b)</a>.)</p>",
    "<https://x.y>": "<p><a https://x.y>https://x.y</a></p>",
    "![cat](https://x.y/c.png)": "<p><a https://x.y/c.png>cat</a></p>",
    "[a](javascript:alert(1))": "<p>[a](javascript:alert(1))</p>",
    "[a](JaVaScRiPt:alert(1)) [b](data:text/html,x) [c](//x.y) [d](/x) [e](vbscript:x)":
    "<p>[a](JaVaScRiPt:alert(1)) [b](data:text/html,x) [c](//x.y) [d](/x) [e](vbscript:x)</p>",
    "[a](https://)": "<p>[a](https://)</p>",
    "<script>alert(1)</script><img src=x onerror=y>": "<p><script>alert(1)</script><img src=x onerror=y></p>",
}  # fmt: skip


def test_what_models_write():
    for (text, expected), (tree, _) in zip(CASES.items(), parse(list(CASES)), strict=True):
        assert markup(tree) == expected, text


def nodes(item):
    for one in item if isinstance(item, list) else item.get("children", []):
        yield one
        if isinstance(one, dict):
            yield from nodes(one)


def test_whatever_is_written_is_made_of_known_parts_and_leads_to_the_web_alone():
    """All tags that a browser makes of it are in the table; every attribute is one of four, none of which runs."""
    pieces = [
        "*", "**", "_", "`", "```", "~~", "[", "](", ")", "javascript:alert(1)", "https://a.b", "<", ">", "\n", "\n\n", "- ", "1. ", "> ", "|",
        "|-|", "#", " ", "a", "ü", "🙂", "\\", "<script>", "onerror=", '"', "&lt;", "&#x6a;", "\t", "\x00", "\u202e", "~~~", "!", "http://",
    ]  # fmt: skip
    rng = random.Random(7)
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 60))) for _ in range(2000)]
    for text, (tree, _) in zip(texts, parse(texts), strict=True):
        for one in nodes(tree):
            if isinstance(one, dict):
                assert one["tag"] in TAGS, text
                assert set(one) <= {"tag", "children", "href", "language", "side", "start", "open"}, text
                assert ("href" in one) == (one["tag"] == "a") and one.get("href", "http://").lower().startswith(("http://", "https://")), text


def test_every_beginning_of_a_text_is_a_text():
    text = "".join(f"{case}\n\n" for case in CASES)
    trees = parse([text[:end] for end in range(0, len(text), 7)])
    assert len(trees[-1][0]) > 20 and {one["tag"] for tree, _ in trees for one in nodes(tree) if isinstance(one, dict)} <= TAGS


def test_no_text_takes_long():
    """100 KB each of what makes parsers quadratic, or deep; two hundred times the 5 ms that this much prose takes."""
    hostile = {
        "stars": "*a " * 33_000, "strong": "**a" * 33_000, "mixed": "_a* ~~" * 16_000, "[": "[" * 100_000, "[](": "[](" * 33_000,
        "links": "[a](http://x" * 8_000, "parentheses": "[a](" + "(" * 100_000, "backticks": "`" * 3 + " ` ``" * 20_000, "quotes": ">" * 100_000,
        "lists": "- " * 50_000, "items": "- a\n" * 25_000, "deep": "\n".join(" " * (2 * i) + "- a" for i in range(300)), "pipes": "|" * 50_000 + "\n" + "|" * 50_000,
        "spaces": "# " + " " * 100_000 + "x", "rule": "* " * 50_000 + "x", "addresses": "http://" * 14_000, "rows": "| a\n" * 25_000,
    }  # fmt: skip
    for name, (_, took) in zip(hostile, parse(list(hostile.values())), strict=True):
        assert took < 1000, f"{name}: {took:.0f} ms"
