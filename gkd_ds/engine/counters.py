"""What a run did, counted: the perf/ numbers of metrics.jsonl are made from it."""

from dataclasses import dataclass


@dataclass
class Counters:
    """Counted rather than timed; reset by nobody, so callers take differences."""

    student_gathers: int = 0  # whole-model gathers of the student
    # Bytes of the student's weights that these made available on this rank.
    student_bytes: int = 0
    teacher_passes: int = 0  # passes over the teacher's layers that score a window
    # Passes for one token more of every completion that the teacher writes.
    teacher_decode_passes: int = 0
    optimizer_bytes: int = 0  # bytes of optimizer states that went to the host for a rollout
    # Bytes of the teacher's weights that were made available on this rank, head included.
    teacher_bytes: int = 0
