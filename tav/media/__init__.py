"""Read untrusted videos, and write videos, previews and contact sheets for people to look at."""
