"""Small networks with random weights, saved as a user's folders are."""

from __future__ import annotations

from pathlib import Path

import torch

from tasks.wordpieces import END, PAD, own_tokenizer, vocabulary


def small_t5(folder: Path) -> Path:
    """A T5 of two layers on each side, with its tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(vocabulary()), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    own_tokenizer().save_pretrained(folder)
    return folder


def small_bart(folder: Path) -> Path:
    """A BART of two layers on each side, with its tokenizer."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=len(vocabulary()), d_model=32, max_position_embeddings=64,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=PAD, bos_token_id=END, eos_token_id=END,
        decoder_start_token_id=END, forced_eos_token_id=END,
    )  # fmt: skip
    torch.manual_seed(0)
    BartForConditionalGeneration(config).save_pretrained(folder)
    own_tokenizer().save_pretrained(folder)
    return folder
