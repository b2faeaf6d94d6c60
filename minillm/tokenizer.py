"""Text to ids and back, from the tokenizer files of a checkpoint folder.

Two libraries stand behind one class: `tokenizers` for tokenizer.json (preferred) and `sentencepiece` for
tokenizer.model.  The two files of one model may disagree about spaces; the folder's tokenizer.json is what it was
published with.  This file must not know any model, template or prompt.
"""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CheckpointError, PromptError
from .text import IncrementalDecoder, encode_in_windows
from .vocabulary import (
    Encoded,
    SentencePieceModel,
    TokenizerJson,
    Vocabulary,
    encode_after,
    read_json,
    read_special_tokens,
)

if TYPE_CHECKING:
    import torch


class Tokenizer:
    """A folder's tokenizer. Immutable; all methods may be called from several threads."""

    def __init__(self, vocabulary: Vocabulary, special_tokens: dict[str, str | None]) -> None:
        """`special_tokens` as `read_special_tokens` gives them; what they do not mention is asked of the vocabulary."""
        self._vocabulary = vocabulary
        self._vocab_size = vocabulary.vocab_size()
        self._bos = self._id("bos_token", special_tokens, vocabulary.bos_id())
        eos = self._id("eos_token", special_tokens, vocabulary.eos_id())
        self._eos = () if eos is None else (eos,)
        self._hidden = vocabulary.special_ids() | {id_ for id_ in (self._bos, eos) if id_ is not None}

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json, else tokenizer.model. Raises CheckpointError, which names the file and the remedy."""
        if (folder / "tokenizer.json").is_file():
            return cls(TokenizerJson(folder / "tokenizer.json"), read_special_tokens(folder))
        if (folder / "tokenizer.model").is_file():
            config = read_json(folder / "tokenizer_config.json")
            return cls(SentencePieceModel(folder / "tokenizer.model", config), read_special_tokens(folder))
        if (folder / "tekken.json").is_file():
            raise CheckpointError(
                f"{folder} has only Mistral's tekken.json, which is not supported: add the tokenizer.json of the "
                "Hugging Face version of this model"
            )
        raise CheckpointError(f"{folder} has neither tokenizer.json nor tokenizer.model: download one of them")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that decodes; rows of the embedding from here on are padding."""
        return self._vocab_size

    @property
    def bos_id(self) -> int | None:
        """The id that begins every text, if there is one."""
        return self._bos

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text, as the tokenizer's files say; the model's configuration may name more."""
        return self._eos

    def encode(self, text: str, *, bos: bool, continuation: bool = False) -> list[int]:
        """Ids of `text`, special tokens written in it recognised.

        With `bos`, exactly one BOS stands first if the tokenizer has one; without, only what the text itself says.
        A `continuation` goes on right behind other text: no space is put first.
        Raises PromptError for text that is not Unicode (lone surrogates).
        """
        ids = self._window(text, not continuation)[0]
        return (self._opening(ids[:2]) if bos else []) + ids

    def encode_pieces(
        self, pieces: Iterable[str], *, bos: bool, continuation: bool = False, window: int = 32_768
    ) -> Iterator[torch.Tensor]:
        """The ids `encode` would give for the joined pieces, as int32 tensors of some tokens each, none of them empty.

        Looks at about `window` characters at a time, see `text.encode_in_windows`, and holds no more than that.
        """
        import torch  # only here, so that reading a tokenizer does not take a second

        def encode(text: str, beginning: bool) -> Encoded:
            return self._window(text, beginning and not continuation)

        parts = encode_in_windows(encode, pieces, window=window)
        if bos:
            first: list[int] = []
            for part in parts:
                first += part
                if len(first) >= 2:
                    break
            parts = chain([self._opening(first[:2]) + first], parts)
        for ids in parts:
            if ids:
                yield torch.tensor(ids, dtype=torch.int32)  # [n]

    def encode_stream(self, pieces: Iterable[str], *, bos: bool, window: int = 32_768) -> torch.Tensor:
        """All that `encode_pieces` gives in one tensor [n], at four bytes a token."""
        import torch

        ids = array("i")  # a list of tensors, joined at the end, would hold everything twice
        for part in self.encode_pieces(pieces, bos=bos, window=window):
            ids.extend(part.tolist())
        return torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)

    def special_ids(self) -> list[int]:
        """Ids that are no text, such as those that begin and end one."""
        return sorted(self._hidden)

    def punctuation_ids(self) -> list[int]:
        """Ids whose text, spaces aside, is punctuation and nothing else."""
        found = []
        for token in range(self._vocab_size):
            text = self._bytes(token).decode(errors="replace").strip()
            if text and all(unicodedata.category(character).startswith("P") for character in text):
                found.append(token)
        return found

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """Text of `ids`, without special tokens. For `continuation` see `stream`. PromptError: id out of range."""
        decoder = self.stream(continuation=continuation)
        return "".join([*map(decoder.push, ids), decoder.flush()])

    def stream(self, *, continuation: bool = False) -> IncrementalDecoder:
        """A decoder for ids that come one by one.

        Sentencepiece writes a space before the first word of every text, and decoding drops it.  For a `continuation`
        of other text that first space is real, and kept.
        """
        return IncrementalDecoder(self._bytes, strip_space=self._vocabulary.adds_space and not continuation)

    def piece(self, token: int) -> str:
        """The vocabulary's own spelling of an id, such as "▁the", "Ġthe", "<0x0A>" or "<s>"."""
        self._check(token)
        return self._vocabulary.piece(token)

    def token_bytes(self, token: int) -> bytes:
        """What an id stands for in UTF-8, or a part of it; the spelling of an id that is no text, such as "<s>"."""
        self._check(token)
        return self.piece(token).encode() if token in self._hidden else self._vocabulary.token_bytes(token)

    def _bytes(self, token: int) -> bytes:
        self._check(token)
        return b"" if token in self._hidden else self._vocabulary.token_bytes(token)

    def _check(self, token: int) -> None:
        if not 0 <= token < self._vocab_size:
            raise PromptError(f"token id {token} is out of range: this tokenizer has ids 0 to {self._vocab_size - 1}")

    def _opening(self, first_two: list[int]) -> list[int]:
        """The BOS to put first, unless the text itself says it; old Llama files then put an empty piece before it."""
        written = self._bos in first_two and self.decode(first_two[: first_two.index(self._bos)]) == ""
        return [] if self._bos is None or written else [self._bos]

    def _window(self, text: str, beginning: bool) -> Encoded:
        """Ids and the character each starts at. Only the `beginning` of a text gets a space put first."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the text has a lone surrogate at character {error.start}: it is not UTF-8") from None
        encode = self._vocabulary.encode
        return encode(text) if beginning or not self._vocabulary.adds_space else encode_after(encode, text)

    def _id(self, name: str, special_tokens: dict[str, str | None], default: int | None) -> int | None:
        if name not in special_tokens:
            return default
        token = special_tokens[name]
        id_ = None if token is None else self._vocabulary.id_of(token)
        if token is not None and id_ is None:
            raise CheckpointError(f"{name} {token!r} is not in the vocabulary: tokenizer files of different models?")
        return id_
