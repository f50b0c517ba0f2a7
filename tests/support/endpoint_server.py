"""An OpenAI-compatible endpoint on loopback that says what the test has it say, and keeps what it was asked with."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Endpoint:
    """`keys`: Authorization headers, `requests`: bodies, in the order of the requests."""

    url: str
    keys: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def endpoint(answer: Callable[[str], str | None]) -> Iterator[Endpoint]:
    """Serves until the block ends. `answer`: from the last message; where it is None the endpoint fails."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            served.keys.append(self.headers["Authorization"])
            served.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            text = answer(served.requests[-1]["messages"][-1]["content"])
            if text is None:
                self.send_response(500)
                self.end_headers()
                return
            message = {"role": "assistant", "content": text}
            usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "writer", "choices": choices, "usage": usage}
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Endpoint(f"http://127.0.0.1:{server.server_port}/v1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
