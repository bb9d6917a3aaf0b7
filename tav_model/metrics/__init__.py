"""Metrics of edited videos: by CLIP embeddings (`clip`) and by pixels and motion (`temporal`)."""
