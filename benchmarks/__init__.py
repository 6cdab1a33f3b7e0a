"""Measurements behind the figures of the documentation; no part of the installed package.

Cost (`RESULTS.md`): `python -m benchmarks` (the parts are in `speed/`), and `memory_limits` for large models, whose
checkpoints `write_pair` writes (`pairs/`). `measured_run` runs main.py and measures it with `memory` and
`compilations`; `costs` starts it; `plan` counts bytes and operations of whole models.

Evidence (`docs/nulls.md`, `docs/power.md`, `docs/distilled.md`): `seeds` trains zoos of tiny models, for `exact_nulls`,
`convergence`, `false_alarms`, `after_alignment`, `power` (with `descendants`) and `distilled`.
"""
