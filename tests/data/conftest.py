"""Tiny files in the real formats, and a local server that misbehaves on request."""

import gzip
import hashlib
import http.server
import os
import struct
import subprocess
import sys
import textwrap
import threading
import urllib.parse

import numpy as np
import pytest

IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR_NAMES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def write_idx_folder():
    """Write the four files; gives back the arrays by name."""

    def write(folder, num_train=7, num_test=3, zipped=True):
        rng = np.random.default_rng(0)
        arrays = {}
        for part, count in (("train", num_train), ("t10k", num_test)):
            arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 5, 4), np.uint8)
            arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 4
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            content = idx_bytes(array)
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (folder / name).write_bytes(content)
        return arrays

    return write


@pytest.fixture
def write_cifar_folder():
    """Write the six files with a few records each; gives back their arrays [N, 3073]."""

    def write(folder, num_records=4):
        rng = np.random.default_rng(1)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {}
        for name in CIFAR_NAMES:
            records = rng.integers(0, 256, (num_records, 3073), np.uint8)
            records[:, 0] %= 10
            (folder / name).write_bytes(records.tobytes())
            arrays[name] = records
        (folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")
        return arrays

    return write


class Server:
    """What `serve` hands out: its address, what to answer, and what was asked."""

    def __init__(self, content):
        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.requests = []  # (path, Range header or None)
        self.url = ""


class Handler(http.server.BaseHTTPRequestHandler):
    """The path says how to behave: /good, /no-range, /cut/1000, /404, /wrong, ..."""

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        server = self.server.shared
        path = urllib.parse.urlsplit(self.path).path
        wanted = self.headers.get("Range")
        server.requests.append((path, wanted))
        kind, _, number = path.strip("/").partition("/")
        content = server.content
        if kind == "404":
            return self.send_error(404)
        if kind == "503" and len(server.requests) == 1:
            return self.send_error(503)
        if kind == "wrong":
            content = bytes(len(content))
        if kind == "short":
            content = content[:-1]
        start = 0
        if wanted and kind != "no-range":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if kind == "416" or start >= len(content):
                return self.send_error(416)
            self.send_response(206)
            told = start + 1 if kind == "other-range" else start
            self.send_header("Content-Range", f"bytes {told}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if kind not in ("no-length", "hang"):
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if kind == "cut":  # so many bytes for each request, then the line goes dead
            body = body[: int(number)]
        if kind == "slow":
            for i in range(0, len(body), 1 + len(body) // 20):
                self.wfile.write(body[i : i + 1 + len(body) // 20])
                self.wfile.flush()
                threading.Event().wait(0.02)
            return None
        self.wfile.write(body)
        if kind == "hang":
            self.wfile.flush()
            threading.Event().wait(3)
        return None


@pytest.fixture
def serve():
    """Start a server for some bytes; it stops with the test."""
    started = []

    def start(content):
        shared = Server(content)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.block_on_close = False
        server.shared = shared
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        shared.url = f"http://127.0.0.1:{server.server_port}"
        started.append((server, thread))
        return shared

    yield start
    for server, thread in started:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def closed_port_url():
    """An address at which nothing listens."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}/file"


@pytest.fixture
def as_nobody(tmp_path):
    """Run code as somebody without rights, since root may write anywhere; gives back its stdout.

    The folders above `tmp_path` are opened for passing through, while the test runs.
    """
    opened = []
    for folder in tmp_path.parents:
        mode = folder.stat().st_mode & 0o7777
        if os.geteuid() == 0 and not mode & 0o001:
            folder.chmod(mode | 0o001)
            opened.append((folder, mode))

    def run(code):
        # The imports are done before the rights are dropped: the source may lie in a private place.
        drop = """
import os, jaxnets.data, jaxnets.data.archive, urllib.request
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
"""
        script = drop + textwrap.dedent(code)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield run
    for folder, mode in opened:
        folder.chmod(mode)
