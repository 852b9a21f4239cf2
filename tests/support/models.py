"""Small networks with random weights, saved as a user's folders are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from atoll.backbones.small_tokenizer import END, PAD, own_tokenizer, vocabulary
from atoll.job.job import Job
from atoll.learning.learner import Learner


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


def small_wav2vec2(
    folder: Path, *, norm: str = "layer", kind: str = "Wav2Vec2", letters: bool = True
) -> Path:
    """A wav2vec 2.0 or HuBERT of two layers; without `letters` it has no output layer, as before tuning."""
    import json

    import transformers

    symbols = ["<pad>", "<s>", "</s>", "<unk>", "|", *"EABCDFGHIJKLMNOPQRSTUVWXYZ'"]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(symbols), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, conv_dim=(16, 16, 16), conv_kernel=(10, 8, 4), conv_stride=(8, 8, 5),
        feat_extract_norm=norm, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=norm == "layer", hidden_dropout=0.0, layerdrop=0.0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCTC" if letters else f"{kind}Model")(config).save_pretrained(folder)
    if letters:
        (folder / "vocab.json").write_text(json.dumps({s: n for n, s in enumerate(symbols)}))
    return folder


def small_whisper(
    folder: Path, *, kind: str = "WhisperForConditionalGeneration", positions: int = 1500
) -> Path:
    """A Whisper of two layers on each side, with the table of pieces that its folders have."""
    import json

    import transformers

    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, num_mel_bins=80, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=positions, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({"!": 0, "Ġthe": 1, "a": 2}))
    return folder


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The way of writing chats that SmolLM2, Qwen and others have."""


def byte_tokenizer(*, template: str | None = CHATML, pad: str | None = "<|im_end|>") -> Any:
    """A token for each byte and a few for pairs; like SmolLM2's it ends, and fills up, with `<|im_end|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("h", "e"), ("l", "l"), ("\u0120", "he"), ("\u010a", "\u010a")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = [*special, *letters, *(one + other for one, other in merges)]
    pieces = Tokenizer(models.BPE({token: number for number, token in enumerate(known)}, merges))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.add_special_tokens(special)
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=pieces, eos_token="<|im_end|>", pad_token=pad, chat_template=template)


def small_llama(folder: Path, *, tied: bool = True, tokenizer: Any = None) -> Path:
    """A Llama of two blocks of width 16, with a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def causal_job(task: str, source: str, folder: Path, tune: dict[str, Any], options: dict[str, Any]) -> Job:
    """Two clients, one round, with the causal model in the folder."""
    table: dict[str, Any] = {
        "name": "small",
        "seed": 4,
        "task": {"name": task, "options": options},
        "data": {"source": source},
        "backbone": {"name": str(folder)},
        "tune": tune,
        "train": {"optimizer": "adam", "lr": 0.01, "batch_size": 4},
        "federation": {"clients": 2, "rounds": 1},
    }
    return Job.parse(table, origin="test")


def moved(learner: Learner) -> dict[str, torch.Tensor]:
    """The tuned tensors away from where they start."""
    generator = torch.Generator().manual_seed(5)
    return {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in learner.initial().items()}
