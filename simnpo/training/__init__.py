"""The training run: `unlearn` in loop.py."""
