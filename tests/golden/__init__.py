"""Golden traces: every figure of a few small runs after every round, as JSON that a person can review.

    python -m tests.golden            print a digest of every bit of each run (to compare two versions on one machine)
    python -m tests.golden --write    write the traces anew, rounded so that they hold on any machine

`test_golden.py` holds the code against the traces.
"""
