"""What crosses trust: files, paths and states of others are refused with one sentence, and never run or followed."""

from __future__ import annotations

import ast
import json
import os
import pickle
from pathlib import Path
from typing import Any

import dspy
import pytest

from bt_ray import config_file
from bt_ray.errors import BtRayError, ConfigError, ModelError, RunDirError
from bt_ray.fork import _link_tree
from bt_ray.lm import weights as weights_of
from bt_ray.lm.adapter import make_adapter
from bt_ray.lm.dspy_engine import Binding, BoundProgram, LoopThread, endpoint_in
from bt_ray.lm.engine_vllm import engine_args
from bt_ray.lm.settings import EngineSettings
from bt_ray.lm.types import Weights
from bt_ray.rollout.program import ProgramSpec, load_program, pickle_program
from bt_ray.rollout.rows import read_rows
from bt_ray.runs.commit import Cost, Step, StepKey, read_record
from bt_ray.runs.identity import file_sha256
from bt_ray.runs.inside import inside
from bt_ray.runs.run_dir import RunDir
from tests.support import plans, programs
from tests.support.spending import forge
from tests.support.stub_pool import BASE, StubPool

ROOT = Path(__file__).parents[2]
MINE = Weights("base", "base", "/models/base", "/models/base")
OUTWARD = ["../other", "a/../../other", "/etc/passwd", "", "a\0b"]


class Planted:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def plant(path: Path, mark: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Planted(mark)))
    return path


def one_sentence(error: pytest.ExceptionInfo[BtRayError]) -> None:
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


# -- pickles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "state.pkl", "model.pt"])
def test_a_pickle_in_the_folder_of_a_runs_weights_is_refused(tmp_path: Path, name: str) -> None:
    folder, mark = tmp_path / "steps" / "finetune-1" / "adapter", tmp_path / "mark"
    plant(folder / name, mark)
    (folder / "adapter_model.safetensors").touch()
    data = Weights("w", "lora", "steps/finetune-1/adapter", "", "steps/finetune-1/adapter").to_json()
    with pytest.raises(ModelError, match=f"{name}, a pickle that bt_ray never writes") as error:
        weights_of.from_record(data, tmp_path, MINE)
    one_sentence(error)
    with pytest.raises(ModelError, match="a pickle"):
        weights_of.merge_adapter(tmp_path, folder, tmp_path / "out")
    assert not mark.exists()


def test_every_model_is_loaded_without_pickles_and_without_code_of_its_folder() -> None:
    """`trust_remote_code` is nowhere on, and nowhere left to ask; a folder's own Python never runs."""
    loads = {"AutoModelForCausalLM": 0, "AutoTokenizer": 0}
    for path in (ROOT / "bt_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")):
                continue
            name, words = ast.unparse(node.func).removesuffix(".from_pretrained"), ast.unparse(node)
            if name in loads:
                loads[name] += 1
                assert "**ONLY_DATA" in words or "trust_remote_code=False" in words, f"{path}: {words}"
                if name == "AutoModelForCausalLM":
                    assert "**ONLY_DATA" in words or "gguf_file=" in words, f"{path}: {words}"
            for keyword in node.keywords:
                assert keyword.arg != "trust_remote_code" or ast.unparse(keyword.value) == "False", path
    assert all(loads.values())
    assert weights_of.ONLY_DATA == {"use_safetensors": True, "trust_remote_code": False}


def test_the_engine_reads_safetensors_alone_and_no_code_of_the_models_folder() -> None:
    settings = EngineSettings(**dict.fromkeys(EngineSettings.__dataclass_fields__))
    args = engine_args(settings, "/m")
    assert args["trust_remote_code"] is False and args["load_format"] == "safetensors"


@pytest.mark.parametrize("key", ["trust_remote_code", "engine.trust_remote_code", "steps.p.trust_remote_code"])
def test_no_config_turns_remote_code_on(key: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown key .*trust_remote_code"):
        config_file.with_overrides(plans.config(), (f"{key}=true",))


def test_code_in_a_models_folder_does_not_run(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Evil: ...\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, OSError)):
        transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), **weights_of.ONLY_DATA)
    assert not (tmp_path / "mark").exists()


def bound() -> BoundProgram:
    binding = Binding(StubPool(programs.answer), BASE, make_adapter("compact", False))
    return BoundProgram(programs.TwoModules(), binding, LoopThread())


@pytest.mark.parametrize("options", [{}, {"allow_pickle": True}])
def test_a_pickled_program_state_is_never_read(tmp_path: Path, options: dict[str, bool]) -> None:
    path = plant(tmp_path / "state.pkl", tmp_path / "mark")
    with pytest.raises(ConfigError, match="never unpickled") as error:
        bound().load(path, **options)
    one_sentence(error)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", [b"\x80\x04N.", b"[]", b"{}", b'{"metadata": 3}', b""])
def test_a_program_state_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(ConfigError, match="holds no state"):
        bound().load(tmp_path / "state.json")


@pytest.mark.parametrize(
    "named",
    [
        {"lm": {"model": "openai/x", "api_base": "https://elsewhere.example"}},
        {"lm": {"model": "openai/x"}},
        {"config": {"api_base": "https://elsewhere.example"}},
        {"config": {"base_url": "https://elsewhere.example"}},
    ],
)
def test_a_program_state_that_names_another_endpoint(tmp_path: Path, named: dict[str, Any]) -> None:
    program = bound()
    program.save(tmp_path / "state.json")
    state = json.loads((tmp_path / "state.json").read_text())
    state["route"].update(named)
    (tmp_path / "state.json").write_text(json.dumps(state))
    for options in ({}, {"allow_unsafe_lm_state": True}):
        with pytest.raises(ConfigError, match=r"names an LM or endpoint of its own \(route\.") as error:
            program.load(tmp_path / "state.json", **options)
        one_sentence(error)
    assert program.program.route.lm is None and not program.program.route.config


def test_a_field_may_be_called_as_an_endpoint_is() -> None:
    assert endpoint_in({"a": {"lm": None, "demos": [{"lm": "x"}], "fields": {"lm": 1}, "signature": {"base_url": "x"}}}) is None


@pytest.mark.parametrize("harm", ["link", "writable"])
def test_a_pickled_program_that_others_can_change_is_not_read(tmp_path: Path, harm: str) -> None:
    path = Path(pickle_program(programs.TwoModules(), programs.exact, str(tmp_path / "scratch")))
    spec = ProgramSpec("-", "-", pickle_path=str(path))
    assert isinstance(load_program(spec), dspy.Module)
    if harm == "link":
        path.rename(tmp_path / "elsewhere.pkl")
        path.symlink_to(tmp_path / "elsewhere.pkl")
    else:
        path.chmod(0o666)
    with pytest.raises(ConfigError, match="symbolic link" if harm == "link" else "others may write") as error:
        load_program(spec)
    one_sentence(error)


# -- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OUTWARD, "9" * 5000, "\ud800", None, 3, ["a"]])
def test_a_path_that_leads_out_is_not_followed(tmp_path: Path, name: Any) -> None:
    with pytest.raises(RunDirError, match="is not followed") as error:
        inside(tmp_path, name)
    one_sentence(error)


def test_a_link_counts_as_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "run" / "own").mkdir(parents=True)
    (tmp_path / "run" / "in").symlink_to("own")
    (tmp_path / "run" / "out").symlink_to(tmp_path)
    (tmp_path / "run" / "circle").symlink_to("circle")
    assert inside(tmp_path / "run", "in/x") == tmp_path / "run" / "in" / "x"
    for name in ("out", "out/x", "circle"):
        with pytest.raises(RunDirError, match="symbolic link"):
            inside(tmp_path / "run", name)
    (tmp_path / "other name").symlink_to(tmp_path / "run")  # the run directory itself may be reached by one
    assert inside(tmp_path / "other name", "own")


def committed(root: Path) -> Step:
    step = Step(root, StepKey("rollout", {"a": 1}))
    step.begin()
    (step.files / "file").write_text("own")
    step.commit("p", {"passed": 1}, Cost())
    return step


@pytest.mark.parametrize("name", OUTWARD[:3])
def test_a_record_vouches_for_no_file_outside_of_its_step(tmp_path: Path, name: str) -> None:
    step = committed(tmp_path)
    data = json.loads((step.folder / "record.json").read_text())
    data["files"] = {name: "0" * 64}
    forge(step.folder, data)
    with pytest.raises(RunDirError, match="is not followed"):
        step.record()


def test_links_in_a_run_directory_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    run, away = tmp_path / "run", tmp_path / "away"
    step = committed(run)
    away.mkdir()
    (away / "a.jsonl").write_text('{"example_id": "x", "sample": 0, "accept": true, "error": null}\n')
    (step.rows / "a.jsonl").symlink_to(away / "a.jsonl")
    with pytest.raises(RunDirError, match="symbolic link"):
        read_rows(step.rows)
    with pytest.raises(RunDirError, match="symbolic link"):
        _link_tree(step.folder, tmp_path / "fork")
    (away / "secret").write_text("not the run's")
    file = next(step.files.iterdir())
    file.unlink()
    file.symlink_to(away / "secret")
    data = json.loads((step.folder / "record.json").read_text())
    data["files"] = {str(file.relative_to(step.folder)): file_sha256(away / "secret")}
    forge(step.folder, data)
    with pytest.raises(RunDirError, match="symbolic link"):
        step.record()
    step.folder.rename(away / step.folder.name)
    step.folder.symlink_to(away / step.folder.name)
    with pytest.raises(RunDirError, match="symbolic link"):
        read_record(step.folder)


@pytest.mark.parametrize("name", ["../../away", "p/../../..", "../run.json"])
def test_a_run_directory_names_no_stage_or_step_outside_of_it(tmp_path: Path, name: str) -> None:
    run = RunDir(tmp_path)
    for look in (run.stage, run.stage_record, run.step, run.examples):
        with pytest.raises(RunDirError, match="is not followed"):
            look(name)


@pytest.mark.parametrize("name", ["../x/model", "/home/somebody/model", "run:../x", "run:/etc"])
def test_weights_of_a_record_lie_in_the_run_directory(tmp_path: Path, name: str) -> None:
    data = Weights("w", "lora", name, "").to_json()
    with pytest.raises(RunDirError, match="is not followed"):
        weights_of.from_record(data, tmp_path / "files", MINE, tmp_path)


def test_weights_of_another_step_are_named_from_the_run_directory(tmp_path: Path) -> None:
    """An adapter on a fully tuned model: its base is another step's. The record holds no path of this machine."""
    files = tmp_path / "steps" / "finetune-2" / "files-0001"
    base = str(tmp_path / "steps" / "finetune-1" / "files-0001" / "model")
    tuned = Weights("w", "lora", str(files / "merged"), base, str(files / "adapter"))
    record = weights_of.to_record(tuned, files, MINE, tmp_path)
    assert str(tmp_path) not in json.dumps(record) and record["base_dir"] == "run:steps/finetune-1/files-0001/model"
    assert weights_of.from_record(record, files, MINE, tmp_path) == tuned
    moved = weights_of.from_record(record, Path("/new/steps/finetune-2/files-0001"), MINE, Path("/new"))
    assert moved.base_dir == "/new/steps/finetune-1/files-0001/model"


def test_this_file_plants_pickles_that_work(tmp_path: Path) -> None:
    pickle.loads(plant(tmp_path / "a.bin", tmp_path / "mark").read_bytes())
    assert (tmp_path / "mark").exists() and os.access(tmp_path / "mark", os.R_OK)
