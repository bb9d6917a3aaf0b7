"""Prefect: the flow `tav`, its artifacts, the local services, rows on Ray, and the benchmark."""
