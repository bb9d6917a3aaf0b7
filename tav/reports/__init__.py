"""The HTML report of a clip and its figures, and the scores as a table."""
