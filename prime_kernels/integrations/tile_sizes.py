"""Sizes of the tiles of logits in the linear operations, for those who plan memory."""

from typing import NamedTuple

from prime_kernels.ops import _fused_tiles
from prime_kernels.ops import _tiled_head as tiles


class TileSizes(NamedTuple):
    """What the linear operations hold of logits on one kind of device. Sizes in elements unless they are bytes."""

    device_type: str
    tokens: int
    """Tokens of a tile, at most."""
    forward: int
    """A tile without gradients."""
    backward: int
    """A tile of gradients of logits in the dtype of the inputs; it has whole tiles of ``forward`` logits."""
    kept_bytes: int
    """All logits of a call that are kept for their gradient, at most, in bytes."""
    fused_bytes: int
    """A tile of `linear_nll` and `linear_ppo_loss`, in bytes: whole rows."""
    added_rows: int
    """Rows of a 16-bit product that are added to a float32 sum at once; 0 where the product adds itself."""
    whole_head: bool
    """Whether kernels of whole heads make the logits in cache: then there are no tiles, and logits only if kept."""

    def forward_tile(self, tokens: int, vocabulary: int) -> tuple[int, int]:
        """(tokens, columns of the head) of a tile without gradients, of ``tokens`` x ``vocabulary`` logits."""
        return tiles.forward_tile(self.device_type, tokens, vocabulary)

    def backward_tile(self, input_bytes: int, logit_bytes: int, tokens: int, vocabulary: int) -> tuple[int, int]:
        """(tokens, columns of the head) of a tile of gradients. Its logits are part of the kept ones if there are."""
        return tiles.backward_tile(self.device_type, input_bytes, logit_bytes, tokens, vocabulary)

    def fused_tokens(self, logit_bytes: int, tokens: int, vocabulary: int) -> int:
        """Tokens of a tile of `linear_nll` and `linear_ppo_loss`, of ``tokens`` in all."""
        return tiles.tokens_of_whole_rows(self.fused_bytes // logit_bytes, tokens, vocabulary)


def tile_sizes(device_type: str) -> TileSizes:
    """The sizes in use on "cpu" or "cuda": of the current GPU, or without one of a GPU of 80 GB.

    Raises ValueError for another device.
    """
    if device_type not in tiles.TOKENS:
        raise ValueError(f"device_type: expected one of {', '.join(map(repr, tiles.TOKENS))}, got {device_type!r}")
    return TileSizes(
        device_type,
        tiles.TOKENS[device_type],
        tiles.forward_elements(device_type),
        tiles.backward_elements(device_type),
        tiles.kept_bytes(device_type),
        tiles.fused_bytes(device_type),
        0 if _fused_tiles.sums_in_product(device_type) else _fused_tiles.ADDED_ROWS[device_type],
        device_type in tiles.HEAD_KERNELS,
    )
