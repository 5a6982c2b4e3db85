"""What vLLM's workers import (`--worker-extension-cls`): it adds our weight transfer before they make theirs."""

from . import engine

engine.register_file_backend()


class WorkerExtension:
    """Adds nothing to the worker; that it is imported is enough."""
