"""The sections of a run's configuration, a file for each room that reads them.

The defaults of `rl`'s algorithm (rollout, filter, prm, algorithm, policy) are the PRIME paper's where it states them
(arXiv 2502.01456, section 4), but for `prm.minibatches`, of which it has four. Of `sft` only the learning rate and its
warm-up are the paper's; those of `train_prm` are its implicit PRM's (arXiv 2412.01981). The rest suit a small machine.
"""

from .base import Section
from .data import SFTConfig, TaskConfig
from .evaluation import BenchConfig, BenchmarkName, EvalConfig
from .metrics import MetricsConfig, TrackerName
from .model import AdapterConfig, ModelConfig, ScaleConfig
from .prm import Compat, ProcessBenchConfig, ScoreConfig, ScoreValue, SelectConfig, Splitter, TrainPRMConfig
from .rollout import Correction, FilterConfig, RolloutConfig, ServerConfig, VLLMConfig, vllm_installed
from .train import COUPLED_KINDS, AlgorithmConfig, CheckpointConfig, PolicyConfig, PRMConfig, PRMKind, PRMLossConfig

__all__ = [
    "COUPLED_KINDS", "AdapterConfig", "AlgorithmConfig", "BenchConfig", "BenchmarkName", "CheckpointConfig", "Compat",
    "Correction", "EvalConfig", "FilterConfig", "MetricsConfig", "ModelConfig", "PRMConfig", "PRMKind",
    "PRMLossConfig", "PolicyConfig", "ProcessBenchConfig", "RolloutConfig", "SFTConfig", "ScaleConfig", "ScoreConfig",
    "ScoreValue", "Section", "SelectConfig", "ServerConfig", "Splitter", "TaskConfig", "TrackerName", "TrainPRMConfig",
    "VLLMConfig", "vllm_installed",
]  # fmt: skip
