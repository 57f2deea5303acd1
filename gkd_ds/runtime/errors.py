"""The one exception for wrong input, and words for its sentences."""

from collections.abc import Sequence


class InputError(ValueError):
    """Something the user gave is wrong.

    The message is one sentence that says what is wrong and what to change. The command line prints
    it on stderr and exits with code 2; library users catch it as a ValueError. Raised before
    anything is allocated, and equally on every rank.
    """


def type_name(value: object) -> str:
    return "nothing (null)" if value is None else f"{type(value).__name__}"


def quote(text: str, limit: int = 40) -> str:
    """repr() escapes lone surrogates and control characters, so the sentence can always be
    printed.
    """
    return repr(text if len(text) <= limit else text[:limit] + "...")


def name_list(names: Sequence[object], limit: int = 20) -> str:
    shown = [quote(name) if isinstance(name, str) else type_name(name) for name in names[:limit]]
    return ", ".join(shown + ["..."] * (len(names) > limit)) or "none"


def first_line(error: BaseException, limit: int = 200) -> str:
    """The next line, too, where the first one announces it with a colon."""
    text, *more = (str(error).strip() or type(error).__name__).splitlines()
    if more and text.endswith(":"):
        text += f" {more[0].strip()}"
    return text if len(text) <= limit else text[:limit] + "..."


def reason(error: BaseException) -> str:
    """The first sentence of what a library says, to stand in brackets in one of ours."""
    return first_line(error).split(". ")[0].rstrip(".:")


def show(value: object) -> str:
    """The value as a user would recognise it, on one line and short."""
    text = ascii(value)
    return text if len(text) <= 100 else text[:97] + "..."
