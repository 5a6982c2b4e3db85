"""Repairs of Triton's interpreter that these tests need."""

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _with_index(tensor, *scope):
    """Loop bounds are arrays of one element, which NumPy 2.4 no longer turns into an int by itself (Triton 3.6)."""
    _patch_tensor(tensor, *scope)
    replace = scope[0].set_attr if scope else setattr
    replace(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _with_index
