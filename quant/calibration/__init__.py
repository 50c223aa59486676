"""The texts from which importance matrices are computed, and how they become what a model reads."""
