"""Do student and teacher speak the same vocabulary, and how much of it do both score?

A divergence compares probabilities of the same token id, so every id must mean the same token to
both models. Heads may be padded to different sizes (Qwen2.5: 151,936 rows for the small models,
152,064 for the large): rows beyond the last token are never targets, and both models are compared
on the part they share.
"""

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from gkd_ds.runtime.errors import InputError


def shared_vocabulary_size(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_vocab_size: int,
    teacher_vocab_size: int,
    new: Collection[int] = (),
) -> int:
    """The number V of token ids that both models score: ids 0..V-1 mean the same to both.

    `*_vocab_size` is the number of rows of the model's head (config.vocab_size), which may exceed
    the number of tokens its tokenizer knows; the teacher need not know those of `new`, ids that
    neither model has been trained with. Raises InputError where the tokenizers differ in any other
    token that both models score, special ones included, or a head is smaller than its vocabulary.
    """
    student = _tokens_by_id(student_tokenizer)
    teacher = _tokens_by_id(teacher_tokenizer)
    shared = min(student_vocab_size, teacher_vocab_size)
    for token_id in sorted(student.keys() | teacher.keys()):
        if token_id in new and token_id not in teacher:
            continue
        if token_id < shared and student.get(token_id) != teacher.get(token_id):
            raise InputError(
                f"student and teacher do not share a vocabulary: token id {token_id} is "
                f"{_show(student, token_id)} to the student and {_show(teacher, token_id)} to the "
                "teacher; "
                "choose two models with one tokenizer"
            )
    # Loading a tokenizer may add a token of its own (Qwen2's <|endoftext|>) that the models have no
    # row for. It does no harm as long as it is not used; the pieces that text is made of must all
    # have one.
    added = student_tokenizer.added_tokens_decoder.keys()
    known = max((token_id for token_id in student if token_id not in added), default=0) + 1
    for name, size in (("student", student_vocab_size), ("teacher", teacher_vocab_size)):
        if size < known:
            raise InputError(
                f"the {name} scores {size} token ids but the tokenizer knows {known}; "
                f"use the tokenizer that belongs to the {name} or resize its embeddings"
            )
    return shared


def new_tokens(
    tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase | None
) -> dict[int, str]:
    """The tokens that the caller's `tokenizer` has beside those of the student's `own` (None: not
    known), by id; and the one for padding, which no model ever sees.
    """
    tokens = _tokens_by_id(tokenizer)
    known = tokens if own is None else _tokens_by_id(own)
    new = {token_id: token for token_id, token in tokens.items() if token_id not in known}
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        new[tokenizer.pad_token_id] = tokenizer.pad_token
    return new


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise InputError(
            "the tokenizer's vocabulary is empty; check the directory that it was loaded from"
        )
    # Sorted, so that of two spellings of one id (an added token over a piece) the same one is kept
    # on both sides.
    return {token_id: token for token, token_id in sorted(vocabulary.items())}


def _show(tokens: dict[int, str], token_id: int) -> str:
    return repr(tokens[token_id]) if token_id in tokens else "no token"
