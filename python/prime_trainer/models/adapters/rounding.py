"""Rounding of merged weights that keeps small updates on average.

An update much smaller than a weight's unit in the last place is gone after rounding to nearest, and with it all of an
adapter that has learned for a few steps. Rounded up as often as the part that is cut off says, each weight is right on
average, and so are the sums over hundreds of weights that a layer makes (stochastic rounding; Gupta et al., arXiv
1502.02551). The random numbers are the same ones in every call: equal weights give equal bits, a resumed run too.
"""

import torch
from torch import Tensor

# Bits of a float32 that a dtype has no room for.
CUT_BITS = {torch.bfloat16: 16, torch.float16: 13}
# Weights at once: what the random numbers take beside a weight does not grow with it.
CHUNK = 2**22


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """`exact` [out, in] float32 in `dtype`, each element to one of its two neighbours, the nearer one more often.

    What has a place in `dtype` stays as it is, so do infinities and NaN. Below 2^-14 float16 rounds to nearest.
    """
    cut = CUT_BITS.get(dtype)
    if cut is None:
        return exact.to(dtype)
    # r_i + c_j modulo 2^cut: uniform, and independent for any two elements, which is all that a variance needs.
    generator = torch.Generator().manual_seed(0)
    of_rows, of_columns = (
        torch.randint(2**cut, (size,), generator=generator, dtype=torch.int32).to(exact.device) for size in exact.shape
    )
    out = exact.new_empty(exact.shape, dtype=dtype)
    rows = max(1, CHUNK // max(1, exact.shape[1]))
    for part, noise, into in zip(exact.split(rows), of_rows.split(rows), out.split(rows), strict=True):
        raised = (noise[:, None] + of_columns).bitwise_and_(2**cut - 1).add_(part.view(torch.int32))
        raised.bitwise_and_(-(2**cut))
        into.copy_(torch.where(part.isfinite(), raised.view(torch.float32), part))
    return out
