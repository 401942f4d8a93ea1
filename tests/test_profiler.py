"What would bore a reader of nbs/api/13_profiler.ipynb."

import contextlib
import errno
import gzip
import json
import threading
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from truthgpt_nb.allocation import allocations, peak_memory, recording
from truthgpt_nb.ceilings import Ceilings, machine_ceilings
from truthgpt_nb.configs import ProfileConfig
from truthgpt_nb.core import ConfigError, InputError
from truthgpt_nb.devices import threads as torch_threads
from truthgpt_nb.operations import Operation, counting_operations, through_cache
from truthgpt_nb.profiler import (
    ModelProfiler,
    StepProfiler,
    _operator_table,
    compare_profiles,
    operator_times,
    profiling,
    timing_modules,
)
from truthgpt_nb.roofline import roofline_of
from truthgpt_nb.spans import _Reader, _spans_and_kernels, marking_modules, module_tree
from truthgpt_nb.traces import read_trace, trace_problems, write_trace

MB = 2**20


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=3, **sizes))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=2, n_positions=64))


def conv_net():
    block = lambda: torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), block(), block(), torch.nn.AdaptiveAvgPool2d(1))


def writing(model):
    prompt = torch.ones(1, 5, dtype=torch.long)
    return lambda: model.generate(prompt, attention_mask=prompt, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)


def cases():
    for make in (llama, gpt2):
        model = make()
        yield pytest.param(model, writing(model), 4, id=make.__name__)
    yield pytest.param(conv_net(), torch.rand(2, 3, 16, 16), 1, id="conv_net")


def hook_count(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(("model", "call", "forwards"), list(cases()))
def test_a_profile_adds_up(model, call, forwards):
    profile = ModelProfiler(model).profile(call)
    root = profile.module_times[0]
    assert (root.path, root.calls) == ("", forwards)
    for times in (profile.module_times, profile.pattern_times):
        assert sum(time.self_seconds for time in times) == pytest.approx(root.seconds, abs=1e-8)
        assert all(0 <= time.self_seconds <= time.seconds for time in times)
    assert sum(time.calls for time in profile.module_times) == sum(time.calls for time in profile.pattern_times)
    assert 0 < sum(time.self_seconds for time in profile.operator_times) <= profile.recorded_seconds
    assert root.seconds <= profile.timed_seconds
    assert all(time.device_seconds == 0 for time in profile.operator_times)
    assert profile.memory.peak_bytes == max(held for _, held in profile.memory.timeline) > 0
    assert json.loads(gzip.decompress(profile.trace))["traceEvents"]
    assert json.loads(profile.to_json())["seconds"] == profile.seconds
    for shown in (repr(profile), profile._repr_html_()):
        assert profile.pattern_times[0].kind in shown and profile.operator_times[0].name in shown


def test_layers_of_a_transformer_are_one_row():
    for model, pattern in ((llama(), "model.layers.*.self_attn"), (gpt2(), "transformer.h.*.attn")):
        times = {time.path: time for time in ModelProfiler(model).profile(writing(model)).pattern_times}
        assert (times[pattern].modules, times[pattern].calls) == (3, 12)
        assert not any("0" in path for path in times)


def test_numbers_of_unlike_modules_stay():
    paths = {time.path for time in ModelProfiler(conv_net()).profile(torch.rand(1, 3, 8, 8)).pattern_times}
    assert {"0", "1", "1.0", "2.2"} <= paths


@pytest.mark.parametrize(("model", "call", "forwards"), list(cases()))
@pytest.mark.parametrize("shapes", [False, True])
def test_operators_are_those_of_torch(model, call, forwards, shapes):
    run = call if callable(call) else lambda: model(call)
    with recording(shapes=shapes) as recorded, torch.no_grad():
        run()
    torchs = defaultdict(float)
    for average in recorded.key_averages(group_by_input_shape=shapes):
        if average.key != "[memory]":
            torchs[average.key, str(average.input_shapes) if shapes else ""] += average.self_cpu_time_total / 1e6
    ours = operator_times(recorded, shapes)
    assert {(time.name, time.shapes) for time in ours} == set(torchs)
    for time in ours:
        assert time.self_seconds == pytest.approx(torchs[time.name, time.shapes], abs=2e-7)
    assert [time.self_seconds for time in ours] == sorted((time.self_seconds for time in ours), reverse=True)


def event(name, start, end, id, device=DeviceType.CPU, linked=0, annotation=False):
    answers = {"name": name, "start_ns": start, "end_ns": end, "duration_ns": end - start, "correlation_id": id}
    answers |= {"device_type": device, "linked_correlation_id": linked, "is_user_annotation": annotation}
    answers |= {"is_hidden_event": False, "start_thread_id": 1, "end_thread_id": 1, "shapes": []}
    return SimpleNamespace(**{name: (lambda value=value: value) for name, value in answers.items()})


def test_kernels_belong_to_the_operator_that_launched_them():
    events = [
        event("aten::linear", 0, 100, 1),
        event("aten::addmm", 10, 60, 2),
        event("cudaLaunchKernel", 20, 30, 7, linked=2),
        event("gemm", 200, 900, 8, DeviceType.CUDA, linked=2),
        event("splitk", 900, 1000, 9, DeviceType.CUDA, linked=2),
        event("step", 200, 1000, 10, DeviceType.CUDA, linked=1, annotation=True),
    ]
    results = SimpleNamespace(events=lambda: events)
    times = operator_times(SimpleNamespace(profiler=SimpleNamespace(kineto_results=results)))
    assert [(time.name, round(time.self_seconds * 1e9), round(time.device_seconds * 1e9)) for time in times] == [
        ("aten::addmm", 50, 800),
        ("aten::linear", 50, 0),
    ]
    spans, kernels = _spans_and_kernels(events, False)
    assert len(spans[1]) == 2 and kernels == {2: 800}
    profile = SimpleNamespace(operator_times=times, settings=ProfileConfig(), recorded_seconds=1e-6)
    assert _operator_table(profile).columns[-2:] == ["GPU time", "GPU share"]


def test_recorded_shapes_are_shown():
    profile = ModelProfiler(conv_net(), shapes=True).profile(torch.rand(2, 3, 16, 16))
    assert "[[2, 3, 16, 16]" in " ".join(row["input shapes"] for row in profile.operators.rows)


def test_a_dominant_layer_is_first():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[2].register_forward_pre_hook(lambda *_: (torch.rand(400, 400) @ torch.rand(400, 400), None)[1])
    assert ModelProfiler(model).profile(torch.rand(1, 8)).modules.rows[0]["module"] == "2"


def test_a_model_without_modules_or_calls():
    empty = ModelProfiler(torch.nn.Sequential()).profile(torch.rand(2))
    assert [(time.path, time.calls) for time in empty.module_times] == [("", 1)]
    uncalled = ModelProfiler(conv_net()).profile(lambda: None)
    assert uncalled.module_times == uncalled.operator_times == [] and uncalled.memory.peak_bytes == 0
    assert "No modules ran" in repr(uncalled.modules) and "No module patterns ran" in uncalled._repr_html_()
    assert len(uncalled.figure().axes) == 3


def test_a_part_of_a_model():
    model = llama()
    profile = ModelProfiler(model).profile(lambda: model.model(torch.ones(1, 4, dtype=torch.long)))
    assert profile.module_times[0].path == "model"
    assert sum(t.self_seconds for t in profile.module_times) == pytest.approx(profile.module_times[0].seconds, abs=1e-8)


def test_inputs_of_each_kind():
    class Sum(torch.nn.Module):
        def forward(self, a, b=1, *, c=0):
            seen.append((float(a), float(b), float(c)))

    one, two = torch.tensor(1.0), torch.tensor(2.0)
    for arguments, named, expected in (
        ((one,), {}, (1, 1, 0)),
        ((one, two), {"c": 3}, (1, 2, 3)),
        (((one, two),), {"c": 3}, (1, 2, 3)),
        (({"a": one, "c": two},), {"b": 5}, (1, 5, 2)),
        ((lambda a: Sum()(a), two), {}, (2, 1, 0)),
    ):
        seen = []
        ModelProfiler(Sum(), warmup=2).profile(*arguments, **named)
        assert seen == [expected] * 6  # two to warm up, one plain, one recorded, one timed, one counted


@pytest.mark.parametrize("wrong", ["text", 3, None, [torch.ones(1)], {1: torch.ones(1)}])
def test_what_is_no_call_is_refused(wrong):
    with pytest.raises(InputError, match="run_or_inputs must be a function or the inputs"):
        ModelProfiler(conv_net()).profile(wrong)
    model = conv_net()
    with pytest.raises(InputError, match="run_or_inputs"):
        ModelProfiler(model).profile(model)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="top"):
        ModelProfiler(conv_net(), top=0)
    profiler = ModelProfiler(conv_net(), ProfileConfig(top=3, memory=False), top=4)
    assert profiler.config == ProfileConfig(top=4, memory=False)
    profile = profiler.profile(torch.rand(1, 3, 8, 8))
    assert len(profile.operators) == len(profile.modules) == 4
    assert profile.memory is None and profile.to_dict()["memory"] is None
    assert len(profile.figure().axes) == 2


@pytest.mark.parametrize(
    ("failing_call", "kind"),
    [(call, kind) for call in (1, 2, 3, 4) for kind in (KeyError, KeyboardInterrupt)] + [(5, KeyboardInterrupt)],
)  # warm-up, plain, recorded, timed, counted
def test_whatever_ends_it_the_model_is_as_before(failing_call, kind):
    model, count = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2)).train(), 0
    model[0].eval()

    def run():
        nonlocal count
        count += 1
        model(torch.rand(1, 2))
        if count == failing_call:
            raise kind("mine")

    random_state = torch.get_rng_state()
    with pytest.raises(kind, match="mine"):
        ModelProfiler(model).profile(run)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == [True, False, True]
    assert hook_count(model) == 0
    assert ModelProfiler(model).profile(torch.rand(1, 2)).module_times  # the profiler is free again


def test_an_interrupt_that_the_caller_survives():
    class Interrupted(torch.nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    class Stubborn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.interrupted, self.linear = Interrupted(), torch.nn.Linear(2, 2)

        def forward(self, x):
            with contextlib.suppress(KeyboardInterrupt):
                self.interrupted(x)
            return self.linear(x)

    model = Stubborn()
    with timing_modules(model) as times:
        model(torch.rand(1, 2))
    assert (times[0].path, times[-1].path) == ("", "linear")
    assert times[0].calls == 1 and times[0].seconds >= times[-1].seconds


def test_a_shared_module_is_one_row():
    shared = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(shared, torch.nn.ReLU(), shared)
    times = ModelProfiler(model).profile(torch.rand(1, 4)).module_times
    assert [(time.path, time.calls) for time in times] == [("", 1), ("0", 2), ("1", 1)]


def test_outputs_and_hooks_of_others_are_untouched():
    class Pair(torch.nn.Module):
        def forward(self, x):
            return x, {"twice": 2 * x}

    model, seen = Pair(), []
    own = model.register_forward_hook(lambda module, args, output: seen.append(output))
    with timing_modules(model):
        x, rest = model(torch.ones(1))
    assert (x, rest["twice"]) == (1, 2) and len(seen) == 1
    assert list(model._forward_hooks) == [own.id]


def test_each_run_draws_the_same_and_leaves_the_stream():
    drawn = []
    model = torch.nn.Linear(1, 1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ModelProfiler(model).profile(lambda: drawn.append(torch.rand(1).item()))
    assert torch.equal(torch.rand(3), expected)
    assert len(set(drawn)) == 1 and len(drawn) == 5


def test_modules_that_run_in_other_threads_keep_apart():
    model = conv_net().eval()
    x = torch.rand(1, 3, 16, 16)

    def run():
        workers = [threading.Thread(target=model, args=(x,)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    root, *rest = ModelProfiler(model).profile(run).module_times
    assert root.calls == 4 and {time.calls for time in rest} == {4}
    assert root.self_seconds + sum(time.self_seconds for time in rest) == pytest.approx(root.seconds, abs=1e-7)


def test_a_second_profiler_is_refused_and_the_first_goes_on():
    model, x = conv_net(), torch.rand(1, 3, 8, 8)
    refused = []

    def run():
        for second in (lambda: ModelProfiler(model).profile(x), lambda: peak_memory(lambda: None)):
            try:
                second()
            except InputError as error:
                refused.append(error.rule)
        model(x)

    profile = ModelProfiler(model, warmup=0).profile(run)
    assert set(refused) == {"must be the only one at work in this process"}
    assert "aten::conv2d" in {time.name for time in profile.operator_times}
    with torch.profiler.profile() as users, pytest.raises(InputError, match="only one"):
        ModelProfiler(model).profile(x)
    assert users.events() is not None


def test_peak_counts_only_what_the_call_holds():
    model = torch.nn.Linear(1, 1)
    take = lambda megabytes: torch.empty(megabytes * MB, dtype=torch.uint8)
    profile = ModelProfiler(model).profile(lambda: (take(10), None)[1] or take(20))
    assert 20 * MB <= profile.memory.peak_bytes < 21 * MB


def test_traces_are_whole_or_not_there(tmp_path):
    profile = ModelProfiler(conv_net()).profile(torch.rand(1, 3, 8, 8))
    path = profile.save_trace(tmp_path / "a.json.gz")
    first = path.read_bytes()
    assert profile.save_trace(str(path)).read_bytes() == first
    events = json.loads(gzip.decompress(first))["traceEvents"]
    assert any(event.get("name") == "aten::conv2d" and event["dur"] > 0 for event in events)
    with pytest.raises(InputError, match=r"must end in \.json\.gz"):
        profile.save_trace(tmp_path / "a.json")
    (tmp_path / "folder.json.gz").mkdir()
    for wrong in (tmp_path / "none" / "a.json.gz", tmp_path / "folder.json.gz", path / "a.json.gz"):
        with pytest.raises(InputError, match="must be a file that can be written"):
            profile.save_trace(wrong)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json.gz", "folder.json.gz"]


# the work of operators


def both_ways(model, *inputs):
    def run():
        out = model(*inputs)
        (out.logits if hasattr(out, "logits") else out).float().square().mean().backward()

    return run


def flops(run):
    with counting_operations() as counted:
        run()
    return sum(operation.flops for operation in counted)


def eager_models():
    tokens = torch.randint(96, (2, 7))
    for make in (llama, gpt2):
        model = make()
        model.set_attn_implementation("eager")
        yield pytest.param(model, tokens, id=make.__name__)
    yield pytest.param(conv_net(), torch.rand(2, 3, 9, 11), id="conv_net")
    yield pytest.param(torch.nn.Conv1d(6, 4, 3, stride=2, dilation=2), torch.rand(3, 6, 20), id="conv1d")


@pytest.mark.parametrize(("model", "x"), list(eager_models()))
def test_flops_are_those_of_torch(model, x):
    for run in (lambda: model(x), both_ways(model, x)):
        with FlopCounterMode(display=False) as counter:
            run()
        assert flops(run) == counter.get_total_flops() > 0
    with torch.inference_mode():
        inferred = flops(lambda: model(x))
    with torch.no_grad():
        assert inferred == flops(lambda: model(x))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_gradients_of_grouped_convolutions(kind, groups):
    conv = kind(8, 12, (3, 5), groups=groups, bias=False)
    once = flops(lambda: conv(torch.rand(2, 8, 9, 10)))
    assert once == flops(lambda: kind(8, 12, (3, 5), bias=False)(torch.rand(2, 8, 9, 10))) // groups
    assert flops(both_ways(conv, torch.rand(2, 8, 9, 10, requires_grad=True))) == 3 * once


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flops_of_quantized_linears():
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).eval()
    small = torch.ao.quantization.quantize_dynamic(net, {torch.nn.Linear}, dtype=torch.qint8)
    x = torch.rand(5, 16)
    with torch.no_grad():
        assert flops(lambda: small(x)) == flops(lambda: net(x)) == 2 * 5 * (16 * 32 + 32 * 4)
        with counting_operations() as counted:
            small(x)
    assert {operation.dtype for operation in counted if operation.flops} == {"int8"}
    assert counted[0].moved_bytes >= 16 * 32


def test_counting_leaves_results_and_randomness():
    model, x = llama().train(), torch.randint(96, (2, 5))
    torch.manual_seed(1)
    expected, after = model(x).logits, torch.rand(1)
    torch.manual_seed(1)
    with counting_operations():
        logits = model(x).logits
    assert torch.equal(logits, expected) and torch.equal(torch.rand(1), after)


def test_a_cache_keeps_what_was_used_last():
    pages = [torch.randint(0, 40, (1,)).item() for _ in range(400)]
    reads = [Operation("aten::sum", "", "float32", 0, 0, ((page * 2**16, 2**16),)) for page in pages]
    room, used, expected = 8, [], []
    for page in pages * 2:
        expected.append(page in used)
        used = [*(p for p in used if p != page), page][-room:]
    found = through_cache(reads, room * 2**16)
    assert [bool(cached) for _, cached in found] == expected[len(pages) :]
    assert all(memory + cached == 2**16 for memory, cached in found)


# spans


def trained_cases():
    tokens = torch.randint(96, (2, 7))
    yield from (pytest.param(make(), tokens, id=make.__name__) for make in (llama, gpt2))
    yield pytest.param(conv_net(), torch.rand(2, 3, 16, 16), id="conv_net")


@pytest.mark.parametrize(("model", "x"), list(trained_cases()))
def test_a_step_adds_up_by_module(model, x):
    run = both_ways(model, x)
    run()  # from now on gradients are added up, in each run alike
    with counting_operations() as counted:
        run()
    with recording() as recorded, marking_modules(model):
        run()
    tree, calls = module_tree(recorded, model, {operation.name for operation in counted})
    nodes = list(tree.walk())
    assert tree.seconds == pytest.approx(sum(node.self_seconds for node in nodes), abs=1e-8)
    assert all(0 <= node.python_seconds <= node.forward_seconds + 1e-9 for node in nodes)
    assert sum(node.held_bytes for node in nodes) == max(held for _, held in allocations(recorded))
    assert all(0 <= node.held_bytes <= node.allocated_bytes for node in nodes)
    owners = {path for path, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert owners <= {node.path for node in nodes if node.backward_seconds > 0}
    roof = roofline_of(counted, calls, machine_ceilings(), tree.seconds, tree.seconds)
    assert roof.unplaced < 0.05 and not any(one.estimated for one in roof.operators if one.flops)
    assert tree.total("flops") == roof.flops == sum(operation.flops for operation in counted)
    assert sum(roof.seconds_by_bound().values()) == pytest.approx(tree.seconds, rel=1e-6)
    assert json.loads(json.dumps(roof.to_dict()))["bound"] == roof.bound


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_belongs_to_its_module(reentrant):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
    with recording() as recorded, marking_modules(model):
        hidden = model[0](torch.rand(2, 4))
        checkpoint(model[1], hidden, use_reentrant=reentrant).sum().backward()
    tree, _ = module_tree(recorded, model)
    assert {node.path: node.calls for node in tree.walk()} == {"(call)": 1, "0": 1, "1": 2, "1.0": 2, "1.1": 2}
    assert all(node.backward_seconds > 0 for node in tree.walk() if node.kind == "Linear")


def test_kernels_of_a_backward_thread_belong_to_the_module():
    def span(name, start, end, id, thread=1, seq=-1, forward=0, scope=0, **more):
        made = event(name, start, end, id, **more)
        made.start_thread_id = made.end_thread_id = lambda: thread
        made.sequence_nr, made.fwd_thread_id, made.scope = lambda: seq, lambda: forward, lambda: scope
        made.is_python_function = lambda: False
        return made

    events = [
        span("call: ", 0, 1000, 1),
        span("module: ", 10, 200, 2),
        span("module: 0", 20, 150, 3),
        span("aten::addmm", 30, 100, 4, seq=7),
        span("autograd::engine::evaluate_function: AddmmBackward0", 300, 400, 5, thread=2, seq=7, forward=1),
        span("AddmmBackward0", 310, 390, 6, thread=2, seq=7, forward=1, scope=1),
        span("aten::mm", 320, 380, 7, thread=2),
        span("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 400, 410, 8, thread=2),
        event("gemm", 100, 600, 9, DeviceType.CUDA, linked=4),
        event("gemm", 600, 900, 10, DeviceType.CUDA, linked=7),
    ]
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    reader = _Reader(model, {"aten::mm", "aten::addmm"})
    reader.read(events)
    nanoseconds = lambda node: [
        round(1e9 * value) for value in (node.forward_seconds, node.backward_seconds, node.device_seconds)
    ]
    found = {node.path: nanoseconds(node) for node in reader.root.walk()}
    assert found == {"(call)": [810, 0, 0], "": [60, 0, 0], "0": [130, 110, 800]}
    assert {call.name: round(1e9 * call.device_seconds) for call in reader.calls} == {
        "aten::addmm": 500,
        "aten::mm": 300,
    }
    ceilings = Ceilings("cuda:0", {"float32": 1e13}, 1e12, 4e12, 2**20, 1e-9, 0.0, {})
    work = [Operation(name, "2×2", "float32", 10**6, 0, ()) for name in ("aten::addmm", "aten::mm")]
    roof = roofline_of(work, reader.calls, ceilings, 1e-6, 1e-6)
    assert roof.on_gpu and roof.bound == "compute"
    assert round(1e9 * roof.seconds_by_bound()["between"]) == 200


def test_stacks_name_the_function():
    profile = ModelProfiler(conv_net(), stacks=True, hardware=False).profile(lambda: calls_from_here())
    lines = {time.called_from for time in profile.operator_times if time.name == "aten::erf"}
    assert len(lines) == 1 and "calls_from_here" in lines.pop()
    assert "called from" in profile.operators.columns


def calls_from_here():
    return torch.rand(3).erf()


# profiles of blocks and steps


def test_inactive_means_nothing_is_left():
    model, x = llama(), torch.randint(96, (1, 4))
    before = dict(vars(torch.nn.modules.module))
    ModelProfiler(model).profile(x)
    with profiling(model):
        model(x)
    with StepProfiler(model, wait=0, warmup=1, active=1) as steps:
        for _ in range(3):
            model(x)
            steps.step()
    assert hook_count(model) == 0 and all(not module._backward_hooks for module in model.modules())
    hooks = [name for name in before if name.startswith("_global_") and name.endswith("_hooks")]
    assert hooks and not any(getattr(torch.nn.modules.module, name) for name in hooks)
    assert not torch.autograd.profiler._is_profiler_enabled
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("failing_step", [1, 2, 3, 4])  # left alone, counted, warm-up, recorded
def test_a_training_that_ends_in_the_middle_of_a_step(failing_step, kind):
    model, x = conv_net(), torch.rand(2, 3, 8, 8)
    steps = StepProfiler(model, wait=1, warmup=2, active=3)

    def train():
        with steps:
            for step in range(1, 7):
                both_ways(model, x)()
                if step == failing_step:
                    raise kind
                steps.step()

    with pytest.raises(kind):
        train()
    assert hook_count(model) == 0 and torch.utils._python_dispatch._get_current_dispatch_mode() is None
    with pytest.raises(InputError, match="must have ended while recorded"):
        steps.profile
    assert ModelProfiler(model).profile(x).module_times


def test_steps_are_added_up():
    model, x = gpt2(), torch.randint(96, (2, 6))
    with StepProfiler(model, wait=1, warmup=1, active=3) as steps:
        for _ in range(7):
            both_ways(model, x)()
            steps.step()
    profile = steps.profile
    assert steps.phase == "over" and profile.steps == 3 and not profile.once
    assert {time.calls for time in profile.module_times} == {3}
    assert profile.tree.seconds == pytest.approx(profile.recorded_seconds, rel=0.05)
    events = read_trace(profile.trace)
    assert trace_problems(events) == [] and sum(e["name"] == "module: lm_head" for e in events) == 3
    assert profile.tree.total("flops") == 3 * profile.roofline.flops
    assert json.loads(profile.to_json())["steps"] == 3 and "3 steps" in repr(profile.table())


def test_work_that_cannot_be_counted_is_said():
    model, x = conv_net(), torch.rand(1, 3, 8, 8)

    def run():
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("not under a mode")
        model(x)

    profile = ModelProfiler(model).profile(run)
    assert profile.roofline is None and "not under a mode" in profile.explain()
    assert ModelProfiler(model, hardware=False).profile(x).roofline_note == "hardware=False was asked for"


def test_training_mode_is_left_alone():
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)), torch.rand(2, 4)
    modes = []

    def step():
        modes.append((model.training, torch.is_grad_enabled()))
        model.zero_grad()
        model(x).sum().backward()

    profile = ModelProfiler(model, training=True).profile(step)
    assert set(modes) == {(True, True)} and model[0].weight.grad is not None
    assert profile.tree.total("backward_seconds") > 0 and len(profile.icicle().axes) == 1


def test_a_compiled_model():
    model, x = conv_net().eval(), torch.rand(1, 3, 8, 8)
    profile = ModelProfiler(torch.compile(model, backend="eager")).profile(x)
    assert profile.roofline.flops == flops(lambda: model(x))
    assert profile.operator_times and hook_count(model) == 0


@pytest.mark.parametrize(
    ("inputs", "rule"),
    [
        ({}, "must be what the model's forward takes"),
        ({"input": torch.ones(1, 8), "other": 1}, "must be what the model's forward takes"),
        ((torch.ones(1, 8), 2), "must be what the model's forward takes"),
        (torch.ones(1, 8, device="meta"), "must be where the model is"),
        ({"input": torch.ones(1, 8, device="meta")}, "must be where the model is"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_a_run(inputs, rule):
    model = torch.nn.Linear(8, 8)
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(InputError, match=rule):
        ModelProfiler(model).profile(inputs)


def test_comparing_profiles():
    model, x = conv_net().eval(), torch.rand(1, 3, 8, 8)
    first = ModelProfiler(model, hardware=False).profile(x)
    same = compare_profiles(first, first)
    assert {change.difference for change in same.operators + same.modules} == {0.0}
    model[1][2] = torch.nn.GELU()
    after = compare_profiles(first, ModelProfiler(model, hardware=False).profile(x))
    calls = {change.name: (change.before_calls, change.after_calls) for change in after.operators}
    assert calls["aten::gelu"] == (0, 1) and calls["aten::relu"] == (2, 1)
    assert len(after.figure().axes) == 2 and "aten::gelu" in repr(after)
    with pytest.raises(InputError, match="before must be a Profile"):
        compare_profiles(None, first)


# traces and ceilings


@pytest.mark.parametrize("mebibytes", [0.1, 0.3])
def test_a_trace_ends_at_its_limit(mebibytes, tmp_path):
    model, x = llama(), torch.randint(96, (1, 4))
    profiler = ModelProfiler(model, trace_mebibytes=mebibytes, hardware=False)
    profile = profiler.profile(lambda: [model(x) for _ in range(9)])
    assert len(gzip.decompress(profile.trace)) <= mebibytes * MB
    assert f"cut at {mebibytes:g} MiB" in profile.trace_note and profile.trace_note in repr(profile.table())
    events = read_trace(profile.save_trace(tmp_path / "t.json.gz"))
    assert trace_problems(events) == [] and all(e.get("dur", 0) >= 0 for e in events)


def test_a_full_disk_takes_the_file_and_nothing_else(tmp_path, monkeypatch):
    profile = ModelProfiler(conv_net(), hardware=False).profile(torch.rand(1, 3, 8, 8))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(InputError, match=r"No space left on device\. Free some room"):
            profile.save_trace(tmp_path / "t.json.gz")
    assert list(tmp_path.iterdir()) == []
    assert trace_problems(read_trace(write_trace(tmp_path / "t.json.gz", profile.trace))) == []


@pytest.mark.parametrize("broken", ["", "{", "[1]", '{"a": 1}'])
def test_ceilings_survive_their_file(broken, tmp_path, monkeypatch):
    made = Ceilings("cpu", {"float32": 1e11}, 1e10, 5e10, 2**25, 1e-6, 0.0, {})
    measured = []
    monkeypatch.setenv("TRUTHGPT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("truthgpt_nb.ceilings.measure_ceilings", lambda device: measured.append(device) or made)
    assert machine_ceilings() == machine_ceilings() == made and len(measured) == 1
    (tmp_path / "home" / "ceilings.json").write_text(broken)
    assert machine_ceilings() == machine_ceilings() == made and len(measured) == 2
    with torch_threads(torch.get_num_threads() + 1):
        machine_ceilings()
    assert len(measured) == 3
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUTHGPT_HOME", str(tmp_path / "file"))  # no folder can be made there
    assert machine_ceilings() == made and len(measured) == 4
