"""How the base model is trained: one module for each part, and the loop that they share."""
