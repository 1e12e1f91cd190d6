"""The live page: it follows the records, writes nothing, and answers nobody else."""

import base64
import hashlib
import http.client
import re
import threading
import time

import fake_run
import pytest
import small

from jaxcl.report import __main__ as command_line
from jaxcl.report import serve
from jaxcl.schema import UserError


def ask(web, path="/", host=None, method="GET"):
    connection = http.client.HTTPConnection(*web.server_address[:2], timeout=10)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.fixture
def web(tmp_path):
    fake_run.make(tmp_path / "run")
    with serve.server([str(tmp_path / "run")], 0) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield web
        web.shutdown()
        thread.join()


def test_the_page_follows_the_records_and_writes_nothing(web, tmp_path):
    run = tmp_path / "run"
    before = small.tree_of(run)
    status, page = ask(web)
    assert status == 200
    assert "setInterval" in page
    assert page.index("setInterval") < page.index("</body>")
    assert "from afar" not in page
    version = ask(web, "/version")[1]
    assert version == ask(web, "/version")[1]
    assert small.tree_of(run) == before
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"event","step":1,"event":"note","message":"from afar"}\n')
    assert ask(web, "/version")[1] != version
    assert "from afar" in ask(web)[1]


def test_a_run_that_has_nothing_to_show_yet_says_so(web, tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text("")
    status, page = ask(web)
    assert (status, "metrics.jsonl is empty" in page, "setInterval" in page) == (200, True, True)
    path.write_text(whole)
    assert "metrics.jsonl is empty" not in ask(web)[1]


def test_an_empty_folder_is_waited_for(tmp_path, monkeypatch, capsys):
    (tmp_path / "new").mkdir()
    live = serve.Live([str(tmp_path / "new")], None)
    assert live.waiting() == f"{tmp_path / 'new'}: no run has written records there yet; the page waits for the first"
    assert "no run has written records there yet" in live.page()
    monkeypatch.setattr(serve.ThreadingHTTPServer, "serve_forever", lambda self: None)
    command_line.main([str(tmp_path / "new"), "--serve", "--port=0"])
    assert "the page waits for the first" in capsys.readouterr().out
    fake_run.make(tmp_path / "new" / "run")
    assert live.waiting() is None
    assert "<svg" in live.page()


@pytest.mark.parametrize("path", ["/", "/version"])
def test_a_browser_keeps_nothing_and_may_run_one_script(web, path):
    connection = http.client.HTTPConnection(*web.server_address[:2], timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    page, known = answer.read().decode(), dict(answer.getheaders())
    assert known["Cache-Control"] == "no-store"
    assert known["X-Content-Type-Options"] == "nosniff"
    rules = dict(rule.split(" ", 1) for rule in known["Content-Security-Policy"].split("; "))
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL) or [serve.script()]
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{own}'"
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert rules[name] == "'none'"


@pytest.mark.parametrize("path", ["/run.json", "/../run.json", "/metrics.jsonl", "/version/", "/%2e%2e/run.json"])
def test_nothing_else_can_be_read(web, path):
    assert ask(web, path)[0] == 404


def test_only_this_machine_is_answered(web):
    host, port = web.server_address[:2]
    assert host == "127.0.0.1"
    assert ask(web, host=f"localhost:{port}")[0] == 200
    for other in ("evil.example", f"evil.example:{port}", "localhost:1"):  # DNS that was rebound to 127.0.0.1
        assert ask(web, host=other)[0] == 403
    assert ask(web, method="POST")[0] == 501


def test_what_cannot_be_served_is_said(tmp_path, web):
    with pytest.raises(UserError, match=rf"--port={web.server_address[1]}: .* choose another"):
        serve.server([str(tmp_path / "run")], web.server_address[1])
    with pytest.raises(UserError, match="no such folder"):
        serve.server([str(tmp_path / "nothing")], 0)
    with pytest.raises(UserError, match="--serve writes no file"):
        command_line.main([str(tmp_path / "run"), "--serve", "--out=x.html"])


def test_the_command_serves_until_it_is_interrupted(tmp_path, monkeypatch, capsys):
    fake_run.make(tmp_path / "run")

    def interrupted(self):
        time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(serve.ThreadingHTTPServer, "serve_forever", interrupted)
    command_line.main([str(tmp_path / "run"), "--serve", "--port=0"])
    assert "http://127.0.0.1:" in capsys.readouterr().out
