"""A Jupyter-first workbench where an optimization counts only once it has been measured on your own model"""

import importlib
from typing import Any

__version__ = "0.1.0"

# where each name lives; a module is imported when one of its names is first used, so `import truthgpt_nb` stays light
_modules = {
    "CacheManager": "cache",
    "CheckpointManager": "checkpoint",
    "EMAManager": "checkpoint",
    "GenerationConfig": "configs",
    "InferenceConfig": "configs",
    "EvidenceConfig": "configs",
    "TrainingConfig": "configs",
    "Tolerance": "configs",
    "TruthGPTError": "core",
    "RecordSource": "data",
    "doctor": "devices",
    "run_demo": "demo",
    "InferenceEngine": "engine",
    "compare": "evidence",
    "DataLoaderBuilder": "loader",
    "ModelManager": "manager",
    "load_text_model": "models",
    "PerformanceOptimizer": "optimization",
    "generation_trial": "optimization",
    "ModelProfiler": "profiler",
    "write_file": "jobs",
    "load_runs": "runs",
    "compare_runs": "runs",
    "generate_dataset": "scale",
    "read_generated": "scale",
    "TextGenerator": "text",
    "ExperimentTracker": "tracker",
    "Trainer": "trainer",
    "TextPanel": "widgets",
    "ProfilePanel": "widgets",
}
__all__ = ["__version__", *sorted(_modules)]


def __getattr__(name: str) -> Any:
    if name not in _modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_modules[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
