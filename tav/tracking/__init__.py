"""MLflow: runs, the outbox for entries that a store misses, provenance, system metrics, comparison."""
