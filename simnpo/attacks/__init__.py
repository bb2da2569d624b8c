"""Ways to bring back what a model was made to forget, and how far they get."""
