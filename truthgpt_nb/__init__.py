"""A Jupyter-first workbench where an optimization counts only once it has been measured on your own model"""

import importlib
from typing import Any

__version__ = "0.1.0"

# where each name lives; a module is imported when one of its names is first used, so `import truthgpt_nb` stays light
_modules = {
    "EfficientAttention": "attention",
    "PositionalEncoding": "attention",
    "RotaryPositionalEmbedding": "attention",
    "backend_report": "attention",
    "swap_attention": "attention",
    "CacheManager": "cache",
    "LiveFigure": "callbacks",
    "Samples": "callbacks",
    "Tracking": "callbacks",
    "CheckpointManager": "checkpoint",
    "EMAManager": "checkpoint",
    "EvidenceConfig": "configs",
    "GenerationConfig": "configs",
    "InferenceConfig": "configs",
    "Tolerance": "configs",
    "TrainingConfig": "configs",
    "TruthGPTError": "core",
    "RecordSource": "data",
    "run_demo": "demo",
    "doctor": "devices",
    "InferenceEngine": "engine",
    "estimate_memory": "estimate",
    "compare": "evidence",
    "write_file": "jobs",
    "train_text": "launch",
    "DataLoaderBuilder": "loader",
    "ModelManager": "manager",
    "MemoryOptimizer": "memory",
    "fit_memory": "memory",
    "load_text_model": "models",
    "PerformanceOptimizer": "optimization",
    "generation_trial": "optimization",
    "OptimizationPlan": "plans",
    "apply_plan": "plans",
    "verify_plan": "plans",
    "ModelProfiler": "profiler",
    "StepProfiler": "profiler",
    "compare_profiles": "profiler",
    "profiling": "profiler",
    "learning_rate_finder": "rates",
    "compare_runs": "runs",
    "load_runs": "runs",
    "generate_dataset": "scale",
    "read_generated": "scale",
    "TextGenerator": "text",
    "ExperimentTracker": "tracker",
    "Trainer": "trainer",
    "optimize_training": "training_steps",
    "ProfilePanel": "widgets",
    "TextPanel": "widgets",
}
__all__ = ["__version__", *sorted(_modules)]


def __getattr__(name: str) -> Any:
    if name not in _modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_modules[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
