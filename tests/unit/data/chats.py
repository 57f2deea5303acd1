"""Conversations, the templates that render them, and tokenizers for both."""

import json

import tokenizers
import transformers

from gkd_ds.data.examples import RowEncoder
from gkd_ds.data.tokenizer import prepare_tokenizer, stop_token_ids

# How Qwen2 (and most ChatML models) write a conversation: their end of text is another token than
# their end of turn.
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# Llama 2 and Mistral: begin of sequence in the template, roles must alternate, a space before the
# end.
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


# Like DeepSeek-R1's: the model is made to start with <think>, a finished turn shows no thinking.
THINKING = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + "
    "message['content'] }}"
    "{% else %}{{ 'Assistant: ' + message['content'].split('</think>')[-1] + '<|im_end|>' }}{% "
    "endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: <think>\n' }}{% endif %}"
)


NO_END = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] + '\n\n' "
    "}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


DATED = (
    "{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date = 'no clock' %}{% endif %}{{ date + strftime_now(', %A %-d %B, %Y-%m-%d') + '\n' "
    "}}" + NO_END
)


CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello there, how are you today? 12 345",
] * 20


CHAT = [
    {"role": "user", "content": "Hello there, fox?"},
    {"role": "assistant", "content": "How are you today?"},
    {"role": "user", "content": "The dog\n  is lazy!  "},
    {"role": "assistant", "content": "The quick brown fox: 12 345 ümläut 漢字."},
]


def byte_level_tokenizer(template=None, **special):
    """A small tokenizer of the GPT-2 and Qwen kind, without BOS."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    extra = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(CORPUS, vocab_size=320, special_tokens=extra)
    special = {"eos_token": "<|endoftext|>", "extra_special_tokens": extra[1:], **special}
    result = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special)
    result.chat_template = template
    return result


def encoder_for(tokenizer, config):
    prepare_tokenizer(tokenizer, config)
    return RowEncoder.build(tokenizer, stop_token_ids(tokenizer, None), config)


ROWS = [{"prompt": f"fox {index}", "completion": "dog"} for index in range(6)]


def rows_of(count, bad=()):
    good = [
        {"prompt": f"The fox {index}", "completion": f"is {index * index}."}
        for index in range(count)
    ]
    return [{"messages": []} if index in bad else row for index, row in enumerate(good)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


USER = {"role": "user", "content": "Hi"}


ANSWER = {"role": "assistant", "content": "Hello"}
