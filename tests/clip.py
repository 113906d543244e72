"""A small CLIP with its tokenizer, on disk as users have it."""

import json
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel

WORDS = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]


def save_clip(folder: Path, tokens: int = 8, width: int = 16, seed: int = 1) -> str:
    """One layer with random weights and a vocabulary of a and b; returns the folder's name."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": WORDS[0], **dict.fromkeys(("eos_token", "unk_token", "pad_token"), WORDS[1])}
    settings = {"tokenizer_class": "CLIPTokenizer", **special, "model_max_length": tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = CLIPTextConfig(
        vocab_size=6, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tokens, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPTextModel(config).save_pretrained(folder)
    return str(folder)
