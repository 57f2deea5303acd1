"""Which student and teacher may be compared, on how many token ids; and the tokenizer trainer of
tools/.
"""

import json
import subprocess
import sys

import pytest
import sentencepiece
import transformers

from gkd_ds.data.vocabulary import new_tokens, shared_vocabulary_size
from gkd_ds.runtime.errors import InputError
from tests import ROOT
from tests.unit.data.chats import CORPUS
from tools.train_tokenizer import main, train_tokenizer


@pytest.mark.parametrize(
    "student, teacher, shared", [(340, 340, 340), (352, 384, 352), (384, 340, 340)]
)
def test_heads_padded_to_different_sizes_share_the_smaller(
    sentencepiece_tokenizer, student, teacher, shared
):
    assert (
        shared_vocabulary_size(sentencepiece_tokenizer, sentencepiece_tokenizer, student, teacher)
        == shared
    )


def test_special_tokens_may_play_other_parts(sentencepiece_tokenizer, sentencepiece_directory):
    teacher = transformers.AutoTokenizer.from_pretrained(
        sentencepiece_directory, eos_token="<s>", pad_token="<unk>"
    )
    assert shared_vocabulary_size(sentencepiece_tokenizer, teacher, 340, 340) == 340


@pytest.mark.parametrize("who, student, teacher", [("student", 339, 340), ("teacher", 340, 300)])
def test_a_head_smaller_than_its_vocabulary_is_refused(
    sentencepiece_tokenizer, who, student, teacher
):
    with pytest.raises(
        InputError,
        match=f"the {who} scores 3.. token ids but the tokenizer knows 340",
    ):
        shared_vocabulary_size(sentencepiece_tokenizer, sentencepiece_tokenizer, student, teacher)


def test_the_first_differing_token_is_shown(sentencepiece_tokenizer, tmp_path):
    other = train_tokenizer([text[::-1] for text in CORPUS], tmp_path, 340)
    ours, theirs = (
        each.convert_ids_to_tokens(list(range(340))) for each in (sentencepiece_tokenizer, other)
    )
    first = next(index for index in range(340) if ours[index] != theirs[index])
    assert first >= 259, "specials and bytes are common to both"
    with pytest.raises(InputError) as caught:
        shared_vocabulary_size(sentencepiece_tokenizer, other, 340, 340)
    expected = (
        f"token id {first} is {ours[first]!r} to the student and {theirs[first]!r} to the teacher"
    )
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_token_that_only_one_side_knows_is_refused(
    sentencepiece_tokenizer, sentencepiece_directory
):
    other = transformers.AutoTokenizer.from_pretrained(sentencepiece_directory)
    other.add_tokens(["<tool_call>"])
    with pytest.raises(
        InputError, match="token id 340 is no token to the student and '<tool_call>' to the teacher"
    ):
        shared_vocabulary_size(sentencepiece_tokenizer, other, 384, 384)
    with pytest.raises(
        InputError, match="'<tool_call>' to the student and no token to the teacher"
    ):
        shared_vocabulary_size(other, sentencepiece_tokenizer, 384, 384)


def test_a_token_that_loading_added_and_no_head_scores_is_no_difference(
    sentencepiece_directory, sentencepiece_tokenizer
):
    """transformers gives every Qwen2 tokenizer an <|endoftext|>, also where the files have none."""
    qwen = transformers.AutoTokenizer.from_pretrained(sentencepiece_directory)
    qwen.add_special_tokens({"pad_token": "<|endoftext|>"})
    assert len(qwen) == 341
    assert shared_vocabulary_size(sentencepiece_tokenizer, qwen, 340, 340) == 340
    assert shared_vocabulary_size(qwen, sentencepiece_tokenizer, 340, 352) == 340


def test_a_token_that_is_new_to_both_is_no_difference(
    sentencepiece_tokenizer, sentencepiece_directory
):
    """The caller's own, and the one for padding, whosever it is; not one of the teacher's."""
    more = transformers.AutoTokenizer.from_pretrained(sentencepiece_directory)
    more.add_tokens(["<tool_call>"])
    new = new_tokens(more, sentencepiece_tokenizer)
    assert new == {340: "<tool_call>"}
    assert shared_vocabulary_size(more, sentencepiece_tokenizer, 384, 384, new) == 384
    assert new_tokens(more, own=more) == new_tokens(more, own=None) == {}
    more.add_special_tokens({"pad_token": "<pad>"})
    assert new_tokens(more, own=more) == {341: "<pad>"}
    with pytest.raises(InputError, match="no token to the student and '<tool_call>' to the teach"):
        shared_vocabulary_size(sentencepiece_tokenizer, more, 384, 384, new)


def test_a_renamed_special_token_is_refused(tmp_path, sentencepiece_tokenizer):
    other = train_tokenizer(CORPUS, tmp_path, 340, eos_token="<|end|>")
    with pytest.raises(
        InputError, match=r"token id 2 is '</s>' to the student and '<\|end\|>' to the teacher"
    ):
        shared_vocabulary_size(sentencepiece_tokenizer, other, 340, 340)


# -- tools/train_tokenizer.py


def test_a_trained_tokenizer_encodes_as_sentencepiece_does(
    sentencepiece_directory, sentencepiece_tokenizer
):
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(sentencepiece_directory / "tokenizer.model")
    )
    for text in ["Hello fox, 345!", "two  spaces \n\n a tab\t", "nie gehörte 漢字 🙂"]:
        ids = sentencepiece_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == model.encode(text)
        assert sentencepiece_tokenizer.decode(ids) == text
    assert (
        sentencepiece_tokenizer("fox")["input_ids"][0] == sentencepiece_tokenizer.bos_token_id == 1
    )
    assert sentencepiece_tokenizer.eos_token_id == sentencepiece_tokenizer.pad_token_id == 2


def test_the_command(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
        for text in CORPUS
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chatml.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    tool = ROOT / "tools" / "train_tokenizer.py"
    command = [sys.executable, str(tool), "rows.jsonl", "--output", "tokenizer"]
    more = ["--special_tokens", "<|im_start|>", "<|im_end|>", "--chat_template", "chatml.jinja"]
    done = subprocess.run(
        [*command, "--vocab_size", "340", *more], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "fox"}], return_dict=False)
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["<|im_start|>", "<|im_end|>"]
    assert len(tokenizer) == 340 and "user" not in tokenizer.get_vocab()


def test_wrong_input_to_the_command_is_one_sentence(tmp_path, capfd):
    (tmp_path / "good.txt").write_text("\n".join(CORPUS))
    (tmp_path / "bad.jsonl").write_text('{"text": "fox"}\n{')
    for file, size, complaint in (
        ("good.txt", 99999, "cannot train 99999 pieces"),
        ("good.txt", 100, "cannot train 100 pieces"),
        ("bad.jsonl", 340, "line 2, is not valid JSON"),
        ("missing.txt", 340, "cannot be read"),
    ):
        arguments = [
            str(tmp_path / file),
            "--output",
            str(tmp_path / "out"),
            "--vocab_size",
            str(size),
        ]
        assert main(arguments) == 2
        error = capfd.readouterr().err
        assert complaint in error and error.count("\n") == 1
