"""Prefect: the flow `tav` and what it needs of DVC. Orchestration only."""
