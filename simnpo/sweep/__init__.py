"""Runs over a grid of settings, each scored on TOFU, in one table and one plot."""
