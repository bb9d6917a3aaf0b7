"""Annotators: the condition frames of control networks, computed from the frames of a clip."""
