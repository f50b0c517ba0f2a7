from pathlib import Path

import pytest

from bt_ray import config_file
from bt_ray.config import PromptStep, RunConfig, Section, WeightStep
from bt_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
GOOD = """program: tasks:Program
metric: tasks:metric
data: {train: a.jsonl, val: b.jsonl, inputs: [message]}
strategy: "p -> w"
steps:
  p: {optimizer: random_fewshot}
  w: {method: sft}
"""


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_good_config_and_its_base_dir(tmp_path):
    config = config_file.load(write(tmp_path, GOOD))
    assert isinstance(config.steps["p"], PromptStep)
    assert isinstance(config.steps["w"], WeightStep)
    assert config.base_dir == str(tmp_path)
    assert config.strategy_steps() == [("p", "w")]


def test_round_trip_through_json(tmp_path):
    config = config_file.load(write(tmp_path, GOOD))
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("metric:", "metrik:", "line 2: unknown key 'metrik'; did you mean 'metric'"),
        ("inputs:", "imputs:", "line 3: unknown key 'data.imputs'; did you mean 'inputs'"),
        (
            "{optimizer: random_fewshot}",
            "{optimizer: x, num_candidate: 3}",
            "line 6: unknown key 'steps.p.num_candidate'; did you mean 'num_candidates'",
        ),
        ("{method: sft}", "{method: sft, lora_rank: 12}", "line 7: steps.w: lora_rank 12 cannot be served"),
        ("{method: sft}", "{method: rl}", "line 7: steps.w.method: Input should be 'sft'"),
        ("{method: sft}", "{method: stf}", "(got 'stf'); did you mean 'sft'?"),
        ("{method: sft}", "{epochs: 2}", "neither `optimizer`"),
        ("{method: sft}", "{method: sft, optimizer: x}", "has both"),
        ("{method: sft}", "{method: sft, global_batch_size: 5, num_workers: 2}", "no multiple of num_workers"),
        ('"p -> w"', '"p -> v"', "which `steps` lacks"),
        ("  w:", "  final:", "the name is taken"),
        ("program: tasks:Program\n", "", "the key 'program' is missing"),
        ("strategy:", "strategy: [", "no valid YAML"),
        ("[message]", "*anchor", "YAML"),
        (
            "{method: sft}",
            "{method: sft, num_candidates: 3}",
            "line 7: unknown key 'steps.w.num_candidates'; "
            "`num_candidates` is a key of prompt steps (`optimizer`), and steps.w is a weight step",
        ),
        (
            "{optimizer: random_fewshot}",
            "{optimizer: gepa, epochs: 3}",
            "unknown key 'steps.p.epochs'; `epochs` is a key of weight steps (`method`), and steps.p is a prompt step",
        ),
        ("{method: sft}", "{method: sft, epoch: 3}", "unknown key 'steps.w.epoch'; did you mean 'epochs'?"),
        (
            "{optimizer: random_fewshot}",
            "{optimizer: gepa, proposer: {modl: x}}",
            "line 6: unknown key 'steps.p.proposer.modl'; did you mean 'model'?",
        ),
        (
            "{optimizer: random_fewshot}",
            "{optimizer: gepa, proposer: {model: x, zzz: 1}}",
            "unknown key 'steps.p.proposer.zzz'; known keys: api_key_env, api_key_file, base_url, engine, model",
        ),
        ("  w: {method: sft}", "  WeightStep: {method: sft, epoch: 3}", "'steps.WeightStep.epoch'; did you mean 'epochs'?"),
        ("metric:", "program: a:B\nmetric:", "line 2: the key 'program' stands twice, first at line 1; keep one of the two"),
        ("{method: sft}", "{method: sft, epochs: 2, epochs: 3}", "line 7: the key 'steps.w.epochs' stands twice"),
        ("strategy:", "extra: [{a: 1, a: 2}]\nstrategy:", "line 4: the key 'extra.a' stands twice"),
        ("  w:", "  my-step: {method: sft}\n  w:", "line 7: steps.my-step: no strategy can name this step"),
    ],
)
def test_bad_config_names_line_and_remedy(tmp_path, old, new, says):
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        config_file.load(write(tmp_path, GOOD.replace(old, new)))
    assert says in str(error.value)


def test_a_key_is_suggested_for_the_kind_of_step_that_an_override_makes_it(tmp_path):
    path = write(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"'steps\.w\.epoch'; did you mean 'epochs'"):
        config_file.load(path, ("steps.w.epoch=4",))
    with pytest.raises(ConfigError, match=r"steps\.w is a weight step"):
        config_file.with_overrides(config_file.load(path), ("steps.w.num_candidates=4",))


COMPLETE = """program: bt_ray.tasks.helpdesk:Helpdesk
metric: bt_ray.tasks.helpdesk:exact_intent
data: {train: train.jsonl, val: val.jsonl, test: test.jsonl, inputs: [message], search_share: 0.5}
model: smollm2-135m
adapter: compact
strategy: "p -> w -> p"
rollout: {samples: 2, temperature: 1.0, max_tokens: 32, metric_threshold: 1.0, constrain: true, timeout_s: 120}
steps:
  p: {optimizer: random_fewshot, num_candidates: 6, max_bootstrapped_demos: 4, max_labeled_demos: 4, student: original, teacher: incoming}
  w: {method: sft, tuning: lora, lora_rank: 16, lora_alpha: 32, target_modules: all-linear, epochs: 2, learning_rate: 5.0e-4, global_batch_size: 4, row_prompts: vanilla, num_workers: 1, zero_stage: 2}
engine: {replicas: {min: 1, max: 1}, max_model_len: 2048, tensor_parallel_size: 1}
budget: {max_lm_calls: null, max_seconds: null}
seed: 0
"""


def test_the_complete_example_parses(tmp_path):
    config = config_file.load(write(tmp_path, COMPLETE))
    assert config.strategy_steps() == [("p", "w", "p")]
    assert (config.model, config.adapter, config.data.search_share, config.seed) == ("smollm2-135m", "compact", 0.5, 0)
    assert (config.rollout.samples, config.rollout.constrain, config.rollout.timeout_s) == (2, True, 120)
    assert (config.steps["p"].optimizer, config.steps["p"].student, config.steps["p"].teacher) == (
        "random_fewshot",
        "original",
        "incoming",
    )
    assert (config.steps["w"].lora_alpha, config.steps["w"].learning_rate, config.steps["w"].zero_stage) == (32, 5.0e-4, 2)
    assert (config.engine.replicas.max, config.budget.max_lm_calls, config.budget.max_seconds) == (1, None, None)


def test_missing_file_and_large_file(tmp_path):
    with pytest.raises(ConfigError, match="there is no file"):
        config_file.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="larger than"):
        config_file.load(write(tmp_path, "#" * 1_000_001))


def test_overrides(tmp_path):
    path = write(tmp_path, GOOD)
    config = config_file.load(path, ("steps.w.epochs=4", "engine.replicas.max=2", "seed=7"))
    assert (config.steps["w"].epochs, config.engine.replicas.max, config.seed) == (4, 2, 7)
    with pytest.raises(ConfigError, match=r"key\.sub=value"):
        config_file.load(path, ("steps.w.epochs",))
    with pytest.raises(ConfigError, match="is a value, not a section"):
        config_file.load(path, ("program.x=1",))


def test_frozen():
    config = PromptStep(optimizer="labeled")
    with pytest.raises(ValueError, match="frozen"):
        config.num_candidates = 3


def sections(model=Section):
    for child in model.__subclasses__():
        yield child
        yield from sections(child)


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_every_field_is_documented(section):
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no description"


def shipped():
    return sorted((ROOT / "bt_ray" / "tasks").glob("*/config*.yaml"))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_parses(path):
    assert config_file.load(path).strategy_steps()


def test_sizes_of_a_search_by_one_word():
    for word, sizes in {"light": (6, 4), "medium": (12, 6), "heavy": (18, 8)}.items():
        step = PromptStep.model_validate({"optimizer": "mipro", "auto": word})
        assert (step.num_candidates, step.num_instructions) == sizes
    assert PromptStep.model_validate({"optimizer": "mipro", "auto": "medium", "num_candidates": 3}).num_candidates == 3
    paper = PromptStep.model_validate({"optimizer": "random_fewshot", "preset": "paper"})
    assert (paper.num_candidates, paper.max_bootstrapped_demos, paper.max_labeled_demos) == (6, 3, 3)
    assert (paper.max_train_examples, paper.max_search_examples) == (100, 250)
    given = {"max_train_examples": 15, "max_search_examples": None}
    iris = PromptStep.model_validate({"optimizer": "random_fewshot", "preset": "paper", **given})
    assert (iris.max_train_examples, iris.max_search_examples) == (15, None)
    plain = PromptStep.model_validate({"optimizer": "random_fewshot"})
    assert (plain.max_train_examples, plain.max_search_examples) == (None, None)
    assert PromptStep.model_validate(paper.model_dump()) == paper
    tuned = WeightStep.model_validate({"preset": "paper", "epochs": 2})
    assert (tuned.lora_rank, tuned.lora_alpha, tuned.target_modules, tuned.epochs) == (32, 64.0, ("q_proj", "k_proj"), 2)
    assert (tuned.learning_rate, tuned.global_batch_size) == (1.0e-5, 8)
    assert WeightStep.model_validate(tuned.model_dump()) == tuned


def test_dpo_needs_two_rollouts_of_an_example(tmp_path):
    text = GOOD.replace("method: sft", "method: dpo")
    assert "method: dpo" in text
    config_file.load(write(tmp_path, text), ("rollout.samples=2",))
    with pytest.raises(ConfigError, match=r"set rollout\.samples to 2 or more"):
        config_file.load(write(tmp_path, text), ("rollout.samples=1",))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"proposer": {"model": "big", "engine": {}, "base_url": "http://x/v1"}}, "keep one"),
        ({"proposer": {"model": "big", "engine": {}, "api_key_file": "/run/secrets/key"}}, "keep one"),
        (
            {"proposer": {"model": "big", "api_key_env": "KEY", "api_key_file": "/run/secrets/key"}},
            "both api_key_env and api_key_file",
        ),
        ({"teacher": {"engine": {}}}, "model"),
        ({"teacher": "somebody"}, "original"),
    ],
)
def test_a_proposer_has_one_place_and_a_teacher_has_a_model(step, words):
    with pytest.raises(ValueError, match=words):
        PromptStep.model_validate({"optimizer": "opro", **step})


def test_a_teacher_may_be_another_model_with_prompts_of_either_kind():
    taught = PromptStep.model_validate({"optimizer": "opro", "teacher": {"model": "big", "prompts": "original"}})
    assert taught.teacher_prompts == "original" and taught.teacher.engine.max_model_len == 2048
    assert PromptStep.model_validate({"optimizer": "opro", "teacher": "original"}).teacher_prompts == "original"
