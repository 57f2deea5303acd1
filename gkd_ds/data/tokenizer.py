"""The tokenizer of a run: its special tokens, its chat template, its stop tokens, and text to ids.

    prepare_tokenizer(tokenizer, config)          # in place: eos, pad and chat template of the run
    stop_token_ids(tokenizer, generation_config)  # the ids that end a completion

A template is a program that came with the tokenizer, so whatever it does becomes one sentence.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from gkd_ds.runtime.errors import InputError, first_line, quote, show

# For a tokenizer that has no chat template of its own. The space before the answer belongs to the
# completion, because " word" is one natural token for byte-level and SentencePiece tokenizers
# alike.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

CLOCK_CODES = "%d %-d %m %-m %b %B %y %Y %a %A %H %I %M %S %p %j".split()
# Some templates (Llama 3.2) print today's date. Tokens that change overnight would make a resumed
# run train on other data, so the date is pinned to the one these templates themselves fall back to.
TEMPLATE_DATE = datetime.date(2024, 7, 26)
# A template sees plain data only, no functions of ours, hence a macro in front of it that hides
# transformers' clock.
PINNED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{TEMPLATE_DATE.strftime(code)}')" for code in CLOCK_CODES)
    + " }}{% endmacro %}"
)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Give the tokenizer the tokens and the chat template of the run; changes it in place, safe to
    repeat.

    `eos_token` and `pad_token` of the config must exist in the vocabulary. `chat_template_path` is
    a Jinja file (.jinja, .j2) or a tokenizer whose template is taken over. A tokenizer without a
    template gets PLAIN_CHAT_TEMPLATE; it is saved with the student, so that whoever loads it talks
    to it as it was trained. Raises InputError.
    """
    vocabulary = tokenizer.get_vocab()
    for name in ("eos_token", "pad_token"):
        token = getattr(config, name)
        if token is not None and token not in vocabulary:
            raise InputError(
                f"{name} {quote(token)} is not in the tokenizer's vocabulary; name a token that is"
            )
        if token is not None:
            setattr(tokenizer, name, token)
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token; set eos_token to one from its vocabulary"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template_path is not None:
        tokenizer.chat_template = _read_chat_template(config.chat_template_path)
    if tokenizer.chat_template is None:
        begins = "{{ bos_token }}" if leading_ids(tokenizer) == [tokenizer.bos_token_id] else ""
        tokenizer.chat_template = begins + PLAIN_CHAT_TEMPLATE


def _read_chat_template(path: str) -> str:
    file = Path(path).expanduser()
    if file.suffix in (".jinja", ".j2"):
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"chat_template_path '{path}' cannot be read ({first_line(error)})"
            ) from error
    try:
        template = AutoTokenizer.from_pretrained(path).chat_template
    except (OSError, ValueError) as error:
        raise InputError(
            f"chat_template_path '{path}' is neither a .jinja file nor a tokenizer"
        ) from error
    if template is None:
        raise InputError(f"the tokenizer at chat_template_path '{path}' has no chat template")
    return template


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None
) -> list[int]:
    """The ids that end a completion, sorted: those of the generation config, the tokenizer's
    end-of-sequence token and the end-of-turn token of its chat template (an instruct model may stop
    at <|im_end|> while eos is another).
    """
    configured = None if generation_config is None else generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured] * (configured is not None)
    if not all(isinstance(token_id, int) for token_id in listed):
        raise InputError(
            f"the student's generation config sets eos_token_id to {show(configured)}; write a "
            "token id, or a list of them."
        )
    ids = {token_id for token_id in listed if token_id >= 0}  # -1 says that there is none
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    end_of_turn = end_of_turn_token(tokenizer)
    if end_of_turn is not None:
        ids.add(tokenizer.convert_tokens_to_ids(end_of_turn))
    return sorted(ids)


def end_of_turn_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The special token that the chat template prints right after an assistant's text, or None."""
    if tokenizer.chat_template is None:
        return None
    answer = "An answer"
    messages = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": answer}]
    try:
        text = render(tokenizer, messages, generation_prompt=False)
    except InputError as error:
        raise InputError(
            f"with a question and an answer as messages, {error}; mend the template"
        ) from error
    if answer not in text:
        raise InputError(
            "the tokenizer's chat template does not print a message's text; use one for text "
            "conversations"
        )
    # Added tokens are those that the tokenizer never splits; of two that match the longer one is
    # meant.
    tail = text.rpartition(answer)[2].lstrip()
    candidates = {token.content for token in tokenizer.added_tokens_decoder.values()} | {
        tokenizer.eos_token
    }
    matching = [token for token in candidates if token and tail.startswith(token)]
    return max(matching, key=len, default=None)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    generation_prompt: bool,
    tools: list[dict] | None = None,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """`messages` as the chat template writes them; `variables` are further ones of the template.

    Raises InputError with a clause about the template.
    """
    try:
        template = tokenizer.get_chat_template(tools=tools)
        if "strftime_now" in template:
            template = PINNED_CLOCK + template
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **variables,
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        # It may refuse these messages (roles that must alternate) or stumble over them in any of
        # these ways.
        raise InputError(f"the chat template fails: {first_line(error)}") from error


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text as it stands: special tokens that are written in it count, none is
    added.
    """
    encoded = tokenizer(
        text, add_special_tokens=False, padding=False, truncation=False, verbose=False
    )
    return encoded["input_ids"]


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of a text by itself: [bos] or nothing, usually."""
    plain = token_ids(tokenizer, "a")
    whole = tokenizer("a", verbose=False)["input_ids"]
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []


def continuation_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> list[int]:
    """Token ids of `text` as they follow `prompt`, such that ids(prompt) + result spells prompt +
    text.

    Both are tokenised together: so the text looks to a model that continues the prompt. Where a
    token would cross the boundary (a prompt ending in a space, say), the text is tokenised apart,
    behind a line break: alone, a SentencePiece tokenizer would put another space in front of it.
    """
    for before in (prompt, "\n"):
        head, whole = token_ids(tokenizer, before), token_ids(tokenizer, before + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return token_ids(tokenizer, text)
