"""Takes secrets out of everything that is written: metrics, configuration, model card, W&B,
messages.

    from gkd_ds.runtime.redaction import redact
    redact({"url": "https://me:hunter2hunter2@host/data"})   # {'url': 'https://***@host/data'}

A secret is the value of an environment variable whose name says so (HF_TOKEN, WANDB_API_KEY,
DB_PASSWORD), the part of a URL before the `@`, or a parameter of a URL that is called so
(?token=...). Redacting happens where text is written, not where it is read, so that what a library
put into a message or a path is caught as well.
"""

import os
import re
from collections.abc import Sequence

HIDDEN = "***"
SECRET_NAME = re.compile(
    r"(?<![A-Z])(TOKEN|(API|ACCESS|SECRET|PRIVATE|ACCOUNT)_?KEY|SECRET|PASS|PASSWD|PASSPHRASE)$|PASSWORD$",
    re.IGNORECASE,
)
# Characters. Hiding every "true" or "1234" would destroy the text and protect nothing.
SHORTEST_SECRET = 8
# Keys of settings that hold a secret. Of OPEN_KEYS, the tokens are of another kind.
SECRET_KEYS = re.compile(r"(^|_)(token|api_?key|password|secret|credentials?)$", re.IGNORECASE)
OPEN_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")

URL_CREDENTIALS = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/?#\s\"'<>]*@", re.IGNORECASE)
URL_PARAMETERS = re.compile(
    rf"([?&](?!{'|'.join(OPEN_KEYS)})(?:[\w.-]*[_.-])?"
    r"(?:token|api[_-]?key|access[_-]?key|key|secret|password|passwd|signature|sig)=)[^&#\s\"'<>]+",
    re.IGNORECASE,
)
SECRET_FLAG = re.compile(r"--?[\w-]*(token|api[_-]?key|secret|password)$", re.IGNORECASE)


def secret_values() -> list[str]:
    """Values of the secret environment variables, longest first, so that no part of one survives
    another.
    """
    found = {value for name, value in os.environ.items() if SECRET_NAME.search(name)}
    return sorted(
        (value for value in found if len(value) >= SHORTEST_SECRET), key=len, reverse=True
    )


def redact(value: object) -> object:
    """The same value with every secret replaced by `***`.

    Strings, and strings inside dictionaries (keys too), lists, tuples and sets, are cleaned; the
    containers are new objects of the same kind. Numbers, None and other objects are returned as
    they are.
    """
    return _redact(value, secret_values())


def redact_argv(arguments: Sequence[str]) -> list[str]:
    """A command line with the values of flags such as `--hub_token X` and `--hub_token=X`
    hidden.
    """
    clean, hide_next = [], False
    for argument in redact(list(arguments)):
        flag, equals, _ = argument.partition("=")
        is_secret = bool(SECRET_FLAG.match(flag)) and flag.removeprefix("--") not in OPEN_KEYS
        if hide_next:
            clean.append(HIDDEN)
        elif equals and is_secret:
            clean.append(f"{flag}={HIDDEN}")
        else:
            clean.append(argument)
        hide_next = not hide_next and not equals and is_secret
    return clean


def _redact(value: object, secrets: list[str]) -> object:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        value = URL_CREDENTIALS.sub(rf"\1{HIDDEN}@", value) if "@" in value else value
        return URL_PARAMETERS.sub(rf"\1{HIDDEN}", value) if "=" in value else value
    if isinstance(value, dict):
        return {_redact(key, secrets): _redact(item, secrets) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_redact(item, secrets) for item in value)
    return value
