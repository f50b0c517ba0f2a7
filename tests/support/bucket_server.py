"""An S3 server on this machine (moto's), which can be told to misbehave."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "runs"
# Nobody's: the server takes any. No profile of whoever runs the tests is read.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test-secret-canary",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
SLOW_DOWN = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'


class _Quiet(WSGIRequestHandler):
    """Logs nothing: what was asked is in `BucketServer.requests`."""

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


class BucketServer:
    """The server's address, what it was asked, and how it is to answer.

    `fault(method, path)`: None to answer as usual, "503" to ask for patience, "reset" to break off before the work is
    done, "lost" to do the work and break off then, or seconds to wait first.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self.fault: Callable[[str, str], str | float | None] = lambda method, path: None
        self.heeds_conditions = True
        self.requests: list[tuple[str, str]] = []
        self.url = ""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        wanted = self.fault(method, path)
        if wanted == "503":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            headers = {"Content-Type": "application/xml", "Content-Length": str(len(SLOW_DOWN)), "Connection": "close"}
            start_response("503 Slow Down", list(headers.items()))
            return [SLOW_DOWN]
        if wanted == "reset":
            raise ConnectionError("told to break off")
        if isinstance(wanted, float):
            time.sleep(wanted)
        if not self.heeds_conditions:
            environ = {name: value for name, value in environ.items() if name not in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")}
        answer = self._app(environ, start_response)
        if wanted == "lost":
            raise ConnectionError("told to break off after the work")
        return answer

    def sent(self, method: str = "PUT") -> list[str]:
        """Paths of the requests of a method."""
        return [path for asked, path in self.requests if asked == method]


@contextmanager
def bucket_server() -> Iterator[BucketServer]:
    """A server with one empty bucket. AWS variables that point to it are in `ENVIRONMENT` and `AWS_ENDPOINT_URL`."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app

    server = BucketServer(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, server, threaded=True, request_handler=_Quiet)
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        client = boto3.client(
            "s3", endpoint_url=server.url, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
        )
        client.create_bucket(Bucket=BUCKET)
        yield server
        client.close()
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
