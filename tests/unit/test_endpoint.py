"""A proposer behind an OpenAI-compatible endpoint: a server that the test starts."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bt_ray.config import ProposerConfig
from bt_ray.errors import ConfigError, PoolError
from bt_ray.lm import endpoint
from bt_ray.lm.endpoint import EndpointPool, endpoint_weights
from bt_ray.lm.types import LMCall, Sampling


@pytest.fixture
def server():
    """(address, requests seen); answers `echo: <last message>`, or 500 where it is told to fail."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.headers["Authorization"], body))
            text = body["messages"][-1]["content"]
            if text == "fail":
                self.send_response(500)
                self.end_headers()
                return
            message = {"role": "assistant", "content": f"echo: {text}"}
            usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "big", "choices": [choice], "usage": usage}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", seen
    http.shutdown()
    thread.join()


def ask(config, text):
    sampling = Sampling(temperature=0.5, max_tokens=20, seed=7)
    return asyncio.run(
        EndpointPool(config).generate(LMCall(endpoint_weights(config), sampling, ({"role": "user", "content": text},)))
    )


def test_an_answer_with_its_tokens_and_the_key_by_reference(server, monkeypatch):
    address, seen = server
    monkeypatch.setenv("MY_KEY", "secret-value")
    config = ProposerConfig(model="openai/big", base_url=address, api_key_env="MY_KEY")
    answer = ask(config, "hello")
    assert answer.text == "echo: hello"
    assert answer.extra == {"prompt_tokens": 5, "completion_tokens": 2}
    ((authorisation, body),) = seen
    assert authorisation == "Bearer secret-value"
    assert (body["temperature"], body["seed"]) == (0.5, 7)
    assert "secret-value" not in config.model_dump_json()


def test_an_endpoint_that_fails_is_a_pool_error(server, monkeypatch):
    monkeypatch.setattr(endpoint, "NUM_RETRIES", 0)
    with pytest.raises(PoolError, match="the endpoint failed"):
        ask(ProposerConfig(model="openai/big", base_url=server[0]), "fail")


def test_a_key_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        EndpointPool(ProposerConfig(model="openai/big", api_key_env="MY_KEY"))
