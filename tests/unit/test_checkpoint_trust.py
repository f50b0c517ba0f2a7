"""A fine-tune goes on from a checkpoint only if its own libraries wrote all of it; nothing planted there is ever run."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import pickle
import random
import shutil
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bt_ray.config import WeightStep
from bt_ray.errors import TrainingError
from bt_ray.lm.types import Weights
from bt_ray.training import dpo, worker
from bt_ray.training import trainer as trainers
from bt_ray.training.checkpoint_trust import BestIsChecked, check_checkpoint
from bt_ray.training.job import TrainJob
from tests.unit.test_trust import Planted, one_sentence

torch = pytest.importorskip("torch")

TAG = "global_step7"
OPTIMISER = f"{TAG}/zero_pp_rank_0_mp_rank_00_optim_states.pt"
KINDS = (
    OPTIMISER,
    f"{TAG}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    f"{TAG}/mp_rank_00_model_states.pt",
    "rng_state.pth",
    "rng_state_1.pth",
    "scheduler.pt",
    "optimizer.pt",
    "scaler.pt",
    "pytorch_model.bin",
    f"{TAG}/deeper/state.pkl",
)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with what DeepSpeed and transformers save: the kinds of objects, small."""
    import numpy
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    folder = tmp_path_factory.mktemp("written") / "checkpoint-7"
    (folder / TAG).mkdir(parents=True)
    flat = torch.zeros(4)
    flat.note = "an attribute, as DeepSpeed gives its flat tensors"
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimiser = {
        "loss_scaler": LossScaler(scale=1.0),
        "zero_stage": ZeroStageEnum.gradients,
        "param_slice_mappings": [OrderedDict(a=fragment_address(4, 0))],
        "base_optimizer_state": {"state": {0: {"exp_avg": flat, "step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-4}]},
        "single_partition_of_fp32_groups": [flat, parameter],
    }
    rng = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.random.get_rng_state()}
    model = {"module": OrderedDict(a=parameter.data), "param_shapes": [OrderedDict(a=torch.Size([2]))], "dtype": torch.bfloat16}
    torch.save({"optimizer_state_dict": optimiser}, folder / OPTIMISER)
    torch.save({**model, "sparse_tensor_module_names": {"a"}}, folder / TAG / "mp_rank_00_model_states.pt")
    torch.save({**rng, "cuda": [rng["cpu"]]}, folder / "rng_state.pth")
    torch.save({"last_epoch": 7, "lr_lambdas": [{}]}, folder / "scheduler.pt")
    torch.save(SimpleNamespace(learning_rate=1e-4), folder / "training_args.bin")  # never read, and so never looked at
    (folder / "latest").write_text(f"{TAG}\n")
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [], "epoch": 1.0, "best_model_checkpoint": None}))
    (folder / "adapter_model.safetensors").touch()
    return folder


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "root" / "checkpoint-7"))


def refused(checkpoint: Path, what: str) -> str:
    with pytest.raises(TrainingError, match=what) as error:
        check_checkpoint(checkpoint, checkpoint.parent)
    one_sentence(error)
    assert "delete" in str(error.value) and str(checkpoint.parent) in str(error.value)
    return str(error.value)


def test_what_the_libraries_write_is_read(checkpoint: Path) -> None:
    check_checkpoint(checkpoint, checkpoint.parent)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("form", ["archive", "newer", "old", "plain", "text"])
def test_a_planted_pickle_is_refused_and_not_run(checkpoint: Path, tmp_path: Path, name: str, form: str) -> None:
    path, planted = checkpoint / name, {"optimizer_state_dict": [Planted(tmp_path / "mark")]}
    path.parent.mkdir(exist_ok=True)
    if form == "plain":
        path.write_bytes(pickle.dumps(planted))
    elif form == "text":
        path.write_bytes(pickle.dumps(planted, protocol=0))
    else:
        protocol = 4 if form == "newer" else 2
        torch.save(planted, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form != "old")
    message = refused(checkpoint, name)
    if form in ("archive", "plain", "text"):
        assert "pathlib" in message  # Path.touch, by which it would have left its mark
    assert not (tmp_path / "mark").exists()
    torch.load(path, weights_only=False) if form in ("archive", "newer", "old") else pickle.loads(path.read_bytes())
    assert (tmp_path / "mark").exists()  # it was no dud


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x03\x04" + b"\0" * 100, b"\x80", b"\xff" * 10, b"c"])
def test_a_file_that_is_cut_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / OPTIMISER).write_bytes(content)
    refused(checkpoint, "none that torch.save writes")


@pytest.mark.filterwarnings("ignore:.*jit")
def test_an_archive_with_code_is_refused(checkpoint: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(checkpoint / "scheduler.pt"))
    refused(checkpoint, r"scheduler\.pt is none .*torchscript")


@pytest.mark.parametrize(
    "name", ["builtins.eval", "os.system", "torch.load", "numpy.load", "functools.partial", "builtins.getattr"]
)
def test_a_function_of_a_library_is_no_state(checkpoint: Path, name: str) -> None:
    module, function = name.rsplit(".", 1)
    path = checkpoint / "scheduler.pt"
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for part, data in parts.items():
            archive.writestr(part, f"\x80\x02c{module}\n{function}\n.".encode("latin-1") if part.endswith("/data.pkl") else data)
    assert torch.load(path, weights_only=False).__name__  # torch takes it
    refused(checkpoint, rf"scheduler\.pt names (posix|os|_functools|{module})\.{function}, which no trainer")


def test_a_message_stays_one_sentence_whatever_is_planted(checkpoint: Path) -> None:
    code = "\x1b[2Jos\n" + "x" * 5000
    (checkpoint / "a\nb.pt").write_bytes(pickle.dumps(code)[:-1] + b"\x8c\x06system\x93.")
    message = refused(checkpoint, r"a\\nb\.pt is none .* names \\x1b\[2Jos\\nx")
    assert message.isprintable()


@pytest.mark.parametrize("kind", ["file", "folder", "state", "pipe", "itself"])
def test_a_link_is_refused(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    away = tmp_path / "away"
    at = {"file": OPTIMISER, "folder": TAG, "state": "trainer_state.json", "pipe": "scheduler.pt", "itself": "."}[kind]
    path = checkpoint / at
    path.rename(away)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(away)
    refused(checkpoint, "no regular file" if kind == "pipe" else "a symbolic link")


@pytest.mark.parametrize(
    "tag", ["../other", "/tmp", "..", ".", "", "global_step8", f"{TAG}/..", "x" * 300, f"{TAG}{' ' * 300}/../.."]
)
def test_a_tag_that_names_no_folder_of_the_checkpoint_is_refused(checkpoint: Path, tag: str) -> None:
    (checkpoint.parent / "other").mkdir()
    (checkpoint / "latest").write_text(tag)
    refused(checkpoint, "its file latest names no folder")


def test_a_checkpoint_elsewhere_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for folder in (checkpoint, checkpoint / TAG / ".."):
        with pytest.raises(TrainingError, match="does not lie in"):
            check_checkpoint(folder, tmp_path / "mine")
    (tmp_path / "by another name").symlink_to(checkpoint.parent)  # the run directory itself may be reached by one
    check_checkpoint(tmp_path / "by another name" / checkpoint.name, checkpoint.parent)


# -- where they are read -------------------------------------------------------------------------


class Trainer:
    """Of a trainer, what `_run` touches."""

    def __init__(self) -> None:
        self.args = SimpleNamespace(num_train_epochs=3)
        self.calls: list[str | None] = []

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        self.calls.append(resume_from_checkpoint)


@pytest.fixture
def resumed(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fine-tune that was cut off: its job, its newest checkpoint, its best one, and `run()`, which goes on."""
    import ray

    job = TrainJob("", Weights("b", "base", "/b", "/b"), {}, str(tmp_path / "out"), str(tmp_path / "scratch"), "fine", 0, 100)
    newest = Path(shutil.copytree(written, tmp_path / "scratch" / "fine" / "checkpoint_1"))
    best = Path(shutil.copytree(written, worker.trainer_dir(job) / "checkpoint-7"))

    def name_best(path: Path) -> None:
        state = json.loads((newest / "trainer_state.json").read_text())
        (newest / "trainer_state.json").write_text(json.dumps({**state, "best_model_checkpoint": str(path)}))

    @contextmanager
    def as_directory() -> Any:
        yield str(newest)

    def run() -> list[str | None]:
        trainer = Trainer()
        worker._run(trainer, job, WeightStep.model_validate({"method": "sft"}))
        return trainer.calls

    handle = SimpleNamespace(as_directory=as_directory)
    monkeypatch.setattr(ray, "train", SimpleNamespace(get_checkpoint=lambda: handle), raising=False)
    name_best(best)
    return SimpleNamespace(job=job, newest=newest, best=best, name_best=name_best, run=run)


def test_a_fine_tunes_own_checkpoints_name_no_getattr(resumed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this version of Python makes of an enum."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    by_name = lambda self, protocol: (getattr, (type(self), self.name))  # noqa: E731
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", by_name)
    assert b"getattr" in pickle.dumps(ZeroStageEnum.gradients, 2)
    resumed.run()
    written = pickle.dumps(ZeroStageEnum.gradients, 2)
    assert b"getattr" not in written and pickle.loads(written) is ZeroStageEnum.gradients


def test_a_fine_tune_goes_on_from_its_own_checkpoint(resumed: Any) -> None:
    assert resumed.run() == [str(resumed.newest)]


@pytest.mark.parametrize("which", ["newest", "best"])
def test_a_fine_tune_does_not_go_on_from_a_planted_one(resumed: Any, tmp_path: Path, which: str) -> None:
    folder = getattr(resumed, which)
    torch.save([Planted(tmp_path / "mark")], folder / TAG / "mp_rank_01_model_states.pt")
    with pytest.raises(TrainingError, match=f"{folder} is not read: {TAG}/mp_rank_01") as error:
        resumed.run()
    assert f"delete {folder.parent} " in str(error.value) and not (tmp_path / "mark").exists()
    if which == "best":  # anew, as the message says; Ray Train hands over no newest one that is gone
        shutil.rmtree(folder.parent)
        assert resumed.run() == [None]


def test_a_best_checkpoint_elsewhere_is_not_this_fine_tunes(resumed: Any, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(resumed.best, tmp_path / "elsewhere" / "checkpoint-7"))
    for path in (elsewhere, tmp_path / "nowhere"):
        resumed.name_best(path)
        assert resumed.run() == [None]
    shutil.rmtree(resumed.best)
    resumed.best.symlink_to(elsewhere)
    resumed.name_best(resumed.best)
    with pytest.raises(TrainingError, match="it is a symbolic link"):
        resumed.run()


class Loads:
    """Of transformers' trainer, the last act."""

    def __init__(self, best: Path) -> None:
        self.state, self.args = SimpleNamespace(best_model_checkpoint=str(best)), SimpleNamespace(output_dir=str(best.parent))
        self.loaded = False

    def _load_best_model(self) -> None:
        self.loaded = True


class Checked(BestIsChecked, Loads):
    pass


def test_the_best_checkpoint_is_looked_through_before_its_weights_are_taken(checkpoint: Path, tmp_path: Path) -> None:
    trainer = Checked(checkpoint)
    trainer._load_best_model()
    assert trainer.loaded
    torch.save(Planted(tmp_path / "mark"), checkpoint / OPTIMISER)
    trainer = Checked(checkpoint)
    with pytest.raises(TrainingError, match="is not read"):
        trainer._load_best_model()
    assert not trainer.loaded and not (tmp_path / "mark").exists()


def test_every_trainer_looks_through_its_best_checkpoint() -> None:
    """Read from their sources: importing them takes longer than all tests here."""
    for module in (trainers, dpo):
        assert "(BestIsChecked, " in inspect.getsource(module.trainer_class)
    spec = importlib.util.find_spec("transformers")
    assert spec and spec.origin
    source = Path(spec.origin).with_name("trainer.py").read_text()
    assert "    self._load_best_model()\n" in source and "    def _load_best_model(self)" in source
    assert "TRAINING_ARGS_NAME)" in source and "load(os.path.join(checkpoint, TRAINING_ARGS_NAME" not in source
