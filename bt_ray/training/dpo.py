"""Direct preference optimisation: settings, and the trainer of a worker.

The loss is that of Rafailov et al. (arXiv 2305.18290), or IPO (Azar et al., arXiv 2310.12036) over
the mean log-ratio of an answer's tokens; the loop is TRL's DPOTrainer. The reference is what
training starts from:

- a new adapter: the same model with the adapter switched off;
- an adapter that is trained on: a frozen second copy of it, which TRL loads under the name "ref"
  (exported is the trained one alone);
- every weight: a second copy of the model, read from the folder that the first came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bt_ray.config import WeightStep
from bt_ray.training.checkpoint_trust import BestIsChecked
from bt_ray.training.sft import TrainShape, trainer_kwargs
from bt_ray.training.tokens import TokenPair
from bt_ray.training.trainer import TrainerParts

REFERENCE = ".ref."  # part of the names of TRL's frozen copy of an adapter


def dpo_kwargs(step: WeightStep, shape: TrainShape) -> dict[str, Any]:
    """Arguments of trl.DPOConfig. Dropout is off in both policies, else they would differ by chance."""
    return {
        **trainer_kwargs(step, shape),
        "beta": step.dpo_beta,
        "loss_type": [step.dpo_loss],
        "disable_dropout": True,
        # TRL caches precomputed ones in a folder of one process, where a second worker does not find them.
        "precompute_ref_log_probs": False,
    }


def dpo_arguments(step: WeightStep, shape: TrainShape) -> Any:
    """The trl.DPOConfig of a step."""
    from trl import DPOConfig

    return DPOConfig(**dpo_kwargs(step, shape))


def dpo_trainer(parts: TrainerParts) -> Any:
    """The trainer of preference pairs."""
    print(f"pairs {len(parts.train)}, held out {len(parts.held_out)}, loss {parts.step.dpo_loss}", flush=True)
    trainer = trainer_class()(
        train_dataset=to_dataset(parts.train),
        eval_dataset=to_dataset(parts.held_out) if parts.held_out else None,
        **parts.keywords(),
    )
    match_reference_dtype(trainer.model)
    return trainer


def to_dataset(pairs: Sequence[TokenPair]) -> Any:
    """A datasets.Dataset with the columns that TRL's preference collator reads."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "prompt_ids": [list(pair.prompt) for pair in pairs],
            "chosen_ids": [list(pair.chosen) for pair in pairs],
            "rejected_ids": [list(pair.rejected) for pair in pairs],
        }
    )


def trainer_class() -> type:
    """DPOTrainer over tokens as they are, and without model cards."""
    from trl import DPOTrainer

    class TokenDPOTrainer(BestIsChecked, DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            """Nothing: the pairs are token ids already, cut where the engine's answer begins and ends."""
            return dataset

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """No card per checkpoint: the bundle's card is written once, from the run's record."""

    return TokenDPOTrainer


def match_reference_dtype(model: Any) -> None:
    """Give the frozen copy of an adapter the dtype of the trained one: TRL makes it in float32, and
    two dtypes side by side break ZeRO-3's gathering."""
    trained = dict(model.named_parameters())
    for name, parameter in trained.items():
        if REFERENCE in name:
            parameter.data = parameter.data.to(trained[name.replace(REFERENCE, ".default.")].dtype)
