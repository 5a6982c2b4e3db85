"""What vLLM's workers import (`--worker-extension-cls`): our weight transfer and head, before they make theirs."""

from ..sampler import LogitsDtype
from . import engine

engine.register_file_backend()
engine.register_head()


class WorkerExtension:
    """A base class that vLLM gives its worker, for calls from outside."""

    def logits_dtype(self) -> LogitsDtype:
        return engine.logits_dtype(self)
