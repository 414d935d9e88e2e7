"""Sweeps over recipes: which variants are worth trying, what each costs and does, which is best.

`sweep` is the call; `recipes` says what is worth trying, `cache` keeps what is done, `pareto` and
`choice` compare, `result` and `report` show. Not here: compiling (`api`), judging (`evaluation`).
"""
