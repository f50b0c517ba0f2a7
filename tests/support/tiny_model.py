"""A tiny random chat model, for tests that need a real model folder but no sensible answers."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 512
MAX_POSITIONS = 2048
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = (
    "The customer cannot log in to the account and asks for a new password.",
    "Which department answers this question: billing, technical support or sales?",
    "Answer with one of the labels: refund, invoice, delivery, login, other.",
    "Given the fields question, produce the fields answer and reasoning.",
    "Natalia sold 48 clips in April and half as many in May; how many altogether?",
    "[[ ## completed ## ]] {\"intent\": \"card_arrival\", \"score\": 0.25}",
)  # fmt: skip


def make_tiny_model(folder: str | Path, seed: int = 0) -> str:
    """Write a random two-layer Llama with a ChatML template to `folder`; returns its path.

    Equal seeds give equal bytes. The head size of 32 is one that vLLM's CPU attention accepts.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(out)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        # Wide enough that greedy answers differ from prompt to prompt and have clear margins.
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(out)
    return str(out)


def _tokenizer():  # type: ignore[no-untyped-def]
    """A byte-level BPE of `VOCABULARY` entries, learned from a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
