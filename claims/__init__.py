"""Claims of papers, tried small: one script a claim, run by `python -m claims AXIS` (`make claims AXIS=deltas`).

A script says only what it compares; `harness` runs it, keeps every finished run, judges, and writes the result.
"""
