"""Fine-tuning for real on a tiny random model: TRL, PEFT and DeepSpeed, and Ray Train where processes are the subject.

The runs are made once for the whole file: on the cluster side by side as far as its CPUs reach, the others in one warm process.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from tests.support.training_runs import (
    ANSWERS,
    answer_losses,
    kill_once_a_checkpoint_is_committed,
    losses,
    preference,
    start_run,
    tensors,
    train_warm,
    zero_states,
)
from tests.support.training_settings import DIVERGING, DPO, FULL, FULL_DPO, HELD_OUT, IPO, held_out_rows, job_maker, tiny_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_weights(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def make_job(base, tmp_path_factory):
    return job_maker(tmp_path_factory.mktemp("training"), base)


@pytest.fixture(scope="module")
def results(ray_cluster, make_job):
    import ray

    killed = make_job("killed")
    runs = {"killed": start_run(killed), "lora": start_run(make_job("lora"))}
    kill_once_a_checkpoint_is_committed(killed)
    found = dict(zip(runs, ray.get(list(runs.values())), strict=True))
    runs = {
        "again": start_run(make_job("again", {"epochs": 2}, start=found["lora"].weights)),
        "two": start_run(make_job("two", {"num_workers": 2})),
        "nan": start_run(make_job("nan", DIVERGING)),
        "too_long": start_run(make_job("too_long", max_length=20)),
    }
    found.update(zip(runs, ray.get(list(runs.values())), strict=True))
    return found


@pytest.fixture(scope="module")
def warm(results, make_job, tmp_path_factory):
    """Runs of one worker that differ in settings and rows alone."""
    jobs = {
        "zero0": make_job("zero0", {"zero_stage": 0}),
        "anew": make_job("anew", {"zero_stage": 0, "init": "base"}, start=results["lora"].weights),
        "zero1": make_job("zero1", {"zero_stage": 1, "micro_batch_size": 2}),
        "zero3": make_job("zero3", {"zero_stage": 3}),
        "full": make_job("full", {**FULL, "zero_stage": 0}),
        "full3": make_job("full3", {**FULL, "zero_stage": 3}),
        "no_layer": make_job("no_layer", {"layers": [0, 5]}),
        "layers": make_job("layers", {"layers": [1], "epochs": 2}),
        "held_out": make_job("held_out", HELD_OUT, rows="held_out"),
        "dpo": make_job("dpo", DPO, rows="pairs"),
        "ipo": make_job("ipo", IPO, rows="pairs"),
        "full_dpo": make_job("full_dpo", FULL_DPO, rows="pairs"),
        "dpo_again": make_job("dpo_again", DPO, start=results["lora"].weights, rows="pairs"),
    }
    return train_warm(jobs, tmp_path_factory.mktemp("warm"))


@pytest.fixture(scope="module")
def shared(ray_cluster, make_job):
    """The runs of two workers that share out the weights."""
    import ray

    runs = {
        "full2": start_run(make_job("full2", {**FULL, "zero_stage": 2, "num_workers": 2})),
        "two3": start_run(make_job("two3", {"zero_stage": 3, "num_workers": 2})),
    }
    return dict(zip(runs, ray.get(list(runs.values())), strict=True))


def test_a_lora_fine_tune_memorises_and_changes_the_linear_layers_only(results, base, make_job):
    from bt_ray.lm.canary import compute
    from bt_ray.lm.weights import content_hash

    result = results["lora"]
    assert losses(result)[-1] < 0.5 * losses(result)[0]
    assert [entry["step"] for entry in result.history] == list(range(1, 17))
    weights = result.weights
    assert weights.kind == "lora" and weights.base_dir == base.base_dir and weights.embedding_id == base.id
    assert content_hash(base.base_dir) == base.id  # the base on disk is untouched
    assert sorted(path.name for path in Path(weights.adapter_dir).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert all(".lora_A." in key or ".lora_B." in key for key in tensors(weights.adapter_dir))
    before, after = tensors(base.base_dir), tensors(weights.model_dir)
    changed = {key for key in before if not before[key].equal(after[key])}
    assert changed == {key for key in before if "_proj." in key}
    assert not (Path(make_job("lora").scratch_dir) / "trainer" / "lora").exists()  # no second copy of the checkpoints
    assert weights.canary == compute(weights.model_dir) != compute(base.base_dir)


def test_zero_stages_and_micro_batches_do_not_change_the_losses(warm, results):
    for name in ("zero0", "zero1", "zero3"):
        assert losses(warm[name]) == pytest.approx(losses(results["lora"]), rel=1e-3), name


def test_each_zero_stage_is_the_engines_own(warm, make_job):
    """Equal losses do not tell the stages apart: what the engine wrote of itself does."""

    def found(name):
        assert losses(warm[name])
        return zero_states(Path(make_job(name).scratch_dir) / "trainer" / name)

    assert {name: found(name) for name in ("zero0", "zero1", "layers", "zero3", "full", "full3")} == {
        "zero0": [], "zero1": [(1, 1)], "layers": [(2, 1)], "zero3": [(3, 1)], "full": [], "full3": [(3, 1)],
    }  # fmt: skip


def test_a_fine_tune_that_starts_from_the_base_again_forgets_the_adapter(warm):
    assert losses(warm["anew"]) == pytest.approx(losses(warm["zero0"]), rel=1e-3)
    assert warm["anew"].weights.id == warm["zero0"].weights.id and warm["anew"].weights.embedding_id


def test_merged_weights_carry_the_hash_of_their_files(results, warm):
    from bt_ray.lm.weights import adapter_id, content_hash

    for weights in (results["lora"].weights, results["again"].weights, warm["anew"].weights):
        assert weights.model_hash == content_hash(weights.model_dir)
        assert weights.id == adapter_id(weights.embedding_id, content_hash(weights.adapter_dir))


def test_two_workers_give_the_losses_of_one(results):
    assert losses(results["two"]) == pytest.approx(losses(results["lora"]), rel=1e-3)


@pytest.mark.parametrize(("name", "stage"), [("two", 2), ("full2", 2), ("two3", 3)])
def test_two_workers_train_and_each_keeps_its_share_of_the_optimizer(results, shared, make_job, name, stage):
    assert losses({**results, **shared}[name])
    scratch = Path(make_job(name).scratch_dir)
    assert zero_states(scratch / name) == [(stage, 2), (stage, 2)] and zero_states(scratch / "lora") == [(2, 1)]
    logs = [(scratch / "logs" / f"{name}-worker-{rank}.log").read_text(errors="replace") for rank in (0, 1)]
    assert [re.findall(r"worker rank (\d+) pid", log) for log in logs] == [["0"], ["1"]]
    assert not (scratch / "logs" / "lora-worker-1.log").exists()


def test_two_workers_that_share_the_weights_train_the_same_adapter(shared, results):
    assert losses(shared["two3"]) == pytest.approx(losses(results["lora"]), rel=1e-3)
    mine, theirs = (tensors(result.weights.adapter_dir) for result in (shared["two3"], results["lora"]))
    assert mine.keys() == theirs.keys() and all(mine[key].shape == theirs[key].shape for key in theirs)


@pytest.mark.parametrize("name", ["full2", "full3"])
def test_a_full_fine_tune_of_shared_weights_exports_them_whole(shared, warm, name):
    result = {**shared, **warm}[name]
    assert losses(result) == pytest.approx(losses(warm["full"]), rel=1e-3)
    mine, theirs = (tensors(one.weights.model_dir) for one in (result, warm["full"]))
    # the tied head equals the embeddings; it is a tensor of its own in some files, and left out under ZeRO 3
    assert mine.keys() ^ theirs.keys() <= {"lm_head.weight"}
    theirs = {key: theirs[key] for key in theirs.keys() & mine.keys()}
    # AdamW may send a weight whose gradient is almost nothing either way; a whole epoch moves it by 1e-3
    assert all((mine[key] - theirs[key]).abs().mean() < 1e-4 for key in theirs)


def test_every_epoch_leaves_a_checkpoint(results, make_job):
    def epochs(name):
        states = (Path(make_job(name).scratch_dir) / name).glob("checkpoint_*/trainer_state.json")
        return sorted(json.loads(path.read_text())["epoch"] for path in states)

    assert epochs("again") == [1, 2]  # all of them: the two newest are kept
    assert epochs("lora") == [7, 8]


def test_a_killed_worker_resumes_from_its_epoch_and_ends_as_if_nothing_had_happened(results, make_job):
    log = Path(make_job("killed").scratch_dir) / "logs" / "killed-worker-0.log"
    text = log.read_text(errors="replace")
    assert len(set(re.findall(r"pid (\d+)", text))) == 2 and "resuming from" in text
    assert losses(results["killed"]) == pytest.approx(losses(results["lora"]), rel=1e-5)
    mine, theirs = (tensors(results[name].weights.adapter_dir) for name in ("killed", "lora"))
    assert all(mine[key].allclose(theirs[key], atol=1e-5) for key in theirs)


def test_equal_runs_give_equal_tokens_counted(warm, results):
    assert results["lora"].trained_tokens == warm["zero0"].trained_tokens > 8 * 8 * 20
    assert warm["full"].trained_tokens * 2 == results["lora"].trained_tokens  # half the epochs


def test_a_second_weight_step_goes_on_from_the_adapter(results):
    first, again = results["lora"], results["again"]
    assert losses(again)[0] < 0.7 * losses(first)[0]
    assert again.weights.base_dir == first.weights.base_dir and again.weights.embedding_id == first.weights.embedding_id
    assert again.weights.id != first.weights.id


def test_a_full_fine_tune_gives_a_model_of_its_own(warm, base):
    result = warm["full"]
    assert losses(result)[-1] < 0.8 * losses(result)[0]
    weights = result.weights
    assert weights.kind == "full" and weights.adapter_dir is None and weights.embedding_id == weights.id != base.id
    before, after = tensors(base.base_dir), tensors(weights.model_dir)
    assert not before["model.embed_tokens.weight"].equal(after["model.embed_tokens.weight"])
    assert not list(Path(weights.model_dir).glob("*.bin"))  # no pickle in what is kept


def test_a_loss_that_is_no_number_stops_at_once_and_keeps_a_finite_checkpoint(results, make_job):
    error = results["nan"]
    assert type(error).__name__ == "TrainingError" and "learning_rate" in str(error)
    job = make_job("nan")
    log = (Path(job.scratch_dir) / "logs" / "nan-worker-0.log").read_text(errors="replace")
    assert len(re.findall(r"worker rank 0 pid", log)) == 1  # not tried again
    kept = sorted((Path(job.scratch_dir) / "nan").glob("checkpoint_*"))
    assert kept
    for checkpoint in kept:
        assert all(math.isfinite(value.abs().max()) for value in tensors(checkpoint).values())


def test_rows_that_are_too_long_fail_by_name_before_training(results, make_job):
    error = results["too_long"]
    assert type(error).__name__ == "TrainingError"
    assert "8 of 8 rows" in str(error) and "example '0'" in str(error)
    assert not list((Path(make_job("too_long").scratch_dir) / "too_long").glob("checkpoint_*"))


def test_a_layer_that_the_model_lacks_is_refused(warm):
    assert "layers [5] do not exist: the model has 2 layers" in str(warm["no_layer"])


def test_only_the_chosen_layers_get_an_adapter(warm, base):
    weights = warm["layers"].weights
    assert {key.split(".layers.")[1].split(".")[0] for key in tensors(weights.adapter_dir)} == {"1"}
    before, after = tensors(base.base_dir), tensors(weights.model_dir)
    changed = {key for key in before if not before[key].equal(after[key])}
    assert changed == {key for key in before if "_proj." in key and ".layers.1." in key}


def test_the_epoch_with_the_lowest_held_out_loss_is_exported_and_training_stops_soon_after(warm):
    result = warm["held_out"]
    assert losses(result) and result.counts == {"trained": 6, "held_out": 2, "left_out": 0}
    measured = [entry["eval_loss"] for entry in result.history]  # one step per epoch
    best = measured.index(min(measured))
    assert len(measured) == best + 1 + HELD_OUT["early_stopping_patience"] < HELD_OUT["epochs"]
    assert measured[-1] > measured[best] + 0.1
    held = [row for row in held_out_rows() if row["completion"][0]["content"] not in ANSWERS]
    found = answer_losses(result.weights.model_dir, held)
    assert sum(loss for loss, _ in found) / sum(count for _, count in found) == pytest.approx(measured[best], rel=1e-3)


def test_dpo_raises_the_chosen_answers_against_the_rejected_ones(warm, base):
    result = warm["dpo"]
    assert losses(result)[0] == pytest.approx(math.log(2), rel=1e-4)  # policy and reference are the same at first
    assert losses(result)[-1] < 0.9 * math.log(2) and result.history[-1]["reward_margin"] > 0.2
    assert preference(result.weights.model_dir) > preference(base.base_dir) + 2.0
    assert result.weights.kind == "lora" and result.weights.embedding_id == base.id


def test_ipo_begins_at_its_own_loss_and_brings_the_answers_apart(warm, base):
    result = warm["ipo"]
    assert losses(result)[0] == pytest.approx(
        1 / (4 * IPO["dpo_beta"] ** 2), rel=1e-3
    )  # no difference yet, where 1 / (2 beta) is wanted
    assert losses(result)[-1] < 0.9 * losses(result)[0]
    assert preference(result.weights.model_dir) > preference(base.base_dir)


def test_dpo_of_all_weights_has_the_model_that_it_began_with_as_its_reference(warm, base):
    result = warm["full_dpo"]
    assert losses(result)[0] == pytest.approx(math.log(2), rel=1e-4)
    assert losses(result)[-1] < losses(result)[0] and result.history[-1]["reward_margin"] > 0
    assert preference(result.weights.model_dir) > preference(base.base_dir)
    assert result.weights.kind == "full" and result.weights.id != base.id
    before, after = tensors(base.base_dir), tensors(result.weights.model_dir)
    assert not before["model.embed_tokens.weight"].equal(after["model.embed_tokens.weight"])


def test_dpo_on_an_adapter_takes_that_adapter_as_its_reference(warm, results):
    start, again = results["lora"].weights, warm["dpo_again"]
    # with the bare base as reference the first loss would be that of an adapter which has learned already
    assert losses(again)[0] == pytest.approx(math.log(2), rel=1e-4)
    assert abs(again.history[0]["reward_margin"]) < 1e-4 < 0.2 < again.history[-1]["reward_margin"]
    assert preference(again.weights.model_dir) > preference(start.model_dir) + 2.0
    mine, theirs = tensors(again.weights.adapter_dir), tensors(start.adapter_dir)
    assert mine.keys() == theirs.keys() and any(not mine[key].equal(theirs[key]) for key in mine)
    assert len(list(Path(again.weights.adapter_dir).iterdir())) == 2  # the frozen copy is not kept
