"""Measurements behind the figures of the documentation; no part of the installed package.

Cost (`RESULTS.md`): `python -m benchmarks` (its parts are in `speed/`), and `memory_limits` for large models, whose
checkpoints `write_pair` writes (`pairs/`). `run_cost` runs main.py in a process of its own and measures it; `plan`
counts bytes and operations of whole models. `python -m benchmarks --help` lists all programs.

Evidence (`docs/nulls.md`, `docs/power.md`, `docs/distilled.md`): `seeds` trains zoos of tiny models, for `exact_nulls`,
`convergence`, `false_alarms`, `after_alignment`, `power` (with `descendants`) and `distilled`.
"""
