"""A Llama of 100,000 weights with a byte-level tokenizer, as an ordinary model directory; and random batches."""

import random
from pathlib import Path
from typing import Any

import torch

from prime_trainer.config.sections import ModelConfig
from prime_trainer.data.groups import Group, Response
from prime_trainer.models.loading import load_model
from prime_trainer.models.tokenizers import BARE_CHATML

TEXTS = [
    "What is 2 + 3? Give the sum in a box.",
    "The answer is \\boxed{5}.",
    "so 2 + 3 = 5\n\n",
    "user assistant system",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_model(
    directory: Path, *, head_dim: int = 32, tied: bool = True, sizes: dict[str, int] | None = None, **generation: Any
) -> Path:
    """`sizes` go into the configuration in place of the usual ones (more ids than the tokenizer has are never text);
    `generation` goes into the generation config, as models' authors do with their sampling defaults."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=301, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    bpe.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:2]})
    tokenizer.chat_template = BARE_CHATML
    tokenizer.save_pretrained(directory)

    torch.manual_seed(0)
    # Weights well above the usual spread: with those the distribution would be flat and attention blind.
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(
        **shape | (sizes or {}),
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        eos_token_id=[2, 0],
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0, **generation)
    model.save_pretrained(directory)
    return directory


def load(directory: Path, dtype: str = "float32"):
    return load_model(ModelConfig(path=str(directory), dtype=dtype, device="cpu"))


def random_groups(prompts: int = 3, n: int = 4, vocabulary: int = 301, longest: int = 9, seed: int = 0) -> list[Group]:
    """Ragged prompts and responses of at least one token, outcomes 0 and 1 in every group."""
    rng = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(length)]

    return [
        Group(ids(rng.randint(2, 12)), [Response(ids(rng.randint(1, longest)), float(k % 2)) for k in range(n)])
        for _ in range(prompts)
    ]
