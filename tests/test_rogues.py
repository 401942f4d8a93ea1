"""A rogues' gallery: models and steps that look like gains and are not, each of which must be refused with its reason.

Times are simulated wherever a verdict on time matters: the clock moves by what a model says that it costs, times noise.
"""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from truthgpt_nb.configs import EvidenceConfig, Tolerance
from truthgpt_nb.core import InputError
from truthgpt_nb.optimization import STEPS, PerformanceOptimizer
from truthgpt_nb.steps import Coverage, NotApplicable, Step, apply_step

QUICK = EvidenceConfig(rounds=8, memory=False, min_sample_seconds=0)


class Clock:
    "A clock that a call moves on by its model's `cost`, times noise."

    def __init__(self, seed=0, noise=0.03):
        self.rng, self.noise, self.now = np.random.default_rng(seed), noise, 0.0

    def __call__(self):
        return self.now

    def run(self, model, sample):
        self.now += getattr(model, "cost", 1.0) * math.exp(self.rng.normal(0, self.noise))
        return model(sample)


def step(name, change, exact=False, writes=True):
    "A step from a function that changes a copy."

    def apply(model, trial):
        changed = change(model)
        return (model if changed is None else changed), Coverage("rogue", 1)

    return Step(name, "", lambda model, trial: None, apply, exact=exact, writes=writes)


@pytest.fixture
def tried(monkeypatch):
    "Try one step on a model; the evidence, and whether the same model came back."

    def run(made, model, sample, clock=None, tolerance=None, settings=QUICK, **options):
        monkeypatch.setitem(STEPS, made.name, made)
        optimizer = PerformanceOptimizer(settings, tolerance)
        if clock is not None:
            optimizer.clocks = (clock, clock)
            options["run"] = lambda model: clock.run(model, sample)
        result = optimizer.optimize_model(model, [made.name], sample=sample, **options)
        evidence = optimizer.report.steps[0]
        assert (result is model) == (not optimizer.report.kept)
        assert evidence.verdict == "kept" or result is model
        return evidence

    return run


def net(width=16, layers=3):
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())]).eval()


def rows(count=4, width=16):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def bits(model):
    state = model.state_dict().items()
    return {k: (v.dtype, v.detach().clone().contiguous().reshape(-1).view(torch.uint8)) for k, v in state}


def same_bits(a, b):
    return a.keys() == b.keys() and all(a[k][0] == b[k][0] and torch.equal(a[k][1], b[k][1]) for k in a)


def cheaper(model, cost=0.5):
    model.cost = cost


# the instrument: nothing is called a gain, and a gain is one


def test_a_step_without_effect_is_never_kept_in_a_hundred_runs(tried):
    "A/A: the step marks the model and changes nothing that it does."
    kept = []
    for seed in range(100):
        clock = Clock(seed, noise=(0.02, 0.1, 0.3)[seed % 3])
        made = step("marks", lambda model: setattr(model, "marked", True))
        settings = EvidenceConfig(rounds=20, memory=False, min_sample_seconds=0, seed=seed)
        kept.append(tried(made, net(layers=1), rows(), clock, settings=settings).verdict == "kept")
    assert sum(kept) == 0


def test_a_true_gain_is_kept_and_what_is_returned_is_not_slower(tried):
    for seed in range(10):
        clock = Clock(seed)
        evidence = tried(step("halves", cheaper), net(layers=1), rows(), clock, settings=EvidenceConfig(rounds=20))
        assert evidence.verdict == "kept"
        assert evidence.speedup == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize(("cost", "verdict"), [(1.1, "slower"), (1.0, "no gain"), (0.98, "no gain"), (0.8, "kept")])
def test_time_alone_decides_between_models_that_say_the_same(tried, cost, verdict):
    made = step("costs", lambda model: setattr(model, "cost", cost + 1e-9))
    evidence = tried(made, net(layers=1), rows(), Clock(noise=0.01), settings=EvidenceConfig(rounds=40))
    assert evidence.verdict == verdict


def test_the_returned_model_is_never_slower_than_the_one_given():
    "Steps of random cost in noise, whatever was kept of them: the true speed is at least 0.97."
    rng = np.random.default_rng(0)
    for seed in range(20):
        costs = {f"step{i}": float(math.exp(rng.normal(0, 0.15))) for i in range(4)}
        clock = Clock(seed, noise=0.08)

        def multiply(model, cost):
            model.cost = getattr(model, "cost", 1.0) * cost

        made = {name: step(name, lambda model, cost=cost: multiply(model, cost)) for name, cost in costs.items()}
        model, sample = net(layers=1), rows()
        optimizer = PerformanceOptimizer(EvidenceConfig(rounds=20, memory=False, min_sample_seconds=0))
        optimizer.clocks = (clock, clock)
        STEPS.update(made)
        try:
            found = optimizer.optimize_model(
                model, list(made), sample=sample, run=lambda model, c=clock, s=sample: c.run(model, s)
            )
        finally:
            for name in made:
                del STEPS[name]
        assert 1 / getattr(found, "cost", 1.0) >= 0.97


# gate one: it was applied


def test_a_step_that_changes_nothing_was_not_applied(tried):
    evidence = tried(step("nothing", lambda model: None), net(), rows())
    assert (evidence.verdict, evidence.reason) == ("does not apply", "the model is no different after it")


def test_a_step_that_counts_zero_layers_was_not_applied(tried):
    made = Step("zero", "", lambda m, t: None, lambda m, t: (cheaper(m) or m, Coverage("layers", 0, 5)))
    assert tried(made, net(), rows(), Clock()).verdict == "does not apply"


def test_conv1d_is_reached_and_torchs_own_call_does_not():
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=99, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    for name in ("quantize_dynamic", "int8_weight_only"):
        coverage = apply_step(STEPS[name], model, _trial({"input_ids": torch.arange(7)[None]}))[1]
        assert (coverage.changed, coverage.eligible) == (9, 9)
        assert "lm_head shares its weight" in str(coverage)


def test_layers_that_a_step_leaves_are_counted_and_named():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(*[Own(8, 8) for _ in range(8)], nn.Linear(8, 8)).eval()
    coverage = apply_step(STEPS["quantize_dynamic"], model, _trial(rows(4, 8)))[1]
    assert str(coverage).startswith("1 of 9 layers")
    assert "left as they are: 0, 1, 2, …" in str(coverage)


def _trial(sample, **options):
    from truthgpt_nb.steps import Trial, call_model

    return Trial(sample, lambda model: call_model(model, sample), **options)


# convolutions and normalizations


class Norms(nn.Module):
    "Two convolutions and two normalizations, with statistics as after training."

    def __init__(self, share=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2 = self.conv if share == "conv" else nn.Conv2d(4, 4, 1)
        self.norm2 = self.norm if share == "norm" else nn.BatchNorm2d(4)
        for layer in (self.norm, self.norm2):
            nn.init.uniform_(layer.running_mean, -1, 1)
            nn.init.uniform_(layer.running_var, 0.2, 3)

    def forward(self, x):
        return self.norm2(self.conv2(self.norm(self.conv(x)).relu()))


class PreActivation(Norms):
    def forward(self, x):
        return self.conv2(self.norm2(self.conv(self.norm(x))).relu())


class ReadTwice(Norms):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Norms("conv"), "called 2 times"),
        (Norms("norm"), "called 2 times"),
        (ReadTwice(), "read elsewhere too"),
    ],
    ids=["reused conv", "reused norm", "output read twice"],
)
def test_what_cannot_be_fused_is_refused(tried, model, reason):
    pixels = torch.randn(2, 4, 6, 6)
    evidence = tried(STEPS["fuse_conv_bn"], model.eval(), pixels)
    assert evidence.verdict == "does not apply"
    assert reason in evidence.reason


def test_a_preactivation_block_keeps_the_norm_that_comes_first(tried):
    torch.manual_seed(0)
    model, pixels = PreActivation().eval(), torch.randn(2, 4, 6, 6)
    changed, coverage = apply_step(STEPS["fuse_conv_bn"], model, _trial(pixels))
    assert (coverage.changed, coverage.eligible) == (1, 2)
    assert "does not read the output of a convolution" in str(coverage)
    torch.testing.assert_close(changed(pixels), model(pixels))


def test_a_norm_in_train_mode_is_not_fused(tried):
    evidence = tried(STEPS["fuse_conv_bn"], Norms().train(), torch.randn(2, 4, 6, 6))
    assert "in train mode" in evidence.reason


def test_a_fusion_by_order_of_the_modules_drifts(tried):
    "What folding the next normalization into each convolution, in the order of the modules, does to a reused one."

    def by_order(model):
        model.conv = nn.utils.fusion.fuse_conv_bn_eval(model.conv, model.norm)
        model.norm, model.conv2 = nn.Identity(), model.conv

    evidence = tried(step("by order", by_order, exact=True), Norms("conv").eval(), torch.randn(2, 4, 6, 6), Clock())
    assert evidence.verdict == "drifts"


# gate two: it is correct


class Early(nn.Module):
    "Leaves out the last layers."

    def __init__(self, model):
        super().__init__()
        self.model, self.cost = model[:-2], 0.3

    def forward(self, x):
        return self.model(x)


class Remembers(nn.Module):
    "Answers every input as the first one."

    cost = 0.1

    def __init__(self, model):
        super().__init__()
        self.model, self.answer = model, None

    def forward(self, x):
        self.answer = self.model(x) if self.answer is None else self.answer
        return self.answer


class Traced(nn.Module):
    "Was traced along one branch of a model that has two."

    cost = 0.5

    def __init__(self, model):
        super().__init__()
        self.traced = torch.jit.trace(model, rows(), check_trace=False)

    def forward(self, x):
        return self.traced(x)


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.one(x) if x.sum() > 0 else self.two(x)


class NaNOnOdd(nn.Module):
    cost = 0.5

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) * (math.nan if len(x) % 2 else 1)


class WritesInput(nn.Module):
    cost = 0.5

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        y = self.model(x)
        x.zero_()
        return y


class Renamed(nn.Module):
    cost = 0.5

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return {"output": self.model(x)}


class Transposed(Renamed):
    def forward(self, x):
        return self.model(x).t()


class Silent(Renamed):
    def forward(self, x):
        self.model(x)


@pytest.mark.parametrize(
    ("made", "verdict", "reason"),
    [
        (step("early", Early), "drifts", "another one"),
        (step("remembers", Remembers), "drifts", "on another input"),
        (step("writes", WritesInput), "failed", "writes to its input"),
        (step("renames", Renamed), "drifts", "dict instead of"),
        (step("transposes", Transposed), "drifts", "the shape is (16, 4) instead of (4, 16)"),
        (step("silent", Silent), "drifts", "NoneType instead of"),
        (step("raises", lambda model: 1 / 0), "failed", "ZeroDivisionError"),
        (step("returns text", lambda model: "model"), "failed", "AttributeError"),
    ],
    ids=lambda value: value.name if isinstance(value, Step) else None,
)
def test_a_rogue_that_is_faster_is_stopped(tried, made, verdict, reason):
    model, sample = net(), rows()
    before, sample_before = bits(model), sample.clone()
    evidence = tried(made, model, sample, Clock())
    assert evidence.verdict == verdict
    assert reason in evidence.reason
    assert same_bits(bits(model), before)
    assert torch.equal(sample, sample_before)


def test_a_branch_that_was_traced_away_is_found(tried):
    torch.manual_seed(0)
    evidence = tried(step("traced", Traced, exact=True), TwoBranches().eval(), rows(), Clock())
    assert evidence.verdict == "drifts"
    assert "on another input" in evidence.reason


def test_nan_on_one_shape_is_found(tried):
    evidence = tried(step("nan", NaNOnOdd), net(), rows(4), more_samples=[rows(6), rows(5)])
    assert evidence.verdict == "drifts"
    assert "on sample 3" in evidence.reason
    assert "NaN" in evidence.reason


def test_an_exact_step_must_be_exact(tried):
    def scale(model):
        model[-2].weight.data *= 1.002
        cheaper(model)

    assert tried(step("lossy", scale), net(), rows(), Clock(), settings=EvidenceConfig(rounds=20)).verdict == "kept"
    evidence = tried(step("exact", scale, exact=True), net(), rows(), Clock())
    assert evidence.verdict == "drifts"
    assert "reordered arithmetic" in evidence.reason


class RoughRotary(nn.Module):
    "Rotary positions whose angles are computed in the type of the input."

    def __init__(self, width=32):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("frequencies", 10000 ** -(torch.arange(0, width, 2) / width))

    def forward(self, x):  # batch × length × width
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * self.frequencies
        a, b = x.chunk(2, -1)
        turned = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)
        return turned * self.scale


def test_rotary_angles_in_bf16_drift_at_late_positions_only(tried):
    assert tried(STEPS["bf16"], RoughRotary().eval(), torch.randn(1, 8, 32)).verdict != "drifts"
    evidence = tried(STEPS["bf16"], RoughRotary().eval(), torch.randn(1, 1024, 32))
    assert evidence.verdict == "drifts"
    assert "relative error" in evidence.reason


def test_another_type_of_output_is_said(tried):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=99)
    evidence = tried(STEPS["bf16"], BertModel(config).eval(), {"input_ids": torch.arange(2, 9)[None]})
    assert "its output is in bfloat16" in evidence.detail


def test_the_likeliest_token_of_an_untrained_model_is_not_held_against_a_step(tried):
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=500, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model, ids = GPT2LMHeadModel(config).eval(), torch.randint(3, 500, (2, 40))
    evidence = tried(STEPS["quantize_dynamic"], model, {"input_ids": ids}, tolerance=Tolerance(cosine=0.9))
    assert "top1_agreement" not in evidence.fidelity.metrics
    assert evidence.verdict != "drifts"


# the baseline itself


class Dropping(nn.Module):
    "Dropout left on, whatever the mode."

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return F.dropout(self.layer(x), 0.1, training=True)


class Appending(nn.Module):
    "Keeps what it saw, in a buffer, as a cache that is written in place."

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x):
        self.seen += x.mean(0)
        return self.layer(x + self.seen)


@pytest.mark.parametrize("model", [Dropping(), Appending()], ids=["dropout left on", "in-place cache"])
def test_a_model_that_differs_from_itself_is_not_verified(tried, model):
    before = bits(model)
    evidence = tried(step("cheaper", cheaper), model.eval(), rows(), Clock())
    assert evidence.verdict == "unverified"
    assert "differs from itself" in evidence.reason
    assert same_bits(bits(model), before)


def test_a_model_that_writes_to_its_input_is_not_verified(tried):
    sample = rows()
    evidence = tried(step("cheaper", cheaper), WritesInput(net()).eval(), sample)
    assert evidence.verdict == "unverified"
    assert "writes to its input" in evidence.reason


def test_bad_samples_are_errors_before_any_step():
    optimizer, model = PerformanceOptimizer(QUICK), nn.Bilinear(16, 16, 4).eval()
    with pytest.raises(InputError, match="must be what the model takes"):
        optimizer.optimize_model(model, ["bf16"], sample=rows())
    with pytest.raises(InputError, match="must be on the model's device, cpu"):
        optimizer.optimize_model(net(), ["bf16"], sample=rows().to("meta"))
    with pytest.raises(InputError, match="must be what the model takes"):
        optimizer.optimize_model(net(), ["bf16"], sample=rows(), more_samples=[rows(4, 15)])


# outputs of every kind


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    label: str = "x"


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Linear(16, 16), wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


@pytest.mark.parametrize(
    "wrap",
    [lambda y: {"y": y, "n": 3}, lambda y: (y, [y + 1]), Answer, lambda y: y],
    ids=["dict", "tuple", "dataclass", "tensor"],
)
def test_outputs_of_every_kind_are_compared(tried, wrap):
    model = Wrapped(wrap).eval()
    evidence = tried(step("cheaper", cheaper), model, rows(), Clock(), settings=EvidenceConfig(rounds=20))
    assert evidence.verdict == "kept"
    wrong = step("wrong", lambda model: (nn.init.zeros_(model.layer.weight.data), cheaper(model))[1])
    assert tried(wrong, model, rows(), Clock()).verdict == "drifts"


# what a step does to what is not its own


def test_a_step_that_breaks_the_weights_and_raises_leaves_the_model_bit_for_bit(tried):
    def breaks(model):
        for weight in model.parameters():
            weight.data.mul_(2)
        del model[0]
        raise RuntimeError("half-way")

    model = net()
    before, modules = bits(model), list(model.modules())
    evidence = tried(step("breaks", breaks), model, rows())
    assert (evidence.verdict, evidence.reason) == ("failed", "RuntimeError: half-way")
    assert same_bits(bits(model), before)
    assert list(model.modules()) == modules


@pytest.mark.parametrize(
    ("turn", "what"),
    [
        (lambda: torch.set_num_threads(3), "the number of threads"),
        (lambda: torch.set_default_dtype(torch.float64), "the default type"),
        (lambda: torch.set_float32_matmul_precision("medium"), "the precision of float32 products"),
    ],
    ids=["threads", "default type", "precision"],
)
def test_a_switch_of_the_whole_process_is_refused_and_put_back(tried, turn, what):
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    evidence = tried(step("turns", lambda model: (turn(), cheaper(model))[1]), net(), rows(), Clock())
    assert evidence.verdict == "failed"
    assert what in evidence.reason
    assert (torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()) == before


def test_the_model_is_byte_identical_after_everything_was_tried_and_refused():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.LayerNorm(16)]
    model, pixels = nn.Sequential(*layers).train(), torch.randn(2, 3, 8, 8)
    before, modes = bits(model), [m.training for m in model.modules()]
    pointers = [p.data_ptr() for p in model.parameters()]
    names = [name for name in STEPS if name not in ("torch_compile", "compile_blocks")]
    strict = Tolerance(relative_error=0, cosine=1)
    optimizer = PerformanceOptimizer(EvidenceConfig(rounds=6, memory=False, min_gain=1000), strict)
    assert optimizer.optimize_model(model, names, sample=pixels) is model
    assert same_bits(bits(model), before)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


def test_tied_weights_stay_tied_and_shared_modules_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.head.weight = self.table.weight
            self.layer = self.again = nn.Linear(16, 16)

        def forward(self, ids):
            return self.head(self.again(self.layer(self.table(ids))))

    model, ids = Tied().eval(), torch.randint(0, 50, (2, 5))
    for name in ("bf16", "freeze", "inference_mode"):
        changed, _ = apply_step(STEPS[name], model, _trial(ids))
        assert changed.head.weight is changed.table.weight
        assert changed.layer is changed.again
    changed, coverage = apply_step(STEPS["quantize_dynamic"], model, _trial(ids))
    assert changed.layer is changed.again
    assert (coverage.changed, coverage.eligible) == (2, 2)
    assert "head shares its weight" in str(coverage)


# the compiler, without waiting for its code


@pytest.fixture
def quick_compiler(monkeypatch):
    "Graphs are made as always and run as they are, so that nothing is built."
    compile_as_is = torch.compile

    def compile_quickly(function, **settings):
        return compile_as_is(function, backend="eager", dynamic=settings.get("dynamic"))

    monkeypatch.setattr(torch, "compile", compile_quickly)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_limit_that_another_model_has_used_up_does_not_count(tried, quick_compiler):
    for width in range(2, 4 + torch._dynamo.config.recompile_limit):
        nn.Linear(width, 1).compile(backend="eager")
        torch.compile(nn.Linear(width, 1))(torch.randn(1, width))
    coverage = apply_step(STEPS["torch_compile"], nn.Linear(16, 16).eval(), _trial(rows()))[1]
    assert "1 graph" in str(coverage)


def test_a_model_that_is_never_compiled_is_refused(quick_compiler):
    class Never(nn.Linear):
        @torch.compiler.disable
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(NotApplicable, match="made no graph"):
        apply_step(STEPS["torch_compile"], Never(16, 16).eval(), _trial(rows()))


def test_a_branch_on_values_is_a_break_that_is_said(quick_compiler):
    torch.manual_seed(0)
    coverage = apply_step(STEPS["torch_compile"], TwoBranches().eval(), _trial(rows()))[1]
    assert "break" in str(coverage)


def test_shapes_that_recompile_and_the_limit_are_said(quick_compiler):
    class Fixed(nn.Module):
        def forward(self, x):
            return x * len(x)

    few, many = [torch.randn(n, 2) for n in (2, 3)], [torch.randn(n, 2) for n in range(2, 14)]
    for samples, said in ((few, "compiled again for other inputs"), (many, "the recompile limit was met")):
        trial = dataclasses.replace(
            _trial(samples[0], more_samples=samples[1:], dynamic=False),
            run=lambda model, samples=samples: [model(sample) for sample in samples],
        )
        assert said in str(apply_step(STEPS["torch_compile"], Fixed(), trial)[1])


def test_repeated_blocks_are_compiled_once_for_all(quick_compiler):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(12)]).eval()
    changed, coverage = apply_step(STEPS["compile_blocks"], model, _trial(rows()))
    assert str(coverage).startswith("12 blocks of 1 kind; 1 graph")
    torch.testing.assert_close(changed(rows()), model(rows()))


# the search


def test_what_loses_alone_and_wins_with_the_compiler_is_found(monkeypatch):
    "W8A8 alone was slower, and with the compiler faster than either."

    def costs(model):
        both = model.marks == {"loses", "torch_compile"}
        model.cost = 0.5 if both else 1.5 if "loses" in model.marks else 1.0

    def marking(name):
        def change(model):
            model.marks = {*getattr(model, "marks", set()), name}
            costs(model)

        return step(name, change)

    for name in ("loses", "torch_compile"):
        monkeypatch.delitem(STEPS, name, raising=False)
        monkeypatch.setitem(STEPS, name, marking(name))
    for names in (["loses", "torch_compile"], "auto"):
        clock, sample = Clock(), rows()
        optimizer = PerformanceOptimizer(EvidenceConfig(rounds=20, memory=False, min_sample_seconds=0))
        optimizer.clocks = (clock, clock)
        if names == "auto":
            for other in [name for name in STEPS if name not in ("loses", "torch_compile")]:
                monkeypatch.delitem(STEPS, other)
        found = optimizer.optimize_model(
            net(layers=1), names, sample=sample, run=lambda model, c=clock, s=sample: c.run(model, s)
        )
        assert set(optimizer.report.kept) == {"loses", "torch_compile"}
        assert found.cost == 0.5


@pytest.mark.parametrize("at", ["first", "second", "third"])
def test_an_interrupted_search_returns_the_best_so_far(monkeypatch, at):
    for name in list(STEPS):
        monkeypatch.delitem(STEPS, name)
    for name, cost in (("first", 0.9), ("second", 0.5), ("third", 0.4)):
        monkeypatch.setitem(STEPS, name, step(name, lambda model, cost=cost: cheaper(model, cost)))
    clock, sample, model = Clock(), rows(), net(layers=1)

    def progress(line):
        if line == f"{at} …":
            raise KeyboardInterrupt

    optimizer = PerformanceOptimizer(EvidenceConfig(rounds=20, memory=False, min_sample_seconds=0), progress=progress)
    optimizer.clocks = (clock, clock)
    found = optimizer.optimize_model(model, "auto", sample=sample, run=lambda model: clock.run(model, sample))
    expected = {"first": [], "second": ["first"], "third": ["second"]}[at]
    assert optimizer.report.kept == expected
    assert (found is model) == (not expected)
    assert optimizer.report.ended.startswith("interrupted")
    assert copy.deepcopy(found) is not None


def test_memory_and_size_are_objectives_that_may_not_cost_time():
    torch.manual_seed(0)
    model, sample = nn.Sequential(*[nn.Linear(128, 128) for _ in range(4)]).eval(), rows(2, 128)
    for least_speed, verdict in ((0.97, "slower"), (0.1, "kept")):
        clock = Clock(noise=0.01)
        optimizer = PerformanceOptimizer(
            EvidenceConfig(rounds=12, memory=False, min_sample_seconds=0), objective="size", least_speed=least_speed
        )
        optimizer.clocks = (clock, clock)

        def run(model, clock=clock, sample=sample):
            model.cost = 1.0 if isinstance(model[0], nn.Linear) else 1.4
            return clock.run(model, sample)

        optimizer.optimize_model(model, ["quantize_dynamic"], sample=sample, run=run)
        assert optimizer.report.steps[0].verdict == verdict
    del model.cost


def test_a_set_up_that_is_not_paid_back_is_no_gain(tried, monkeypatch):
    import truthgpt_nb.optimization as module

    ticks = iter(np.arange(0, 1e6, 100.0))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setitem(STEPS, "slow set-up", step("slow set-up", cheaper))
    clock, sample = Clock(), rows()
    for calls, verdict in ((10, "no gain"), (10_000, "kept")):
        optimizer = PerformanceOptimizer(EvidenceConfig(rounds=20, memory=False), expected_calls=calls)
        optimizer.clocks = (clock, clock)
        optimizer.optimize_model(
            net(layers=1), ["slow set-up"], sample=sample, run=lambda model: clock.run(model, sample)
        )
        evidence = optimizer.report.steps[0]
        assert evidence.verdict == verdict
        assert evidence.break_even_calls is None or evidence.break_even_calls > 100
