"""Real servers for tests: a Ray head as users start one, an S3 store, and a store with faults."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
BUCKET = "hts-test"


def free_ports(count: int) -> list[int]:
    """Return ports outside the range that Ray's workers take, others' in the next moment too."""
    drawn = random.SystemRandom().sample(range(21000, 32000), 50)
    return [port for port in drawn if not listens(port)][:count]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def await_port(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not listens(port):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and all that it started; not gently, as Ray would drain for half a minute."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for started in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                started.kill()
    process.wait(60)


@contextmanager
def ray_head(folder: Path, cpus: int = 4) -> Iterator[dict[str, str]]:
    """Start a head node with token authentication; gives the environment of its clients."""
    token = folder / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
        "RAY_agent_register_timeout_ms": "120000",
        # As in an activated environment: the job's `python` is the one with the libraries.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for attempt in range(3):  # Ray gives a node 30 s to start, too little on a crowded machine
        process, url, log = _start_head(environment, folder, cpus)
        try:
            if _started(process, log, int(url.rpartition(":")[2])):
                yield {**environment, "RAY_API_SERVER_ADDRESS": url}
                return
        finally:
            kill_tree(process)
        assert attempt < 2, log.read_text()


def _start_head(
    environment: dict[str, str], folder: Path, cpus: int
) -> tuple[subprocess.Popen, str, Path]:
    port, dashboard, client = free_ports(3)
    log = folder / f"head-{port}.log"
    temporary = Path(f"/tmp/hts-{os.getpid()}-{port}")  # short: Ray's sockets live below it
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
             f"--ray-client-server-port={client}", f"--temp-dir={temporary}",
             f"--num-cpus={cpus}", "--dashboard-agent-listen-port=0", "--disable-usage-stats",
             "--object-store-memory=200000000"],
            env=environment, stdout=stream, stderr=stream,
        )  # fmt: skip
    return process, f"http://127.0.0.1:{dashboard}", log


def _started(process: subprocess.Popen, log: Path, dashboard: int) -> bool:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        if "Ray runtime started" in log.read_text() and listens(dashboard):
            return True
        time.sleep(0.2)
    return False


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Start an S3 server with one empty bucket; gives the environment of its clients."""
    (port,) = free_ports(1)
    log = folder / "s3.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=stream, stderr=stream,
        )  # fmt: skip
        try:
            await_port(process, port, log)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("PUT", f"/{BUCKET}")
            assert connection.getresponse().status == 200, log.read_text()
            yield s3_environment(port)
        finally:
            kill_tree(process)


def s3_environment(port: int) -> dict[str, str]:
    """Return what a process needs to find the S3 server on a port of this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests by a handler from a thread, at the URL that is given."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Fault:
    """What happens to the next `times` requests of a method: an error, a pause, or both.

    `path` cuts it to requests whose path holds these words.
    """

    method: str
    status: int | None = None
    code: str = ""
    times: int = 1
    seconds: float = 0.0
    path: str = ""


@dataclass
class FaultyStore:
    """A proxy in front of an S3 server that lets requests fail as `faults` say, in order."""

    url: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def take(self, method: str, path: str) -> Fault | None:
        """Return the fault that the next request of a method meets, and count it."""
        for fault in self.faults:
            if fault.method == method and fault.times > 0 and fault.path in path:
                fault.times -= 1
                return fault
        return None


@contextmanager
def faulty_store(endpoint: str) -> Iterator[FaultyStore]:
    """Put a proxy with faults in front of an S3 server."""
    target = endpoint.rpartition("/")[2]
    store = FaultyStore("")
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self._body()
            with lock:
                store.requests.append(f"{self.command} {self.path}")
                fault = store.take(self.command, self.path)
            if fault is not None:
                time.sleep(fault.seconds)
            if fault is not None and fault.status is not None:
                text = f"<Error><Code>{fault.code}</Code><Message>test</Message></Error>".encode()
                self._send(fault.status, {"Content-Type": "application/xml"}, text)
                return
            upstream = http.client.HTTPConnection(target, timeout=60)
            skipped = {"transfer-encoding", "content-length", "expect"}
            kept = {k: v for k, v in self.headers.items() if k.lower() not in skipped}
            upstream.request(self.command, self.path, body, kept)
            reply = upstream.getresponse()
            self._send(reply.status, dict(reply.getheaders()), reply.read())

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            length = headers.get("Content-Length", headers.get("content-length"))
            for name, value in headers.items():
                if name.lower() not in {"content-length", "connection", "transfer-encoding"}:
                    self.send_header(name, value)
            head = self.command == "HEAD"
            self.send_header("Content-Length", length if head and length else str(len(body)))
            self.end_headers()
            if not head:
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Hub:
    """A model hub of one machine: commits by branch, and the folder of each commit.

    The next requests get the answers in `failures` (HTTP statuses) first; `asked` has the paths.
    """

    url: str = ""
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Path] = field(default_factory=dict)
    failures: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a path of the hub's own layout."""
        self.asked.append(path)
        if self.failures:
            return self.failures.pop(0), {}, b"the server is being mended"
        parts = path.partition("?")[0].strip("/").split("/")
        if parts[0] != "api":  # owner/name/resolve/commit/file
            commit = self.branches.get(parts[3], parts[3])
            file = self.commits[commit] / "/".join(parts[4:])
            if not file.is_file():
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
            body = file.read_bytes()
            etag = hashlib.sha1(body, usedforsecurity=False).hexdigest()
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, body
        name, kind, *rest = "/".join(parts[2:4]), *(parts[4:] or ["revision", "main"])
        commit = self.branches.get(rest[0], rest[0])
        if commit not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        answer: Any = {"id": name, "sha": commit}
        if kind == "tree":
            answer = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                for file in self.commits[commit].iterdir()
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Start a hub that knows what it is told of."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = _answer

        def log_message(self, *_: object) -> None:
            return

    with serving(Handler) as url:
        hub.url = url
        yield hub


@dataclass
class ChatFault:
    """What happens to a request for which `hits(words, image)` holds, `times` times.

    `status` with `headers` is answered, or `body` in the place of the right one, after a pause.
    """

    hits: Callable[[str, Image.Image], bool] = lambda words, image: True
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    seconds: float = 0.0
    times: int = 1_000_000


@dataclass
class Chat:
    """An OpenAI-compatible server of one model.

    `answer(words, image, request)` makes the `choices`; `requests` has the bodies and `keys` the
    Authorization headers of all requests, and `running` the most that ran at the same time.
    """

    answer: Callable[[str, Image.Image, dict[str, Any]], list[dict[str, Any]]]
    url: str = ""
    model: str = "tiny"
    key: str = ""
    faults: list[ChatFault] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    running: list[int] = field(default_factory=lambda: [0, 0])

    def reply(self, request: dict[str, Any]) -> tuple[int, dict[str, str], bytes, float]:
        """Return status, headers, body and pause for a request."""
        image, text = request["messages"][0]["content"]
        data = image["image_url"]["url"].partition("base64,")[2]
        picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        words = text["text"]
        fault = next((f for f in self.faults if f.times > 0 and f.hits(words, picture)), None)
        if fault is not None:
            fault.times -= 1
            if fault.status != 200 or fault.body is not None:
                body = fault.body or b'{"error": {"message": "told to fail"}}'
                return fault.status, fault.headers, body, fault.seconds
        if request["model"] != self.model:
            return 404, {}, b'{"error": {"message": "no such model"}}', 0.0
        answer = {
            "id": "1", "object": "chat.completion", "created": 0, "model": self.model,
            "choices": self.answer(words, picture, request),
            "usage": {"prompt_tokens": 100, "completion_tokens": 3, "total_tokens": 103},
        }  # fmt: skip
        return 200, {}, json.dumps(answer).encode(), fault.seconds if fault else 0.0


@contextmanager
def chat_server(chat: Chat) -> Iterator[Chat]:
    """Serve a chat model's answers on a port of this machine."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            listed = {"object": "list", "data": [{"id": chat.model, "object": "model"}]}
            self._send(200, {}, json.dumps(listed).encode())

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            given = self.headers.get("Authorization")
            if chat.key and given != f"Bearer {chat.key}":
                self._send(401, {}, b'{"error": {"message": "wrong key"}}')
                return
            with lock:
                chat.requests.append(request)
                chat.keys.append(given)
                chat.running[0] += 1
                chat.running[1] = max(chat.running)
                status, headers, body, seconds = chat.reply(request)
            time.sleep(seconds)
            with lock:
                chat.running[0] -= 1
            self._send(status, headers, body)

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            with contextlib.suppress(OSError):  # the client has given up
                self.send_response(status)
                about = {"Content-Type": "application/json", "Content-Length": str(len(body))}
                for name, value in {**about, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    with serving(Handler) as url:
        chat.url = f"{url}/v1"
        yield chat
