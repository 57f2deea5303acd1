"""Every kind of file and directory reads alike; what cannot be read is one sentence."""

import json

import datasets
import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.examples import tokenize
from gkd_ds.data.files import dataset_splits, read_dataset
from gkd_ds.runtime.errors import InputError
from tests.unit.data.chats import QWEN2, ROWS, byte_level_tokenizer, write_jsonl
from tests.unit.data.fuzz import ROW


def fingerprint(dataset, config, where="x"):
    return tokenize(dataset, byte_level_tokenizer(QWEN2), config, where, [0, 2]).fingerprint


@pytest.mark.parametrize(
    "kind", ["jsonl", "crlf", "bom", "json lines", "json array", "parquet", "saved"]
)
def test_every_kind_of_file_reads_alike(tmp_path, config, kind):
    path = tmp_path / f"rows.{'json' if 'json ' in kind else 'jsonl'}"
    lines = [json.dumps(row) for row in ROWS]
    if kind == "jsonl" or kind == "json lines":
        path.write_text("\n".join(lines))
    elif kind == "crlf":
        path.write_bytes("\r\n".join(lines).encode() + b"\r\n")
    elif kind == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    elif kind == "json array":
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "parquet":
        path = tmp_path / "rows.parquet"
        datasets.Dataset.from_list([{"id": 1, **row} for row in ROWS]).to_parquet(path)
    else:
        path = tmp_path / "saved"
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    before = sorted(tmp_path.rglob("*"))
    assert fingerprint(read_dataset(str(path), "any split"), config) == fingerprint(ROWS, config)
    assert dataset_splits(str(path)) == ["train"], "a single file is no evaluation set"
    assert sorted(tmp_path.rglob("*")) == before


def test_directories(tmp_path, config):
    by_split, shards, unnamed, saved = (
        tmp_path / name for name in ("by_split", "shards", "unnamed", "saved")
    )
    for directory in (by_split, shards / "data", unnamed):
        directory.mkdir(parents=True)
    write_jsonl(by_split / "train.jsonl", ROWS[:4])
    write_jsonl(by_split / "test.json", ROWS[4:])
    for index in range(2):
        part = datasets.Dataset.from_list(ROWS[2 * index : 2 * index + 2])
        part.to_parquet(shards / "data" / f"train-0000{index}-of-00002.parquet")
    datasets.Dataset.from_list(ROWS[4:]).to_parquet(shards / "data" / "test-00000-of-00001.parquet")
    write_jsonl(unnamed / "a.jsonl", ROWS[:2])
    write_jsonl(unnamed / "b.jsonl", ROWS[2:4])
    splits = {
        "train": datasets.Dataset.from_list(ROWS[:4]),
        "test": datasets.Dataset.from_list(ROWS[4:]),
    }
    datasets.DatasetDict(splits).save_to_disk(saved)

    for directory in (by_split, shards, unnamed, saved):
        assert fingerprint(read_dataset(str(directory), "train"), config) == fingerprint(
            ROWS[:4], config
        )
        assert ("test" in dataset_splits(str(directory))) == (directory != unnamed)
        if directory != unnamed:
            assert fingerprint(read_dataset(str(directory), "test"), config) == fingerprint(
                ROWS[4:], config
            )
        with pytest.raises(InputError, match="has no split 'dev'; it has: .*'train'"):
            read_dataset(str(directory), "dev")


def test_a_bad_line_among_several_files_is_named(tmp_path, config):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", [ROWS[0], [1]])
    with pytest.raises(InputError, match=r"^corpus, b\.jsonl, line 2: the row must be an object"):
        fingerprint(read_dataset(str(tmp_path), "train"), config, "corpus")


@pytest.mark.parametrize(
    "line, complaint",
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"messages": ["\xff"]}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
        (b"NaN", "must be an object"),
        (b"[]", "must be an object"),
        (b'{"prompt": "\\ud800", "completion": "b"}', "lone surrogate"),
        (b'{"prompt": "\\u0000", "completion": "b"}', "NUL"),
        (b'{"messages": "Hi"}', "must be a list"),
    ],
)
def test_bad_lines(tmp_path, config, line, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + line)
    with pytest.raises(InputError, match=rf"^data, rows\.jsonl, line 2: .*{complaint}"):
        fingerprint(read_dataset(str(path), "train"), config, "data")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_text_that_is_not_utf_8_is_named_as_what_it_is(tmp_path, encoding, name):
    text = json.dumps(ROWS) if name == "rows.json" else "\n".join(map(json.dumps, ROWS))
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(
        InputError, match=rf"{name}' is {encoding[:6].upper()} text; save it as UTF-8"
    ):
        read_dataset(str(tmp_path / name), "train")


ONE_OBJECT = {
    "rows below a key": {"data": ROWS},
    "and more": {"version": "1.0", "info": {"author": "x"}, "rows": ROWS},
    "splits": {"train": ROWS, "test": ROWS},
    "deeper": {"data": {"train": ROWS}},
    "columns": {"prompt": ["a", "b"], "completion": ["c", "d"]},
    "columns of conversations": {"messages": [[{"role": "user", "content": "Hi"}]] * 2},
    "rows by number": {"0": ROWS[0], "1": ROWS[0]},
}


@pytest.mark.parametrize("kind", ONE_OBJECT)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_instead_of_rows_is_named_as_what_it_is(tmp_path, kind, indent):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ONE_OBJECT[kind], indent=indent))
    first = next(iter(ONE_OBJECT[kind]))
    with pytest.raises(
        InputError, match=f"rows.json' holds one JSON object with the keys '{first}'"
    ):
        read_dataset(str(path), "train")


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    "row", [ROWS[0], {"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:]}]
)
def test_a_file_of_one_row(tmp_path, config, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert fingerprint(read_dataset(str(path), "train"), config)
    path.write_text(json.dumps({"text": "Hi"}))
    with pytest.raises(InputError, match="line 1: .*'messages', or 'prompt'.*'text'"):
        fingerprint(read_dataset(str(path), "train"), config)


def test_a_row_over_several_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0], indent=2))
    with pytest.raises(InputError, match="holds one JSON object .* one object per line"):
        read_dataset(str(path), "train")


def test_bad_sources(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    write_jsonl(tmp_path / "mixed" / "train-00000-of-00002.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "mixed" / "train-00001-of-00002.parquet")
    (tmp_path / "rows.csv").write_text("prompt,completion\n")
    (tmp_path / "rows.json").write_text("[1, 2")
    (tmp_path / "rows.parquet").write_text("not parquet")
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(saved)
    next(saved.glob("*.arrow")).write_bytes(b"broken")
    good = write_jsonl(tmp_path / "good.jsonl", ROWS)
    for name, split, complaint in (
        (tmp_path / "missing.jsonl", "train", "does not exist"),
        (tmp_path / "missing", "train", "does not exist"),
        ("../missing/rows", "train", "does not exist"),
        ("rows.parquet", "train", "does not exist"),
        ("", "train", "name is empty"),
        ("https://example.org/rows.csv?token=x", "train", "does not exist"),
        (tmp_path / "empty", "train", "holds no dataset"),
        (tmp_path / "mixed", "train", "mixes Parquet and JSON"),
        (tmp_path / "rows.csv", "train", r"ends in \.jsonl, \.json, \.parquet"),
        (tmp_path / "rows.json", "train", "not valid JSON"),
        (tmp_path / "rows.parquet", "train", "not a readable Parquet file"),
        (saved, "train", "cannot be loaded"),
        (good, "train[:10]", "hub syntax"),
    ):
        with pytest.raises(InputError, match=complaint) as caught:
            read_dataset(str(name), split)
        assert "\n" not in str(caught.value)


def test_a_hub_name_without_a_network_is_one_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match="'nobody/nothing' is no local file .* from the hub: "
    ) as caught:
        read_dataset("nobody/nothing", "train")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="dataset 'nobody/nothing' cannot be found"):
        dataset_splits("nobody/nothing")


@settings(max_examples=80, deadline=None)
@given(
    lines=st.lists(
        st.binary(max_size=30) | ROW.map(lambda row: json.dumps(str(row)).encode()), max_size=4
    )
)
def test_any_file_gives_examples_or_an_input_error(tmp_path_factory, encoders, lines):
    directory = tmp_path_factory.mktemp("fuzz")
    config = GKDConfig(output_dir=str(directory / "run"), row_errors="skip")
    for suffix in ("json", "jsonl"):
        path = directory / f"rows.{suffix}"
        path.write_bytes(b"\n".join([json.dumps(ROWS[0]).encode(), *lines]))
        examples = tokenize(
            read_dataset(str(path), "train"), encoders[2].tokenizer, config, "rows", [0, 2]
        )
        assert len(examples) >= 1
