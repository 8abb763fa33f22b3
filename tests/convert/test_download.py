"""Downloads from a local server that fails, changes its file, or sends wrong answers."""

import hashlib
import http.server
import os
import pathlib
import pty
import random
import socket
import subprocess
import sys
import termios
import threading
import time

import pytest

from mbv2_jax.convert import download
from mbv2_jax.convert.published import PUBLISHED
from mbv2_jax.errors import UserError

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = f"net-{SHA256[:8]}.pth"


class Server(http.server.ThreadingHTTPServer):
    """Serves one file under every path.

    Attributes:
      content, tag: the file, and the ETag that goes with it.
      ranges: whether it gives parts of the file.
      errors: the codes that its next answers consist of.
      breaks: after how many bytes of the file its next answers break off.
      pause: while not set, answers stop at 200,000 bytes of the file.
      location: where /moved/... is redirected to.
      asked: the Range of each request so far.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.content, self.location = CONTENT, ""
        self.tag: str | None = '"1"'
        self.ranges = True
        self.errors: list[int] = []
        self.breaks: list[int] = []
        self.asked: list[str | None] = []
        self.pause = threading.Event()
        self.pause.set()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.errors:
            return self.send_error(server.errors.pop(0))
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", server.location)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        whole, start = server.content, 0
        same = self.headers.get("If-Range") == server.tag
        if asked and same and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        else:
            self.send_response(200)
        if server.tag:
            self.send_header("ETag", server.tag)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(whole) - start))
        self.end_headers()
        stop = server.breaks.pop(0) if server.breaks else len(whole)
        if not server.pause.is_set():
            self.wfile.write(whole[start:200_000])
            server.pause.wait()
            start = 200_000
        self.wfile.write(whole[start:stop])
        if stop < len(whole):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("MBV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "WAIT", 0.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.pause.set()
        server.shutdown()
        thread.join()


def refusal(source: str) -> str:
    with pytest.raises(UserError) as caught:
        download.locate(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kept() -> list[str]:
    """Returns the files in the cache except locks."""
    files = download.cache_folder().rglob("*")
    return [file.name for file in files if file.is_file() and file.suffix != ".lock"]


def test_a_download_is_kept_and_not_repeated(server, capsys):
    address = f"{server.address}/models/{NAME}"
    file = download.locate(address)
    assert (file.name, file.read_bytes()) == (NAME, CONTENT)
    assert address in capsys.readouterr().err
    assert download.locate(address) == file
    assert server.asked == [None]
    assert capsys.readouterr().err == ""
    assert kept() == [NAME]


def test_the_same_name_at_two_addresses(server):
    first = download.locate(f"{server.address}/a/model.pth")
    server.content = b"other" + CONTENT
    second = download.locate(f"{server.address}/b/model.pth")
    assert first.read_bytes() == CONTENT
    assert second.read_bytes() == b"other" + CONTENT


def test_a_broken_connection_is_resumed(server):
    server.breaks = [100_000, 250_000]
    assert download.locate(f"{server.address}/{NAME}").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=250000-"]
    assert kept() == [NAME]


def test_the_next_command_resumes_the_download(server):
    server.breaks = [100_000] * download.TRIES
    line = refusal(f"{server.address}/model.pth")
    assert line.endswith("after 100,000 of 300,000 bytes; the same command resumes from there")
    assert len(server.asked) == download.TRIES
    assert download.locate(f"{server.address}/model.pth").read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=100000-"


def test_a_server_without_ranges(server):
    server.ranges = False
    server.breaks = [100_000]
    assert download.locate(f"{server.address}/model.pth").read_bytes() == CONTENT


def test_a_server_without_tags(server):
    """Without a tag, the part may be of another file: the download starts anew."""
    server.tag = None
    server.breaks = [100_000]
    assert download.locate(f"{server.address}/model.pth").read_bytes() == CONTENT
    assert server.asked == [None, None]


def test_a_file_that_changed_meanwhile(server):
    server.breaks = [100_000] * download.TRIES
    refusal(f"{server.address}/model.pth")
    server.content, server.tag = CONTENT[::-1], '"2"'
    assert download.locate(f"{server.address}/model.pth").read_bytes() == CONTENT[::-1]


def start(address: str) -> subprocess.Popen[str]:
    """Starts a process that downloads a file and prints its path."""
    code = f"from mbv2_jax.convert import download; print(download.locate({address!r}))"
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_half() -> pathlib.Path:
    """Waits, at most a minute, until a download has reached the server's pause."""
    for _ in range(600):
        for part in download.cache_folder().rglob("*.part"):
            if part.stat().st_size > 100_000:
                return part
        time.sleep(0.1)
    raise AssertionError("nothing came")


def test_a_killed_command_leaves_no_file_and_the_next_resumes(server):
    server.pause.clear()
    process = start(f"{server.address}/{NAME}")
    part = wait_for_half()
    process.kill()
    process.communicate()
    server.pause.set()
    assert NAME not in kept()
    size = part.stat().st_size
    assert download.locate(f"{server.address}/{NAME}").read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={size}-"]


def test_two_commands_at_once_download_once(server):
    server.pause.clear()
    first = start(f"{server.address}/{NAME}")
    wait_for_half()
    second = start(f"{server.address}/{NAME}")
    assert second.stderr is not None
    assert "waiting for another process" in second.stderr.readline()
    server.pause.set()
    files = [process.communicate(timeout=60)[0].strip() for process in (first, second)]
    assert files[0] == files[1]
    assert pathlib.Path(files[0]).read_bytes() == CONTENT
    assert server.asked == [None]


def test_a_wrong_hash_is_refused_and_nothing_kept(server):
    server.content = CONTENT[:-1] + b"x"
    line = refusal(f"{server.address}/{NAME}")
    assert SHA256[:8] in line
    assert hashlib.sha256(server.content).hexdigest()[:8] in line
    assert kept() == []
    server.content = CONTENT
    assert download.locate(f"{server.address}/{NAME}").read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache_is_downloaded_again(server):
    file = download.locate(f"{server.address}/{NAME}")
    file.write_bytes(CONTENT[:1000])
    assert download.locate(f"{server.address}/{NAME}").read_bytes() == CONTENT


def test_a_date_in_a_name_is_no_hash(server):
    assert download.locate(f"{server.address}/net-20200708.pth").read_bytes() == CONTENT


def test_a_web_page_is_refused_and_not_kept(server):
    server.content = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"
    assert "a web page" in refusal(f"{server.address}/model.pth")
    line = refusal(f"{server.address}/me/net/blob/main/model.pth")
    assert f"{server.address}/me/net/raw/main/model.pth" in line
    assert kept() == []


def test_errors_of_the_server(server):
    for code in (404, 403):
        server.errors = [code]
        assert f"the server says {code}" in refusal(f"{server.address}/model.pth")
    server.errors = [503] * download.TRIES
    assert "the server says 503" in refusal(f"{server.address}/model.pth")
    server.errors = [503, 429]
    assert download.locate(f"{server.address}/model.pth").read_bytes() == CONTENT


def test_a_silent_server(server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        line = refusal(f"http://127.0.0.1:{silent.getsockname()[1]}/model.pth")
    assert line.endswith("no answer for 0.05 seconds")


def test_no_server(server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "Connection refused" in refusal(f"http://127.0.0.1:{port}/model.pth")
    assert "no such host" in refusal("https://weights.invalid/model.pth")


def test_redirections_stay_encrypted(server):
    server.location = f"{server.address}/elsewhere"
    assert download.locate(f"{server.address}/moved/model.pth").read_bytes() == CONTENT
    server.location = "http://example.org/model.pth"
    assert "over https only" in refusal(f"{server.address}/moved/other.pth")


@pytest.mark.parametrize("scheme", ["http", "ftp", "file", "s3"])
def test_other_schemes_are_refused(scheme, server):
    assert "over https only" in refusal(f"{scheme}://example.org/model.pth")


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MBV2_CACHE", str(tmp_path / "file"))
    assert "MBV2_CACHE" in refusal(f"{server.address}/model.pth")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("MBV2_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert download.cache_folder() == pathlib.Path("/a")
    monkeypatch.delenv("MBV2_CACHE")
    assert download.cache_folder() == pathlib.Path("/b/mbv2_jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore it
    assert download.cache_folder() == pathlib.Path("/c/.cache/mbv2_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert download.cache_folder() == pathlib.Path("/c/.cache/mbv2_jax")


def test_known_names_come_from_their_address(server, monkeypatch):
    """The local server answers for the address in the table."""
    asked = []

    def open_instead(request, part):
        asked.append(request.full_url)
        request.full_url = f"{server.address}/{PUBLISHED['torchvision'].file}"
        return opened(request, part)

    opened = download._open
    monkeypatch.setattr(download, "_open", open_instead)
    line = refusal("torchvision")  # our content is not torchvision's
    assert asked == ["https://download.pytorch.org/models/mobilenet_v2-b0353104.pth"]
    assert "b0353104" in line
    assert SHA256[:8] in line


def test_files_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("net.pth", "net-0123abcd.pth", "torchvision"):
        (tmp_path / name).write_bytes(CONTENT)
        assert download.locate(name).samefile(name)
        assert download.locate(f"~/{name}").samefile(name)


def test_another_file_under_a_published_name(tmp_path):
    file = tmp_path / PUBLISHED["mmpretrain"].file
    file.write_bytes(CONTENT)
    line = refusal(str(file))
    assert SHA256[:8] in line
    assert "rename it" in line


def test_unknown_sources_are_refused(tmp_path):
    assert "did you mean 'torchvision'?" in refusal("torchvison")
    assert "known are 'mmpretrain', 'torchvision'" in refusal("resnet50")
    assert refusal("weights/resnet50") == "weights/resnet50 does not exist"
    assert refusal("resnet50.pth") == "resnet50.pth does not exist"
    assert "is a folder" in refusal(str(tmp_path))
    assert "is not an address" in refusal("https:///model.pth")


def test_a_bar_on_a_terminal(server):
    """The bar appears on terminals only, because it would fill logs."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    code = f"from mbv2_jax.convert import download; download.locate('{server.address}/{NAME}')"
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "100%" in shown
    assert "300k/300k" in shown
