"""A proposer behind an OpenAI-compatible endpoint: a server that the test starts."""

import asyncio

import pytest

from bt_ray.config import ProposerConfig
from bt_ray.errors import ConfigError, PoolError
from bt_ray.lm import endpoint
from bt_ray.lm.endpoint import EndpointPool, endpoint_weights
from bt_ray.lm.types import LMCall, Sampling
from tests.support.endpoint_server import endpoint as serving


@pytest.fixture
def server():
    """Answers `echo: <last message>`, or fails where it is told to."""
    with serving(lambda text: None if text == "fail" else f"echo: {text}") as served:
        yield served


def ask(config, text):
    sampling = Sampling(temperature=0.5, max_tokens=20, seed=7)
    return asyncio.run(
        EndpointPool(config).generate(LMCall(endpoint_weights(config), sampling, ({"role": "user", "content": text},)))
    )


def test_an_answer_with_its_tokens_and_the_key_by_reference(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-value")
    config = ProposerConfig(model="openai/big", base_url=server.url, api_key_env="MY_KEY")
    answer = ask(config, "hello")
    assert answer.text == "echo: hello"
    assert answer.extra == {"prompt_tokens": 5, "completion_tokens": 2}
    (body,) = server.requests
    assert server.keys == ["Bearer secret-value"]
    assert (body["temperature"], body["seed"]) == (0.5, 7)
    assert "secret-value" not in config.model_dump_json()


def test_an_endpoint_that_fails_is_a_pool_error(server, monkeypatch):
    monkeypatch.setattr(endpoint, "NUM_RETRIES", 0)
    with pytest.raises(PoolError, match="the endpoint failed"):
        ask(ProposerConfig(model="openai/big", base_url=server.url), "fail")


def test_a_key_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        EndpointPool(ProposerConfig(model="openai/big", api_key_env="MY_KEY"))
