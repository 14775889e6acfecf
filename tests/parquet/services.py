"""An S3 server of this machine, and a proxy before it that answers badly."""

import contextlib
import http.client
import http.server
import logging
import os
import random
import socket
import struct
import sys
import threading

import pyarrow.fs as pafs
import pytest

from hbkit.parquet import fetch

FAULTS = ("503", "reset", "short", "cut", "stall")
BODIES = {"503": b"<Error><Code>SlowDown</Code></Error>", "403": b"<Error><Code>AccessDenied</Code></Error>"}


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a server, or answers them badly.

    ``fault(n, method)`` says what becomes of the n-th request: None, a status, ``reset`` (the connection), ``short``
    (the body ends before Content-Length), ``cut`` (body and Content-Length are too short), ``stall`` (silence) or
    ``lost`` (the server does as it is told, but the connection breaks before it answers); ``path`` is what it asks for.
    ``log`` holds ``(method, path, Range, fault)`` of each.
    """

    daemon_threads = True

    def __init__(self, upstream):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.lock, self.ended = upstream, threading.Lock(), threading.Event()
        self.condition = threading.Lock()
        self.reset()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def reset(self):
        self.fault, self.log = lambda n, method: None, []

    def fail_some(self, seed, faults=FAULTS):
        """One request of every five fails, which one and how is random but as the seed has it."""
        rng = random.Random(seed)
        plan = [rng.choice(faults) if i == bad else None for bad in rng.choices(range(5), k=200) for i in range(5)]
        self.fault = lambda n, method: plan[n % len(plan)]

    def fail_all(self, fault):
        self.fault = lambda n, method: fault

    def handle_error(self, request, client_address):
        pass

    def close(self):
        self.ended.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self):
        proxy = self.server
        sent = self.rfile.read(int(self.headers["Content-Length"] or 0))
        with proxy.lock:
            proxy.path = self.path
            fault = proxy.fault(len(proxy.log), self.command)
            proxy.log.append((self.command, self.path, self.headers["Range"], fault))
        if fault == "stall":
            proxy.ended.wait(20)
            self.close_connection = True
        elif fault == "reset":
            self.reset()
        elif fault and fault.isdigit():
            self.send(int(fault), [], BODIES.get(fault, b""))
        else:
            # The server looks whether an object is there, and then puts it: one after the other, as S3 would.
            with proxy.condition if self.headers["If-None-Match"] else contextlib.nullcontext():
                upstream = http.client.HTTPConnection(*proxy.upstream)
                upstream.request(self.command, self.path, sent, dict(self.headers))
                response = upstream.getresponse()
                body = response.read()
                upstream.close()
            if fault == "lost":
                return self.reset()
            dropped = ("content-length", "connection", "date", "server", "transfer-encoding")
            headers = [(k, v) for k, v in response.getheaders() if k.lower() not in dropped]
            n = None
            if self.command == "HEAD":
                n = response.headers["Content-Length"]
            elif fault in ("short", "cut"):
                n, body = len(body), body[: len(body) // 2]
                self.close_connection = True
            self.send(response.status, headers, body, None if fault == "cut" and self.command == "GET" else n)

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def send(self, status, headers, body, n=None):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if n is None else n))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def service():
    """A proxy before an S3 server that has an empty bucket."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("AWS_") or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
                patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "some")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "one")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        moto = pytest.importorskip("moto.server")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        proxy = Proxy(server.get_host_and_port())
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.server_address[1]}")  # for s3fs
        if "s3fs" in sys.modules:
            sys.modules["s3fs"].S3FileSystem.clear_instance_cache()  # of clients of another module's server
        direct(proxy).create_dir("bucket")
        try:
            yield proxy
        finally:
            proxy.close()
            server.stop()


@pytest.fixture
def proxy(service, monkeypatch):
    """The proxy as it answers well, until it is told otherwise."""
    monkeypatch.setattr(fetch, "BACKOFF", 0.02)
    service.reset()
    yield service
    service.reset()


@pytest.fixture
def hasty(monkeypatch):
    """Nobody waits for long."""
    monkeypatch.setattr(fetch, "TIMEOUT", 1.0)
    monkeypatch.setattr(fetch, "DEADLINE", 15.0)


def direct(proxy):
    """A client of the server, past the proxy."""
    host, port = proxy.upstream
    return pafs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
    )


def s3(proxy, key):
    """The URI of an object by way of the proxy."""
    port = proxy.server_address[1]
    return f"s3://bucket/{key}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


def s3fs(proxy, key):
    """The same object by way of fsspec, whose client takes a second to make and is kept."""
    pytest.importorskip("s3fs").S3FileSystem().connect()
    return f"s3a://bucket/{key}"
