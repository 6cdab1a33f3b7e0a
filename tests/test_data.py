"""Laws of reading text and cutting it into blocks, on two small tokenizers of the kinds that models use."""

import io
import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tracing_jax.data import (
    Documents,
    ids_of_text,
    load_tokenizer,
    read_documents,
    same_tokenizer,
    shared_tokens,
    token_blocks,
)
from tracing_jax.data import blocks as blocks_module
from tracing_jax.data import documents as documents_module

TEXT = "".join(
    f"The {n}th fox said:  “naïve”, {n * n} times.\n\n Ωmega — 漢字 🦊 {chr(0x4E00 + n)} привет\tand so on, and on;\r\n"
    for n in range(40)
)
DOCUMENTS = Documents(TEXT, {"dataset": "fable"})


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS, as GPT-2's: it splits rare characters into bytes and trims spaces off its offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT[:600]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32)


def sentencepiece_like(first_tokens: tuple[str, ...] = ("<unk>", "<s>")) -> PreTrainedTokenizerFast:
    """BPE over ▁-words that prepends a space, falls back to bytes and adds BOS, as Llama 2's."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*first_tokens, *fallback, *"▁Thefoxsaidnt,.0123456789", "▁T", "an", "▁an"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "T"), ("a", "n"), ("▁", "an")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bos_id = vocabulary["<s>"]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bos_id)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", model_max_length=32)


@pytest.fixture(params=[byte_level, sentencepiece_like])
def tokenizer(request):
    return request.param()


def text_ids(tokenizer, text=TEXT):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


# Blocks


def test_blocks_concatenated_are_the_start_of_the_token_sequence(tokenizer):
    ids = text_ids(tokenizer)
    blocks = token_blocks(DOCUMENTS, tokenizer, block_size=16, bos=False)
    assert blocks.tokens.dtype == np.int32
    assert blocks.tokens.shape == (len(ids) // 16, 16)
    assert blocks.tokens.ravel().tolist() == ids[: blocks.tokens.size]


def test_bos_starts_each_block_where_the_tokenizer_adds_it():
    tokenizer = sentencepiece_like()
    ids = text_ids(tokenizer)
    blocks = token_blocks(DOCUMENTS, tokenizer, block_size=16)
    assert (blocks.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert blocks.tokens[:, 1:].ravel().tolist() == ids[: len(blocks.tokens) * 15]
    assert blocks.source["bos"] is True
    assert token_blocks(DOCUMENTS, byte_level(), block_size=16).source["bos"] is False


@pytest.mark.parametrize("block_size", [2, 7, 16])
def test_bytes_add_up_to_the_text_covered(block_size):
    blocks = token_blocks(DOCUMENTS, sentencepiece_like(), block_size=block_size)
    assert blocks.num_bytes.sum() == len(TEXT[: blocks.text_chars].encode())


@pytest.mark.parametrize("block_size", [2, 7, 16])
def test_bytes_of_given_tokens_are_left_out(block_size):
    tokenizer = byte_level()
    blocks = token_blocks(DOCUMENTS, tokenizer, block_size=block_size)
    predicted = [tokenizer.convert_ids_to_tokens(block[1:].tolist()) for block in blocks.tokens]
    # A byte-level token is spelt with one character per byte. The bytes of a split character all go to its first token.
    num_bytes = np.array([len("".join(tokens)) for tokens in predicted])
    assert (blocks.num_bytes >= 0).all()
    assert np.abs(blocks.num_bytes - num_bytes).max() <= 3


def test_tokens_that_share_a_character_count_it_once():
    tokenizer = sentencepiece_like()
    blocks = token_blocks(Documents("漢字", {"dataset": "two"}), tokenizer, block_size=2)
    assert len(blocks.tokens) == 7  # ▁ and three bytes for each character
    assert blocks.num_bytes.sum() == 6


def test_byte_level_tokens_decode_to_a_prefix_of_the_text():
    tokenizer = byte_level()
    blocks = token_blocks(DOCUMENTS, tokenizer, block_size=16, num_tokens=400)
    decoded = tokenizer.decode(blocks.tokens.ravel(), clean_up_tokenization_spaces=False)
    assert len(decoded) > 100
    assert TEXT[: blocks.text_chars].startswith(decoded.rstrip("�"))
    assert blocks.text_chars <= len(decoded)


def test_num_tokens_keeps_the_first_whole_blocks(tokenizer):
    every = token_blocks(DOCUMENTS, tokenizer, block_size=16)
    some = token_blocks(DOCUMENTS, tokenizer, block_size=16, num_tokens=16 * 5 + 15)
    np.testing.assert_array_equal(some.tokens, every.tokens[:5])
    np.testing.assert_array_equal(some.num_bytes, every.num_bytes[:5])


def test_another_tokenizer_encodes_exactly_the_text_that_the_base_covers():
    base, ft = byte_level(), sentencepiece_like()
    base_blocks = token_blocks(DOCUMENTS, base, block_size=16, num_tokens=160)
    text = DOCUMENTS.prefix(base_blocks.text_chars)
    ft_blocks = token_blocks(text, ft, block_size=2)
    assert ft_blocks.tokens[:, 1].tolist() == text_ids(ft, TEXT[: base_blocks.text_chars])
    assert ft_blocks.num_bytes.sum() == len(text.text.encode())
    assert len(text.text) < len(TEXT)


@pytest.mark.parametrize("piece_chars", [10, 100, 1000])
def test_pieces_of_a_long_text_keep_every_character(piece_chars, monkeypatch):
    monkeypatch.setattr(blocks_module, "_PIECE_CHARS", piece_chars)
    tokenizer = byte_level()
    blocks = token_blocks(DOCUMENTS, tokenizer, block_size=2, bos=False)
    decoded = tokenizer.decode(blocks.tokens.ravel(), clean_up_tokenization_spaces=False)
    assert decoded == TEXT[: blocks.text_chars]
    assert blocks.text_chars >= len(TEXT) - 1


def test_pieces_end_with_lines_where_they_can(monkeypatch):
    monkeypatch.setattr(blocks_module, "_PIECE_CHARS", 6)
    assert list(blocks_module._pieces("ab\ncd\nefghijklm\n")) == [(0, "ab\ncd\n"), (6, "efghij"), (12, "klm\n")]


def test_text_longer_than_the_model_raises_no_warning(tokenizer, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    token_blocks(DOCUMENTS, tokenizer, block_size=16)
    logger.removeHandler(caplog.handler)
    assert tokenizer.model_max_length < len(TEXT) / 100
    assert not caplog.records


def test_hash_tells_tokens_and_block_sizes_apart():
    def digest(documents, block_size):
        return token_blocks(documents, byte_level(), block_size=block_size, num_tokens=96).sha256

    changed = Documents("t" + TEXT[1:], DOCUMENTS.source)
    assert digest(DOCUMENTS, 16) == digest(DOCUMENTS, 16)
    assert len({digest(DOCUMENTS, 16), digest(DOCUMENTS, 32), digest(changed, 16)}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 100_000}, r"the text has \d+ tokens, a block of 100000 needs 100000"),
        ({"block_size": 1}, "block_size must be 2 or more"),
        ({"block_size": 16, "num_tokens": 15}, "num_tokens at least block_size"),
        ({"block_size": 16, "bos": True}, "has no BOS token"),
    ],
)
def test_impossible_blocks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        token_blocks(DOCUMENTS, byte_level(), **arguments)


# Tokenizers


def test_saved_tokenizer_loads(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert same_tokenizer(loaded, tokenizer)
    np.testing.assert_array_equal(
        token_blocks(DOCUMENTS, loaded, block_size=16).tokens, token_blocks(DOCUMENTS, tokenizer, block_size=16).tokens
    )


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    # transformers itself returns an empty tokenizer here.
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(FileNotFoundError, match=r"no tokenizer, expected one of tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_words_in_vocab_txt_are_a_tokenizer_of_the_families_that_read_it_and_an_empty_one_of_others(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert load_tokenizer(tmp_path)("the foxes", add_special_tokens=False)["input_ids"] == [5, 6, 7]
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="empty tokenizer"):
        load_tokenizer(tmp_path)


def test_broken_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot load this tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizers_with_other_ids_or_other_splits_differ():
    swapped = sentencepiece_like(("<s>", "<unk>"))
    splitting = sentencepiece_like()
    splitting.backend_tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    unspaced = sentencepiece_like()
    unspaced.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    assert same_tokenizer(sentencepiece_like(), sentencepiece_like())
    assert same_tokenizer(sentencepiece_like(), splitting)  # there are no merges of digits
    assert not same_tokenizer(sentencepiece_like(), unspaced)
    assert not same_tokenizer(sentencepiece_like(), swapped)
    assert not same_tokenizer(sentencepiece_like(), byte_level())


def test_shared_tokens_pair_ids_of_the_same_string_in_order():
    a, b = byte_level(), sentencepiece_like()
    ids_a, ids_b = shared_tokens(a, b)
    strings = a.convert_ids_to_tokens(ids_a.tolist())
    assert strings == b.convert_ids_to_tokens(ids_b.tolist())
    assert strings == sorted(set(a.get_vocab()) & set(b.get_vocab()))
    assert "an" in strings
    np.testing.assert_array_equal(shared_tokens(b, a)[0], ids_b)


# Reading

ROWS = ["first\u2028row", "", "zweite Größe"]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines) + "\n"
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_rows_of_a_file_are_joined(name, column, tmp_path):
    path = write(tmp_path / name, [{"id": i, column: row} for i, row in enumerate(ROWS)])
    documents = read_documents(str(path))
    assert documents.text == "\n\n".join(ROWS)
    assert documents.source == {
        "dataset": str(path), "config": None, "split": None, "column": column, "separator": "\n\n"
    }  # fmt: skip


def test_text_column_is_taken_before_others_unless_one_is_named(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", [{"title": "a", "text": "b"}, {"title": None, "text": "c"}]))
    assert read_documents(path).text == "b\n\nc"
    assert read_documents(path, text_column="title").text == "a"


def test_text_file_is_one_document_with_its_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\r\nzwölf\n".encode())
    assert read_documents(str(tmp_path / "a.txt")).text == "one\r\n\r\nzwölf\n"


def test_files_of_a_folder_are_read_by_name(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.md").write_text("not read")
    write(tmp_path / "c.jsonl", [{"text": "three"}, {"text": "four"}])
    assert read_documents(str(tmp_path), separator="|").text == "one|two|three|four"


@pytest.mark.parametrize(
    ("dataset", "arguments", "error", "message"),
    [
        ("none.txt", {}, FileNotFoundError, "no such file"),
        ("nowhere/to/be/found", {}, FileNotFoundError, "no such file"),
        ("empty", {}, ValueError, r"of the kinds \.txt, \.json"),
        ("blank.txt", {}, ValueError, "no text in column 'text'"),
        ("latin.txt", {}, ValueError, "utf-8"),
        ("list.json", {}, ValueError, "expected a list of objects"),
        ("half.jsonl", {}, ValueError, r"cannot be read as \.jsonl"),
        ("mixed.jsonl", {}, ValueError, r"cannot be read as \.jsonl"),
        ("noise.parquet", {}, ValueError, r"cannot be read as \.parquet"),
        ("two.jsonl", {}, ValueError, r"choose a string one of question \(string\), answer \(string\), n \(int64\)"),
        ("two.jsonl", {"text_column": "n"}, ValueError, "text column n not found"),
        ("two.jsonl", {"split": "test"}, ValueError, "is local, it has no subset or split"),
        ("no-such/data-set", {}, ValueError, "cannot read the Hub data set 'no-such/data-set'"),
    ],
)
def test_bad_inputs_are_refused(dataset, arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("blank.txt").write_text(" \n")
    Path("latin.txt").write_bytes("Größe".encode("latin-1"))
    Path("list.json").write_text('["a", "b"]')
    Path("half.jsonl").write_text('{"text": "a"}\n{"text": ')
    Path("mixed.jsonl").write_text('{"text": "a"}\n{"text": 1}')
    Path("noise.parquet").write_bytes(b"noise")
    write(Path("two.jsonl"), [{"question": "a", "answer": "b", "n": 1}])
    with pytest.raises(error, match=message):
        read_documents(dataset, **arguments)


def test_reading_stops_with_the_row_that_reaches_the_limit(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": row} for row in ("ab", "cd", "ef")])
    (tmp_path / "b.jsonl").write_text("not read")
    for max_chars, text in [(1, "ab"), (2, "ab"), (3, "ab|cd"), (5, "ab|cd"), (6, "ab|cd|ef"), (8, "ab|cd|ef")]:
        assert read_documents(str(tmp_path), separator="|", max_chars=max_chars).text == text
    with pytest.raises(ValueError, match="cannot be read"):
        read_documents(str(tmp_path), separator="|", max_chars=9)


# The Hub

BROKEN = b"no rows"


@pytest.fixture(params=[".jsonl", ".parquet"])
def hub(request, tmp_path, monkeypatch):
    """Stands a local repository in for every Hub id; returns the list of what was asked for.

    It goes through datasets' own streaming. Whoever opens a file of "train", or the second one of "test", finds noise.
    """
    for name, content in {"train": "", "test-0": "test", "test-1": "", "validation": "dev"}.items():
        path = tmp_path / "repository" / "data" / f"{name}{request.param}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, [{"text": content}, {"text": None}, {"text": "b"}])
        if not content:
            path.write_bytes(BROKEN)
    load, asked = datasets.load_dataset_builder, []

    def load_dataset_builder(path, name):
        asked.append((path, name))
        return load(str(tmp_path / "repository"), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(documents_module, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: None))
    return asked


@pytest.mark.slow
def test_only_files_of_the_split_are_opened_and_only_while_text_is_wanted(hub, tmp_path):
    assert read_documents("wikitext", max_chars=7).text == "test\n\nb"
    assert read_documents("someone/something", subset="small", split="validation").text == "dev\n\nb"
    assert hub == [("Salesforce/wikitext", "wikitext-103-raw-v1"), ("someone/something", "small")]
    assert not list(tmp_path.glob("cache/**/*.arrow"))
    with pytest.raises(ValueError, match="cannot read the Hub data set 'Salesforce/wikitext'"):
        read_documents("wikitext", max_chars=8)


def test_hub_source_says_what_was_chosen(hub):
    assert read_documents("wikitext", max_chars=1).source == {
        "dataset": "Salesforce/wikitext", "config": "wikitext-103-raw-v1", "split": "test", "column": "text",
        "separator": "\n\n",
    }  # fmt: skip


def test_missing_split_or_column_names_those_there_are(hub):
    with pytest.raises(ValueError, match="no split dev: choose one of train, validation, test"):
        read_documents("someone/something", split="dev")
    with pytest.raises(ValueError, match=r"text column body not found: choose a string one of text \(string\)"):
        read_documents("someone/something", text_column="body")


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A cache as `datasets.load_dataset("someone/something")` leaves it."""
    folder = tmp_path / "something"
    folder.mkdir()
    for split in ("train", "test"):
        write(folder / f"{split}.jsonl", [{"text": split}, {"text": "b"}])
    datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "local"))
    (made,) = tmp_path.glob("local/something/default*/*/*/dataset_info.json")
    shutil.copytree(made.parent, tmp_path / "cache/someone___something/default/0.0.0/0123")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=["offline", "no network"])
def unreachable(request, monkeypatch):
    if request.param == "no network":
        monkeypatch.setattr(documents_module.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(documents_module.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there


@pytest.mark.slow
def test_prepared_copy_is_read_without_a_network(unreachable, prepared):
    assert read_documents("someone/something").text == "test\n\nb"
    assert read_documents("someone/something", split="train", max_chars=5).text == "train"
    with pytest.raises(ValueError, match="no split dev: choose one of train, test"):
        read_documents("someone/something", split="dev")


def test_without_a_network_or_a_copy_the_ways_out_are_named(unreachable, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    began = time.monotonic()
    with pytest.raises(ValueError, match="cannot read the Hub data set 'Salesforce/wikitext'") as caught:
        read_documents("wikitext")
    assert time.monotonic() - began < 10
    for part in ("is out of reach", "Couldn't find cache", "--dataset FILE", "load_dataset('Salesforce/wikitext'"):
        assert part in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "code"), [({"max_chars": 1}, 0), ({"text_column": "body"}, 1)])
def test_python_exits_cleanly_after_a_scan_that_was_stopped(arguments, code, tmp_path):
    # Arrow's threads used to abort the process here.
    pq.write_table(pa.table({"text": ["row"] * 5000}), tmp_path / "test.parquet", row_group_size=1000)
    script = f"""if True:
        import datasets
        from types import SimpleNamespace
        from tracing_jax.data import documents
        builder = datasets.load_dataset_builder({str(tmp_path)!r}, cache_dir={str(tmp_path / "cache")!r})
        datasets.load_dataset_builder = lambda *_: builder
        documents.get_session = lambda: SimpleNamespace(head=lambda *_, **__: None)
        print(documents.read_documents("someone/something", **{arguments}).text)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == code, done.stderr
    assert done.stdout.strip() == "row" if code == 0 else "text column body not found" in done.stderr


def test_named_data_sets_have_parts_and_local_copies(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(documents_module, "_hub_tables", lambda *hub: asked.append(hub) or ("test", iter_of("inputs")))
    assert read_documents("aya:english").text == "a row"
    assert asked == [("CohereForAI/aya_collection_language_split", "english", None)]
    for wrong, expected_message in (("aya", "name one, such as aya:english"), ("wikitext2:en", "has no parts")):
        with pytest.raises(ValueError, match=expected_message):
            read_documents(wrong)
    (tmp_path / "m2d2" / "cs_l1").mkdir(parents=True)
    (tmp_path / "m2d2" / "cs_l1" / "a.jsonl").write_text('{"text": "of a field"}\n')
    assert read_documents("m2d2:cs_l1", data_dir=str(tmp_path)).text == "of a field"
    assert len(asked) == 1


def iter_of(column):
    yield "hub", pa.table({column: ["a row"], "targets": ["another"]})


def test_generated_texts_are_prompts_and_what_follows(tmp_path, monkeypatch):
    rows = [
        {"prompt": "Once", "text": " upon", "tokens": [1], "seed": 0},
        {"prompt": "", "text": "x", "tokens": [], "seed": 0},
    ]
    (tmp_path / "m_gentext.json").write_text(json.dumps(rows))
    assert read_documents(f"generated:{tmp_path}", separator="|").text == "Once upon|x"
    assert read_documents(f"generated:{tmp_path}/m_gentext.json", separator="|").text == "Once upon|x"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"generate\.py"):
        read_documents("generated")
    (tmp_path / "m_gentext.json").write_text('[{"text": 1}]')
    with pytest.raises(ValueError, match=r"not a file of generate\.py"):
        read_documents(f"generated:{tmp_path}")


def _sentencepiece_folder(folder, kind="bpe", **settings):
    """A folder with a sentencepiece model as its only tokenizer, and the settings that came with it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS.text.split("\n") * 20), model_writer=model, vocab_size=400, model_type=kind,
        byte_fallback=True, bos_id=1, eos_id=2, unk_id=0, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        {"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": "", "unk_token": ""},
    ],
    ids=["alone", "Llama", "LLaMA, empty special tokens"],
)
def test_sentencepiece_model_alone_is_a_tokenizer(settings, tmp_path):
    tokenizer = load_tokenizer(_sentencepiece_folder(tmp_path / "model", **settings))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model" / "tokenizer.model"))
    assert tokenizer.get_vocab() == {pieces.id_to_piece(i): i for i in range(len(pieces))}
    blocks = token_blocks(DOCUMENTS, tokenizer, block_size=16)
    assert tokenizer.decode(blocks.tokens[0], skip_special_tokens=True).strip()[:8] in DOCUMENTS.text


def test_sentencepiece_models_of_other_names_are_tokenizers(tmp_path):
    folder = _sentencepiece_folder(tmp_path / "model", "unigram")
    (folder / "tokenizer.model").rename(folder / "spiece.model")
    (folder / "config.json").write_text('{"model_type": "t5"}')
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    found, text = load_tokenizer(folder), DOCUMENTS.text.split("\n")[0][:40]
    assert found.convert_ids_to_tokens(found(text)["input_ids"]) == [*pieces.encode(text, out_type=str), "</s>"]


def test_empty_special_tokens_that_the_vocabulary_lacks_stay_empty(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "", "eos_token": "", "unk_token": ""}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert len(load_tokenizer(tmp_path)) == 3


def test_tokenizer_made_by_code_of_the_repository_is_refused(tmp_path):
    code = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    folder = _sentencepiece_folder(tmp_path / "model", **code)
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="made by code in the repository, which is never run"):
        load_tokenizer(folder)


_GROWTH = """
import ctypes, gc, sys
from tracing_jax.data import ids_of_text, load_tokenizer, sample_documents

def resident_kib():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

def read():
    return ids_of_text(load_tokenizer(sys.argv[1]), sample_documents().text)

read(), read()
before = resident_kib()
for _ in range(12):
    read()
print(resident_kib() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_tokenizer_read_is_freed_with_it(family):
    """Half a MiB for each tokenizer otherwise, which the worker of a zoo does not get back."""
    command = [sys.executable, "-c", _GROWTH, str(family.member("base"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert int(done.stdout) < 2048


def test_tokens_of_a_text_are_those_of_short_pieces():
    """A tokenizer can be made that reads long texts otherwise, so that its tokens seem to be in no text."""

    def tokenizer(text, **_):
        return {"input_ids": [7] * 100 if len(text) > 5000 else [1, 2, 3, len(text) % 5] * 10}

    text = "\n\n".join(f"{'word ' * 30}{'x' * i}" for i in range(60))
    assert set(ids_of_text(tokenizer, text)) <= {0, 1, 2, 3, 4}
