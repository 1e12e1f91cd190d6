"""A browser without a window, steered over two pipes in Chrome's own protocol; no driver and no package is needed."""

import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe")
PATIENCE = 120  # seconds


def found():
    """Returns the program, or None."""
    return os.environ.get("JAXCL_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `events` are all that the browser has told, in their order."""

    def __init__(self, program, folder):
        read, self.out = os.pipe()
        self.into, write = os.pipe()
        command = [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        shell = ["bash", "-c", f'exec "$0" "$@" 3<&{read} 4>&{write}', *command]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(shell, pass_fds=(read, write), start_new_session=True, **quiet)
        os.close(read)
        os.close(write)
        self.number, self.events, self.answers, self.rest, self.session = 0, [], {}, b"", None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **params):
        """Returns the answer to a command."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        command |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(command).encode() + b"\0")
        self.until(lambda: self.number in self.answers)
        answer = self.answers.pop(self.number)
        assert "error" not in answer, answer
        return answer["result"]

    def until(self, holds):
        """Takes in what the browser says until something holds."""
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, "the browser does not answer"
            if not select.select([self.into], [], [], 0.1)[0]:
                continue
            data = os.read(self.into, 2**20)
            assert data, "the browser has ended"
            *whole, self.rest = (self.rest + data).split(b"\0")
            for message in map(json.loads, whole):
                if "id" in message:
                    self.answers[message["id"]] = message
                else:
                    self.events.append(message)

    def said(self, method):
        """Returns the parameters of all events of one kind."""
        return [event["params"] for event in self.events if event["method"] == method]

    def open(self, address):
        """Loads a page."""
        loads = len(self.said("Page.loadEventFired"))
        self.ask("Page.navigate", url=address)
        self.until(lambda: len(self.said("Page.loadEventFired")) > loads)

    def value(self, expression):
        """Returns what an expression of JavaScript gives on the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression):
        """Waits until an expression is true on the page."""
        end = time.monotonic() + PATIENCE
        while not self.value(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.1)

    def faults(self):
        """Returns errors of scripts and of loading."""
        logged = [entry["entry"] for entry in self.said("Log.entryAdded")]
        called = [call for call in self.said("Runtime.consoleAPICalled") if call["type"] in ("error", "warning")]
        return [x for x in logged if x["level"] == "error"] + called + self.said("Runtime.exceptionThrown")

    def close(self):
        """Ends the browser and all of its processes."""
        try:
            self.session = None
            os.write(self.out, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
            self.process.wait(20)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            os.killpg(self.process.pid, 9)
            self.process.wait()
        os.close(self.out)
        os.close(self.into)
