"What would bore a reader of nbs/api/13_profiler.ipynb."

import contextlib
import gzip
import json
import threading
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from truthgpt_nb.allocation import peak_memory, recording
from truthgpt_nb.configs import ProfileConfig
from truthgpt_nb.core import ConfigError, InputError
from truthgpt_nb.profiler import ModelProfiler, _operator_table, _spans_and_kernels, operator_times, timing_modules

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
        assert seen == [expected] * 5  # two to warm up, one plain, one recorded, one timed


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


@pytest.mark.parametrize("failing_call", [1, 2, 3, 4])  # warm-up, plain, recorded, timed
@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt])
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
    assert len(set(drawn)) == 1 and len(drawn) == 4


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
