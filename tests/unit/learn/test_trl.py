"""TRL's generate_on_policy_outputs, beside model.generate and, where it is installed, beside TRL's
own.
"""

import pytest
import torch
from transformers import GenerationConfig

from gkd_ds.learn.trl import generate_on_policy_outputs

LENGTH = 12
PAD, EOS = 0, 2  # of the tiny tokenizer


@pytest.fixture(scope="module")
def inputs():
    prompts = torch.tensor([[PAD, PAD, 40, 41], [50, 51, 52, 53], [PAD, 60, PAD, 61]])
    mask = torch.tensor(
        [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]
    )  # a pad token inside a prompt is a token
    return {"prompts": prompts, "prompt_attention_mask": mask}


def config(**how) -> GenerationConfig:
    return GenerationConfig(
        **{"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": PAD, **how}
    )


@pytest.fixture(scope="module")
def endless(model, inputs):
    """[B, LENGTH]: what the model writes when nothing stops it."""
    masked = {"input_ids": inputs["prompts"], "attention_mask": inputs["prompt_attention_mask"]}
    return model.generate(**masked, generation_config=config(eos_token_id=-1))[
        :, inputs["prompts"].shape[1] :
    ]


def check(model, inputs, endless, generation_config, stop_ids, pad=PAD, **arguments):
    """Sequences are generate's; the mask and the labels end with each row's first stop token."""
    ids, mask, labels = generate_on_policy_outputs(model, inputs, generation_config, **arguments)
    prompts, prompt_mask = (
        inputs["prompts"],
        torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]),
    )
    width = prompts.shape[1]
    assert torch.equal(ids[:, :width], prompts) and torch.equal(mask[:, :width], prompt_mask)
    assert (labels[:, :width] == -100).all() and ids.shape == mask.shape == labels.shape
    for row, written in enumerate(endless.tolist()):
        stops = [position for position, token in enumerate(written) if token in stop_ids]
        length = stops[0] + 1 if stops else len(written)
        after = ids.shape[1] - width - length
        assert ids[row, width:].tolist() == written[:length] + [pad] * after
        assert mask[row, width:].tolist() == [1] * length + [0] * after
        assert labels[row, width:].tolist() == written[:length] + [-100] * after
    return ids, mask, labels


def some_stops(endless) -> list[int]:
    """Two tokens that come first in the middle of the first and of the second row's text."""
    stops = []
    for written in endless.tolist()[:2]:
        fresh = [
            position for position, token in enumerate(written) if token not in written[:position]
        ]
        assert len(fresh) > 4, "a text that repeats itself tests little"
        stops.append(written[fresh[len(fresh) // 2]])
    return stops


def test_several_stop_tokens(model, inputs, endless):
    stops = some_stops(endless)
    _, mask, _ = check(model, inputs, endless, config(eos_token_id=stops), stops)
    assert len(set(mask[:, -LENGTH:].sum(1).tolist())) > 1, "rows of different lengths"


def test_pad_is_the_stop_token(model, inputs, endless):
    """The stop token counts, and what fills the row after it, the same token, does not."""
    stop = some_stops(endless)[0]
    check(model, inputs, endless, config(eos_token_id=stop, pad_token_id=stop), [stop], pad=stop)


def test_no_stop_token_anywhere(model, inputs, endless):
    model.generation_config.eos_token_id = None
    try:
        _, mask, _ = check(model, inputs, endless, config(), [])
    finally:
        model.generation_config.eos_token_id = EOS
    assert mask[:, -LENGTH:].all()


def test_without_one_of_its_own_the_model_s_stop_tokens_count(model, inputs, endless):
    """generate() takes them then; TRL's would call the padding after them text."""
    model.generation_config.eos_token_id = stops = some_stops(endless)
    try:
        check(model, inputs, endless, config(), stops)
    finally:
        model.generation_config.eos_token_id = EOS


def test_the_pad_token_stands_in_for_a_missing_mask(model, inputs, endless):
    """A fourth argument of some releases of TRL."""
    stops = some_stops(endless)
    alone = {"prompts": inputs["prompts"]}
    check(model, alone, endless, config(eos_token_id=stops), stops, pad_token_id=PAD)
    ids, mask, _ = generate_on_policy_outputs(
        model, {"prompts": inputs["prompts"][1:2]}, config(eos_token_id=stops)
    )
    assert mask[:, :4].all() and ids[0, 4:].tolist() == endless[1, : ids.shape[1] - 4].tolist(), (
        "nothing is padding"
    )


def test_trl_s_own_gives_the_same(model, inputs, endless):
    trl = pytest.importorskip("trl.experimental.gkd", reason="the bench extra installs it")
    generation_config = config(eos_token_id=some_stops(endless))
    theirs = trl.GKDTrainer.generate_on_policy_outputs(model, inputs, generation_config)
    ours = generate_on_policy_outputs(model, inputs, generation_config)
    assert all(torch.equal(mine, their) for mine, their in zip(ours, theirs))
