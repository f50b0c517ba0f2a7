"""A proposer behind an OpenAI-compatible endpoint: a server that the test starts."""

import asyncio

import pytest

from bt_ray.config import ProposerConfig
from bt_ray.errors import ConfigError, PoolError
from bt_ray.lm import endpoint
from bt_ray.lm.endpoint import EndpointPool, endpoint_weights, key_in_file
from bt_ray.lm.types import LMCall, Sampling
from tests.support.endpoint_server import endpoint as serving


@pytest.fixture
def server():
    """Answers `echo: <last message>`, or fails where it is told to."""
    with serving(lambda text: None if text == "fail" else f"echo: {text}") as served:
        yield served


def ask(config, text, base_dir="."):
    sampling = Sampling(temperature=0.5, max_tokens=20, seed=7)
    return asyncio.run(
        EndpointPool(config, base_dir).generate(LMCall(endpoint_weights(config), sampling, ({"role": "user", "content": text},)))
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
        EndpointPool(ProposerConfig(model="openai/big", api_key_env="MY_KEY"), ".")


@pytest.mark.parametrize("named", ["keys/key", "absolute", "~/keys/key", "link"])
def test_a_key_in_a_file_is_read_at_each_call(server, tmp_path, monkeypatch, named):
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "key").write_text("  secret-value\n")
    (tmp_path / "link").symlink_to("keys/key")  # as Kubernetes mounts a secret
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    path = str(tmp_path / "keys" / "key") if named == "absolute" else named
    config = ProposerConfig(model="openai/big", base_url=server.url, api_key_file=path)
    assert ask(config, "hello", str(tmp_path)).text == "echo: hello"
    pool = EndpointPool(config, str(tmp_path))
    (tmp_path / "keys" / "key").write_text("another-value")
    asyncio.run(pool.generate(LMCall(endpoint_weights(config), Sampling(), ({"role": "user", "content": "again"},))))
    assert server.keys == ["Bearer secret-value", "Bearer another-value"]
    assert "value" not in config.model_dump_json() + repr(vars(pool)) + endpoint_weights(config).id


BAD_KEY_FILES = {
    "missing": (None, "names no file that there is"),
    "folder": ("a folder", "names a folder"),
    "empty": (b"", "names an empty file"),
    "blank": (b" \n\t\n", "names an empty file"),
    "large": (b"k" * (1 << 16) + b"\n", "more than 64 KiB"),
    "several lines": (b"one\ntwo\n", "more than one line of plain text"),
    "control characters": (b"one\x00two", "more than one line of plain text"),
    "binary": (b"\xff\xfeo\x00", "more than one line of plain text"),
}


@pytest.mark.parametrize("kind", BAD_KEY_FILES)
def test_a_file_that_holds_no_key_is_refused_without_its_words(tmp_path, kind):
    content, words = BAD_KEY_FILES[kind]
    path = tmp_path / "the-key"
    if content == "a folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        EndpointPool(ProposerConfig(model="openai/big", api_key_file="the-key"), str(tmp_path))
    assert "the-key" not in str(error.value) and "one\n" not in str(error.value) and "Name a file" in str(error.value)


def test_a_key_of_the_largest_size_is_one(tmp_path):
    (tmp_path / "key").write_bytes(b"k" * (1 << 16))
    assert key_in_file(ProposerConfig(model="openai/big", api_key_file="key"), str(tmp_path)) == "k" * (1 << 16)


@pytest.mark.parametrize("name", ["k\0y", "k" * 5000, "~nobody-of-this-name/key", ""])
def test_what_can_be_no_path_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"proposer\.api_key_file: it names"):
        key_in_file(ProposerConfig(model="openai/big", api_key_file=name), str(tmp_path))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "key").write_text("secret-value")
    monkeypatch.setattr(endpoint, "_beginning", refuse)
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\)"):
        key_in_file(ProposerConfig(model="openai/big", api_key_file="key"), str(tmp_path))
