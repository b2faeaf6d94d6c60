"""The chat page of `minillm serve`, as a person has it: a real server behind it, and real keys pressed in Chromium.

Needs Debian's packages chromium and chromium-driver, and selenium; skipped where one of them is missing.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from .tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.slow
PAGE = Path(__file__).resolve().parents[1] / "minillm" / "server" / "page.html"
SLOTS, KEY, ENTER, ESCAPE, SHIFT = 40, "open-sesame", "\ue007", "\ue00c", "\ue008"
HOSTILE = "<img src=x onerror=\"document.title='pwned'\"> </script><b>bold</b> &amp; \u4f60\u597d"

# Every visible text, and how much it stands out from what is behind it (WCAG 2.2, 1.4.3).
CONTRASTS = """
const paper = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const over = (colour, under) => {
  paper.fillStyle = under; paper.fillRect(0, 0, 1, 1);
  paper.fillStyle = colour; paper.fillRect(0, 0, 1, 1);
  return [...paper.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = rgb => rgb.map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  const written = own || (element.placeholder && !element.value);
  if (!written || !element.checkVisibility() || element.matches(".sr, :disabled, script, noscript *")) continue;
  let behind = element, ground = "rgba(0, 0, 0, 0)";
  for (; behind && ground === "rgba(0, 0, 0, 0)"; behind = behind.parentElement)
    ground = getComputedStyle(behind).backgroundColor;
  const colour = getComputedStyle(element, own ? null : "::placeholder").color;
  const [a, b] = [light(over(colour, ground)), light(over(ground, ground))].sort((a, b) => b - a);
  found.push([(a + .05) / (b + .05), element.id || element.className || element.tagName]);
}
return found;
"""


# --- the file --------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_file_carries_everything_and_trusts_nothing() -> None:
    text = PAGE.read_text(encoding="utf-8")
    tags = Reader(text).tags
    for _, attributes in tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]  # no policy would let them
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")  # type: ignore[union-attr]
    assert [tag for tag, _ in tags].count("script") == [tag for tag, _ in tags].count("style") == 1
    code = re.sub(r"(?<![:'\"])//.*", "", text[text.index("<script>") :])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|localStorage", code)
    assert not re.search(r"@import|url\(", text)
    labelled = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    assert "box" in labelled
    assert len(text.encode()) < 32 * 1024


# --- a server and a browser ------------------------------------------------------------------------------------------


def command(model: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "minillm", "serve", "--model", str(model), "--budget", str(SLOTS), "--rows", "2"]
    return [*words, "--threads", "1", "--host", "127.0.0.1", "--port", "0", *options]


class Server:
    """`minillm serve` in a process of its own; `url` once it is ready."""

    def __init__(self, model: Path, *options: str) -> None:
        self.process = subprocess.Popen(command(model, *options), stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.url = found[0]
                break
        else:
            pytest.fail("the server did not start:\n" + "".join(self.said))
        self.reader = threading.Thread(target=lambda stream: self.said.extend(stream), args=(self.process.stderr,))
        self.reader.start()  # a full pipe would stop the server

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def session(self, name: str, method: str = "GET") -> Any:
        """What the server says of a session; None if it has none."""
        request = urllib.request.Request(f"{self.url}/v1/sessions/{name}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 404:
                raise
            return None


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template, which talks on and on."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "talker", template=True)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One headless Chromium for all tests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium or no chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    found.command_executor.client_config.timeout = 30  # seconds: a page that hangs fails soon
    yield found
    found.quit()


@pytest.fixture(scope="module")
def server(driver: Any, talker: Path) -> Iterator[Server]:  # noqa: ARG001 - where there is no browser, no server starts
    found = Server(talker)
    yield found
    found.stop()


class Visitor:
    """Somebody who has the page open."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.switch_to.new_window("tab")  # where nothing of an earlier test is remembered
        self.size(1200, 800)
        driver.get(url)

    def leave(self) -> None:
        """Close the tab; nothing else may have gone wrong in it than answers that are no 200."""
        log = self.driver.get_log("browser")
        self.driver.close()
        self.driver.switch_to.window(self.driver.window_handles[0])
        assert [entry for entry in log if entry["source"] != "network"] == []  # a policy broken, a script that failed

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def until(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression in the page is true."""
        limit = time.monotonic() + seconds
        while not (found := self.run(f"return {script}")):
            assert time.monotonic() < limit, f"still not: {script}\n{self.text('body')}"
            time.sleep(0.05)
        return found

    def size(self, width: int, height: int, scheme: str = "light") -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    def texts(self, selector: str) -> list[str]:
        return list(self.run(f"return [...document.querySelectorAll({selector!r})].map(found => found.textContent)"))

    def press(self, keys: str) -> None:
        """Keys go where the focus is."""
        self.driver.switch_to.active_element.send_keys(keys)

    def set(self, **settings: object) -> None:
        self.find("#settings-open").click()
        for name, value in settings.items():
            self.find(f"#{name}").clear()
            self.find(f"#{name}").send_keys(str(value))
        self.find("#settings .main").click()

    def say(self, text: str) -> None:
        """Write a message and wait for the end of the answer."""
        self.begin(text)
        self.rest()

    def begin(self, text: str) -> None:
        self.find("#box").send_keys(text, ENTER)

    def rest(self) -> None:
        self.until("running === null && document.getElementById('stop').hidden")

    def counts(self) -> dict[str, float]:
        words = self.run("return document.getElementById('counts').innerText").replace(",", "").split()
        return dict(zip(words[1::2], map(float, words[::2]), strict=True))


@pytest.fixture
def visitor(driver: Any, server: Server) -> Iterator[Visitor]:
    found = Visitor(driver, server.url)
    found.until("model")
    yield found
    found.leave()


# --- what a person does ----------------------------------------------------------------------------------------------


def test_a_conversation_and_what_is_remembered_of_it(visitor: Visitor, server: Server) -> None:
    assert visitor.run("return document.activeElement.id") == "box"
    assert f"keeps {SLOTS} tokens" in visitor.text("#promise")
    assert visitor.text("#counts") == "nothing yet"
    visitor.set(max_tokens=30, seed=7)
    visitor.find("#box").click()
    visitor.press("the dog")
    visitor.press(SHIFT + ENTER)
    visitor.press("sat")
    visitor.press(ENTER)
    visitor.rest()
    assert visitor.texts(".user .text") == ["the dog\nsat"]
    assert visitor.texts(".answer .text")[0]
    assert "seed 7" in visitor.texts(".answer .note")[0]
    visitor.say("the cat sat on the mat")
    visitor.say("once upon a time")
    counts = visitor.counts()
    told = server.session(visitor.run("return chat.id"))
    assert counts["seen"] == told["seen_tokens"] > counts["kept"]
    assert SLOTS * 0.8 < counts["kept"] <= SLOTS
    assert counts["kept"] == pytest.approx(told["kept_tokens"], abs=0.5)
    assert counts["evicted"] == counts["seen"] - counts["kept"]
    # The turns lie side by side from the first token to the newest, and what they hold adds up to what is kept.
    spans = [span for turn in visitor.run("return chat.turns.map(turn => spans(turn))") for span in turn]
    assert [kind for kind, _, _ in spans] == ["user", "answer"] * 3
    assert [start for _, start, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
    assert spans[-1][2] == counts["seen"]
    held = [visitor.run(f"return held({start}, {end})") for _, start, end in spans]
    kept = sum(share * (end - start) for share, (_, start, end) in zip(held, spans, strict=True))
    assert kept == pytest.approx(told["kept_tokens"], rel=0.02)
    assert held[-1] > held[0]
    shown = visitor.texts(".share")
    assert len(shown) == 6
    assert all(re.fullmatch(r"forgotten|all remembered|(under )?\d+% remembered", share) for share in shown)
    assert visitor.run("return document.querySelectorAll('#turns i').length") == 6
    pixels = "[...strip.getContext('2d').getImageData(0, 0, strip.width, 1).data].filter((_, i) => i % 4 === 3)"
    alphas = visitor.run(f"const strip = document.getElementById('strip'); return {pixels}")
    assert alphas == pytest.approx([255 * share for share in told["remembered"]], abs=1)
    assert re.search(r"first quarter: .+, newest: \d+%", visitor.find("#strip").get_attribute("aria-label"))


# Random weights end an answer when they like; the page has no setting for that.
ENDLESS = """
const real = fetch;
window.fetch = (path, options) => real(path, options.method === "POST"
  ? {...options, body: JSON.stringify({...JSON.parse(options.body), ignore_eos: true})} : options);
"""


def test_the_bar_follows_an_answer_that_can_be_stopped(visitor: Visitor, server: Server) -> None:
    """By Escape and by the button; the conversation then goes on."""
    visitor.set(max_tokens=100_000, temperature=0)
    visitor.run(ENDLESS)
    for end in (lambda: visitor.press(ESCAPE), lambda: visitor.find("#stop").click()):
        visitor.begin("the dog sat")
        begun = visitor.run("return chat.turns.at(-1).from")
        seen = visitor.until(f"seen() > {begun + 3 * SLOTS} && seen()")
        visitor.until(f"seen() > {seen}")
        assert visitor.run("return document.querySelector('[aria-busy=true]') !== null")
        end()
        visitor.rest()
        assert visitor.run("return document.activeElement.id") == "box"
        assert visitor.texts(".answer .note")[-1] == "stopped"
        session = visitor.run("return chat.id")
        stopped = server.session(session)["seen_tokens"]
        time.sleep(0.3)
        assert server.session(session)["seen_tokens"] == stopped  # nobody listens, so nothing is drawn
    visitor.set(max_tokens=5)
    visitor.say("and the cat")
    assert "token" in visitor.texts(".answer .note")[-1]
    assert len(visitor.texts("article")) == 6
    spans = [span for turn in visitor.run("return chat.turns.map(turn => spans(turn))") for span in turn]
    assert [start for _, start, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
    assert spans[-1][2] == server.session(session)["seen_tokens"]


def test_a_page_slower_than_its_model_hears_every_key(visitor: Visitor) -> None:
    visitor.set(max_tokens=100_000, temperature=0)
    visitor.run(ENDLESS)
    visitor.driver.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": 8})
    visitor.begin("the dog sat")
    visitor.until(f"seen() > {10 * SLOTS}")
    visitor.press(ESCAPE)
    visitor.rest()
    assert visitor.texts(".answer .note") == ["stopped"]
    assert visitor.texts(".answer .text")[0] == visitor.run("return chat.turns[0].answer.trimStart()")  # all that came


def test_an_answer_is_read_out_in_sentences(visitor: Visitor) -> None:
    """The log itself is not live: token by token nobody could listen to it."""
    visitor.set(max_tokens=60, seed=3, temperature=1)
    visitor.say("the dog")
    answer = visitor.texts(".answer .text")[0]
    assert "".join("".join(visitor.texts("#said p")).split()) == "".join(answer.split())
    live = "[...document.querySelectorAll('[aria-live=polite]')].map(found => found.id)"
    assert visitor.run(f"return {live}") == ["said"]
    assert visitor.run("return document.querySelector('[role=log]').ariaLabel") == "Conversation"


def test_a_new_conversation_deletes_the_old_one(visitor: Visitor, server: Server) -> None:
    visitor.set(max_tokens=5)
    visitor.say("the dog")
    old = visitor.run("return chat.id")
    assert server.session(old) is not None
    visitor.find("#anew").click()
    visitor.until("chat.turns.length === 0")
    assert visitor.texts("article") == []
    assert visitor.text("#counts") == "nothing yet"
    assert visitor.run("return document.activeElement.id") == "box"
    limit = time.monotonic() + 20
    while server.session(old) is not None:
        assert time.monotonic() < limit
        time.sleep(0.05)
    visitor.say("the cat")
    assert visitor.run("return chat.id") != old
    assert visitor.run("return chat.turns[0].from") == 0


def test_the_system_message_goes_with_the_first_message_only(visitor: Visitor) -> None:
    visitor.set(system="be kind and answer as a small dog would", max_tokens=4)
    visitor.say("hello")
    visitor.say("hello")
    assert visitor.texts("article.system .text") == ["be kind and answer as a small dog would"]
    first, second = visitor.run("return chat.turns.map(turn => turn.prompt)")
    assert first > second + 10
    visitor.find("#settings-open").click()
    assert not visitor.find("#system").is_enabled()
    assert "new conversation" in visitor.text("#system-note")
    visitor.press(ESCAPE)
    visitor.until("!document.querySelector('dialog[open]')")


def test_a_session_that_is_gone_is_said_so(visitor: Visitor, server: Server) -> None:
    visitor.set(max_tokens=5)
    visitor.say("the dog")
    old = visitor.run("return chat.id")
    server.session(old, "DELETE")
    visitor.say("what did I say?")
    assert "no longer has the conversation" in "".join(visitor.texts(".notice"))
    assert visitor.texts(".share") == ["forgotten", "forgotten"]
    assert visitor.find("#box").get_attribute("value") == "what did I say?"
    visitor.find(".notice button").click()
    visitor.rest()
    assert visitor.texts(".user .text") == ["the dog", "what did I say?"]
    assert visitor.run("return chat.id") != old
    assert visitor.counts()["seen"] == visitor.run("return chat.turns[1].to")
    visitor.driver.refresh()  # and is said again
    visitor.until("model && chat.memory")
    assert "no longer has the conversation" in "".join(visitor.texts(".notice"))


def test_a_page_loaded_again_has_its_conversation(visitor: Visitor, server: Server) -> None:
    visitor.set(max_tokens=5, seed=11)
    visitor.say("the dog")
    before = [visitor.texts(one) for one in (".text", ".share", ".note", "#counts")]
    visitor.driver.refresh()
    visitor.until("model && chat.memory")
    assert [visitor.texts(one) for one in (".text", ".share", ".note", "#counts")] == before
    assert visitor.find("#seed").get_attribute("value") == "11"
    visitor.run('window.real = fetch; window.fetch = async () => new Response(\'{"id": "a", "resident": false}\')')
    assert visitor.run("return look()") is True  # it rests in a file, and what is remembered is as it was
    visitor.run("window.fetch = real")
    assert visitor.texts("#counts") == before[3]
    server.session(visitor.run("return chat.id"), "DELETE")
    visitor.driver.refresh()
    visitor.until("document.querySelector('.notice') !== null")
    assert visitor.texts(".share") == ["forgotten", "forgotten"]


# Another answer in the place of the server's: for what a real one says too seldom.
ANSWERING = """
window.real ??= fetch;
window.fetch = (path, options) => options.method === "POST" ? Promise.resolve(answer()) : real(path, options);
const answer = () => """


def said(*events: object, comment: str = "") -> str:
    """A streamed answer, as JavaScript."""
    return f"new Response({json.dumps(comment + ''.join(f'data: {json.dumps(one)}{chr(10) * 2}' for one in events))})"


BUSY = """new Response('{"error": {"message": "queue full"}}', {status: 429, headers: {"Retry-After": "3"}})"""
BROKEN = said(
    {"choices": [{"delta": {"content": "One. Tw"}}]}, {"error": {"message": "the guard of memory stopped it"}}
)


def test_text_stays_text(visitor: Visitor) -> None:
    visitor.set(max_tokens=5)
    visitor.begin(HOSTILE)
    visitor.rest()
    assert visitor.texts(".user .text") == [HOSTILE]
    assert visitor.run("return document.querySelectorAll('article img, article b').length") == 0
    # A model that says the same.
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "minillm": {"seen_tokens": 40, "seed": 1}}
    visitor.run(ANSWERING + said({"choices": [{"delta": {"content": HOSTILE}}]}, {"choices": [], "usage": usage}))
    visitor.say("again")
    assert visitor.texts(".answer .text")[-1] == HOSTILE
    assert visitor.run("return document.querySelectorAll('article img, article b').length") == 0
    assert "pwned" not in visitor.driver.title


@pytest.mark.parametrize(
    ("answer", "says", "back"),
    [(BUSY, "busy with others: it asks to wait 3 s", True), (BROKEN, "the guard of memory stopped it", False)],
)
def test_what_goes_wrong_is_said_and_nothing_is_lost(answer: str, says: str, back: bool, visitor: Visitor) -> None:
    visitor.set(max_tokens=5)
    visitor.run(ANSWERING + answer)
    visitor.say("the dog")
    assert says in visitor.texts(".notice.bad")[0]
    assert says in "".join(visitor.texts("#said p"))
    assert visitor.texts(".user .text") == ([] if back else ["the dog"])
    assert visitor.find("#box").get_attribute("value") == ("the dog" if back else "")
    visitor.run("window.fetch = real")
    if back:
        visitor.find(".notice button").click()
        visitor.rest()
    else:
        visitor.say("the cat")
        assert visitor.texts(".answer .text")[0] == "One. Tw"
        assert visitor.texts(".note")[1] == "broken off"
    assert visitor.texts(".notice") == []
    assert "token" in visitor.texts(".answer .note")[-1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(320, 640), (1600, 900), (640, 256)])
def test_everything_can_be_read_on_any_screen(width: int, height: int, scheme: str, visitor: Visitor) -> None:
    visitor.size(width, height, scheme)
    visitor.set(system="a-long-word-without-a-break" * 5, max_tokens=40)
    visitor.say("dog" * 60)
    visitor.say("cat")
    visitor.run("notice('something went wrong', 'bad', () => {})")
    for dialog in (None, "settings", "key"):
        if dialog is not None:
            visitor.run(f"document.getElementById({dialog!r}).showModal()")
        contrasts = visitor.run(CONTRASTS)
        assert len(contrasts) > 20
        assert min(contrasts)[0] >= 4.5, min(contrasts)
        assert visitor.run("return document.documentElement.scrollWidth <= innerWidth")
        if dialog is not None:
            box = visitor.find(f"#{dialog}")
            assert box.get_property("scrollWidth") <= box.get_property("clientWidth")
            visitor.press(ESCAPE)
    names = visitor.run("""return [...document.querySelectorAll("button, input, textarea")].map(
        found => found.ariaLabel || found.labels[0]?.textContent || found.textContent)""")
    assert len(names) > 10
    assert all(names)


def test_a_server_with_a_key_and_one_that_is_gone(driver: Any, talker: Path) -> None:
    server = Server(talker, "--api-key", KEY)
    try:
        visitor = Visitor(driver, server.url)
        for key, note in (("wrong", "It is kept in this tab only"), (KEY, "The key was not accepted")):
            visitor.until("document.getElementById('key').open")
            assert note in visitor.text("#key-note")
            assert visitor.run("return document.activeElement.id") == "key-box"
            visitor.press(key + ENTER)
        visitor.until("model")
        visitor.set(max_tokens=5)
        visitor.say("the dog")
        assert visitor.texts(".notice") == []
        assert KEY in visitor.run("return JSON.stringify(sessionStorage)")
        assert visitor.run("return localStorage.length") == 0
        assert visitor.run("return document.cookie") == ""
    finally:
        server.stop()
    visitor.say("the cat")
    assert "cannot be reached" in visitor.texts(".notice.bad")[0]
    assert visitor.find("#box").get_attribute("value") == "the cat"
    visitor.leave()
