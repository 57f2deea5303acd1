#!/usr/bin/env python3
"""Prints the path of the file that stops a run with a checkpoint, as soon as it exists.

python tools/stop_file.py --config recipe.yaml [--any_field value ...]
"""

import sys

from gkd_ds import GKDConfig
from gkd_ds.config.recipe import read_flags, read_recipe
from gkd_ds.runtime.errors import InputError


def main() -> int:
    try:
        given = read_flags(sys.argv[1:])
        recipe = given.pop("config", None)
        fields = {**(read_recipe(recipe) if recipe else {}), **given}
        print(
            GKDConfig(
                **{name: fields[name] for name in ("output_dir", "stop_file") if name in fields}
            ).stop_path
        )
        return 0
    except InputError as error:
        print(f"stop_file: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
