"""The pieces that TRL's trainers are extended with, and the one of supervised fine-tuning.

Called in training workers only (torch, trl).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bt_ray.config import WeightStep
from bt_ray.errors import TrainingError
from bt_ray.training.checkpoint_trust import BestIsChecked
from bt_ray.training.history import held_out_losses, stops_early
from bt_ray.training.sft import TrainShape, sft_kwargs, tree_fits
from bt_ray.training.tokens import TokenRow, Tree, pack_tree

IGNORED = -100  # label of a token without loss


@dataclass(frozen=True)
class TrainerParts:
    """What the trainer of every method is made of. `arguments`: its TRL config. `adapter`: the
    LoraConfig of a new adapter, or None. `train`, `held_out`: rows as the method tokenises them."""

    step: WeightStep
    arguments: Any
    model: Any
    adapter: Any
    tokenizer: Any
    train: list[Any]
    held_out: list[Any]
    callbacks: list[Any]

    def keywords(self) -> dict[str, Any]:
        """Arguments that TRL's trainers share."""
        return {
            "model": self.model,
            "args": self.arguments,
            "processing_class": self.tokenizer,
            "peft_config": self.adapter,
            "callbacks": self.callbacks,
        }


def sft_arguments(step: WeightStep, shape: TrainShape) -> Any:
    """The trl.SFTConfig of a step."""
    from trl import SFTConfig

    return SFTConfig(**sft_kwargs(step, shape))


def sft_trainer(parts: TrainerParts) -> Any:
    """The trainer of supervised fine-tuning; its batches are trees where that is exact."""
    text_config = parts.model.config.get_text_config()
    sliding = bool(getattr(text_config, "use_sliding_window", False))
    longest = max(len(row) for row in (*parts.train, *parts.held_out))
    tree = tree_fits(parts.step, text_config.model_type, sliding, longest)
    print(f"rows {len(parts.train)}, held out {len(parts.held_out)}, batches as trees: {tree}", flush=True)
    trainer = trainer_class()(
        train_dataset=to_dataset(parts.train),
        eval_dataset=to_dataset(parts.held_out) if parts.held_out else None,
        data_collator=collate_tree if tree else None,
        **parts.keywords(),
    )
    if parts.held_out:
        trainer.held_out_tokens = sum(len(row.completion) for row in parts.held_out) / len(parts.held_out)
    return trainer


def to_dataset(tokens: Sequence[TokenRow]) -> Any:
    """A datasets.Dataset that SFTTrainer takes as it is: token ids, and labels on the answers only."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [[*row.prompt, *row.completion] for row in tokens],
            "labels": [[IGNORED] * len(row.prompt) + list(row.completion) for row in tokens],
        }
    )


def collate_tree(examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
    """Batch of one sequence: ids and positions [1, T], mask [1, 1, T, T], the K indices whose next
    token has a loss, and these tokens [1, K]."""
    rows = []
    for example in examples:
        length = sum(label == IGNORED for label in example["labels"])
        ids = example["input_ids"]
        rows.append(TokenRow(tuple(ids[:length]), tuple(ids[length:])))
    return tree_tensors(pack_tree(rows))


def tree_tensors(tree: Tree) -> dict[str, Any]:
    """A packed tree as the tensors of a forward pass."""
    import torch

    size = len(tree.ids)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for index, parent in enumerate(tree.parents):  # a parent always comes before its children
        if parent >= 0:
            mask[index] = mask[parent]
        mask[index, index] = True
    targets = torch.tensor([tree.targets])
    return {
        "input_ids": torch.tensor([tree.ids]),
        "position_ids": torch.tensor([tree.positions]),
        "attention_mask": mask[None, None],
        "logits_to_keep": torch.tensor(tree.sources),
        "labels": targets,
        "shift_labels": targets,  # already shifted: the trainer counts them as they are
    }


def trainer_class() -> type:
    """SFTTrainer with the loss of packed trees, and without model cards."""
    from torch.nn.functional import cross_entropy
    from trl import SFTTrainer

    class TreeSFTTrainer(BestIsChecked, SFTTrainer):  # type: ignore[misc]
        held_out_tokens = 0.0  # answer tokens of a held-out row, on average

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if not self.model.training:
                # Held-out rows come one by one and their losses are averaged. With this divisor the
                # average is the mean over their tokens, as the loss of a training step is.
                num_items_in_batch = self.held_out_tokens * self.accelerator.num_processes
            if "logits_to_keep" not in inputs:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            inputs = dict(inputs)
            targets = inputs.pop("shift_labels")[0]
            inputs.pop("labels")
            # The head only reads the positions with a loss: TRL's own head on a CPU reads all, with a
            # vocabulary of 49 thousand words a quarter of all work.
            logits = model(**inputs, use_cache=False).logits[0]
            total = cross_entropy(logits.float(), targets, reduction="sum")
            # Mean over the answer tokens of the whole optimiser step, over all workers and micro batches;
            # gradients are averaged over the workers, hence the factor.
            loss = total / num_items_in_batch * self.accelerator.num_processes
            return (loss, logits) if return_outputs else loss

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """No card per checkpoint: the bundle's card is written once, from the run's record."""

    return TreeSFTTrainer


def finite_callback(report: Callable[[Any, Any], None]) -> Any:
    """A callback that stops at the first loss or weight that is not finite, and calls `report(args, state)`
    after each checkpoint. All workers come to the same decision, so none is left waiting."""
    from transformers import TrainerCallback

    class FiniteCallback(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            for name, words in (("loss", "loss"), ("eval_loss", "held-out loss")):
                loss = (logs or {}).get(name)
                if loss is not None and not math.isfinite(float(loss)):
                    raise TrainingError(
                        f"fine-tune: the {words} is {loss} at step {state.global_step} of {state.max_steps}. Lower "
                        f"learning_rate (now {args.learning_rate:g}) or raise warmup_share. The last finite checkpoint is kept."
                    )

        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            # The loss of a step is that of the weights before its update, so the weights themselves are checked
            # before they become a checkpoint.
            if not weights_finite(model):
                raise TrainingError(
                    f"fine-tune: weights that are not finite after step {state.global_step} of {state.max_steps}. "
                    f"Lower learning_rate (now {args.learning_rate:g}). The last finite checkpoint is kept."
                )

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            report(args, state)

    return FiniteCallback()


def patience_callback(patience: int | None) -> Any:
    """A callback that ends training after `patience` epochs without a lower held-out loss. It counts in
    the trainer's own log, which a checkpoint holds, so a resumed training stops where the first would have."""
    from transformers import TrainerCallback

    class PatienceCallback(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if stops_early(held_out_losses(state.log_history), patience):
                control.should_training_stop = True

    return PatienceCallback()


def weights_finite(model: Any) -> bool:
    """Whether every trainable weight, of every worker's share, is a number. A collective call."""
    import torch
    import torch.distributed as dist

    bad = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            share = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3 leaves each worker only its share
            bad = bad or float(not bool(torch.isfinite(share.detach()).all()))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        flag = torch.tensor([bad], device=next(model.parameters()).device)
        dist.all_reduce(flag)
        bad = flag.item()
    return bad == 0.0
