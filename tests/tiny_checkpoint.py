"""A checkpoint folder of a few kilobytes: random weights, and a byte-level tokenizer trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minillm.loader import save_checkpoint

from .helpers import tiny_config, tiny_model

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>"]
TEXT = ["the dog sat on the mat and the cat sat on the dog", "once upon a time there was a little girl"]


def write_checkpoint(folder: Path, *, bos: bool = True, template: bool = False) -> Path:
    """Write the files of a model with 512 positions; `template`: ChatML, whose answers end with <|im_end|>."""
    special = SPECIAL if bos else SPECIAL[:2]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>"} | ({"bos_token": "<s>"} if bos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    if template:
        (folder / "chat_template.jinja").write_text(CHATML)
    padded = tokenizer.get_vocab_size() + 4  # rows of the embedding that mean nothing, as real checkpoints have
    config = tiny_config(vocab_size=padded, bos_token_id=2 if bos else None, eos_token_ids=(1,))
    save_checkpoint(folder, tiny_model(config), config)
    return folder
