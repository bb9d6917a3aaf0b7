"""Training of the base model: a module for each part, and the loop that they share."""
