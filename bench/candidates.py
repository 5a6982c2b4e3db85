"""Time of candidates against the plain scoring pass, in turns within one process.

    python bench/candidates.py [--tokens 512] [--vocabulary 49152] [--width 576] [--dtype float32] [--repeats 9]

Prints the medians in milliseconds and the median of the ratios of neighbours, for logits and for a Head, at min_prob
0.05, 0.1 and 0.2. Logits are peaked as a language model's are: 1.3 candidates a position at 0.1.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import prime_kernels as pk


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(plain: Callable[[], object], searched: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """(plain, searched, ratio): medians, of calls in turns."""
    pairs = []
    for turn in range(repeats + 1):
        calls = (plain, searched) if turn % 2 else (searched, plain)
        first, second = seconds(calls[0]), seconds(calls[1])
        pairs.append((first, second) if turn % 2 else (second, first))
    del pairs[0]  # warms up
    columns = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return columns[0], columns[1], statistics.median(after / before for before, after in pairs)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 512), ("vocabulary", 49152), ("width", 576), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", default=None)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, given.dtype)
    torch.manual_seed(0)
    # Hidden states near the rows of a few likely tokens: sure positions, and some with several candidates.
    weight = torch.randn(given.vocabulary, given.width) / given.width**0.5
    likely = weight[torch.randint(given.vocabulary, (given.tokens, 3))]
    strength = given.width**0.5 * torch.rand(given.tokens, 3, 1).pow(0.5) * torch.tensor([1.0, 0.75, 0.4]).view(3, 1)
    hidden = 0.8 * (likely * strength).sum(1) * given.width**0.5 / 2 + 0.3 * torch.randn(given.tokens, given.width)
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)
    ids = torch.randint(given.vocabulary, (given.tokens,), device=device)
    logits, head = hidden @ weight.T, pk.Head(hidden, weight)
    with torch.no_grad():
        for min_prob in (0.05, 0.1, 0.2):
            options = {"min_prob": min_prob, "backend": given.backend}
            forms = {
                "logits": (
                    lambda: pk.log_probs(logits, ids, backend=given.backend),
                    lambda options=options: pk.candidates(logits, ids, **options),
                ),
                "head": (
                    lambda: pk.linear_log_probs(hidden, weight, ids, backend=given.backend),
                    lambda options=options: pk.candidates(head, ids, **options),
                ),
            }
            for form, calls in forms.items():
                plain, searched, ratio = compare(*calls, given.repeats)
                found = pk.candidates(head, **options).counts.float().mean().item()
                print(
                    f"{form:6s} min_prob {min_prob:<4g} {found:5.2f} candidates a position: "
                    f"plain {plain * 1e3:8.2f} ms, with candidates {searched * 1e3:8.2f} ms, {ratio:.3f}x"
                )


if __name__ == "__main__":
    main()
