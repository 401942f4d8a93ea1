"""The calls of the original system, as they were written there, on the embedded models."""

import pytest
import torch
from torch import nn

from truthgpt_nb.attention import EfficientAttention, PositionalEncoding, RotaryPositionalEmbedding
from truthgpt_nb.models import load_text_model
from truthgpt_nb.optimization import PerformanceOptimizer
from truthgpt_nb.text import TextGenerator
from truthgpt_nb.tracker import ExperimentTracker


def test_text_generator(tmp_path):
    generator = TextGenerator(model="tiny-english", tokenizer=None, use_cache=True, cache_dir=str(tmp_path / "cache"))
    text = generator.generate("Once upon a time", max_new_tokens=8)
    assert isinstance(text, str) and text
    assert generator.generate("Once upon a time", max_new_tokens=8) == text
    assert generator.stats().hits_memory == 1
    generator.cache.close()


def test_performance_optimizer():
    model = load_text_model("tiny-english").model
    optimized = PerformanceOptimizer().optimize_model(
        model=model, optimizations=["quantize_dynamic", "channels_last"], compile_mode="default"
    )
    assert isinstance(optimized, nn.Module)
    assert optimized is not model


def test_experiment_tracker(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = ExperimentTracker(trackers=["wandb", "tensorboard"], project="truthgpt", run_name="experiment")
    tracker.log({"loss": 0.5, "accuracy": 0.9}, step=1)
    tracker.log_histogram("weights", torch.randn(100), step=1)
    tracker.finish()
    with ExperimentTracker(trackers=["tensorboard"], project="truthgpt", run_name="another") as tracker:
        tracker.log({"loss": 0.5})
    assert (tmp_path / "runs/truthgpt/experiment/record.jsonl").read_text().count("metrics") == 1
    assert len(list(tmp_path.rglob("*.tfevents.*"))) == 2 and len(list(tmp_path.rglob("*.wandb"))) == 1


@pytest.mark.filterwarnings("ignore:attention by torch instead of xformers")
@pytest.mark.parametrize("attention_backend", ["auto", "flash", "xformers", "torch"])
def test_efficient_attention(tmp_path, monkeypatch, attention_backend):
    monkeypatch.setenv("TRUTHGPT_HOME", str(tmp_path))
    attention = EfficientAttention(dim=64, num_heads=4, attention_backend=attention_backend)
    out = attention(torch.randn(2, 10, 64))
    assert out.shape == (2, 10, 64) and out.isfinite().all()


def test_positions():
    rope = RotaryPositionalEmbedding(dim=16, max_seq_len=32)
    q, k = rope(torch.randn(2, 4, 10, 16), torch.randn(2, 4, 10, 16))
    assert q.shape == k.shape == (2, 4, 10, 16)
    assert PositionalEncoding(16)(torch.randn(2, 10, 16)).shape == (2, 10, 16)
