"""The exit codes of gkd_ds.train. The numbers from 65 on are those of sysexits.h.

No torch is imported here, so that wrong input ends a command at once.
"""

FINISHED = 0
FAILED = 1  # an unexpected error, with a traceback; also what Python and the launcher use
WRONG_INPUT = 2  # InputError: one sentence on stderr
DIVERGED = 65  # EX_DATAERR: too many bad updates in a row (guards.TrainingStopped)
STUCK = 70  # EX_SOFTWARE: the watchdog ended a rank that made no progress
NOT_SAVED = 74  # EX_IOERR: stopped, or finished, but what is left is not what was asked for
# EX_TEMPFAIL: stopped early with a checkpoint; the same command with resume 'auto' continues.
STOPPED = 75
