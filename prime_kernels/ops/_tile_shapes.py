"""Shapes of tiles of logits [tokens, columns], from how many logits may be in memory."""

from collections.abc import Iterator

# Rows of logits start at multiples of 16 bytes: vector loads are possible for any vocabulary, and a tile gives the same
# bits at any position.
ALIGNED_COLUMNS = 8


def spans(total: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``total``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def tile_shape(elements: int, n_tokens: int, vocabulary: int, most_tokens: int) -> tuple[int, int]:
    """(tokens, columns) of a tile of at most ``elements`` logits; more tokens where it holds the whole vocabulary."""
    tokens = max(1, min(n_tokens, most_tokens))
    columns = max(1, min(vocabulary, elements // tokens))
    if ALIGNED_COLUMNS < columns < vocabulary:
        columns -= columns % ALIGNED_COLUMNS
    if columns == vocabulary:
        tokens = max(1, min(n_tokens, elements // columns))
    return tokens, columns


def whole_tiles(parts: tuple[int, int], sizes: tuple[int, int], n_tokens: int, vocabulary: int) -> tuple[int, int]:
    """``sizes`` (tokens, columns) of a tile made smaller to consist of whole ``parts``; at least one of them."""
    totals = (max(1, n_tokens), vocabulary)
    tokens, columns = (
        size if size >= total else max(part, size - size % part)
        for size, part, total in zip(sizes, parts, totals, strict=True)
    )
    return tokens, columns


def tokens_of_whole_rows(elements: int, n_tokens: int, vocabulary: int) -> int:
    """Tokens of a tile of at most ``elements`` logits over the whole vocabulary: as few tiles as go, of one size."""
    count = max(1, -(-n_tokens // max(1, elements // vocabulary)))
    return max(1, -(-n_tokens // count))


def moved(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)


def up_to(size: int, multiple: int) -> int:
    """The first multiple that is not less."""
    return -(-size // multiple) * multiple


def aligned(columns: int) -> int:
    return up_to(columns, ALIGNED_COLUMNS)
