"""What only a GPU can show: the answers of the definition, counts that add up, states that come back."""

import copy
import time

import pytest
import torch
from small_training import Data
from test_attention import NAMES, masks
from test_engine import ARCHITECTURES, VOCABULARY, made, settings_of, some_requests
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from truthgpt_nb import attention
from truthgpt_nb.attention import AttentionMask, attend, backend_refusal
from truthgpt_nb.ceilings import measure_ceilings
from truthgpt_nb.checkpoint import EMAManager
from truthgpt_nb.configs import EvidenceConfig, GenerationConfig, Tolerance
from truthgpt_nb.engine import InferenceEngine, end_ids
from truthgpt_nb.estimate import estimate_memory
from truthgpt_nb.evidence import Fidelity, compare
from truthgpt_nb.memory import find_batch_size, memory_snapshot, memory_stats
from truthgpt_nb.models import load_text_model
from truthgpt_nb.optimization import PerformanceOptimizer
from truthgpt_nb.profiler import ModelProfiler
from truthgpt_nb.trainer import Trainer

pytestmark = pytest.mark.cuda
SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8}
LLAMA = LlamaConfig(**SHAPE, num_key_value_heads=4, vocab_size=8000)
GPT2 = GPT2Config(n_embd=512, n_layer=6, n_head=8, vocab_size=8000, bos_token_id=0, eos_token_id=0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    "What is measured once and remembered goes to a folder of the test."
    monkeypatch.setenv("TRUTHGPT_HOME", str(tmp_path / "home"))
    attention._chosen.clear()
    print("seed", torch.seed())


# the engine


def alone(model, ids, count):
    "What `generate` writes for one prompt."
    row = torch.tensor([ids], device="cuda")
    plain = {"attention_mask": torch.ones_like(row), "do_sample": False, "pad_token_id": 0}
    written = model.generate(row, max_new_tokens=count, **plain)[0, len(ids) :].tolist()
    return written[:-1] if written[-1] in end_ids(model) else written


RUNS = [(name, False) for name in ARCHITECTURES if name != "GptOss"]
RUNS += [(name, True) for name in ("Llama", "GPT2", "Gemma3")]  # three, for the time that compiling takes


@pytest.mark.parametrize(("name", "compiled"), RUNS)
def test_the_engine_writes_what_generate_writes(name, compiled):
    model, requests = made(name).cuda(), some_requests(seed=1)
    expected = [alone(model, *request) for request in requests]
    with InferenceEngine(model, max_batch_size=5, chunk_tokens=24, compile=compiled) as engine:
        assert engine.fallback is None
        together = engine.generate_batch([ids for ids, _ in requests], settings_of(requests))
    assert [one.tokens for one in together] == expected


def test_drawn_texts_depend_on_their_seed_alone():
    model, requests = made("Llama").cuda(), some_requests(seed=2)
    drawn = [GenerationConfig(max_new_tokens=n, do_sample=True, seed=i) for i, (_, n) in enumerate(requests)]
    with InferenceEngine(model) as engine:
        together = engine.generate_batch([ids for ids, _ in requests], drawn)
        for (ids, _), setting, one in zip(requests, drawn, together, strict=True):
            assert engine.generate_batch([ids], setting)[0].tokens == one.tokens


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost():
    model = GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=4, n_head=4, vocab_size=VOCABULARY)).eval().cuda()
    prompts = [[3 + (7 * row + i) % 90 for i in range(500)] for row in range(24)]
    settings = GenerationConfig(max_new_tokens=4)
    with InferenceEngine(model, prefix_bytes=0) as engine:
        expected = [one.tokens for one in engine.generate_batch(prompts, settings, stop_ids=())]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    large = {"max_batch_size": 24, "max_tokens": 24 * 512, "chunk_tokens": 24 * 500, "prefix_bytes": 0}
    with InferenceEngine(model, **large) as engine:
        engine.generate_batch([[5, 6, 7]], settings, stop_ids=())
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 100 * 2**20) / total)
        try:
            written = [one.tokens for one in engine.generate_batch(prompts, settings, stop_ids=())]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert engine.stats().max_batch_size < 24
    assert written == expected


def test_half_precision_is_used_where_it_is_allowed():
    model = made("Llama").cuda()
    with InferenceEngine(model, precision="fast") as engine:
        engine.generate_batch([[5, 6, 7]], GenerationConfig(max_new_tokens=3))
        halves = {p.dtype for p in engine._work.ragged.model.parameters()}
    assert halves <= {torch.bfloat16, torch.float16} and halves
    assert model.dtype == torch.float32


# attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "math", "flash", "efficient", "cudnn", "flex", "auto"])
def test_attention_agrees_with_the_definition(backend, dtype, recwarn):
    if refusal := backend_refusal(backend, "cuda") if backend not in ("auto", "torch", "math") else None:
        pytest.skip(refusal)
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 2e-2}[dtype]
    for name in NAMES if backend != "flex" else ("causal", "packed window", "added"):
        shapes = [(2, 4, 96, 32), (2, 2, 96, 32), (2, 2, 96, 32)]
        q, k, v = inputs = [torch.randn(shape).to("cuda", dtype).requires_grad_() for shape in shapes]
        mask = masks(name)
        moved = AttentionMask(
            mask.causal,
            mask.window,
            None if mask.documents is None else mask.documents.cuda(),
            None if mask.visible is None else mask.visible.cuda(),
        )
        out = attend(q, k, v, moved, backend)
        exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
        expected, weight = attend(*exact, mask, "eager"), torch.randn(out.shape)
        (out.float() * weight.cuda()).sum().backward()
        (expected * weight.double()).sum().backward()
        for ours, theirs in [(out, expected), *[(a.grad, b.grad) for a, b in zip(inputs, exact, strict=True)]]:
            assert ours.isfinite().all(), name
            error = (ours.double().cpu() - theirs).abs().max()
            assert error <= tolerance * theirs.abs().max().clamp_min(1e-3), (name, float(error))


# measuring


def test_clocks_wait_for_the_kernels():
    a = torch.randn(8192, 8192, device="cuda")
    one, three = (lambda: a @ a), (lambda: a @ a @ a @ a)
    start = time.perf_counter()
    one()
    launched = time.perf_counter() - start
    settings = EvidenceConfig(budget_seconds=2, warmup=2)
    slow = compare(three, one, settings=settings, measure=never_apart)
    same = compare(one, lambda: a @ a, settings=settings, measure=never_apart)
    assert 2.4 < slow.speedup < 3.6
    assert same.verdict != "kept"
    print("launched within", launched)


def never_apart(*_):
    return Fidelity("value", {"identical": 1.0})


def test_ceilings_are_those_of_a_gpu():
    found = measure_ceilings("cuda")
    assert found.products["bfloat16"] > 4 * found.products["float32"] > 4e12
    assert found.memory_bandwidth > 2e11
    assert 1e-6 < found.operator_seconds < 1e-3


def test_a_profile_counts_the_time_of_the_kernels():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval().cuda()
    ids = torch.randint(8000, (8, 512), device="cuda")
    profile = ModelProfiler(model).profile({"input_ids": ids})
    modules = {one.path: one.seconds for one in profile.module_times}
    layers = sum(seconds for name, seconds in modules.items() if name.removeprefix("model.layers.").isdigit())
    assert 0.3 * profile.timed_seconds < layers < profile.timed_seconds
    kernels = sum(one.seconds for one in profile.roofline.operators)
    assert 0.5 * profile.roofline.seconds < kernels < 1.2 * profile.roofline.recorded_seconds
    assert profile.roofline.on_gpu and 0.9 < profile.roofline.distance < 100
    products = 2 * 8 * 512 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert profile.roofline.flops > products
    print(profile.explain())


# memory


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_takes_what_was_estimated(config, checkpointing):
    estimate = estimate_memory(config, "train", batch=8, length=512, device="cuda", checkpointing=checkpointing)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    kind = LlamaForCausalLM if config is LLAMA else GPT2LMHeadModel
    model = kind(config).cuda().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(8000, (8, 512), device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() - before
    print(f"estimated {estimate.peak / peak:.3f} of {peak}")
    assert estimate.peak == pytest.approx(peak, rel=0.15)


def test_a_ledger_tells_what_is_held_on_the_gpu():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2).cuda().train()
    ids = torch.randint(8000, (4, 256), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ledger = memory_snapshot(model, {"input_ids": ids, "labels": ids})
    assert ledger.peak > 0
    assert memory_stats("cuda").to_dict()
    assert torch.cuda.memory_allocated() <= before + 2**20
    print(ledger)


def test_a_batch_is_made_smaller_until_it_fits():
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        ones = lambda size: torch.ones(size, 2**22, device="cuda").sum().item()
        search = find_batch_size(ones, start=128, shrink=0.5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 16 <= search.batch_size <= 64 and len(search.failed) >= 1


# training


def gpt2(dropout=0.1):
    torch.manual_seed(0)
    shape = {"vocab_size": 29, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 16}
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(**shape, **drop, bos_token_id=0, eos_token_id=0)).cuda()


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_run_that_was_killed_ends_as_the_one_that_was_not(precision, tmp_path):
    def trained(folder, callbacks=()):
        settings = {"steps": 12, "save_every": 4, "precision": precision, "accumulate": 2, "ema": 0.9}
        return Trainer(gpt2(), Data(), folder=folder, callbacks=callbacks, learning_rate=1e-2, **settings)

    def die(trainer, what):
        if what == "step" and trainer.step == 7:
            raise RuntimeError("killed")

    torch.use_deterministic_algorithms(False)
    whole = trained(tmp_path / "whole")
    whole.fit(progress=False)
    with pytest.raises(RuntimeError, match="killed"):
        trained(tmp_path / "killed", [die]).fit(progress=False)
    torch.rand(5, device="cuda")
    again = trained(tmp_path / "killed")
    again.fit(progress=False)
    assert not torch.equal(whole.bare.lm_head.weight, gpt2().lm_head.weight)
    for (name, a), b in zip(whole.bare.named_parameters(), again.bare.parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(whole.ema._average.values(), again.ema._average.values(), strict=True):
        assert torch.equal(a, b)


def test_the_average_follows_the_weights_to_the_gpu():
    model = nn.Linear(8, 8)
    ema = EMAManager(model, decay=0.5, warmup=False)
    start = model.weight.detach().clone()
    model.cuda()
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    with ema.swapped():
        assert model.weight.is_cuda
        torch.testing.assert_close(model.weight.detach().cpu(), start + 0.5)


# optimization


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()) for _ in range(6)]
        self.blocks = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *blocks)

    def forward(self, x):
        return self.blocks(x).mean((2, 3))


def test_steps_on_a_gpu_are_kept_or_taken_back_and_the_model_stays_as_it_was():
    torch.manual_seed(0)
    model, x = Net().eval().cuda(), torch.randn(16, 3, 128, 128, device="cuda")
    before = copy.deepcopy(model.state_dict())
    optimizer = PerformanceOptimizer(EvidenceConfig(budget_seconds=2), Tolerance())
    fast = optimizer.optimize_model(model, ["fuse_conv_bn", "channels_last", "bf16", "torch_compile"], sample=x)
    print(optimizer.report)
    assert {one.verdict for one in optimizer.report.steps} <= {"kept", "no gain", "slower", "drifts"}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    reference = model(x)
    assert torch.nn.functional.cosine_similarity(fast(x).float().flatten(), reference.flatten(), 0) > 0.99


def test_compiled_with_graphs_a_model_gives_its_answers_again_and_again():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(8)]).eval().cuda()
    x = torch.randn(4, 256, device="cuda")
    optimizer = PerformanceOptimizer(EvidenceConfig(budget_seconds=2))
    fast = optimizer.optimize_model(model, ["torch_compile"], "reduce-overhead", sample=x)
    print(optimizer.report)
    assert optimizer.report.steps[0].verdict == "kept", optimizer.report.explain()
    with torch.no_grad():
        outs = [fast(each).clone() for each in (x, 2 * x, x)]  # a graph's next call writes over its results
        for each, out in zip((x, 2 * x, x), outs, strict=True):
            torch.testing.assert_close(out, model(each), rtol=1e-4, atol=1e-5)


def test_int4_weights_on_a_gpu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)).eval().cuda().bfloat16()
    x = torch.randn(2, 1024, device="cuda", dtype=torch.bfloat16)
    optimizer = PerformanceOptimizer(EvidenceConfig(budget_seconds=2), Tolerance(), objective="memory")
    optimizer.optimize_model(model, ["int4_weight_only"], sample=x)
    print(optimizer.report)
    assert optimizer.report.steps[0].verdict not in ("failed", "does not apply"), optimizer.report.explain()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_model_is_loaded_with_fewer_bits(quantization):
    pytest.importorskip("torchao")
    whole = load_text_model("tiny-english", "bfloat16", device="cuda")
    small = load_text_model("tiny-english", "bfloat16", device="cuda", quantization=quantization)
    row = whole.tokenizer("It is a truth universally acknowledged", return_tensors="pt").to("cuda")
    a, b = (one.model(**row).logits[0].float() for one in (whole, small))
    similar = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0)
    assert similar > {"int8": 0.99, "int4": 0.9}[quantization]
