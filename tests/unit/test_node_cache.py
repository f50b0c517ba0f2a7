"""Copies of weights on a node's own disk: made once, whole, and only of what was committed."""

from __future__ import annotations

import shutil
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from bt_ray.errors import CommitError, ModelError, StorageError
from bt_ray.lm import node_cache
from bt_ray.lm.types import Weights
from bt_ray.lm.weights import adapter_id, content_hash

MOUNTS = """\
/dev/vda / ext4 rw 0 0
fs-1.efs.us-west-2.amazonaws.com:/ /mnt/bt_ray nfs4 rw,vers=4.1 0 0
/dev/nvme1n1 /mnt/bt_ray/scratch xfs rw 0 0
bucket /mnt/with\\040space fuse.gcsfuse rw 0 0
overlay /layers fuse.fuse-overlayfs rw 0 0
one /twice ext4 rw 0 0
two /twice nfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("/home/a", False),
        ("/mnt/bt_ray", True),
        ("/mnt/bt_ray/runs/a", True),
        ("/mnt/bt_ray_2/runs", False),
        ("/mnt/bt_ray/scratch/a", False),
        ("/mnt/with space/a", True),
        ("/layers/a", False),
        ("/twice/a", True),
    ],
)
def test_which_file_systems_are_a_networks(path: str, remote: bool) -> None:
    assert node_cache.is_remote(node_cache.file_system(Path(path), MOUNTS)) is remote


def test_copies_are_made_where_the_node_says_or_where_reading_is_far() -> None:
    near, far = Path("/home/a"), Path("/mnt/bt_ray/runs/a")
    assert node_cache.place(near, None, MOUNTS) is None
    own = node_cache.place(far, None, MOUNTS)
    assert own is not None and not own.asked_for and not own.folder.is_relative_to("/mnt/bt_ray")
    assert node_cache.place(near, "/nvme/weights", MOUNTS) == node_cache.Place(Path("/nvme/weights"), asked_for=True)
    for kind in ("nfs", "tmpfs"):
        assert node_cache.place(far, None, f"{MOUNTS}one / {kind} rw 0 0\n") is None, "this node has no disk of its own"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(node_cache.SETTING, str(tmp_path / "cache"))
    monkeypatch.setattr(node_cache, "SPARE_BYTES", 0)
    return tmp_path / "cache"


def folder(root: Path, tensors: str, **more: str) -> Path:
    root.mkdir(parents=True)
    for name, text in {"model.safetensors": tensors, "config.json": "{}", "tokenizer.json": "{}", **more}.items():
        (root / name).write_text(text)
    return root


def base(root: Path, tensors: str = "tensors", **more: str) -> Weights:
    made = folder(root, tensors, **more)
    found = content_hash(made)
    return Weights(found, "base", str(made), str(made), embedding_id=found)


def adapted(of: Weights, root: Path) -> Weights:
    adapter, merged = folder(root / "adapter", "low rank"), folder(root / "merged", "sum")
    own_id = adapter_id(of.id, content_hash(adapter))
    return Weights(own_id, "lora", str(merged), of.base_dir, str(adapter), of.id, model_hash=content_hash(merged))


def copies(cache: Path) -> set[str]:
    """Content hashes of what the cache holds."""
    return {path.name.partition("-")[0] for path in cache.iterdir() if path.is_dir()}


def test_each_folder_is_copied_once_and_read_from_there(tmp_path: Path, cache: Path) -> None:
    of = base(tmp_path / "base", **{"optimizer.bin": "a pickle"})
    tuned = adapted(of, tmp_path / "tuned")
    found = [Path(one) for one in (node_cache.model_folder(of), node_cache.model_folder(tuned), node_cache.adapter_folder(tuned))]
    assert {one.parent for one in found} == {cache}
    assert [one.name.partition("-")[0] for one in found] == [of.id, tuned.model_hash, content_hash(tuned.adapter_dir or "")]
    assert {path.name for path in found[0].iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
    made_ns = (found[0] / "model.safetensors").stat().st_mtime_ns
    assert node_cache.base_folder(tuned) == node_cache.base_folder(of) == str(found[0])
    assert (found[0] / "model.safetensors").stat().st_mtime_ns == made_ns, "it was copied again"


def test_another_tokenizer_beside_the_same_tensors_is_another_copy(tmp_path: Path, cache: Path) -> None:
    of = base(tmp_path / "base")
    first = node_cache.model_folder(of)
    (tmp_path / "base" / "chat_template.jinja").write_text("a template")
    second = node_cache.model_folder(of)
    assert first != second and (Path(second) / "chat_template.jinja").read_text() == "a template"


def test_half_a_copy_is_not_taken_for_one(tmp_path: Path, cache: Path) -> None:
    of = base(tmp_path / "base")
    copy = Path(node_cache.model_folder(of))
    (copy / "model.safetensors").unlink()
    assert node_cache.model_folder(of) == str(copy) and (copy / "model.safetensors").read_text() == "tensors"


def test_a_copy_that_has_no_room_is_an_error_where_the_node_names_the_folder_and_else_none_is_made(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = base(tmp_path / "base")
    monkeypatch.setattr(node_cache, "SPARE_BYTES", 10**18)
    with pytest.raises(StorageError, match=f"Set {node_cache.SETTING} on this node to a folder of a disk with room"):
        node_cache.model_folder(of)
    monkeypatch.setattr(node_cache, "place", lambda *_: node_cache.Place(cache, asked_for=False))
    assert node_cache.model_folder(of) == of.model_dir and not copies(cache)


def test_without_a_hash_to_check_a_folder_is_used_in_place(tmp_path: Path, cache: Path) -> None:
    of = base(tmp_path / "base")
    full = replace(of, kind="full", id="f" * 16)  # it does not know what its base's files hash to
    old = replace(adapted(of, tmp_path / "tuned"), model_hash="")
    assert (node_cache.base_folder(full), node_cache.model_folder(old)) == (of.base_dir, old.model_dir)
    assert not cache.exists()


def test_what_was_changed_or_cut_is_refused_and_leaves_no_copy(tmp_path: Path, cache: Path) -> None:
    of = base(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_text("tens")
    with pytest.raises(CommitError, match=r"copy of .* is not what was committed"):
        node_cache.model_folder(of)
    assert not copies(cache)


def test_an_adapter_replaced_under_its_name_is_refused_in_place_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(node_cache.SETTING, raising=False)
    tuned = adapted(base(tmp_path / "base"), tmp_path / "tuned")
    assert node_cache.adapter_folder(tuned) == tuned.adapter_dir
    (Path(tuned.adapter_dir or "") / "model.safetensors").write_text("another")
    with pytest.raises(CommitError, match="is not the one with the id"):
        node_cache.adapter_folder(tuned)
    (Path(tuned.adapter_dir or "") / "adapter_model.bin").write_text("pickled")
    with pytest.raises(ModelError, match="pickle"):
        node_cache.adapter_folder(tuned)


def test_a_copy_that_was_cut_off_is_made_again(tmp_path: Path, cache: Path) -> None:
    of = base(tmp_path / "base")
    draft = folder(cache / f".{of.id}.draft", "half")
    copy = Path(node_cache.model_folder(of))
    assert (copy / "model.safetensors").read_text() == "tensors"
    assert not draft.exists()


def test_who_comes_second_waits_for_the_copy(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, copied, copy = base(tmp_path / "base"), [], shutil.copyfile

    def slowly(source: Path, target: Path) -> None:
        copied.append(source.name)
        time.sleep(0.1)
        copy(source, target)

    monkeypatch.setattr(node_cache.shutil, "copyfile", slowly)
    with ThreadPoolExecutor(4) as pool:  # the lock is the system's, held by an open file: threads meet it as processes do
        found = set(pool.map(node_cache.model_folder, [of] * 4))
    assert len(found) == 1 and sorted(copied) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_room_is_made_by_what_was_not_used_for_longest_and_is_used_by_nobody(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, old, new = (base(tmp_path / name, name) for name in ("held", "old", "new"))
    folders = [node_cache.model_folder(one) for one in (held, old, new)]
    node_cache.keep_only(folders[:1])
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda path: usage(100 - 30 * len(copies(cache))))
    node_cache.make_room(cache, 35)
    assert copies(cache) == {held.id, new.id}
    with pytest.raises(StorageError, match=r"and a copy needs 0\.0 GB"):
        node_cache.make_room(cache, 200)
    assert copies(cache) == {held.id}
