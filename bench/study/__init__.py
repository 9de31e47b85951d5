"""The study: docs/study/ is what it has found, and this is how.

`plan.py` says which runs there are and `worker.py` does them, one after another (`python -m bench.study` is both as a
command); `records.py` keeps what is left of a run, `tokens.py` its loss by kinds of tokens. From the records alone
`report.py` writes the tables: `pairs.py` has the differences and tests, `mechanism.py` the rest, `figures.py` draws.
"""
