"""The source archive is found and checked as pip would find it. The index is a server of this test's own."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from metalstep.cli.errors import CommandError
from metalstep.plugin import package_index

FILENAME = "vllm-0.33.0.tar.gz"
BODY = b"the archive" * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()
LOGIN = "Basic " + base64.b64encode(b"me:s3cret").decode()


class Index(BaseHTTPRequestHandler):
    def do_GET(self):
        answer = self.server.pages.get(self.path)
        if self.server.login and self.headers.get("Authorization") != self.server.login:
            return self.answer(401, "text/plain", b"")
        if answer is None:
            return self.answer(404, "text/plain", b"")
        return self.answer(200, *answer)

    def answer(self, status, kind, body):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) + self.server.missing * (kind == "application/gzip")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    server.pages = {"/files/" + FILENAME: ("application/gzip", BODY)}
    server.login, server.missing = None, 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def list_as_json(server, *filenames):
    files = [{"filename": name, "url": f"../../files/{name}"} for name in filenames]
    server.pages["/simple/vllm/"] = ("application/vnd.pypi.simple.v1+json", json.dumps({"files": files}).encode())


def list_as_html(server, *filenames):
    links = "".join(f'<a href="/files/{name}#sha256=0" data-requires-python="&gt;=3.11">{name}</a>' for name in filenames)
    server.pages["/simple/vllm/"] = ("text/html", f"<!DOCTYPE html><html><body>{links}</body></html>".encode())


def fetch(tmp_path, settings):
    return package_index.fetch("vllm", FILENAME, SHA256, tmp_path, settings)


@pytest.mark.parametrize("page", [list_as_json, list_as_html])
def test_an_index_is_read_in_both_of_its_forms(server, tmp_path, page):
    page(server, "vllm-0.32.0.tar.gz", FILENAME, "vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl")
    path = fetch(tmp_path, {"index-url": [server.url + "/simple"]})
    assert path.read_bytes() == BODY
    assert list(tmp_path.iterdir()) == [path]


def test_the_next_index_is_asked_where_one_has_not_got_it(server, tmp_path):
    list_as_json(server, FILENAME)
    settings = {"index-url": [server.url + "/empty/"], "extra-index-url": [server.url + "/simple/"]}
    assert fetch(tmp_path, settings).read_bytes() == BODY


def test_a_password_in_the_index_goes_to_its_host_and_not_into_messages(server, tmp_path):
    list_as_json(server, FILENAME)
    server.login = LOGIN
    host = server.url.removeprefix("http://")
    assert fetch(tmp_path, {"index-url": [f"http://me:s3cret@{host}/simple"]}).read_bytes() == BODY
    with pytest.raises(CommandError, match="Unauthorized") as caught:
        fetch(tmp_path, {"index-url": [f"http://me:wrong@{host}/simple"]})
    assert "wrong" not in str(caught.value)


def test_a_password_comes_from_netrc(server, tmp_path, monkeypatch):
    list_as_json(server, FILENAME)
    server.login = LOGIN
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert fetch(tmp_path, {"index-url": [server.url + "/simple"]}).read_bytes() == BODY


def test_a_folder_of_links_comes_before_the_index(tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    (links / FILENAME).write_bytes(BODY)
    for place in (str(links), links.as_uri()):
        target = tmp_path / "target"
        target.mkdir(exist_ok=True)
        assert fetch(target, {"find-links": [place], "no-index": ["true"]}).read_bytes() == BODY


def test_another_file_than_the_published_one_is_refused(server, tmp_path):
    list_as_json(server, FILENAME)
    server.pages["/files/" + FILENAME] = ("application/gzip", BODY + b"!")
    with pytest.raises(CommandError, match=f"{FILENAME} has the sha256 .*, expected {SHA256}"):
        fetch(tmp_path, {"index-url": [server.url + "/simple"]})


def test_half_a_file_is_no_file(server, tmp_path):
    list_as_json(server, FILENAME)
    server.missing = 10
    with pytest.raises(CommandError, match="the connection ended after 11,000 of 11,010 bytes"):
        fetch(tmp_path, {"index-url": [server.url + "/simple"]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"index-url": ["http://127.0.0.1:9/simple"]}, "Connection refused"),
        ({"index-url": ["http://127.0.0.1:9/simple"], "no-index": ["1"]}, "pip is set up without an index"),
        ({"index-url": ["file:///nonexistent/simple"]}, "does not list it"),
    ],
)
def test_without_an_answer_the_error_says_why_and_what_to_do(server, tmp_path, settings, message):
    with pytest.raises(CommandError, match=message) as caught:
        fetch(tmp_path, settings)
    assert "pass --sdist FILE" in caught.value.hint
