"""Real tokenizers of both formats: ids as published, text and ids in pieces, and files that are not tokenizers."""

from __future__ import annotations

import base64
import json
import random
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, processors

from minillm.errors import CheckpointError, PromptError
from minillm.tokenizer import Tokenizer

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|end_header_id|>": 7}

MULTILINGUAL = (
    "The quick brown fox, naïve café — “quotes”… price: 3.14 € / 1,234,567 ¥.\n\n"
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया। สวัสดีชาวโลก\r\n"
    "你好，世界。こんにちは世界！안녕하세요 세계. 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 e\u0301 n\u0303\t\ttabs\n"
    "🦙🙂👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽 mixed🦙in🦙words   three spaces\n    if x == 1:\n        return x  # indented\n"
)
ADVERSARIAL = {
    "letters": "a" * 3000 + "b" * 3000,
    "no spaces": "thequickbrownfoxjumpsoverthelazydog" * 100,
    "only spaces": " " * 5000,
    "ha": "ha ha ha " * 600,
    "emoji": "🦙🙂👩‍👩‍👧‍👦🏳️‍🌈👍🏽" * 120,
    "cjk": "天地玄黄宇宙洪荒日月盈昃辰宿列張" * 150,
    "newlines": "one\ntwo\r\nthree\r\r\n\n\n\n" * 150,
    "digits": "1234567890" * 300,
    "all": MULTILINGUAL * 10,
}


def convert_llama3(ranks_file: Path, folder: Path) -> None:
    """Meta's tiktoken ranks as a tokenizer.json: every split of a token into two known ones becomes a merge."""
    lines = ranks_file.read_bytes().split(b"\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    visible = {byte: token for token, byte in _byte_tokens().items()}
    spell = {token: "".join(visible[byte] for byte in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks]
        merges += [(spell[a], spell[b]) for _, _, a, b in sorted(known)]
    vocab = {spell[token]: rank for token, rank in ranks.items()}
    hf = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    hf.decoder = decoders.ByteLevel()
    names = {offset: name for name, offset in LLAMA3_SPECIAL.items()}
    hf.add_special_tokens([names.get(i, f"<|reserved_special_token_{i}|>") for i in range(256)])
    bos = "<|begin_of_text|>"
    hf.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, len(ranks))])
    folder.mkdir()
    hf.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": "<|end_of_text|>"}))


def _byte_tokens() -> dict[str, int]:
    """GPT-2's spelling of bytes, as the library itself applies it."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled: dict[str, int] = {}
    for byte in range(128):
        spelled[level.pre_tokenize_str(chr(byte))[0][0]] = byte
    for byte in range(128, 256):  # a byte above 127 needs company to be text: take it from a character that has it
        lead, trail = (bytes([0xC4, byte]), 1) if byte < 0xC0 else (bytes([byte, 0x80, 0x80, 0x80]), 0)
        spelled.setdefault(_GPT2_EXTRA[byte - 128] if not trail else level.pre_tokenize_str(lead.decode())[0][0][1], byte)
    return spelled
