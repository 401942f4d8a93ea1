"""What would bore a reader of 02b_ledger, 06g_estimate and 11_memory: estimates held against measured processes."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

from truthgpt_nb.allocation import peak_memory
from truthgpt_nb.core import InputError
from truthgpt_nb.estimate import MemorySettings, _job, _measured, estimate_memory
from truthgpt_nb.ledger import Ledger
from truthgpt_nb.memory import find_batch_size, fit_memory, memory_limit, memory_stats, optimize_for_inference

SIZES = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"vocab_size": 4000}
SHARED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 4000, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = {
    "llama": LlamaConfig(**SHARED),
    "qwen3": Qwen3Config(**SHARED, head_dim=32),
    "gpt2": GPT2Config(**GPT2),
    "opt": OPTConfig(**{k: v for k, v in SIZES.items() if k[0] != "i"}, ffn_dim=512, word_embed_proj_dim=128),
    "neox": GPTNeoXConfig(**SIZES),
    "mistral": MistralConfig(**SHARED, sliding_window=128),
    "gemma2": Gemma2Config(**SHARED, head_dim=32, sliding_window=128),
    "bert": BertConfig(**SIZES, architectures=["BertForMaskedLM"]),
}
TRAINING = [
    MemorySettings(task="train", batch=4, length=256),
    MemorySettings(task="train", batch=3, length=256, attention="eager", checkpointing=True, optimizer="adamw_fused"),
]
WRITING = MemorySettings(task="generate", batch=16, length=384, new_tokens=3)
READING = MemorySettings(task="forward", batch=6, length=384)
DONE = [(name, [*TRAINING, READING if name in ("bert", "opt") else WRITING]) for name in FAMILIES]


@pytest.fixture(scope="module")
def measured():
    "What each family took, each case in a process of its own; for the first one the allocator's account too."
    jobs = [_job(FAMILIES[name], cases, as_usual=False, account=name == "llama") for name, cases in DONE]
    return dict(zip(FAMILIES, _measured(jobs), strict=True))


@pytest.mark.parametrize(("family", "cases"), DONE, ids=list(FAMILIES))
def test_estimates_are_within_15_percent_of_what_a_process_takes(family, cases, measured):
    for case, real in zip(cases, measured[family], strict=True):
        estimate = estimate_memory(FAMILIES[family], case).peak
        print(f"{family} {case.task} {estimate / real.process:.3f} of {real}")
        assert estimate == pytest.approx(real.process, rel=0.15), (case, real)
        assert real.tensors is None or estimate == pytest.approx(real.tensors, rel=0.15), (case, real)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) + sum(
        len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()
    )


def conv_net():
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8, 4))


@pytest.mark.parametrize("fails", [False, True])
def test_a_ledger_leaves_nothing_behind(fails):
    model = conv_net()
    call = lambda: model(torch.rand(2, 3 + fails, 9, 9)).sum().backward()
    if fails:
        with pytest.raises(RuntimeError), Ledger(model):
            call()
    else:
        with Ledger(model) as ledger:
            call()
        assert ledger.at_end()["gradients"] == sum(p.nbytes for p in model.parameters())
    assert hooks(model) == 0
    torch.ones(3) + 1  # no mode is left on


def test_the_account_is_that_of_the_profiler():
    for rows, width in ((100, 64), (333, 17), (1000, 128)):
        model = torch.nn.Sequential(torch.nn.Linear(width, 2 * width), torch.nn.GELU(), torch.nn.Linear(2 * width, 3))
        x = torch.randn(rows, width)
        call = lambda model=model, x=x: model(x).square().mean().backward()
        with Ledger(model) as ledger:
            there = ledger.held
            call()
        model.zero_grad()
        assert ledger.peak - there == pytest.approx(peak_memory(call), rel=0.02)


def test_a_long_block_remembers_a_bounded_number_of_blocks_and_its_peak():
    with Ledger(limit=1000) as ledger:
        big = torch.empty(1000) + torch.empty(1000)
        del big
        for _ in range(5000):
            torch.empty(2)
    assert ledger.dropped > 3000
    assert ledger.peak == 4000 * 3 == sum(ledger.at_peak().values())


def test_tied_weights_count_once_and_frozen_ones_have_no_gradients():
    tied = estimate_memory(LlamaConfig(**SHARED, tie_word_embeddings=True), "train", length=32)
    loose = estimate_memory(LlamaConfig(**SHARED), "train", length=32)
    assert loose.parts["parameters"] - tied.parts["parameters"] == 4 * 4000 * 128
    adapted = estimate_memory(LlamaConfig(**SHARED), "train", length=32, lora_rank=4)
    assert adapted.parts["optimizer state"] < loose.parts["optimizer state"] / 10
    assert 0 < adapted.trainable < adapted.parameters / 10


def test_half_precision_halves_the_weights_and_checkpointing_the_activations():
    config = FAMILIES["llama"]
    whole, half = (estimate_memory(config, "train", length=256, dtype=t) for t in ("float32", "bfloat16"))
    assert half.parts["parameters"] * 2 == whole.parts["parameters"]
    again = estimate_memory(config, "train", length=256, checkpointing=True)
    assert again.parts["activations"] < whole.parts["activations"] / 2


def test_a_model_that_is_there_is_not_touched():
    model = GPT2LMHeadModel(FAMILIES["gpt2"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimate_memory(model, "train", length=64)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (hooks(model), model.training, {p.device.type for p in model.parameters()}) == (0, True, {"cpu"})


def test_what_fits_is_within_the_budget_whatever_the_budget():
    for budget in (20, 45, 90):
        fit = fit_memory(FAMILIES["gpt2"], "train", budget=budget * 2**20, batch=4, length=128)
        assert fit.fits == (estimate_memory(FAMILIES["gpt2"], fit.settings).peak <= fit.budget)
        assert [change.peak for change in fit.changes] == sorted((c.peak for c in fit.changes), reverse=True)
        if fit.largest_batch:
            peak = estimate_memory(FAMILIES["gpt2"], fit.asked.settings, batch=fit.largest_batch).peak
            assert peak <= fit.budget


@pytest.mark.parametrize("make", [conv_net, lambda: GPT2LMHeadModel(FAMILIES["gpt2"])], ids=["conv_net", "gpt2"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_optimizing_for_inference_is_undone_bit_for_bit(make, dtype):
    model = make().train()
    language = hasattr(model, "config")
    sample = {"input_ids": torch.arange(9)[None]} if language else torch.rand(2, 3, 9, 9)
    optimizer = torch.optim.AdamW(model.parameters())
    out = model(**sample).logits if language else model(sample)
    out.square().mean().backward()
    optimizer.step()
    state = lambda: [*model.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values())]
    before, gradients = [t.clone() for t in state()], [p.grad.clone() for p in model.parameters()]
    report = optimize_for_inference(model, optimizer, dtype=dtype, sample=sample)
    assert not model.training
    assert not optimizer.state
    assert report.saved["optimizer state"] >= 2 * report.saved["gradients"]
    report.undo()
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))


def test_an_interrupt_puts_the_model_back(monkeypatch):
    model = conv_net().train()
    before = [t.clone() for t in model.state_dict().values()]
    monkeypatch.setattr("truthgpt_nb.memory._judge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        optimize_for_inference(model, dtype="bfloat16", sample=torch.rand(2, 3, 9, 9))
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_a_failed_batch_does_not_hold_its_tensors():
    seen = []

    def work(batch_size):
        seen.append(memory_stats("cpu").tensors)
        held = torch.ones(batch_size, 2**18)
        if batch_size > 2:
            raise MemoryError("no more")
        return held.sum().item()

    found = find_batch_size(work, start=8, shrink=0.5)
    assert (found.batch_size, [batch for batch, _ in found.failed]) == (2, [8, 4])
    assert max(seen) - min(seen) < 2**20


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None, "1"])
def test_bad_limits_are_refused(bad):
    with pytest.raises(InputError, match="extra must be"), memory_limit(bad):
        pass
    if bad is not None:
        with pytest.raises(InputError, match="budget must be"):
            fit_memory("tiny-english", budget=bad)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
from truthgpt_nb.ledger import ProcessPeak, return_freed_memory
small, large, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
return_freed_memory()
AutoModelForCausalLM.from_pretrained(small, dtype=dtype)  # what is loaded at the first call
process = ProcessPeak()
model = AutoModelForCausalLM.from_pretrained(large, dtype=dtype)
sum(float(p.sum()) for p in model.parameters())
print(process.bytes() - process.before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_what_was_estimated(dtype, tmp_path):
    large = LlamaConfig(**SHARED | {"vocab_size": 60_000})
    for name, config in (("small", FAMILIES["llama"]), ("large", large)):
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    estimate = estimate_memory(tmp_path / "large", "forward", length=8, dtype=dtype)
    assert int(done.stdout.splitlines()[-1]) == pytest.approx(estimate.loading, rel=0.15)
