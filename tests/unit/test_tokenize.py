"""Counting prompt tokens without transformers gives what transformers gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bt_ray.errors import ModelError
from bt_ray.lm.models import resolve
from bt_ray.lm.tokenize import ChatTokenizer, read_chat_template
from tests.support.tiny_model import make_tiny_model

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b>ünïcode</b> & 你好 {{ 1 }}"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\n\n  two "},
        {"role": "assistant", "content": " done"},
        {"role": "user", "content": "<|im_end|> again"},
    ],
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def _agree(folder: str | Path) -> None:
    from transformers import AutoTokenizer

    ours, reference = ChatTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for chat in CHATS:
        for opened in (True, False):
            expected = reference.apply_chat_template(chat, add_generation_prompt=opened, return_dict=False)
            assert ours.encode_chat(chat, add_generation_prompt=opened) == expected
        assert ours.count(chat) == len(ours.encode_chat(chat))


def test_tiny_model_as_transformers(tiny: Path) -> None:
    _agree(tiny)


def test_default_model_as_transformers() -> None:
    _agree(resolve("smollm2-135m").model_dir)


def test_what_published_templates_use(copy: Path) -> None:
    """Special tokens by name, loop controls, the generation tag, unescaped JSON; several named templates."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
    )
    (copy / "chat_template.jinja").write_text(template)
    _agree(copy)
    (copy / "chat_template.jinja").unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_chat_template(copy) == template
    assert ChatTokenizer(copy).render([{"content": "<&>"}]) == '<|im_start|>{"content": "<&>"}'


def test_a_saved_length_limit_does_not_hide_a_long_prompt(copy: Path) -> None:
    data = json.loads((copy / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (copy / "tokenizer.json").write_text(json.dumps(data))
    assert ChatTokenizer(copy).count([{"role": "user", "content": "word " * 100}]) > 100


@pytest.mark.parametrize("attack", ["{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"])
def test_a_template_reaches_no_python_objects(copy: Path, attack: str) -> None:
    (copy / "chat_template.jinja").write_text(attack)
    with pytest.raises(ModelError, match="refuses"):
        ChatTokenizer(copy).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("template", "words"), [("{{ raise_exception('no system role') }}", "no system role"), ("{% for %}", "no valid jinja")]
)
def test_a_template_that_refuses_or_is_broken(copy: Path, template: str, words: str) -> None:
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=words):
        ChatTokenizer(copy).count([{"role": "system", "content": "x"}])


@pytest.mark.parametrize(
    ("file", "words"), [("chat_template.jinja", "no chat template"), ("tokenizer.json", "no tokenizer.json")]
)
def test_a_model_without_its_files(copy: Path, file: str, words: str) -> None:
    (copy / file).unlink()
    with pytest.raises(ModelError, match=words):
        ChatTokenizer(copy)


def test_equal_seeds_give_equal_models(tiny: Path, tmp_path: Path) -> None:
    same, other = make_tiny_model(tmp_path / "same"), make_tiny_model(tmp_path / "other", seed=1)
    tensors = [(Path(folder) / "model.safetensors").read_bytes() for folder in (tiny, same, other)]
    assert tensors[0] == tensors[1] != tensors[2]
