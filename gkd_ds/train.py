"""Train from a recipe: what the launcher runs on every rank.

    deepspeed --module gkd_ds.train --config launch/recipes/quickstart.yaml --lmbda 1.0
    python -m gkd_ds.train --config recipe.yaml --dry_run   # what one process would do, then stop
    python -m gkd_ds.train --help                           # every field

A recipe is a flat YAML file of GKDConfig's names; every name is a flag too, and the command line
wins. Wrong input ends with exit code 2 and one sentence on stderr, before torch is imported where
that is possible.
"""

import atexit
import os
import shutil
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.fields import GROUPS, INACTIVE
from gkd_ds.config.option import Option
from gkd_ds.config.recipe import read_flags, read_recipe
from gkd_ds.runtime import faults
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.exit_codes import DIVERGED, FAILED, STOPPED, WRONG_INPUT
from gkd_ds.runtime.launcher import LauncherGone, check_hostfile
from gkd_ds.runtime.redaction import redact

# The launcher looks at its ranks once a second. As soon as one of a node has failed it ends them
# all and reports that one's exit code: ranks that may fail because another did wait, so that it is
# the one with the reason.
SECONDS_BEFORE_EXIT = 3.0


def main(argv: list[str] | None = None) -> int:
    """Train. Returns the exit code: 2 for wrong input, else one of those in exit_codes.py."""
    return command(sys.argv[1:] if argv is None else argv, run, check_training)


def command(
    argv: list[str], work: Callable[[GKDConfig], int], check: Callable[[GKDConfig, bool], None]
) -> int:
    """Read a command line, `check` its configuration (and whether it is a dry run) and do `work`
    with it; `work` returns the exit code.
    """
    try:
        given = read_flags(argv)
        if given.pop("help", False):
            print_help()
            return 0
        dry_run = given.pop("dry_run", False)
        recipe = given.pop("config", None)
        config = GKDConfig(**{**(read_recipe(recipe) if recipe else {}), **given})
        check(config, dry_run)
        if config.use_cpu:  # DeepSpeed chooses its accelerator when it is imported
            os.environ["DS_ACCELERATOR"] = "cpu"
        if not dry_run:
            return work(config)
        print_plan(config)
        return 0
    except InputError as error:
        say(error)
        return WRONG_INPUT
    except LauncherGone as error:
        say(error)
        return STOPPED
    except (
        Exception
    ):  # with a traceback, as Python would print it, but without the secrets that may be in it
        print(redact(traceback.format_exc()), file=sys.stderr, flush=True)
        if (
            int(os.environ.get("WORLD_SIZE", "1")) > 1
        ):  # it may be that another rank has died: the connection is lost
            time.sleep(SECONDS_BEFORE_EXIT)
        return FAILED


def check_inputs(config: GKDConfig, dry_run: bool = False) -> None:
    """Everything that can be wrong with the input and be found without importing torch, whatever is
    done with it.

    Raises:
        InputError: a needed name is missing, or a file, directory, split or hub model is not there.
    """
    for name, what in (
        ("model_name_or_path", "the student"),
        ("teacher_model_name_or_path", "the teacher"),
        ("dataset_name", "the data to train on"),
    ):
        if getattr(config, name) is None:
            raise InputError(f"No {name} is given ({what}); set it in the recipe or with --{name}.")
    check_hostfile()
    config.validate_files()
    check_hub_model("model_name_or_path", config.model_name_or_path, config.model_init_kwargs)
    check_hub_model(
        "teacher_model_name_or_path",
        config.teacher_model_name_or_path,
        config.teacher_model_init_kwargs,
    )


def check_training(config: GKDConfig, dry_run: bool = False) -> None:
    """The inputs, and that the run overwrites nothing; early, before the first rank can have
    written anything there. A dry run writes nothing, beside whatever run is in output_dir.
    """
    check_inputs(config)
    config.check_output_dir_is_free(dry_run or config.resume_from_checkpoint)


def check_hub_model(field: str, model: str, init_kwargs: dict | None) -> None:
    """A model that is no local directory is in the hub's local cache or on the hub (asked once, no
    retries).
    """
    if os.path.isdir(model):
        return
    from huggingface_hub import HfApi, try_to_load_from_cache

    revision = (init_kwargs or {}).get("revision")
    try:
        if not isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            HfApi().model_info(model, revision=revision, timeout=10)
    except (
        Exception
    ) as error:  # unknown, forbidden, no network: more ways than the hub's library documents
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(
            f"GKDConfig field '{field}' is '{model}', which is neither a local directory nor a "
            "model that the "
            f"hub gives us ({reason}); check the name."
        ) from None


def read_datasets(config: GKDConfig) -> tuple[Any, Any]:
    """The training data and, when any evaluation is asked for, the evaluation data (else None)."""
    from gkd_ds.data.files import dataset_splits, read_dataset

    train = read_dataset(config.dataset_name, config.dataset_train_split, config.dataset_config)
    if not (config.do_eval or config.eval_on_start or config.eval_strategy != "no"):
        return train, None
    splits = dataset_splits(config.dataset_name, config.dataset_config)
    if config.dataset_test_split not in splits:
        raise InputError(
            f"Evaluation is asked for, but '{config.dataset_name}' has no split "
            f"'{config.dataset_test_split}' (it "
            f"has: {', '.join(splits)}); set dataset_test_split, or switch evaluation off."
        )
    return train, read_dataset(
        config.dataset_name, config.dataset_test_split, config.dataset_config
    )


def run(config: GKDConfig) -> int:
    """Build the trainer and train to the end; the exit code.

    The process is about to end then: signals are ignored from there on.
    """
    trainer = build(config)

    from gkd_ds.monitor.guards import TrainingStopped

    trainer.interrupts.afterwards = signal.SIG_IGN
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    except TrainingStopped as error:
        say(error)
        return DIVERGED
    finally:
        faults.point("leave")
    return trainer.exit_code


def build(config: GKDConfig):
    """The trainer of a recipe."""
    train_dataset, eval_dataset = read_datasets(config)

    from gkd_ds.trainer import (
        GKDTrainer,  # torch and DeepSpeed: only now, when the input is known to be good
    )

    return GKDTrainer(
        model=config.model_name_or_path,
        teacher_model=config.teacher_model_name_or_path,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )


def print_plan(config: GKDConfig) -> None:
    """The resolved configuration, the batch arithmetic and the memory estimate."""
    train_dataset, _ = read_datasets(config)

    from gkd_ds.plan.dry_run import dry_run_report

    report = dry_run_report(config, num_samples=len(train_dataset))
    if config.process_index == 0:
        print(report)


def say(error: Exception) -> None:
    """What is wrong, in one line on stderr, once per node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("gkd_ds: error:", redact(" ".join(str(error).split())), file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_BEFORE_EXIT)


def print_help() -> None:
    """GKDConfig's fields in their groups."""
    width = min(shutil.get_terminal_size().columns, 110)
    print(__doc__)
    print("  --config FILE\n      A recipe: flat YAML of the names below.")
    print(
        "  --dry_run\n      Print the configuration, the batch arithmetic and the memory estimate, "
        "and stop."
    )
    for heading, options in GROUPS.items():
        print(f"\n{heading}")
        for option in options:
            print_option(option, width)
    print("\nOf TRL's, on which nothing has to act (gkd_ds/FIELDS.md says why)")
    print(
        textwrap.fill(
            ", ".join(sorted(INACTIVE)), width, initial_indent="  ", subsequent_indent="  "
        )
    )


def print_option(option: Option, width: int) -> None:
    default = option.default
    shown = (
        ""
        if default is None
        else f" (default: {str(default).lower() if default in (True, False) else default})"
    )
    print(f"  --{option.name}{shown}")
    indent = " " * 6
    print(textwrap.fill(option.help, width, initial_indent=indent, subsequent_indent=indent))


def leave(code: int) -> NoReturn:
    """End the process with this exit code, without taking the interpreter down first.

    A thread of gloo's that lets go of a Python object meanwhile dies of SIGABRT ("terminate called
    without an active exception"), and launchers and Slurm scripts, which act on the code, would see
    that in its place.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
