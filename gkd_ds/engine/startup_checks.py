"""What is tried before training: a row must come out the same each time, and the same whatever is
beside it.

    refuse_noise(...)             two forwards of the student in the mode in which it learns
    switch = find_switch(...)     a short row where nothing is longer, and where something is

Some models choose their tables of rotations by the longest row of a batch (longrope, dynamic NTK),
some let a row's tokens compete with its neighbours', some draw random numbers. Both checks look at
results and at nothing else, so that they find what no list of names would. They are collectives,
and their forwards are short: about 40 tokens each, one of two rows of up to BESIDE.
Shapes: B rows, T tokens, N positions that are compared, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.lengths import RowLengths
from gkd_ds.records import SequenceBatch, Source
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError, first_line

# Batches -> the last hidden states `[N, D]` of each at its `index_N`.
Run = Callable[[list[SequenceBatch]], list[Tensor]]

# Tokens of the row that is compared: a few at least, since the first ones are hardly rotated.
FEWEST, MOST = 8, 32
# Tokens of the row that is put beside it. Positions beyond are tried by moving a single token.
BESIDE = 256


# -- the same each time --------------------------------------------------------------------------


def refuse_noise(
    model: PreTrainedModel, run: Run, to_learn: Callable[[], None], config: GKDConfig
) -> None:
    """Raise InputError unless the student computes the same twice when it learns, and what it
    computes when it samples. `to_learn` puts it into the mode of the learn phase, without dropout.

    Drawing random numbers is noise as well, also where it has changed nothing this time.
    """
    batch = _Rows(model, MOST).alone()
    model.eval()
    (sampled,) = run([batch])
    to_learn()
    before = _random_states()
    (learned,) = run([batch])
    if not ranks.any_rank(not torch.equal(sampled, learned) or _random_states() != before):
        return
    (again,) = run([batch])
    name = type(model).__name__
    if ranks.any_rank(not torch.equal(learned, again) or _random_states() != before):
        where = first_noisy_module(model, lambda: run([batch]))
        advice = "use another model"
        if config.gradient_checkpointing:
            advice = "set gradient_checkpointing to false"
        if not config.disable_dropout:
            advice = "set disable_dropout to true"
        raise InputError(
            f"the student ({name}) is random where it learns, in {where}, and not by dropout that "
            f"could be switched off; {advice}."
        )
    if _differ(sampled, learned, _rough(learned)):
        raise InputError(
            f"the student ({name}) computes something else when it learns than when it samples; "
            "use another model."
        )


def first_noisy_module(model: nn.Module, run: Callable[[], object]) -> str:
    """The first module to end with drawn random numbers, or with another output than in the run
    before.
    """
    runs: list[list[tuple[str, bool, float]]] = []
    for _ in range(2):
        ends, before = [], _random_states()

        def note(module, args, output, name, ends=ends, before=before):
            ends.append((name, _random_states() != before, _checksum(output)))

        hooks = [
            module.register_forward_hook(lambda *call, name=name: note(*call, name=name))
            for name, module in model.named_modules()
        ]
        run()
        for hook in hooks:
            hook.remove()
        runs.append(ends)
    for (name, has_drawn, first), (_, _, second) in zip(*runs):
        if has_drawn or first != second:
            return name
    return type(model).__name__


def _random_states() -> list[list[int]]:
    """Of the host's generator and the accelerator's."""
    return [torch.get_rng_state().tolist(), get_accelerator().get_rng_state().tolist()]


def _checksum(output: object) -> float:
    first = output if isinstance(output, Tensor) else next(iter(output), None)
    return float(first.double().sum()) if isinstance(first, Tensor) else 0.0


# -- the same beside others ----------------------------------------------------------------------


def find_switch(role: str, model: PreTrainedModel, run: Run, lengths: RowLengths) -> int | None:
    """The length up to which the model computes rows in one way, and beyond it in another: rows on
    both sides must not share a batch. None where there is no such length.

    Raises InputError where longer rows depend on each other, too, where rows depend on their
    neighbours' tokens, and where the model cannot be given the longest row.
    """
    short = min(max(lengths.shortest, FEWEST), MOST)
    if lengths.longest <= short:
        return None
    rows, who = _Rows(model, short), f"the {role} ({type(model).__name__})"
    try:
        near, far, beside = run(
            [rows.reaching(short), rows.reaching(lengths.longest), rows.beside(lengths.longest)]
        )
    except (IndexError, RuntimeError) as error:
        raise InputError(
            f"{who} cannot compute a row of {lengths.longest} tokens ({first_line(error)}); set "
            "max_length lower."
        ) from error
    switch = None
    if _differ(near, far, _fine(near)):
        switch = _switch_between(rows, lengths.longest, run, who)
    if switch is not None:
        near, beside = run([rows.reaching(short), rows.beside(switch)])
    if _differ(near, beside, _rough(near)):
        raise InputError(
            f"{who} computes a row differently when another is beside it in a batch; use another "
            "model."
        )
    return switch


def _switch_between(rows: _Rows, longest: int, run: Run, who: str) -> int | None:
    """Where between `rows.short` and `longest` tokens the short row begins to change."""
    near, other, far = run(
        [rows.reaching(rows.short), rows.reaching(rows.short, token=3), rows.reaching(longest)]
    )
    # Mixtures of experts multiply the tokens of a batch together, so that any other token changes
    # a little.
    noise = 8 * distance(near, other)
    if not _differ(near, far, max(noise, _fine(near))):
        return None
    switch, longer = rows.short, longest
    while longer - switch > 1:
        middle = (switch + longer) // 2
        if _differ(*run([rows.reaching(rows.short), rows.reaching(middle)]), noise):
            longer = middle
        else:
            switch = middle
    # Some models keep the tables of the longest row that they have seen: both ways are tried.
    near, first, last, back = run(
        [rows.reaching(length) for length in (rows.short, longer, longest, switch)]
    )
    if _differ(first, last, noise) or _differ(near, back, noise):
        raise InputError(
            f"{who} computes every row by the longest in its batch where that has more than "
            f"{switch} tokens; set max_length to {switch} or less."
        )
    return switch


def _differ(one_ND: Tensor, other_ND: Tensor, tolerance: float) -> bool:
    """Whether they are further apart than `tolerance`, on any rank."""
    return ranks.any_rank(distance(one_ND, other_ND) > tolerance)


def refuse_both_sides(role: str, source: Source, switch: int | None, lengths: RowLengths) -> None:
    """Raise InputError where rows that are written together can lie on both sides of `switch`: the
    keys of a row that crosses it were rotated by the other tables.
    """
    for span in lengths.spans if switch is not None else ():
        if span.source is source and span.shortest <= switch < span.longest:
            raise InputError(
                f"the {role} computes rows of more than {switch} tokens with other tables than "
                f"shorter ones, and rows of {span.shortest} to {span.longest} tokens would be "
                f"written side by side; set max_length to {switch} or less."
            )


class _Rows:
    """A row of `short` tokens and what can be in a batch with it."""

    def __init__(self, model: PreTrainedModel, short: int):
        self.short, self.vocabulary = short, model.config.get_text_config().vocab_size
        parameters = inspect.signature(model.base_model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.device = get_accelerator().current_device_name()
        self.ids_T = self._ids(short - 1, 7)

    def alone(self) -> SequenceBatch:
        return self._batch(self.ids_T[None])

    def reaching(self, length: int, token: int = 5) -> SequenceBatch:
        """The row, and as much behind it as makes the batch one of `length` tokens.

        A single token at the last position is enough for that: it cannot change what comes before
        it, but for tables that are chosen by the longest row. Models that count for themselves are
        given a row of that length.
        """
        if not self.takes_positions:
            return self.beside(length)
        ids_T = torch.cat([self.ids_T[:-1], self._ids(1, token)])
        position_T = torch.arange(len(ids_T), device=self.device)
        position_T[-1] = length - 1
        return self._batch(ids_T[None], position_ids=position_T[None])

    def beside(self, length: int) -> SequenceBatch:
        """The row, padded, behind a longer one."""
        length = min(length, BESIDE) if self.takes_positions else length
        longer_T = self._ids(length, 11)
        padded_T = torch.zeros_like(longer_T)
        padded_T[: len(self.ids_T)] = self.ids_T
        return self._batch(torch.stack([longer_T, padded_T]))

    def _batch(self, ids_BT: Tensor, **extra: Tensor) -> SequenceBatch:
        """All tokens of the row but its last are compared."""
        first = ids_BT.numel() - ids_BT.shape[1]
        index_N = torch.arange(first, first + len(self.ids_T) - 1, device=self.device)
        return SequenceBatch(ids_BT, index_N, ids_BT.flatten()[index_N + 1], extra)

    def _ids(self, count: int, stride: int) -> Tensor:
        return torch.arange(1, count + 1, device=self.device).mul(stride).remainder(self.vocabulary)


def distance(one_ND: Tensor, other_ND: Tensor) -> float:
    """How far apart hidden states are, relative to their length.

    A tenth of the positions may be further: where two experts are as good as each other, rounding
    decides between them.
    """
    one_ND, other_ND = one_ND.float(), other_ND.float()
    distance_N = (one_ND - other_ND).norm(dim=-1) / one_ND.norm(dim=-1)
    return float(distance_N.quantile(0.9))


def _is_exact(hidden_ND: Tensor) -> bool:
    return hidden_ND.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def _fine(hidden_ND: Tensor) -> float:
    """What rounding may change between batches of one shape."""
    return 1e-5 if _is_exact(hidden_ND) else 1e-3


def _rough(hidden_ND: Tensor) -> float:
    """What rounding may change between batches of different shapes, which other kernels compute."""
    return 1e-4 if _is_exact(hidden_ND) else 0.1
