"""Errors that are no defect of the trainer: shown as one message, without a traceback."""


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what is kept."""
