"""Train a small SentencePiece tokenizer (BPE with byte fallback, the Llama kind) that AutoTokenizer
loads.

    python tools/train_tokenizer.py corpus.txt more.jsonl --output tokenizer --vocab_size 4000
    python tools/train_tokenizer.py train.jsonl --output tokenizer --chat_template chatml.jinja \
        --special_tokens '<|im_start|>' '<|im_end|>'

Text files give one text per line; JSONL files give every string of a row except the `role` of a
message. A few thousand pieces take a second. The directory gets tokenizer.model, tokenizer.json,
tokenizer_config.json and, with --chat_template, the template; without one gkd_ds uses its plain
template. Wrong input: one sentence, exit code 2.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gkd_ds.runtime.errors import InputError  # noqa: E402  (a tool also runs where the package is not installed)

BOS, EOS, UNK = "<s>", "</s>", "<unk>"


def train_tokenizer(
    texts: Iterable[str],
    directory: str | Path,
    vocab_size: int,
    special_tokens: Iterable[str] = (),
    eos_token: str = EOS,
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """Train on texts, write the directory, and return the tokenizer as AutoTokenizer loads it from
    there.

    vocab_size counts everything, the 256 bytes and the special tokens included. Raises InputError
    where SentencePiece cannot make that many (or so few) pieces of the texts.
    """
    special_tokens = [token for token in special_tokens if token not in (BOS, UNK, eos_token)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,  # no text is unknown
            normalization_rule_name="identity",  # decoding gives back what was encoded, spaces included
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=1 << 20,  # bytes; longer texts would be left out silently
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            unk_piece=UNK, bos_piece=BOS, eos_piece=eos_token,
            user_defined_symbols=special_tokens,
            num_threads=1,  # the same file gives the same tokenizer
            minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"SentencePiece cannot train {vocab_size} pieces on this text: {reason}"
        ) from error
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "tokenizer.json").unlink(
        missing_ok=True
    )  # of an earlier training; it would be preferred
    names = {"unk_token": UNK, "bos_token": BOS, "eos_token": eos_token, "pad_token": eos_token}
    described = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        **names,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"extra_special_tokens": special_tokens})
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def read_texts(file: Path) -> Iterator[str]:
    """The texts of one file, one per line of text. Raises InputError with file and line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{file}' cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if file.suffix != ".jsonl":
            yield line
        elif line.strip():
            try:
                yield from _strings(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(f"'{file}', line {number}, is not valid JSON: {error}") from error


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield from value.encode(errors="replace").decode().splitlines()
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "role":
                yield from _strings(item)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="+", type=Path, help="text files, or JSONL files by their suffix"
    )
    parser.add_argument("--output", required=True, type=Path, help="directory for the tokenizer")
    parser.add_argument(
        "--vocab_size", type=int, default=4000, help="all pieces, bytes and special tokens"
    )
    parser.add_argument(
        "--special_tokens", nargs="*", default=[], help="further tokens that are never split"
    )
    parser.add_argument("--eos_token", default=EOS, help="text of the end-of-sequence token")
    parser.add_argument(
        "--chat_template", type=Path, help="a Jinja file, stored with the tokenizer"
    )
    args = parser.parse_args(arguments)
    try:
        template = None
        if args.chat_template is not None:
            template = "\n".join(read_texts(args.chat_template))
        texts = [text for file in args.files for text in read_texts(file) if text.strip()]
        tokenizer = train_tokenizer(
            texts, args.output, args.vocab_size, args.special_tokens, args.eos_token, template
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{args.output}: {len(tokenizer)} tokens from {len(texts)} texts, eos {tokenizer.eos_token}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
