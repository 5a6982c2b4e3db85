"""Numbers and names used by all backends. csrc/include/pk/abi.h has the same values; a test compares them."""

NORMALIZE_EPS = 1e-6
"""Process rewards are divided by their largest return plus this."""
WHITEN_EPS = 1e-8
"""Advantages are divided by the square root of the variance plus this."""
MAX_LOG_RHO = 20.0
"""PPO ratios are clamped to e^20, beyond which they have no gradient: float32 would overflow to inf and NaN."""
PRM_KINDS = ("ce", "dpo", "kto", "nca", "prefix")
"""The losses of :func:`prime_kernels.prm_loss`."""
PRM_PAIR_KINDS = ("dpo", "nca")
"""Those that are means over pairs of responses, and need groups."""
PRM_BALANCED_KINDS = ("ce", "prefix")
"""Those that take a weight and a shift of each response."""
PRM_BETA, PREFIX_BETA = 0.05, 10.0
"""The default beta of the losses of whole responses, and of "prefix", whose values are means over tokens."""
