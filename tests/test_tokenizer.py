"""Real tokenizers of both formats: ids as published, text and ids in pieces, and files that are not tokenizers."""

# ruff: noqa: RUF001 (letters of other alphabets that look like Latin ones are the point)

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
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

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
    "letters": "a" * 800 + "b" * 800,
    "no spaces": "thequickbrownfoxjumpsoverthelazydog" * 100,
    "only spaces": " " * 3000,
    "ha": "ha ha ha " * 200,
    "emoji": "🦙🙂👩‍👩‍👧‍👦🏳️‍🌈👍🏽" * 60,
    "cjk": "天地玄黄宇宙洪荒日月盈昃辰宿列張" * 80,
    "newlines": "one\ntwo\r\nthree\r\r\n\n\n\n" * 80,
    "digits": "1234567890" * 200,
    "blank lines": " \n" * 400 + "k",
    "blank lines in words": "a" + " \n" * 301 + "b" + "\n" * 500 + "c",
    "all": MULTILINGUAL * 5,
}


def convert_llama3(ranks_file: Path, folder: Path) -> None:
    """Meta's tiktoken ranks as a tokenizer.json: every split of a token into two known ones becomes a merge."""
    lines = ranks_file.read_bytes().split(b"\n")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    visible: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
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


@pytest.fixture(scope="module")
def folders(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every real tokenizer as a checkpoint folder would hold it."""
    root = tmp_path_factory.mktemp("tokenizers")
    found = {
        "stories": shared_data / "models" / "stories260K",
        "mistral-json": shared_data / "hf-metadata" / "Mistral-7B-Instruct-v0.3",
        "llama1-json": shared_data / "tokenizers" / "llama1-hf",
        "llama2-spm": shared_data / "tokenizers" / "llama2",
        "llama3": root / "llama3",
    }
    for name, model in {
        "mistral-v1-spm": shared_data / "tokenizers" / "mistral" / "tokenizer.model.v1",
        "mistral-v3-spm": shared_data / "tokenizers" / "mistral" / "tokenizer.model.v3",
        "stories-spm": shared_data / "models" / "stories260K" / "tokenizer.model",
    }.items():
        (root / name).mkdir()
        shutil.copy(model, root / name / "tokenizer.model")
        found[name] = root / name
    convert_llama3(shared_data / "tokenizers" / "llama3" / "tokenizer.model", root / "llama3")
    return found


NAMES = [
    "stories",
    "mistral-json",
    "llama1-json",
    "llama2-spm",
    "llama3",
    "mistral-v1-spm",
    "mistral-v3-spm",
    "stories-spm",
]


@pytest.fixture(scope="module")
def load(folders: dict[str, Path]) -> Callable[[str], Tokenizer]:
    loaded: dict[str, Tokenizer] = {}

    def get(name: str) -> Tokenizer:
        if name not in loaded:
            loaded[name] = Tokenizer.from_folder(folders[name])
        return loaded[name]

    return get


Load = Callable[[str], Tokenizer]


@pytest.mark.parametrize(("name", "vectors"), [("llama2-spm", "llama-spm"), ("llama3", "llama-bpe")])
def test_published_vectors(shared_data: Path, load: Load, name: str, vectors: str) -> None:
    file = shared_data / "tokenizers" / "vectors" / f"ggml-vocab-{vectors}.gguf"
    texts = file.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [[int(id_) for id_ in line.split()] for line in file.with_suffix(".gguf.out").read_text().split("\n")]
    assert len(texts) == len(expected) == 47
    wrong = [text for text, ids in zip(texts, expected, strict=True) if load(name).encode(text, bos=False) != ids]
    assert wrong == []


@pytest.mark.parametrize("name", NAMES)
def test_sizes_bos_and_eos(load: Load, name: str) -> None:
    tokenizer = load(name)
    sizes = {"stories": 512, "llama": 32_000, "mistral-v1": 32_000, "mistral": 32_768}
    expected = 128_256 if name == "llama3" else next(size for start, size in sizes.items() if name.startswith(start))
    assert tokenizer.vocab_size == expected
    first, last = (128_000, 128_001) if name == "llama3" else (1, 2)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (first, (last,))


@pytest.mark.parametrize("name", NAMES)
def test_exactly_one_bos(load: Load, name: str) -> None:
    tokenizer = load(name)
    bos = tokenizer.bos_id
    assert bos is not None
    plain = tokenizer.encode("Hello", bos=False)
    assert bos not in plain
    assert tokenizer.encode("Hello", bos=True) == [bos, *plain]
    assert tokenizer.encode("", bos=True) == [bos]
    assert tokenizer.encode("", bos=False) == []
    # A text that already begins with it, such as a rendered template, does not get a second one.
    written = tokenizer.piece(bos) + "Hello"
    assert tokenizer.encode(written, bos=True).count(bos) == 1
    assert tokenizer.encode(written, bos=False).count(bos) == 1
    assert tokenizer.encode_stream([written], bos=True).tolist().count(bos) == 1
    assert tokenizer.encode_stream([], bos=True).tolist() == [bos]
    assert tokenizer.encode_stream([], bos=False).tolist() == []


def test_sentencepiece_plain_text_has_its_own_ids(folders: dict[str, Path], load: Load) -> None:
    for name in ("llama2-spm", "mistral-v1-spm", "mistral-v3-spm", "stories-spm"):
        library = sentencepiece.SentencePieceProcessor(model_file=str(folders[name] / "tokenizer.model"))
        for text in (MULTILINGUAL, *ADVERSARIAL.values()):
            assert load(name).encode(text, bos=False) == library.encode(text)


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_finds_special_tokens_in_text(
    folders: dict[str, Path], tmp_path: Path, legacy: bool, shared_data: Path
) -> None:
    """Control pieces and added tokens, with spaces around them as in the original tokenizer of this model."""
    shutil.copy(folders["mistral-v3-spm"] / "tokenizer.model", tmp_path)
    added = {"32768": {"content": "<|extra|>", "special": True}, "32769": {"content": "<think>", "special": False}}
    config = {"bos_token": "<s>", "eos_token": "</s>", "legacy": legacy, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("[INST] hi[/INST]<|extra|><think>a</s>", bos=False)
    pieces = [tokenizer.piece(id_) for id_ in ids]
    gap, a = (["▁", "▁hi"], "▁a") if legacy else (["▁hi"], "a")
    assert pieces == ["[INST]", *gap, "[/INST]", "<|extra|>", "<think>", a, "</s>"]
    assert tokenizer.vocab_size == 32_770
    assert tokenizer.decode(ids).split() == (["hi<think>", "a"] if legacy else ["hi<think>a"])
    if not legacy:  # the same model's tokenizer.json was made from this behaviour
        published = Tokenizer.from_folder(shared_data / "hf-metadata" / "Mistral-7B-Instruct-v0.3")
        text = "<s>[INST] Hello  there[/INST] General\n Kenobi</s>[INST]x[/INST]"
        assert tokenizer.encode(text, bos=False) == published.encode(text, bos=False)


# llama1-json is left out: transformers 5 no longer uses that folder's tokenizer.json as it stands.
@pytest.mark.parametrize("name", ["stories", "mistral-json", "llama3"])
def test_ids_and_text_equal_transformers(folders: dict[str, Path], load: Load, name: str) -> None:
    tokenizer, theirs = load(name), AutoTokenizer.from_pretrained(folders[name])
    bos, eos = (tokenizer.piece(id_) for id_ in (tokenizer.bos_id or 0, tokenizer.eos_ids[0]))
    for text in (MULTILINGUAL, f"{bos}Hello{eos} there {eos}\n{bos}", "  two spaces"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, bos=False) == ids
        expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize("name", NAMES)
def test_decoding_gives_the_text_back(load: Load, name: str) -> None:
    texts = ["Hello world", *ADVERSARIAL.values(), MULTILINGUAL]
    for text in texts:
        if name == "stories-spm":  # this model has room for one space only
            text = " ".join(text.replace("\n", " ").split())
        elif text.startswith(" ") and name in ("stories", "mistral-json"):
            text = "x" + text  # these files take a written first space for the one put first
        ids = load(name).encode(text, bos=True)
        assert load(name).decode(ids) == text


def test_continuation_keeps_the_first_space(load: Load) -> None:
    for name in ("llama2-spm", "llama1-json", "mistral-json", "stories"):
        ids = load(name).encode("world", bos=False)
        assert load(name).decode(ids) == "world"
        assert load(name).decode(ids, continuation=True) == " world"


@pytest.mark.parametrize("name", NAMES)
def test_incremental_decoding_equals_decoding_at_once(load: Load, name: str) -> None:
    tokenizer = load(name)
    rng = random.Random(0)
    sequences = [tokenizer.encode(text, bos=True) for text in (MULTILINGUAL, *ADVERSARIAL.values())]
    for ids in sequences:
        decoder = tokenizer.stream()
        shown = [decoder.push(id_) for id_ in ids]
        assert decoder.flush() == ""
        assert "\ufffd" not in "".join(shown)
        assert "".join(shown) == tokenizer.decode(ids)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(60))]
        decoder = tokenizer.stream(continuation=True)
        text = "".join(map(decoder.push, ids)) + decoder.flush()
        assert text == tokenizer.decode(ids, continuation=True)


def test_a_character_appears_with_its_last_byte(load: Load) -> None:
    for name in NAMES:
        decoder = load(name).stream()
        shown = [decoder.push(id_) for id_ in load(name).encode("🦙🙂", bos=False)]
        assert "".join(shown) == "🦙🙂"
        assert len(shown) > 2
        assert set("".join(shown)) == {"🦙", "🙂"}
        assert shown[-1].endswith("🙂")


def test_an_unfinished_character_waits_for_flush(load: Load) -> None:
    decoder = load("llama2-spm").stream()
    assert [decoder.push(3 + byte) for byte in "🦙".encode()[:3]] == ["", "", ""]
    assert decoder.flush() == "\ufffd"


def test_decoder_state_is_bounded(load: Load) -> None:
    decoder = load("mistral-json").stream()
    rng = random.Random(1)
    for _ in range(1000):
        decoder.push(rng.randrange(32_768))
    tracemalloc.start()
    for _ in range(100_000):
        decoder.push(rng.randrange(32_768))
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 4096


def test_pieces_and_ids_out_of_range(load: Load) -> None:
    assert load("llama2-spm").piece(13) == "<0x0A>"
    assert load("mistral-json").piece(3) == "[INST]"
    assert load("llama3").piece(128_000) == "<|begin_of_text|>"
    for name in NAMES:
        tokenizer = load(name)
        for wrong in (-1, tokenizer.vocab_size):
            with pytest.raises(PromptError, match=f"token id {wrong} .* 0 to {tokenizer.vocab_size - 1}"):
                tokenizer.piece(wrong)
            with pytest.raises(PromptError, match="out of range"):
                tokenizer.decode([wrong])


def test_lone_surrogates_are_refused(load: Load) -> None:
    for name in ("llama2-spm", "llama3"):
        with pytest.raises(PromptError, match="surrogate at character 1"):
            load(name).encode("a\udcff", bos=True)


def pieces_of(text: str, rng: random.Random) -> Iterator[str]:
    at = 0
    while at < len(text):
        step = rng.choice((0, 1, 3, 50, 5000))
        yield text[at : at + step]
        at += step


@pytest.mark.parametrize("name", NAMES)
def test_stream_equals_whole_on_a_book(shared_data: Path, load: Load, name: str) -> None:
    text = (shared_data / "text" / "moby-dick.txt").read_text(encoding="utf-8")[:300_000]
    streamed = load(name).encode_stream(pieces_of(text, random.Random(0)), bos=True)
    assert streamed.dtype == torch.int32
    assert streamed.tolist() == load(name).encode(text, bos=True)


@pytest.mark.parametrize("name", NAMES)
def test_stream_equals_whole_with_tiny_windows(load: Load, name: str) -> None:
    tokenizer = load(name)
    eos = tokenizer.piece(tokenizer.eos_ids[0])
    marked = MULTILINGUAL.replace(" ", f" {eos}", 20).replace("\n", f"{eos} \n") * 3
    for text in (*ADVERSARIAL.values(), marked):
        whole = tokenizer.encode(text, bos=False)
        for window in (60, 700):
            got = tokenizer.encode_stream(pieces_of(text, random.Random(window)), bos=False, window=window)
            assert got.tolist() == whole, (text[:20], window)


def test_stream_memory_does_not_grow_with_the_text(shared_data: Path, load: Load) -> None:
    text = (shared_data / "text" / "moby-dick.txt").read_text(encoding="utf-8")[:20_000]

    def peak(copies: int) -> tuple[int, int]:
        tracemalloc.start()
        ids = load("mistral-json").encode_stream((text for _ in range(copies)), bos=True, window=4096)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used, len(ids)

    (small, few), (large, many) = peak(2), peak(16)
    assert many > 7 * few
    assert large - small < 10 * (many - few)  # int32 storage and its spare room; Python integers would take 36


BROKEN = {
    "empty": ({}, "neither tokenizer.json nor tokenizer.model"),
    "tekken": ({"tekken.json": "{}"}, "tekken.json, which is not supported"),
    "lfs json": ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"}, "git-lfs pointer"),
    "lfs model": ({"tokenizer.model": "version https://git-lfs.github.com/spec/v1\n"}, "git-lfs pointer"),
    "cut json": ({"tokenizer.json": '{"version": "1.0", "model'}, "is not a tokenizer"),
    "no model": ({"tokenizer.json": "{}"}, "is not a tokenizer"),
    "garbage model": ({"tokenizer.model": "garbage" * 9}, "is not a sentencepiece model"),
    "empty model": ({"tokenizer.model": ""}, "is not a sentencepiece model"),
    "tiktoken": ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, "tiktoken ranks"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    files, reason = BROKEN[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [("{", "not valid JSON"), ("[]", "not a JSON object"), ('{"bos_token": "<begin>"}', "not in the vocabulary")],
)
def test_broken_configurations_are_refused(folders: dict[str, Path], tmp_path: Path, config: str, reason: str) -> None:
    shutil.copy(folders["stories"] / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=reason):
        Tokenizer.from_folder(tmp_path)


def test_special_tokens_come_from_the_files_that_are_there(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["stories"] / "tokenizer.json", tmp_path)
    bare = Tokenizer.from_folder(tmp_path)
    assert (bare.bos_id, bare.eos_ids) == (1, ())
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}')
    assert Tokenizer.from_folder(tmp_path).eos_ids == (2,)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    without = Tokenizer.from_folder(tmp_path)
    assert (without.bos_id, without.eos_ids) == (None, (2,))
    assert without.encode("Once", bos=True) == without.encode("Once", bos=False)


def test_tokenizer_json_is_never_truncated_or_padded(folders: dict[str, Path], tmp_path: Path) -> None:
    hf = tokenizers.Tokenizer.from_file(str(folders["stories"] / "tokenizer.json"))
    hf.enable_truncation(3)
    hf.enable_padding(length=50)
    hf.save(str(tmp_path / "tokenizer.json"))
    assert 4 < len(Tokenizer.from_folder(tmp_path).encode("Once upon a time there was", bos=True)) < 50
