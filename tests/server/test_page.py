"""The page at `/` in a real Chromium, in front of the fake engine: what people do with it, and what it must not do."""

import contextlib
import json
import re
import types
from dataclasses import replace

import pytest
from ktransformers.models import embedded_model

from ktransformers.cli.machine_facts import placement
from ktransformers.configs import read_config
from ktransformers.server import answers
from ktransformers.server.answers import Content, Reasoning, ToolCall
from ktransformers.server.keys import Keys
from ktransformers.server.machine import Machine
from ktransformers.server.service import Service, Settings
from tests.server.browser import Browser, executable
from tests.server.support import listening, saying, served, service, tokenizer, wait_for

MARKDOWN = "## Title\n\nSome **bold** text, `code` and\n\n- one\n- two\n\n| a | b |\n|--|--|\n| 1 | 2 |\n\n```py\nprint(1)\n```\n\nEnd."
ATTACK = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> [x](javascript:window.hacked=1) <svg onload=window.hacked=1>'



@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if executable() is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    made = Browser(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


@pytest.fixture
def browser(chromium):
    chromium.errors.clear(), chromium.dialogs.clear()
    chromium.size(1280, 800), chromium.dark(False)
    return chromium


@contextlib.contextmanager
def page(browser, service_=None, **options):
    """The page of a server of its own, which makes it another origin with a storage of its own."""
    made = service_ or service(**options)
    with listening(made) as url:
        browser.open(url + "/")
        browser.wait("document.getElementById('conversations').children.length")
        try:
            yield made
        finally:
            browser.open("about:blank#done")


def say(browser, text):
    browser.js("document.getElementById('text').focus()")
    browser.type(text)
    browser.press("Enter", 13)


def click(browser, selector, text=None):
    found = f"[...document.querySelectorAll({json.dumps(selector)})].find(one => {json.dumps(text)} === null || one.textContent === {json.dumps(text)})"
    browser.wait(found)
    browser.js(f"{found}.click()")


def text_of(browser, selector):
    return browser.js(f"[...document.querySelectorAll({json.dumps(selector)})].map(one => one.textContent).join('|')")


def done(browser, answers_=1):
    browser.wait(f"document.querySelectorAll('.message.assistant').length === {answers_} && !document.querySelector('.running')")


def asked(service_, at=-1):
    """The prompt of a request, as text."""
    return tokenizer().decode(service_.served.engine.requests[at].ids)


def test_an_answer_is_markdown_while_it_comes_and_tells_how_fast_it_came(browser):
    with page(browser, says=saying(MARKDOWN), step_seconds=0.02, cached=7):
        say(browser, "Where are *experts*?")
        browser.wait("document.querySelector('.running h2')")
        assert "End." not in text_of(browser, ".assistant .markdown")
        assert browser.js("!document.getElementById('stop').hidden && document.getElementById('send').hidden")
        done(browser)
        assert text_of(browser, ".user .body") == "Where are *experts*?"
        found = [text_of(browser, f".assistant .markdown {tag}") for tag in ("h2", "strong", "p > code", "li", "td", "pre code")]
        assert found == ["Title", "bold", "code", "one|two", "1|2", "print(1)"]
        assert re.search(r"\d+ tokens · [\d.]+ tokens/s · prompt \d+, 7 of them cached · first after", text_of(browser, ".stats"))
        assert browser.js("document.title") == "Where are *experts*? · KTransformers"
    assert browser.errors == []


def test_stop_retry_and_edit(browser):
    with page(browser, says=saying("word " * 200, "second"), step_seconds=0.01) as one:
        say(browser, "First question")
        browser.wait("document.querySelector('.assistant .body > .markdown').textContent.length > 20")
        browser.press("Escape", 27)
        done(browser)
        wait_for(lambda: one.served.engine.tickets[0].cancelled)
        assert text_of(browser, ".note:not([hidden])") == "You stopped it." and "word word" in text_of(browser, ".markdown")
        click(browser, ".foot button", "Retry")
        browser.wait("document.querySelector('.running .body > .markdown')?.textContent.length > 20")
        click(browser, "#stop")
        done(browser)
        assert asked(one, 0) == asked(one, 1) and len(one.served.engine.tickets) == 2
        click(browser, ".foot button", "Edit")
        assert browser.js("document.getElementById('text').value") == "First question"
        browser.js("document.getElementById('text').select()")
        say(browser, "Another question")
        wait_for(lambda: len(one.served.engine.requests) == 3)
        assert text_of(browser, ".user .body") == "Another question"
        assert "Another question" in asked(one) and "First" not in asked(one)
        browser.press("Escape", 27)
        done(browser)
    assert browser.errors == []


def test_enter_sends_shift_enter_does_not_and_nothing_is_sent_twice(browser):
    with page(browser, says=saying("word " * 50), step_seconds=0.01) as one:
        browser.type("a")
        browser.press("Enter", 13, modifiers=8)
        browser.type("b")
        browser.press("Enter", 13), browser.press("Enter", 13)
        browser.type("too early")
        browser.press("Enter", 13)
        done(browser)
        assert text_of(browser, ".user .body") == "a\nb" and len(one.served.engine.requests) == 1
        assert browser.js("document.getElementById('text').value") == "too early", "what was written meanwhile is kept"


def test_conversations_are_kept_renamed_exported_and_deleted(browser):
    with page(browser):
        say(browser, "The first")
        done(browser)
        click(browser, "#new")
        say(browser, "The second")
        done(browser)
        browser.reload()
        browser.wait("document.querySelectorAll('#conversations li').length === 2")
        assert text_of(browser, ".title") == "The second|The first" and text_of(browser, ".user .body") == "The second"
        assert "Rules say" in text_of(browser, ".assistant .markdown") and "tokens/s" in text_of(browser, ".stats")
        click(browser, "#conversations .title", "The first")
        assert text_of(browser, ".user .body") == "The first"
        click(browser, ".actions button", "Rename")
        browser.type("Renamed")
        browser.press("Enter", 13)
        browser.wait("document.querySelector('.open .title')?.textContent === 'Renamed'")
        browser.js("window.saved = []; URL.createObjectURL = (blob) => (blob.text().then((text) => saved.push(text)), 'about:blank#x')")
        browser.js("HTMLAnchorElement.prototype.click = function () { window.named = this.download }")
        click(browser, ".actions button", "Export")
        browser.wait("saved.length")
        assert browser.js("named") == "Renamed.md"
        assert browser.js("saved[0]").startswith("# Renamed\n\n## You\n\nThe first\n\n## Answer\n\nRules say")
        click(browser, ".actions button", "JSON")
        browser.wait("saved.length === 2")
        assert json.loads(browser.js("saved[1]"))["messages"][0] == {"role": "user", "content": "The first"}
        click(browser, ".actions button", "Delete")
        browser.wait("document.querySelectorAll('#conversations li').length === 1")
        browser.reload()
        assert text_of(browser, ".title") == "The second" and len(browser.dialogs) == 1
    assert browser.errors == []


def test_an_answer_goes_on_while_another_conversation_is_in_view(browser):
    with page(browser, says=saying("word " * 100 + "end"), step_seconds=0.01):
        say(browser, "Slow")
        browser.wait("document.querySelector('.running')")
        click(browser, "#new")
        browser.wait("document.querySelector('.welcome') && document.querySelector('.dot')")
        assert not text_of(browser, ".message")
        browser.wait("!document.querySelector('.dot')")
        click(browser, "#conversations .title", "Slow")
        assert text_of(browser, ".assistant .markdown").endswith("end")
        click(browser, ".foot button", "Retry")
        browser.wait("document.querySelector('.running')")
        click(browser, ".actions button", "Delete")
        browser.wait("!document.querySelector('.dot')")
        browser.js("new Promise(done => setTimeout(done, 200))")
        assert browser.js("Object.keys(localStorage).filter(key => key.includes('conversation')).length") == 0


def test_text_stays_text_whatever_it_says(browser):
    with page(browser, says=saying(ATTACK + "\n\n```x\n" + ATTACK + "\n```\n| " + ATTACK + " |\n|--|\n")):
        say(browser, ATTACK)
        done(browser)
        click(browser, ".actions button", "Rename")
        browser.type(ATTACK)
        browser.press("Enter", 13)
        browser.reload()
        done(browser)
        browser.js("new Promise(done => setTimeout(done, 200))")
        assert browser.js("window.hacked") is None
        assert browser.js("document.querySelectorAll('#messages :is(img, script, svg, iframe), #messages a:not([href^=http])').length") == 0
        assert text_of(browser, ".user .body") == ATTACK == text_of(browser, ".title")
        assert text_of(browser, ".assistant .markdown > p").startswith(ATTACK) and text_of(browser, "pre code") == ATTACK
        refused = "(() => { try { document.body.innerHTML = '<b>x'; return false } catch { return true } })()"
        assert browser.js(refused), "the browser itself would let text become HTML"
    assert not [error for error in browser.errors if "TrustedHTML" not in error]


def test_reasoning_is_folded_and_calls_of_tools_are_shown_and_answered(browser, monkeypatch):
    class Reader:
        keep, over = frozenset(), False

        def __init__(self, *_):
            self.pieces = [Reasoning("Let me **think**."), Content("I ask."), ToolCall(0, "call_1", "weather", '{"city": '), ToolCall(0, "call_1", None, '"Ulm"}')]

        def add(self, text):
            return [self.pieces.pop(0)] if self.pieces else []

        def end(self):
            return self.pieces

    monkeypatch.setattr(answers, "reader", Reader)
    with page(browser) as one:
        click(browser, "#open-settings")
        browser.js("document.getElementById('setting-tools').focus()")
        browser.type('[{"type": "function", "function": {"name": "weather"}}]')
        click(browser, "#close-settings")
        say(browser, "Weather?")
        done(browser)
        assert text_of(browser, ".reasoning strong") == "think" and not browser.js("document.querySelector('.reasoning').open")
        assert text_of(browser, ".call summary") == "Calls weather" and json.loads(text_of(browser, ".call pre")) == {"city": "Ulm"}
        assert browser.js("document.getElementById('text').placeholder") == "Result of weather"
        sent = browser.js("window.sent = []; const ask = fetch; window.fetch = (url, options) => (sent.push(options?.body), ask(url, options))")
        say(browser, "rain")
        done(browser, 2)
        sent = json.loads(browser.js("sent.find(Boolean)"))
        assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "tool"]
        assert sent["messages"][1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
        assert sent["messages"][2] == {"role": "tool", "content": "rain", "tool_call_id": "call_1"} and sent["tools"]
        assert len(one.served.engine.requests) == 2
    assert browser.errors == []


def test_settings_reach_the_engine_and_are_kept(browser):
    values = {"system": "Be brief.", "temperature": "0.5", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "5", "seed": "7"}
    with page(browser) as one:
        click(browser, "#open-settings")
        for name, value in values.items():
            browser.js(f"document.getElementById('setting-{name}').focus()")
            browser.type(value)
        browser.js("document.getElementById('setting-top_p').select()")
        browser.type("7")
        assert "from 0 to 1" in text_of(browser, "#setting-top_p-wrong")
        browser.press("Escape", 27)
        assert not browser.js("document.getElementById('settings').open")
        browser.reload()
        say(browser, "Go")
        done(browser)
        request = one.served.engine.requests[0]
        config = request.sampling.config
        assert (config.temperature, config.top_p, config.top_k, config.min_p) == (0.5, 0.9, 40, 0.05)
        assert (request.max_new_tokens, request.seed) == (5, 7) and "Be brief." in asked(one)
        assert "most tokens" in text_of(browser, ".note:not([hidden])")
        stored = json.loads(browser.js("localStorage.getItem('kt.settings')"))
        assert stored == {"system": "Be brief.", "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 5, "seed": 7}


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(browser):
    with page(browser, keys=Keys(None, "sesame")) as one:
        browser.wait("!document.getElementById('key-form').hidden && document.activeElement.id === 'key'")
        browser.type("wrong")
        browser.press("Enter", 13)
        browser.wait("!document.getElementById('notice').hidden")
        assert "does not know this key" in text_of(browser, "#notice-text")
        say(browser, "Let me in")
        browser.wait("document.querySelector('.note.error')")
        assert "API key" in text_of(browser, ".note.error") and not one.served.engine.requests
        browser.js("document.getElementById('key').focus()")
        browser.type("sesame")
        browser.press("Enter", 13)
        done(browser)
        browser.wait("document.querySelector('.stats')")
        assert "Rules say" in text_of(browser, ".assistant .markdown")
        assert browser.js("document.getElementById('key-form').hidden && sessionStorage.getItem('kt.key') === 'sesame'")
        assert "sesame" not in browser.js("JSON.stringify(localStorage) + document.documentElement.outerHTML")
        browser.reload()
        browser.wait("document.getElementById('model').value === 'tiny'")


@pytest.mark.parametrize(("options", "expected"), [
    ({"fails_at": 3}, "The engine could not go on with this answer"), ({"max_waiting": 0}, "Too many requests are waiting"), ({"context": 8}, "Shorten it"),
], ids=["engine", "queue", "context"])  # fmt: skip
def test_what_goes_wrong_is_a_sentence(browser, options, expected):
    with page(browser, **options):
        say(browser, "Where are experts?")
        done(browser)
        assert expected in text_of(browser, ".note.error")
        assert text_of(browser, ".assistant .foot button").endswith("Retry")


def test_a_server_that_loads_is_waited_for_and_one_that_is_gone_is_named(browser):
    loading = Service(Settings(names=("late",)))
    with page(browser, loading):
        browser.wait("document.getElementById('model-name').textContent.includes('being loaded')")
        loading.served = served()
        browser.wait("document.getElementById('model-name').textContent === 'late'")
        browser.js("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
        say(browser, "Anybody?")
        done(browser)
        assert "The server does not answer" in text_of(browser, ".note.error")


def test_a_full_storage_is_said_and_the_conversation_goes_on(browser):
    with page(browser):
        browser.js("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }")
        say(browser, "One")
        done(browser)
        assert "storage for this page is full" in text_of(browser, "#notice-text")
        click(browser, "#dismiss")
        say(browser, "Two")
        done(browser, 2)
        assert text_of(browser, ".user .body") == "One|Two" and browser.js("document.getElementById('notice').hidden"), "it is said once"
    assert browser.errors == []


def test_what_is_damaged_in_the_storage_is_passed_over(browser):
    with page(browser):
        damaged = {"a": "{", "b": "null", "c": '{"messages": 5}', "d": '{"messages": [{"role": "system", "content": 1}]}', "e": '{"messages": []}'}
        for name, value in damaged.items():
            browser.js(f"localStorage.setItem('kt.conversation.{name}', {json.dumps(value)})")
        browser.js("localStorage.setItem('kt.settings', '[1]')")
        browser.reload()
        say(browser, "Hello")
        done(browser)
        assert browser.js("localStorage.getItem('kt.conversation.a')") == "{"
    assert browser.errors == []


def test_an_answer_that_was_cut_off_by_leaving_the_page_is_kept_so_far(browser):
    with page(browser, says=saying("word " * 200), step_seconds=0.01):
        say(browser, "Slow")
        browser.wait("document.querySelector('.running .body > .markdown')?.textContent.length > 20")
        browser.reload()
        browser.wait("document.querySelector('.note:not([hidden])')")
        assert "The page was left" in text_of(browser, ".note") and "word word" in text_of(browser, ".body > .markdown")


def test_the_list_keeps_the_focus_when_an_answer_ends(browser):
    with page(browser, says=saying("word " * 20), step_seconds=0.01):
        say(browser, "Slow")
        browser.wait("document.querySelector('.running')")
        browser.js("document.querySelector('#conversations .title').focus()")
        done(browser)
        assert browser.js("document.activeElement.className") == "title"
        click(browser, ".foot button", "Retry")
        click(browser, ".actions button", "Rename")
        browser.type("While it writes")
        done(browser)
        assert browser.js("document.activeElement.value") == "While it writes"
        browser.press("Enter", 13)
        browser.wait("document.querySelector('.title')?.textContent === 'While it writes'")
    assert browser.errors == []


# ---- sizes, keyboards, people who listen -------------------------------------------------------------------

WIDE = "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n| " + " | ".join("column" for _ in range(20)) + " |\n|" + "--|" * 20 + "\n"


@pytest.mark.parametrize("width", [320, 375, 768])
def test_a_phone_scrolls_in_one_direction_alone(browser, width):
    browser.size(width, 700, phone=True)
    with page(browser, machine_service(says=saying(WIDE))):
        say(browser, "z" * 300)
        if width < 768:
            browser.press("Enter", 13)
            assert not browser.js("document.querySelector('.message')"), "Enter begins a line where keys are drawn on glass"
        click(browser, "#send")
        done(browser)
        scrolls = "Math.max(document.documentElement.scrollWidth, ...['messages', 'machine', 'settings'].map(id => { const e = document.getElementById(id); return e.scrollWidth - e.clientWidth + innerWidth }))"
        assert browser.js(scrolls) <= width
        click(browser, "#menu")
        browser.wait("getComputedStyle(document.getElementById('side')).transform === 'matrix(1, 0, 0, 1, 0, 0)' || document.getElementById('side').getBoundingClientRect().left >= 0")
        assert browser.js("document.activeElement.id") == "new"
        browser.press("Escape", 27)
        assert browser.js("document.activeElement.id") == "menu" and not browser.js("document.body.classList.contains('drawer')")
        click(browser, "#tab-machine")
        browser.wait("document.querySelector('.modules details')")
        click(browser, ".modules summary")
        assert browser.js(scrolls) <= width
        click(browser, "#open-settings")
        assert browser.js(scrolls) <= width


def test_everything_that_can_be_used_has_a_name(browser):
    with page(browser, machine_service()):
        say(browser, "Hello")
        done(browser)
        for tab, seen in (("chat", ".stats"), ("machine", ".modules details")):
            click(browser, f"#tab-{tab}")
            browser.wait(f"document.querySelector('{seen}')")
            tree = browser.call("Accessibility.getFullAXTree")["nodes"]
            used = {"button", "textbox", "searchbox", "combobox", "checkbox", "tab", "link", "image", "img", "meter", "spinbutton", "log", "tabpanel"}
            found = [(one["role"]["value"], one.get("name", {}).get("value", "")) for one in tree if not one["ignored"] and one["role"]["value"] in used]
            assert len(found) > 8 and all(name for _, name in found), found


def test_tabs_are_walked_by_arrows(browser):
    with page(browser, machine_service()):
        browser.js("document.getElementById('tab-chat').focus()")
        browser.press("ArrowRight", 39)
        assert browser.js("document.activeElement.id") == "tab-machine" and browser.js("document.getElementById('chat').hidden")
        browser.press("ArrowLeft", 37)
        assert browser.js("document.activeElement.id") == "tab-chat" and browser.js("document.getElementById('machine').hidden")


# ---- the machine -------------------------------------------------------------------------------------------


def machine_service(counted=True, **options):
    """With the embedded model's plan, and counts that a test can foretell."""
    counts = types.SimpleNamespace(layers={1: [7, 1, 0, 0, 0, 0, 0, 0], 2: [1, 1, 1, 1, 1, 1, 1, 1]}, tokens=4) if counted else None
    plan = placement(types.SimpleNamespace(config=read_config(embedded_model())), "MLA", {})
    return service(replace(served(**options), machine=Machine(plan, {"cpu": 5 << 20}, counts)))


def test_the_machine_tab_shows_modules_by_rule_memory_load_and_use_of_experts(browser):
    with page(browser, machine_service()):
        click(browser, "#tab-machine")
        browser.wait("document.querySelector('.modules details')")
        lines = text_of(browser, ".modules summary").split("|")
        experts = next(line for line in lines if ".experts" in line)
        assert re.fullmatch(r"model\.layers\.\*\.mlp\.experts ×2KTransformersExpertsMLA\.yaml:\d+cpu", experts)
        click(browser, ".modules details:nth-child(1) summary")
        assert "rule 1 (MLA.yaml:5): trait layer does not hold" in text_of(browser, ".modules details[open] li")
        assert "Running0" in text_of(browser, ".facts") and "5.0 MiB of weights" in text_of(browser, ".device")
        assert browser.js("document.querySelectorAll('.strip span').length") == 6
        assert "2 layers of 8 experts, 4 tokens" in text_of(browser, ".heat") and "6 of 16 were never chosen" in text_of(browser, ".heat")
        pixels = "[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 8, 2).data].filter((_, i) => i % 4 === 0)"
        shades = browser.js(pixels)
        assert shades[0] < shades[1] < shades[2] == shades[7] and len(set(shades[8:])) == 1, "the most used is the darkest"
        browser.js("document.querySelector('canvas').focus()")
        browser.press("ArrowRight", 39)
        assert text_of(browser, ".cell").startswith("Layer 1, expert 0: chosen 7 times, 87.5 %")
        browser.dark()
        browser.wait(f"{pixels}[0] > {pixels}[2]")
        browser.js("document.getElementById('filter-modules').focus()")
        browser.type("gate")
        few = text_of(browser, ".modules summary").split("|")
        assert 0 < len(few) < len(lines) and all("gate" in line.lower() for line in few)
    assert browser.errors == []


def test_where_nobody_counts_it_says_how(browser):
    with page(browser, machine_service(counted=False)):
        click(browser, "#tab-machine")
        browser.wait("document.querySelector('.modules details')")
        assert "--count-experts" in text_of(browser, "#machine") and not browser.js("document.querySelector('canvas')")
