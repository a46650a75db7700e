"""download_data.sh against a server on this machine that breaks off, forgets parts and serves damaged ones."""
import gzip
import hashlib
import io
import os
import shutil
import socket
import subprocess
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "download_data.sh"
PROGRAMS = ("sh", "awk", "basename", "cat", "cut", "dirname", "expr", "gzip", "mkdir", "mv", "rm", "sha256sum", "tar",
            "tr", "wc")


def make_archive() -> bytes:
    """A .tar.gz of 60 KB that no compression makes smaller."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        content = np.random.default_rng(0).bytes(60_000)
        member = tarfile.TarInfo("image.jpg")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


ARCHIVE = make_archive()


class Server(ThreadingHTTPServer):
    """Serves `files` (name -> bytes) with Range requests; `log` has (method, name, first byte) of every request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.log = {}, []
        self.broken = {}  # name -> how many bytes to send before breaking off, once
        self.failures = {}  # name -> how many times to answer 503
        self.knows_head = self.knows_range = self.tells_length = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/data"

    def gets(self):
        return [entry[1:] for entry in self.log if entry[0] == "GET"]


class Handler(BaseHTTPRequestHandler):
    def answer(self):
        server, name = self.server, self.path.rsplit("/", 1)[-1]
        asked = self.headers.get("Range", "") if server.knows_range else ""
        start = int(asked.removeprefix("bytes=").split("-")[0] or 0) if asked else 0
        server.log.append((self.command, name, start))
        content = server.files.get(name)
        if self.command == "HEAD" and not server.knows_head:
            return self.send_error(501)
        if content is None:
            return self.send_error(404)
        if server.failures.get(name, 0):
            server.failures[name] -= 1
            return self.send_error(503)
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.tells_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:][:server.broken.pop(name, None)])

    do_GET = do_HEAD = answer

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = Server()
    size = len(ARCHIVE) // 3 + 1
    server.files = {f"raw.tar.{9 + k:03d}": ARCHIVE[k * size:(k + 1) * size] for k in range(3)}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["curl", "wget"])
def programs(request, tmp_path):
    """A folder with this client alone and what else the script calls; the pauses between tries take no time."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in (*PROGRAMS, request.param):
        (folder / program).symlink_to(shutil.which(program))
    (folder / "sleep").symlink_to(shutil.which("true"))
    return folder


@pytest.fixture
def download(programs, server, tmp_path):
    def call(*arguments, base_url=None, checksums=""):
        environment = {**os.environ, "PATH": str(programs), "BASE_URL": base_url or server.url, "CHECKSUMS": checksums}
        for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            environment.pop(proxy, None)
        return subprocess.run([str(SCRIPT), *map(str, arguments)], cwd=tmp_path, env=environment, capture_output=True,
                              text=True, timeout=60)
    return call


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_parts_are_joined_in_order_and_deleted_and_a_second_run_does_nothing(download, server, tmp_path):
    done = download("raw", "out/yfcc.tar.gz", 9, 11)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "yfcc.tar.gz").read_bytes() == ARCHIVE
    assert names(tmp_path / "out") == ["yfcc.tar.gz"]
    assert server.gets() == [("raw.tar.009", 0), ("raw.tar.010", 0), ("raw.tar.011", 0)]
    server.log.clear()
    again = download("raw", "out/yfcc.tar.gz", 9, 11)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert server.log == []


def test_a_broken_transfer_is_resumed(download, server, tmp_path):
    server.broken = {"raw.tar.010": 7000}
    done = download("raw", "yfcc.tar.gz", 9, 11)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "yfcc.tar.gz").read_bytes() == ARCHIVE
    assert server.gets() == [("raw.tar.009", 0), ("raw.tar.010", 0), ("raw.tar.010", 7000), ("raw.tar.011", 0)]


def test_a_later_run_goes_on_with_a_partial_part(download, server, tmp_path):
    part = server.files["raw.tar.009"]
    (tmp_path / "raw.tar.009.partial").write_bytes(part[:5000])
    (tmp_path / "raw.tar.010.partial").write_bytes(server.files["raw.tar.010"])  # killed before it was renamed
    (tmp_path / "raw.tar.011.partial").write_bytes(bytes(len(part) + 1))  # of something else
    assert download("raw", "yfcc.tar.gz", 9, 11).returncode == 0
    assert (tmp_path / "yfcc.tar.gz").read_bytes() == ARCHIVE
    assert ("raw.tar.009", 5000) in server.gets() and ("raw.tar.011", 0) in server.gets()


def test_a_busy_server_is_asked_again(download, server, tmp_path):
    server.failures = {"raw.tar.009": 2}
    assert download("raw", "yfcc.tar.gz", 9, 11).returncode == 0
    assert (tmp_path / "yfcc.tar.gz").read_bytes() == ARCHIVE


def test_plain_servers_will_do(download, server, tmp_path):
    server.knows_head = server.knows_range = False
    server.broken = {"raw.tar.010": 7000}
    assert download("raw", "yfcc.tar.gz", 9, 11).returncode == 0
    assert (tmp_path / "yfcc.tar.gz").read_bytes() == ARCHIVE


def test_lengths_that_are_not_given_are_not_compared(download, server, tmp_path):
    server.tells_length = False
    assert download("raw", "yfcc.tar.gz", 9, 11).returncode == 0
    assert (tmp_path / "yfcc.tar.gz").read_bytes() == ARCHIVE


def test_a_missing_part_is_named_and_the_others_are_kept(download, server, tmp_path):
    content = server.files.pop("raw.tar.011")
    done = download("raw", "yfcc.tar.gz", 9, 11)
    assert done.returncode == 1
    assert "raw.tar.011 is not there (HTTP 404)" in done.stderr
    assert {"raw.tar.009", "raw.tar.010"} <= set(names(tmp_path)) and "yfcc.tar.gz" not in names(tmp_path)
    server.files["raw.tar.011"] = content
    server.log.clear()
    assert download("raw", "yfcc.tar.gz", 9, 11).returncode == 0
    assert server.gets() == [("raw.tar.011", 0)]


def test_a_host_that_is_gone_is_named_and_partial_parts_are_kept(download, tmp_path):
    (tmp_path / "raw.tar.009.partial").write_bytes(ARCHIVE[:100])
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    done = download("raw", "yfcc.tar.gz", 9, 11, base_url=url)
    assert done.returncode == 1
    assert f"no answer from {url}" in done.stderr and "BASE_URL" in done.stderr
    assert (tmp_path / "raw.tar.009.partial").read_bytes() == ARCHIVE[:100]


def write_checksums(path, files, style="  "):
    path.write_text("".join(f"{hashlib.sha256(content).hexdigest()}{style}{name}\n" for name, content in files.items()))
    return path


@pytest.mark.parametrize("style", ["  ", " *", "  ./parts/"])
def test_right_checksums(download, server, tmp_path, style):
    checksums = write_checksums(tmp_path / "sums", server.files, style)
    done = download("raw", "yfcc.tar.gz", 9, 11, checksums=checksums)
    assert done.returncode == 0, done.stderr


def test_a_wrong_checksum_is_named_and_the_parts_are_kept(download, server, tmp_path):
    checksums = write_checksums(tmp_path / "sums", server.files)
    server.files["raw.tar.010"] = server.files["raw.tar.010"][::-1]
    done = download("raw", "yfcc.tar.gz", 9, 11, checksums=checksums)
    assert done.returncode == 1
    assert "raw.tar.010 has not the checksum" in done.stderr
    assert {"raw.tar.009", "raw.tar.010"} <= set(names(tmp_path)) and "yfcc.tar.gz" not in names(tmp_path)


def test_a_checksum_list_that_lacks_a_part_is_refused_at_once(download, server, tmp_path):
    server.files.pop("raw.tar.010")
    done = download("raw", "yfcc.tar.gz", 9, 11, checksums=write_checksums(tmp_path / "sums", server.files))
    assert done.returncode == 2 and "does not name raw.tar.010" in done.stderr
    assert server.log == []


def test_a_damaged_archive_is_not_put_in_place(download, server, tmp_path):
    server.files["raw.tar.011"] = server.files["raw.tar.011"][:-100]
    done = download("raw", "yfcc.tar.gz", 9, 11)
    assert done.returncode == 1 and "do not make a whole archive" in done.stderr
    assert {"raw.tar.009", "raw.tar.010", "raw.tar.011"} <= set(names(tmp_path))
    assert not [name for name in names(tmp_path) if "yfcc" in name]


def test_the_test_follows_the_name(download, server):
    server.files = {"a.tar.000": gzip.compress(b"a list"), "b.tar.000": b"no gzip", "c.tar.000": b"anything",
                    "d.tar.000": gzip.decompress(ARCHIVE)}
    assert download("a", "pairs.gz", 0, 0).returncode == 0
    assert download("b", "other.gz", 0, 0).returncode == 1
    assert download("c", "notes.txt", 0, 0).returncode == 0
    assert download("d", "not_compressed.tar.gz", 0, 0).returncode == 0  # a host may name a plain .tar so


@pytest.mark.parametrize("arguments", [
    (), ("raw", "out.tar.gz", 0), ("raw", "out.tar.gz", "zero", 8), ("raw", "out.tar.gz", 0, -1),
    ("raw", "out.tar.gz", 8, 0), ("raw", "out.tar.gz", 0, 1000), ("a/raw", "out.tar.gz", 0, 8), ("raw", ".", 0, 8),
    ("raw", "", 0, 8), ("", "out.tar.gz", 0, 8)])
def test_bad_arguments(download, server, arguments):
    done = download(*arguments)
    assert done.returncode == 2 and "usage:" in done.stderr
    assert server.log == []


def test_numbers_may_have_leading_zeros(download, tmp_path):
    assert download("raw", "yfcc.tar.gz", "009", "011").returncode == 0
    assert (tmp_path / "yfcc.tar.gz").read_bytes() == ARCHIVE
