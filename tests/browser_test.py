"""The live page in a browser: no error, no request elsewhere, new records as they come, nothing injected."""

import base64
import json
import os
import threading
from pathlib import Path

import browser
import fake_run
import pytest

from jaxcl.report import serve

PROGRAM = browser.found()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome on this machine")
MARK = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    made = browser.Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A run that a stranger has named, and the address of its page."""
    monkeypatch.setattr(serve, "REFRESH_S", 0.2)
    run = fake_run.make(tmp_path / "run", stop=300, label=f"label {MARK}")
    note(run, MARK)
    with serve.server([str(run)], 0) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield run, web
        web.shutdown()
        thread.join()


def note(run, message):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 301, "event": "note", "message": message}) + "\n")


def test_the_live_page_works_in_a_browser(tab, served, tmp_path):
    run, web = served
    tab.events.clear()
    address = f"http://127.0.0.1:{web.server_address[1]}/"
    tab.ask("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
    tab.open(address)
    assert MARK in tab.value("document.body.innerText")
    assert tab.value("document.querySelectorAll('svg').length") > 3
    tab.wait("performance.getEntriesByName(new URL('version', location)).length > 1")  # it asks, and does not reload
    assert len(tab.said("Page.loadEventFired")) == 1
    tab.value("window.scrollTo(0, 500)")
    note(run, "from afar")
    tab.wait("document.body.innerText.includes('from afar')")
    tab.wait("window.scrollY === 500")
    assert tab.value("window.ran") is None
    pictures = {}
    for width in (1200, 390):
        tab.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        assert tab.value("document.documentElement.scrollWidth") <= width
        data = tab.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        pictures[width] = base64.b64decode(data)
        assert len(pictures[width]) > 20_000
        Path(os.environ.get("JAXCL_SCREENSHOTS", tmp_path), f"live-{width}.png").write_bytes(pictures[width])
    asked = {request["request"]["url"] for request in tab.said("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith((address, "data:"))} == set()
    assert tab.faults() == []


def test_an_injected_script_would_not_run(tab, served, monkeypatch):
    """Even on a page that forgot to escape: the header that comes with it allows our own script alone."""
    _, web = served
    monkeypatch.setattr(serve.html, "escape", lambda text: text)
    monkeypatch.setattr(serve.report, "build", lambda *_, **__: (f"<!doctype html><title>x</title>{MARK}</body>", {}))
    tab.events.clear()
    tab.open(f"http://127.0.0.1:{web.server_address[1]}/")
    tab.wait("performance.getEntriesByName(new URL('version', location)).length > 1")  # ours runs
    assert tab.value("window.ran") is None
    assert tab.faults() != []


def test_a_page_whose_server_has_ended_says_so(tab, served):
    _, web = served
    tab.open(f"http://127.0.0.1:{web.server_address[1]}/")
    web.shutdown()
    web.server_close()
    tab.wait("document.title.startsWith('(stopped) ')")
