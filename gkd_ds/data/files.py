"""Where rows come from: files, directories, saved datasets, the hub."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

from gkd_ds.data.rows import COLUMNS
from gkd_ds.runtime.errors import InputError, first_line, name_list

SUFFIXES = (".jsonl", ".json", ".parquet")
USUAL_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}

# JSON rows stay text until they are checked: Arrow would refuse the whole file for one row of
# another shape, without saying which.
JSON_COLUMN, PLACE_COLUMN = "__json__", "__place__"


def read_dataset(name: str, split: str, config: str | None = None) -> datasets.Dataset:
    """One split of a file (.json, .jsonl, .parquet), a directory or a dataset on the hub (with its
    `config`).

    A directory holds what `save_to_disk` wrote, or files named by split (train.jsonl,
    test-00000-of-00002.parquet, also under data/), or files of other names that together are
    "train". A single file, and a single saved dataset, is whatever split one asks for. JSON rows
    arrive undecoded, for tokenize() to check. Raises InputError.
    """
    if not name:
        raise InputError(
            "the dataset's name is empty; give a file, a directory or a name on the hub"
        )
    path = Path(name).expanduser()
    if path.is_file():
        _refuse_slice(name, split)
        return _read_files([path])
    if path.is_dir():
        _refuse_slice(name, split)
        return _read_directory(path, split)
    if (
        not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
        or path.suffix in SUFFIXES
        or name.startswith(".")
    ):
        raise InputError(
            f"dataset '{name}' does not exist; give a file, a directory or a name on the hub"
        )
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # a download fails in more ways than its libraries document
        raise InputError(
            f"'{name}' is no local file or directory, and its split '{split}' cannot be loaded "
            "from the hub: "
            f"{first_line(error)}"
        ) from error


def dataset_splits(name: str, config: str | None = None) -> list[str]:
    """The splits that read_dataset() finds; for a single file only "train", so no evaluation runs
    on it.
    """
    path = Path(name).expanduser()
    if path.is_file() or (path / "state.json").is_file():
        return ["train"]
    if (path / "dataset_dict.json").is_file():
        return list(_load_saved(path))
    if path.is_dir():
        return sorted(_split_files(path))
    try:
        return datasets.get_dataset_split_names(name, config)
    except Exception as error:  # as above
        raise InputError(f"dataset '{name}' cannot be found: {first_line(error)}") from error


def _refuse_slice(name: str, split: str) -> None:
    if "[" in split or "+" in split:
        raise InputError(
            f"split '{split}' is hub syntax, but '{name}' is local; name a whole split"
        )


def _read_directory(path: Path, split: str) -> datasets.Dataset:
    if (path / "state.json").is_file():
        return _load_saved(path)
    saved = (path / "dataset_dict.json").is_file()
    splits = _load_saved(path) if saved else _split_files(path)
    if split not in splits:
        raise InputError(f"'{path}' has no split '{split}'; it has: {name_list(sorted(splits))}")
    return splits[split] if saved else _read_files(splits[split])


def _load_saved(path: Path) -> datasets.Dataset | datasets.DatasetDict:
    try:
        return datasets.load_from_disk(str(path))
    except (
        datasets.exceptions.DatasetsError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
    ) as error:
        raise InputError(
            f"the dataset saved in '{path}' cannot be loaded: {first_line(error)}"
        ) from error


def _split_files(path: Path) -> dict[str, list[Path]]:
    """Data files by split: the file's name without suffix and shard number."""
    splits: dict[str, list[Path]] = {}
    files = []
    for folder in (path, path / "data"):
        if not files and folder.is_dir():
            files = sorted(
                file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file()
            )
    if not files:
        raise InputError(
            f"'{path}' holds no dataset: no saved one and no {', '.join(SUFFIXES)} file"
        )
    for file in files:
        splits.setdefault(re.sub(r"-\d+-of-\d+(-\w+)?$", "", file.stem), []).append(file)
    if not splits.keys() & USUAL_SPLITS:
        splits["train"] = files
    return splits


def _read_files(files: list[Path]) -> datasets.Dataset:
    suffixes = {file.suffix for file in files}
    if not suffixes <= set(SUFFIXES):
        raise InputError(
            f"'{files[0]}' is not a dataset file; give one that ends in {', '.join(SUFFIXES)}"
        )
    if suffixes == {".parquet"}:
        return _read_parquet(files)
    if ".parquet" in suffixes:
        raise InputError(
            f"'{files[0].parent}' mixes Parquet and JSON files in one split; keep one kind"
        )
    places, rows = [], []
    for file in files:
        for place, row in _read_json(file):
            places.append(f"{file.name}, {place}")
            rows.append(row)
    table = {
        JSON_COLUMN: pyarrow.array(rows, pyarrow.large_binary()),
        PLACE_COLUMN: pyarrow.array(places, "string"),
    }
    return datasets.Dataset(pyarrow.table(table))


def _read_json(file: Path) -> Iterator[tuple[str, bytes]]:
    """Every row of a JSON file, still JSON, with its place. JSON Lines, or one array (told by its
    first character).
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"'{file}' cannot be read ({first_line(error)})") from error
    encoding = json.detect_encoding(content)
    if not encoding.startswith("utf-8"):
        raise InputError(f"'{file}' is {encoding[:6].upper()} text; save it as UTF-8")
    if file.suffix == ".json" and content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"'{file}' is not valid JSON: {first_line(error)}") from error
        yield from (
            (f"row index {index}", json.dumps(row).encode()) for index, row in enumerate(rows)
        )
        return
    lines = [line.strip() for line in content.split(b"\n")]
    _refuse_one_object(file, [line for line in lines if line])
    for number, line in enumerate(lines, start=1):
        if line:
            yield f"line {number}", line


def _refuse_one_object(file: Path, lines: list[bytes]) -> None:
    """Raise InputError where all of a file is one JSON object that is no row: rows below a key,
    columns, or something else written over several lines.
    """
    if len(lines) != 1 and (not lines or _is_json(lines[0])):
        return
    try:
        whole = json.loads(b"\n".join(lines))
    except (ValueError, RecursionError):
        return  # the line that is wrong will be named
    if not isinstance(whole, dict) or (len(lines) == 1 and _is_row(whole)):
        return
    raise InputError(
        f"'{file}' holds one JSON object with the keys {name_list(list(whole))}; rows are a list, "
        "or one object per line, each with 'messages', or with 'prompt' and 'completion'"
    )


def _is_row(found: dict) -> bool:
    """Whether an object is a row, good or bad, rather than what holds rows or their columns."""
    known = {name: found[name] for name in COLUMNS if name in found}
    if not known:
        return not any(isinstance(value, list | dict) for value in found.values())
    firsts = {name: value[0] for name, value in known.items() if isinstance(value, list) and value}
    return not any(
        isinstance(first, list) or (isinstance(first, str) and name != "messages")
        for name, first in firsts.items()
    )


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def decode_json(row: object) -> object:
    if not isinstance(row, Mapping) or JSON_COLUMN not in row:
        return row
    try:
        return json.loads(row[JSON_COLUMN])
    except (ValueError, RecursionError) as error:
        raise InputError(f"the row is not valid JSON: {first_line(error)}") from error


def _read_parquet(files: list[Path]) -> datasets.Dataset:
    """Our columns; of the others the names alone, since a warning will tell them."""
    tables, others = [], {}
    for file in files:
        try:
            names = pyarrow.parquet.read_schema(file).names
            # With none of our columns, keep all: the complaint about it lists them.
            ours = [name for name in COLUMNS if name in names] or names
            tables.append(pyarrow.parquet.read_table(file, columns=ours))
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(
                f"'{file}' is not a readable Parquet file: {first_line(error)}"
            ) from error
        others |= {name: None for name in names if name not in ours}
    try:
        table = pyarrow.concat_tables(tables).replace_schema_metadata(None)
    except pyarrow.ArrowException as error:
        raise InputError(
            f"the Parquet files in '{files[0].parent}' differ in their columns"
        ) from error
    for name in others:
        table = table.append_column(name, pyarrow.nulls(len(table)))
    return datasets.Dataset(table)
