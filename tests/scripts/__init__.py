"""Small scripts as people write them against TRL and transformers; each is a function.

    PYTHONPATH=. python -m tests.scripts.run DIRECTORY              # all of them, in one process
    PYTHONPATH=. python -m tests.scripts.run DIRECTORY train_log_save beta_sweep
    PYTHONPATH=.:TRL GKD_SCRIPTS=trl python -m tests.scripts.run DIRECTORY    # with TRL itself

A script gets the place of two models, stands in a directory of its own, and asserts what its author
would see. tests/dist/test_scripts.py runs them.
"""
