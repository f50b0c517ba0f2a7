from __future__ import annotations

import json
from pathlib import Path

import pytest

from bt_ray.errors import CommitError, ModelError
from bt_ray.lm.types import CanaryCase, Weights
from bt_ray.lm.weights import content_hash, engine_key, lora_rank, swap_mode, verify


def folder(root: Path, **files: str) -> Path:
    root.mkdir()
    for name, text in {"model.safetensors": "tensors", "config.json": "{}", **files}.items():
        (root / name).write_text(text)
    return root


def weights(name: str, embedding: str = "e", kind: str = "base", base: str = "b") -> Weights:
    return Weights(name, kind, f"/m/{name}", base, embedding_id=embedding)  # type: ignore[arg-type]


def test_hash_follows_from_content_and_not_from_place(tmp_path: Path) -> None:
    first = content_hash(folder(tmp_path / "a"))
    assert len(first) == 16 and int(first, 16) >= 0
    assert content_hash(folder(tmp_path / "b")) == first
    assert content_hash(folder(tmp_path / "c", **{"README.md": "not a part of the weights"})) == first
    others = [{"model.safetensors": "tensorz"}, {"config.json": "{ }"}, {"adapter_config.json": "{}"}, {"more.safetensors": ""}]
    found = {content_hash(folder(tmp_path / f"d{n}", **files)) for n, files in enumerate(others)}
    assert len(found) == len(others) and first not in found


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text("pickled")
    with pytest.raises(ModelError, match="safetensors"):
        content_hash(tmp_path)


def test_changed_weights_fail_their_check(tmp_path: Path) -> None:
    root = folder(tmp_path / "a")
    verify(root, content_hash(root))
    (root / "model.safetensors").write_text("other")
    with pytest.raises(CommitError, match="content hash"):
        verify(root, "0" * 16)


@pytest.mark.parametrize(
    ("current", "wanted", "mode"),
    [
        (None, weights("a"), "restart"),
        (weights("a"), weights("a"), "same"),
        (weights("a"), weights("b"), "hot"),
        (weights("a"), weights("b", embedding="f"), "restart"),
        (weights("a", embedding=""), weights("b", embedding=""), "restart"),  # unknown embeddings
    ],
)
def test_swap_in_place_only_with_equal_embeddings(current: Weights | None, wanted: Weights, mode: str) -> None:
    assert swap_mode(current, wanted) == mode


def test_run_time_adapters_share_their_bases_engine() -> None:
    base, one, two = weights("a"), weights("b", kind="lora"), weights("c", kind="lora")
    assert engine_key(base, "runtime") == engine_key(one, "runtime") == engine_key(two, "runtime")
    assert len({engine_key(w, "merge") for w in (base, one, two)}) == 3
    assert engine_key(weights("d", kind="full"), "runtime") != engine_key(base, "runtime")
    assert engine_key(weights("e", kind="lora", base="other"), "runtime") != engine_key(base, "runtime")


def test_rank_is_the_highest_of_the_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "rank_pattern": {"q_proj": 64}}))
    assert lora_rank(tmp_path) == 64
    with pytest.raises(ModelError, match="rank"):
        lora_rank(tmp_path / "nowhere")


def test_weights_survive_json() -> None:
    full = Weights("i", "lora", "m", "b", "a", "e", (CanaryCase((1, 2), (3,), (0.5,)),))
    assert Weights.from_json(json.loads(json.dumps(full.to_json()))) == full
