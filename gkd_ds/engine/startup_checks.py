"""What is tried before training: a row must come out the same each time, and the same whatever is
beside it.

    switch = try_rows("teacher", model, run, lengths)

Some models draw random numbers where they learn, and not for dropout (a router's jitter). Some
choose their tables of rotations by the longest row of a batch (longrope, dynamic NTK), let the
tokens of a batch compete, or choose between equal tokens by how many there are. Here only results
are compared, so that no list of names is needed: a short row is computed twice, in a batch that
reaches as far as the longest row of the run, and padded, beside others, of which one is computed
alone, too. That takes five forwards of few tokens, and more only where something is found.
All of it is collective.

Shapes: B rows, T tokens, N positions that are compared, D width.
"""

from __future__ import annotations

import inspect
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import numpy
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_ds.data.lengths import RowLengths
from gkd_ds.engine import causal_lm
from gkd_ds.records import SequenceBatch, Source
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError

# Batches -> the last hidden states `[N, D]` of each at its `index_N`. Where a model has two modes
# of use, the first batch is computed in the one and all others in the other.
Run = Callable[[list[SequenceBatch]], list[Tensor]]

# Tokens of the row that is compared: a few at least, since the first ones are hardly rotated.
FEWEST, MOST = 8, 32
# Tokens of the row that is put beside it, and how many different ones a row of medium length has:
# some models cannot decide between tokens that are the same.
BESIDE, DIFFERENT = 64, 12


def try_rows(
    role: str, model: PreTrainedModel, run: Run, lengths: RowLengths, against_noise: str
) -> int | None:
    """The length up to which the model computes rows in one way, and beyond it in another: rows on
    both sides must not share a batch. None where there is no such length.

    `against_noise` is the advice where results are random. Raises InputError where they are, or
    depend on the mode, where rows depend on the tokens or lengths beside them in any other way, and
    where the longest row is too long.
    """
    rows, who = _Rows(model, lengths.shortest), f"the {role} ({type(model).__name__})"
    longest = max(lengths.longest, rows.short)
    batches = [rows.near(), rows.near(), rows.reaching(longest)]
    batches += [rows.medium(longest), rows.beside(longest)]
    before = _random_states()
    problem = f"{who} cannot compute a row of {longest} tokens"
    with causal_lm.refusing(problem, "set max_length lower"):
        near, again, far, medium, beside = run(batches)
    if ranks.any_rank(_random_states() != before or not _is_equal(near, again)):
        _refuse_noise(who, model, run, rows, against_noise)
    switch = None
    if _differ(near, far, rows.rounding(near)):
        switch = _switch_below(longest, who, run, rows)
    if switch is not None:
        near, medium, beside = run([rows.near(), rows.medium(switch), rows.beside(switch)])
    beside_medium, beside_near = beside.split([len(medium), len(near)])
    if _differ(medium, beside_medium, _rough(near)) or _differ(near, beside_near, _rough(near)):
        raise InputError(
            f"{who} computes a row differently when another is beside it in a batch; use another "
            "model."
        )
    return switch


def refuse_both_sides(
    role: str, source: Source, switch: int | None, lengths: RowLengths, advice: str
) -> None:
    """Raise InputError where rows that are written together can lie on both sides of `switch`: the
    keys of a row that crosses it were rotated by the other tables.
    """
    for span in lengths.spans if switch is not None else ():
        if span.source is source and span.shortest <= switch < span.longest:
            raise InputError(
                f"the {role} computes rows of more than {switch} tokens with other tables than "
                f"shorter ones, and rows of {span.shortest} to {span.longest} tokens would be "
                f"written side by side; set max_length to {switch} or less, or {advice}."
            )


def require_same_order(model: PreTrainedModel, run_pass: Callable[[Callable], object]) -> None:
    """Raise InputError where the modules of a student that run, or how often, depend on its tokens:
    ranks with different rows could not gather their parameters together.
    """
    few, many = (_calls(model, partial(run_pass, run)) for run in _few_and_many_tokens(model))
    varying = [name for name in few | many if few[name] != many[name]]
    callers = {_caller(model, name) for name in varying}
    outermost = {name for name in callers if callers.isdisjoint(_above(name))}
    if outermost:
        kinds = sorted({type(model.get_submodule(name)).__name__ for name in outermost})
        raise InputError(
            f"which parts of the student ({type(model).__name__}) run depends on the tokens (in "
            f"{min(outermost)}), and ranks with different rows could not gather them together; "
            f'add "leaf_module": {json.dumps({"classes": kinds})} to zero_optimization of the '
            "student's DeepSpeed file, or use ZeRO stage 2."
        )


def require_gradients(model: PreTrainedModel, run_pass: Callable[[Callable], object]) -> None:
    """Raise InputError where a student, in the mode in which it learns, cannot be gone through
    backwards: some architectures ask for another mode, or compute without gradients. `run_pass`
    leaves gradients on.

    No weight gets a gradient: it ends at what the embedding gives.
    """
    who = f"the student ({type(model).__name__})"
    problem, remedy = f"{who} cannot learn", "use another model"
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    device = get_accelerator().current_device_name()
    ids_BT = torch.arange(1, FEWEST + 1, device=device).remainder(_vocabulary(model))[None]
    ends: list[Tensor] = []

    def end_here(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        ends.append(output.detach().requires_grad_())
        return ends[-1].clone()  # it may be changed in place

    hook = model.get_input_embeddings().register_forward_hook(end_here)
    for weight in trained:
        weight.requires_grad_(False)
    try:
        with torch.enable_grad(), causal_lm.refusing(problem, remedy):
            hidden_BTD = run_pass(lambda: causal_lm.body_forward(model, ids_BT))
            if hidden_BTD.requires_grad:
                hidden_BTD.float().square().mean().backward()
    finally:
        hook.remove()
        for weight in trained:
            weight.requires_grad_(True)
    if ends[0].grad is None:
        raise InputError(f"{problem}, because no gradient comes back to its embedding; {remedy}.")


def _few_and_many_tokens(model: PreTrainedModel) -> list[Callable[[], Tensor]]:
    """Forwards of one token, twice (a single one may go the way of decoding), and of many."""
    many_T = torch.arange(BESIDE, device=get_accelerator().current_device_name())
    many_T = many_T.remainder(_vocabulary(model))
    batches = many_T[:1].expand(1, 2), many_T.view(2, -1)
    return [partial(causal_lm.body_forward, model, ids_BT) for ids_BT in batches]


def _calls(model: nn.Module, run: Callable[[], object]) -> Counter[str]:
    """How often `run` calls each module that ZeRO-3 notes."""
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: calls.update([name]))
        for name, module in _noted_modules(model)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def _noted_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules, by name, that ZeRO-3 notes when they run: all but what is inside of one that is
    fetched as a whole.
    """
    yield name, model
    if not z3_leaf_module(model):
        for child_name, child in model.named_children():
            yield from _noted_modules(child, f"{name}.{child_name}".lstrip("."))


def _above(name: str) -> list[str]:
    """The names of what a module is part of, the nearest first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def _caller(model: nn.Module, name: str) -> str:
    """The nearest module above that has a forward of its own."""
    lists = nn.ModuleList | nn.ModuleDict
    return next(a for a in _above(name) if not isinstance(model.get_submodule(a), lists))


class _Rows:
    """A short row, in batches that differ in what else they hold."""

    def __init__(self, model: PreTrainedModel, shortest: int):
        self.short = min(max(shortest, FEWEST), MOST)
        self.vocabulary = _vocabulary(model)
        parameters = inspect.signature(causal_lm.body(model).forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.device = get_accelerator().current_device_name()

    def near(self, token: int = 5) -> SequenceBatch:
        """Nothing in the batch is longer than the run's shortest row."""
        return self.reaching(self.short, token)

    def reaching(self, length: int, token: int = 5) -> SequenceBatch:
        """The batch is one of `length` tokens.

        A single token in the last position is enough for that: no other token sees it, so they
        change only with tables that are chosen by the longest row, and by nothing else, since
        all these batches have one shape. Models that count positions for themselves are given a
        row of that length.
        """
        if not self.takes_positions:
            ids_BT = self._ids(length, 11).repeat(2, 1)
            ids_BT[1] = 0
            ids_BT[1, : self.short] = self._row(token)
            return self._batch(ids_BT, [self.short - 1])
        position_T = torch.arange(self.short, device=self.device)
        position_T[-1] = length - 1
        return self._batch(self._row(token)[None], [self.short - 1], position_ids=position_T[None])

    def beside(self, length: int, token: int = 5) -> SequenceBatch:
        """The row, padded, behind one of `length` tokens and one of medium length, padded, which is
        compared, too; fewer where `reaching` does better.
        """
        longer_T, medium_T = self._ids(self._longer(length), 11), self._medium(length)
        ids_BT = longer_T.new_zeros(3, len(longer_T))
        ids_BT[0] = longer_T
        ids_BT[1, : len(medium_T)] = medium_T
        ids_BT[2, : self.short] = self._row(token)
        return self._batch(ids_BT, [len(medium_T) - 1, self.short - 1])

    def medium(self, length: int) -> SequenceBatch:
        """The row of medium length in `beside`, alone."""
        ids_T = self._medium(length)
        return self._batch(ids_T[None], [len(ids_T) - 1])

    def rounding(self, hidden_ND: Tensor) -> float:
        """What rounding may change from one `reaching` to the other."""
        return _fine(hidden_ND) if self.takes_positions else _rough(hidden_ND)

    def _batch(self, ids_BT: Tensor, counts: list[int], **extra: Tensor) -> SequenceBatch:
        """The last rows are compared, as many tokens at their beginning as `counts` says."""
        first_B = torch.arange(len(ids_BT), device=self.device)[-len(counts) :] * ids_BT.shape[1]
        index_N = torch.cat(
            [
                first + torch.arange(count, device=self.device)
                for first, count in zip(first_B, counts)
            ]
        )
        return SequenceBatch(ids_BT, index_N, ids_BT.flatten()[index_N + 1], extra)

    def _longer(self, length: int) -> int:
        return min(length, BESIDE) if self.takes_positions else length

    def _medium(self, length: int) -> Tensor:
        length = max(self.short, self._longer(length) * 3 // 4)
        return self._ids(length, 1).remainder(DIFFERENT)

    def _row(self, token: int) -> Tensor:
        """The short row; all of it but `token`, the last one, is compared."""
        return torch.cat([self._ids(self.short - 1, 7), self._ids(1, token)])

    def _ids(self, count: int, stride: int) -> Tensor:
        return torch.arange(1, count + 1, device=self.device).mul(stride).remainder(self.vocabulary)


def _vocabulary(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size


# -- the same beside a longer one ----------------------------------------------------------------


def _switch_below(longest: int, who: str, run: Run, rows: _Rows) -> int | None:
    """The longest row that leaves the short one alone, if one of `longest` tokens changes it."""
    near, other, far = run([rows.near(), rows.near(token=3), rows.reaching(longest)])
    # Mixtures of experts multiply the tokens of a batch together: any other token changes a little.
    noise = 8 * _distance(near, other) if rows.takes_positions else _rough(near)
    if not _differ(near, far, max(noise, rows.rounding(near))):
        return None
    switch, longer = rows.short, longest
    while longer - switch > 1:
        middle = (switch + longer) // 2
        if _differ(*run([rows.near(), rows.reaching(middle)]), noise):
            longer = middle
        else:
            switch = middle
    # Up and down again: some models keep the tables of the longest row that they have seen.
    way = [rows.near(), rows.reaching(longer), rows.reaching(longest), rows.reaching(switch)]
    near, first, last, back = run(way)
    if _differ(first, last, noise) or _differ(near, back, noise):
        raise InputError(
            f"{who} computes every row by the longest in its batch where that has more than "
            f"{switch} tokens; set max_length to {switch} or less, or use another model."
        )
    return switch


def _differ(one_ND: Tensor, other_ND: Tensor, tolerance: float) -> bool:
    """Whether they are further apart than `tolerance`, on any rank."""
    return ranks.any_rank(_distance(one_ND, other_ND) > tolerance)


def _distance(one_ND: Tensor, other_ND: Tensor) -> float:
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
    return 2e-6 if _is_exact(hidden_ND) else 1e-3


def _rough(hidden_ND: Tensor) -> float:
    """What rounding may change between batches of different shapes, which other kernels compute."""
    return 1e-4 if _is_exact(hidden_ND) else 0.1


# -- the same each time --------------------------------------------------------------------------


def _refuse_noise(who: str, model: PreTrainedModel, run: Run, rows: _Rows, advice: str) -> None:
    """Raise InputError where the model is random, or another one in its other mode.

    Drawing random numbers is noise as well, also where it has changed nothing this time.
    """
    before = _random_states()
    one, two, three = run([rows.near(), rows.near(), rows.near()])
    if ranks.any_rank(_random_states() != before) or _differ(two, three, _fine(two)):
        where = first_noisy_module(model, lambda: run([rows.near(), rows.near()]))
        raise InputError(
            f"{who} computes with random numbers in {where}, for something else than dropout that "
            f"is known by its name; {advice}."
        )
    if _differ(one, two, _rough(one)):
        raise InputError(
            f"{who} computes something else where it learns than where it samples; use another "
            "model."
        )


def first_noisy_module(model: nn.Module, run: Callable[[], object]) -> str:
    """The first module to end with drawn random numbers, or with another output than in the run
    before.
    """
    runs: list[list[tuple[str, bool, float]]] = []
    for _ in range(2):
        ends, before = [], _random_states()

        def note(name: str, output: object, ends=ends, before=before) -> None:
            ends.append((name, _random_states() != before, _checksum(output)))

        hooks = [
            module.register_forward_hook(lambda _, args, output, name=name: note(name, output))
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


def _random_states() -> list[object]:
    """Of torch's generators, the host's and the accelerator's, of Python's and of NumPy's."""
    torch_s = [torch.get_rng_state().tolist(), get_accelerator().get_rng_state().tolist()]
    return [*torch_s, random.getstate(), repr(numpy.random.get_state())]


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Bit for bit."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _checksum(output: object) -> float:
    first = output if isinstance(output, Tensor) else next(iter(output), None)
    return float(first.double().sum()) if isinstance(first, Tensor) else 0.0
