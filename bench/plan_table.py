"""The memory tables of docs/scale.md: `prime-trainer plan` for the shapes of three well-known model sizes.

python bench/plan_table.py > plan.md
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from prime_trainer.config.run_config import RunConfig
from prime_trainer.plan import plan

# Of Qwen2.5: hidden size, MLP size, layers, heads, key and value heads, vocabulary, tied head; then GPUs.
SIZES = {
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True, 8),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 8),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 32),
}
ADAPTERS = {"7B": 1, "32B": 8}
"""GPUs of the rows with adapters of rank 128 on all linear layers."""
RANK = 128
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
KEYS = (*KEYS, "vocab_size", "tie_word_embeddings")


def plan_of(name: str, gpus: int, rank: int = 0) -> str:
    """A run of the paper's batch, as `prime-trainer plan` prints it."""
    shape = SIZES[name][:-1]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / name
        directory.mkdir()
        config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 4096}
        (directory / "config.json").write_text(json.dumps(config | dict(zip(KEYS, shape, strict=True))))
        large = name == "32B"
        cfg = RunConfig(
            model={"path": str(directory), "adapter": {"rank": rank}},
            micro_batch_tokens=8192,
            rollout={"batch_size": 64 if not large else 16},
            scale={"activation_checkpointing": "full", "offload": ["reference"] if large and not rank else []},
        )
        made = plan.make(cfg, gpus, prompt_tokens=1024)
        cfg.model.path = name
        return plan.render(made, cfg, gpus, 80.0)


def main() -> None:
    for name, (*_, gpus) in SIZES.items():
        print(f"### {name}\n\n{plan_of(name, gpus)}\n")
    for name, gpus in ADAPTERS.items():
        print(f"### {name}, adapters of rank {RANK}\n\n{plan_of(name, gpus, RANK)}\n")


if __name__ == "__main__":
    main()
