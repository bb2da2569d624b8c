"""What can go wrong in a run, by whose doing."""


class UserError(ValueError):
    """An argument, a file or a model that this package cannot work with; the message says what to change."""


class RunError(RuntimeError):
    """A run that had to stop; the message names the step and what is left on disk."""
