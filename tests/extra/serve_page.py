"""Search on the page of a served model in a real browser, and look at it wide and on a phone: `tests/extra/run`.

The browser is driven over its debugging pipe, as a person would: text is put in, the button is pressed, and what the
page then shows is read.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from browser import FLAGS

import people
from served import Served

PATIENCE = 1500.0


class Page:
    """One page of a browser, which is spoken to by JSON with a zero byte behind it."""

    def __init__(self, browser: str, profile: Path) -> None:
        given, taken = os.pipe(), os.pipe()  # the browser reads from 3 and writes to 4
        command = [browser, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        shell = ["bash", "-c", f'exec 3<&{given[0]} 4>&{taken[1]}; exec "$@"', "bash", *command]
        self.process = subprocess.Popen(shell, pass_fds=(given[0], taken[1]), stderr=subprocess.DEVNULL)
        os.close(given[0])
        os.close(taken[1])
        self._out, self._in = os.fdopen(given[1], "wb", buffering=0), os.fdopen(taken[0], "rb", buffering=0)
        self._rest, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                data = self._in.read(1 << 20)
                if not data:
                    sys.exit("serve_page: the browser has ended")
                self._rest += data
            words, _, self._rest = self._rest.partition(b"\0")
            found = json.loads(words)
            if found.get("id") == self._number:
                if "error" in found:
                    sys.exit(f"serve_page: {method}: {found['error']}")
                return found["result"]
            self._note(found)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            sys.exit(f"serve_page: {expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.value(expression):
            if time.monotonic() > end:
                sys.exit(f"serve_page: waited in vain for {expression}; errors: {self.errors}")
            time.sleep(0.05)

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(timeout=PATIENCE)


def fail_unless(true: bool, what: str) -> None:
    if not true:
        sys.exit(f"serve_page: {what}")


def press(page: Page, query: str, texts: list[str] | None = None) -> None:
    """Fill the form as a person would, and press the button."""
    if texts is not None:
        page.value(f"part('texts').value = {json.dumps(chr(10).join(texts))}")
    page.value(f"part('query').value = {json.dumps(query)}")
    page.value("part('said').textContent = ''; part('go').click()")
    page.wait("!part('go').disabled && part('said').textContent !== '' && part('said').textContent !== 'Working.'")


def search(page: Page, server: Served, *, reranks: bool) -> None:
    """Search twice; the page has to show the server's own order."""
    texts = ["the fast table", "slow search <b>of</b> text", "a", "of of of a text"]
    for query in ("fast", "slow text"):
        press(page, query, texts)
        said = page.value("part('said').textContent")
        fail_unless(page.value("part('said').className") == "", f"the page says {said}")
        shown = page.value("[...document.querySelectorAll('#results li')].map((row) => row.textContent)")
        if reranks:
            rows = server.ask("/v1/rerank", {"query": query, "documents": texts})[1]["results"]
            wanted = [(row["relevance_score"], texts[row["index"]]) for row in rows]
        else:
            data = server.ask("/v1/embeddings", {"input": [query, *texts]})[1]["data"]
            first, *rest = [row["embedding"] for row in data]
            scores = [sum(a * b for a, b in zip(first, row, strict=True)) for row in rest]
            wanted = sorted(zip(scores, texts, strict=True), reverse=True)
        fail_unless(shown == [f"{value:.3f}{text}" for value, text in wanted], f"{shown}, not {wanted}")
    page.value("part('texts').value = ' '; part('go').click()")
    page.wait("part('said').textContent === 'There is no text to search.'")


def look(page: Page, server: Served, width: int) -> None:
    """Open the page; nothing may come from elsewhere, nothing may be wider than the screen."""
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
    page.wait("document.readyState === 'complete' && document.getElementById('name').textContent !== 'nogemm'")
    fail_unless(page.value("document.documentElement.scrollWidth") <= width, f"the page is wider than {width}")


def main() -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("serve_page: no browser was found; install the package chromium")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {
            "encoder": people.bert(folder / "encoder"),
            "reranker": people.reranker(folder / "reranker"),
            "decoder": people.gpt2(folder / "decoder"),
        }
        for kind, model in models.items():
            with Served(model) as server:
                page = Page(browser, folder / f"profile-{kind}")
                for width in (1200, 400):
                    look(page, server, width)
                    if kind == "decoder":
                        press(page, "a fast")
                        answer = server.ask("/v1/completions", {"prompt": "a fast", "max_tokens": 20})[1]
                        wanted = "a fast" + answer["choices"][0]["text"]
                        fail_unless(page.value("part('text').textContent") == wanted, "the page continues otherwise")
                    else:
                        search(page, server, reranks=kind == "reranker")
                own = f"http://127.0.0.1:{server.port}/"
                foreign = [url for url in page.requests if not url.startswith((own, "data:,"))]
                fail_unless(not foreign, f"the page asks for {foreign}")
                fail_unless(not page.errors, f"the browser says {page.errors}")
                page.close()
    print("serve_page: searched with an encoder and a reranker, continued with a decoder, wide and narrow")


if __name__ == "__main__":
    main()
