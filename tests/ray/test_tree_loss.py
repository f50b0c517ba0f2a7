"""The packing of a batch as a tree, against the same rows one by one on a tiny random model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.tiny_model import make_tiny_model
from tests.support.training_runs import chat_rows


def test_a_tree_has_the_loss_and_gradient_of_the_rows_one_by_one(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bt_ray.training.tokens import pack_tree, tokenize_rows
    from bt_ray.training.trainer import tree_tensors

    base_dir = make_tiny_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    rows = tokenize_rows([*chat_rows()][:4], tokenizer, 128)
    rows.append(replace(rows[0], completion=rows[1].completion))  # the same prompt, another answer
    model = AutoModelForCausalLM.from_pretrained(base_dir, attn_implementation="sdpa")
    one_by_one = torch.zeros(())
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.completion]])
        logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
        one_by_one = one_by_one + torch.nn.functional.cross_entropy(logits, ids[0, len(row.prompt) :], reduction="sum")
    expected = torch.autograd.grad(one_by_one, list(model.parameters()))
    batch = tree_tensors(pack_tree(rows))
    assert batch["input_ids"].numel() < 0.7 * sum(len(row) for row in rows)
    targets = batch.pop("shift_labels")[0]
    batch.pop("labels")
    packed = torch.nn.functional.cross_entropy(model(**batch).logits[0], targets, reduction="sum")
    assert packed.item() == pytest.approx(one_by_one.item(), rel=1e-5)
    for mine, theirs in zip(torch.autograd.grad(packed, list(model.parameters())), expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)
