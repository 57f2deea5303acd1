"""Names and values from a recipe (a flat YAML file) and from the command line; GKDConfig reads the
values.

Values stay text, as they were written, except for the lists and mappings of a recipe: what a field
means by "no" or "2e-5" is the field's business, the same for both.
"""

import difflib
import fnmatch
import types
from typing import Any, Union, get_args, get_origin

import yaml

from gkd_ds.config.fields import OPTIONS
from gkd_ds.config.values import convert
from gkd_ds.runtime.errors import InputError, show

KINDS = {name: option.kind for name, option in OPTIONS.items()}
# argparse makes flags like these of TRL's configuration, for what is on by default.
NEGATIONS = {f"no_{name}": name for name, option in OPTIONS.items() if option.default is True}
COMMANDS = ("config", "dry_run", "help")  # flags that are no fields
# Names that are no fields, as patterns, with what to do: nobody is sent to the field that happens
# to be spelt most alike.
ELSEWHERE = {
    "gradient_checkpointing_use_*": "write use_reentrant into gradient_checkpointing_kwargs",
    "evaluation_strategy": "use eval_strategy",
    "max_seq_length": "use max_length",
    "tokenizer": "the student's is used; pass another one to GKDTrainer as processing_class",
}


def read_recipe(path: str) -> dict[str, Any]:
    """The fields that a recipe sets.

    Raises:
        InputError: the file is missing, unreadable, no flat YAML mapping, or sets an unknown name
            or one twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError:
        raise InputError(
            f"The recipe '{path}' is not UTF-8 text; it must be a YAML file."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"The recipe {show(path)} cannot be read ({reason}); check --config."
        ) from None
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, (yaml.TagToken, yaml.AnchorToken, yaml.AliasToken)):
                line = token.start_mark.line + 1
                raise InputError(
                    f"The recipe '{path}' uses a YAML tag or anchor in line {line}; write the "
                    "plain value."
                )
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        return read_fields(path, root)
    except yaml.YAMLError as error:
        raise InputError(
            f"The recipe '{path}' is not valid YAML: {first_problem(error)}."
        ) from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"The recipe '{path}' holds a value that cannot be read: {show(str(error))}."
        ) from None


def read_fields(path: str, root: yaml.Node | None) -> dict[str, Any]:
    """A composed recipe's names and values."""
    if not isinstance(root, yaml.MappingNode):
        raise InputError(
            f"The recipe '{path}' must be a flat YAML mapping, with lines such as 'learning_rate: "
            "2e-5'."
        )
    fields: dict[str, Any] = {}
    for key, node in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        where = f"the recipe '{path}', line {key.start_mark.line + 1}"
        if name not in KINDS:
            raise unknown(name, where, list(KINDS))
        if name in fields:
            raise InputError(f"The name '{name}' appears twice in {where}; remove one.")
        fields[name] = read_node(node)
    return fields


def read_node(node: yaml.Node) -> Any:
    """A scalar as it was written (None for an empty or null one), a list or mapping as YAML means
    it.
    """
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    return yaml.constructor.SafeConstructor().construct_document(node)


def first_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return " ".join(str(getattr(error, "problem", None) or error).split()) + where


def read_flags(arguments: list[str]) -> dict[str, Any]:
    """The fields and commands that a command line sets: `--name value`, `--name=value`, `--name`
    for true, or `--no_name` for false where true is the default; `--name value value` where it
    takes a list.

    Dashes inside a name count as underscores; of a repeated flag the last one counts; `null` takes
    back what a recipe sets.

    Raises:
        InputError: an unknown name (with the nearest known one), a value without a name, a name
            without a value.
    """
    given: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "-h":
            argument = "--help"
        if not argument.startswith("--") or argument == "--":
            raise InputError(
                f"The argument {show(argument)} does not belong to any flag; flags are written "
                "--name value."
            )
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name not in {*KINDS, *COMMANDS, *NEGATIONS}:
            raise unknown(name, "the command line", [*KINDS, *COMMANDS], prefix="--")
        alone = not equals and (not rest or rest[0].startswith("--"))
        if name in NEGATIONS:
            if not alone:
                raise InputError(f"The flag --{name} takes no value; write --{NEGATIONS[name]}.")
            given[NEGATIONS[name]] = False
        elif name == "help" or (alone and (name == "dry_run" or is_switch(name))):
            given[name] = True
        elif alone:
            raise InputError(f"The flag --{name} needs a value, as in --{name} VALUE.")
        else:
            values = [value if equals else rest.pop(0)]
            while takes_list(name) and rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            given[name] = read_flag_values(name, values)
    return given


def read_flag_values(name: str, values: list[str]) -> Any:
    if name == "dry_run":
        return convert(name, bool, values[0])
    if values == ["null"] and types.NoneType in kinds_of(name):
        return None
    is_json = values[0].lstrip().startswith("[")
    if len(values) == 1 and (is_json or not takes_list(name) or str in kinds_of(name)):
        return values[0]
    return values


def kinds_of(name: str) -> tuple:
    """The types that a flag's values may have."""
    kind = KINDS.get(name)
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def is_switch(name: str) -> bool:
    """Whether the flag may stand without a value."""
    return bool in kinds_of(name)


def takes_list(name: str) -> bool:
    """Whether several values may follow the flag."""
    return any(get_origin(kind) is list for kind in kinds_of(name))


def unknown(name: str, where: str, known: list[str], prefix: str = "") -> InputError:
    near = difflib.get_close_matches(name, known, n=1)
    elsewhere = [what for pattern, what in ELSEWHERE.items() if fnmatch.fnmatchcase(name, pattern)]
    if elsewhere:
        hint = f"{elsewhere[0]}."
    else:
        hint = f"did you mean {prefix}{near[0]}?" if near else "see --help for all names."
    return InputError(f"Unknown name {show(prefix + name)} in {where}; {hint}")
