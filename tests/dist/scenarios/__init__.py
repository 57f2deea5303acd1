"""What tests/dist/worker.py runs, by subject. A scenario is a function that returns what JSON can
hold.
"""
