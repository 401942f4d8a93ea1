"""What would bore a reader of 15_checkpoint: every kind of tree, damage, disks, kills, processes."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from truthgpt_nb.checkpoint import (
    CheckpointManager,
    EMAManager,
    RandomState,
    join_tree,
    split_tree,
)
from truthgpt_nb.core import CheckpointError, InputError

ROOT = Path(__file__).resolve().parents[1]


# trees

TYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
TENSORS = st.builds(
    lambda dtype, shape, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype),
    st.sampled_from(TYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
STRIDED = TENSORS.map(lambda tensor: tensor.transpose(0, -1) if tensor.dim() else tensor)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | TENSORS | STRIDED
KEYS = st.text(alphabet="ab.~", max_size=3) | st.integers(-2, 2) | st.sampled_from(["~tensor", "~dict", "__metadata__"])


def nested(children):
    lists = st.lists(children, max_size=3)
    return lists | lists.map(tuple) | st.dictionaries(KEYS, children, max_size=3)


def same(one, other):
    "Whether two trees have the same types, values and bits."
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@settings(max_examples=200, deadline=None)
@given(st.recursive(LEAVES, nested, max_leaves=12))
def test_every_tree_comes_back(tree):
    plain, tensors = split_tree(tree)
    assert same(join_tree(json.loads(json.dumps(plain)), tensors), tree)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.recursive(LEAVES, nested, max_leaves=8), min_size=1))
def test_every_tree_comes_back_from_disk(tmp_path_factory, parts):
    with CheckpointManager(tmp_path_factory.mktemp("trees")) as manager:
        manager.save(1, parts)
        assert same(manager.load(), parts)


@pytest.mark.parametrize("wrong", [{1}, b"x", object(), torch.Generator(), {(1, 2): 3}, torch.ones(2, device="meta")])
def test_what_needs_a_pickle_is_refused_with_its_path(wrong):
    with pytest.raises(InputError, match=r"deep\.1\.here must be"):
        split_tree({"deep": [0, {"here": wrong}]})


def test_tied_weights_are_on_disk_once(tmp_path):
    model = torch.nn.ModuleList([torch.nn.Linear(64, 64, bias=False) for _ in range(2)])
    model[1].weight = model[0].weight
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": model})
        manager.wait()
        assert manager.latest().files["model.safetensors"]["bytes"] < 1.1 * 64 * 64 * 4
        assert list(load_file(manager.latest().path / "model.safetensors")) == ["0.weight"]
        manager.resume({"model": model})


def test_slices_of_one_tensor_are_not_taken_for_one_another(tmp_path):
    whole = torch.arange(8.0)
    tree = {"first": whole[:4], "second": whole[4:], "every": whole[::2], "all": whole, "row": whole.view(2, 4)}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"tree": tree})
        assert same(manager.load()["tree"], tree)


def test_the_copy_is_of_the_moment(tmp_path):
    weight, numbers = torch.zeros(2**20), {"list": [0]}
    with CheckpointManager(tmp_path, keep_last=None) as manager:
        for step in range(5):
            weight.fill_(step)
            numbers["list"][0] = step
            manager.save(step, {"weight": weight, "numbers": numbers})
            weight.fill_(-1)
            numbers["list"][0] = -1
        for step in range(5):
            found = manager.load(step)
            assert found["numbers"] == {"list": [step]} and (found["weight"] == step).all()


def test_what_was_loaded_outlives_its_file(tmp_path):
    with CheckpointManager(tmp_path, keep_last=1) as manager:
        manager.save(1, {"weight": torch.ones(1000)})
        found = manager.load()["weight"]
        manager.save(2, {"weight": torch.zeros(1000)})
        manager.wait()
        found += 1
        assert (found == 2).all() and manager.steps() == [2]


# damage


def test_damage_to_any_byte_is_found(tmp_path):
    run = {"model": torch.nn.Linear(3, 3), "numbers": {"a": [1, 2.5, None]}}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, run)
        manager.save(2, run)
    path = manager._paths()[-1]
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for place in range(0, len(whole), 11):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            with pytest.warns(UserWarning, match="is broken and skipped"):
                assert manager.latest().step == 1, (file.name, place)
        for cut in (0, 1, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:cut])
            with pytest.warns(UserWarning, match="is broken and skipped"):
                assert manager.latest().step == 1, (file.name, cut)
        file.write_bytes(whole)
    assert manager.latest().step == 2


def test_without_a_whole_checkpoint_nothing_begins_anew(tmp_path):
    manager = CheckpointManager(tmp_path)
    assert manager.latest() is None and manager.resume({}) is None and manager.best() is None
    with pytest.raises(CheckpointError, match="must have a checkpoint, got None"):
        manager.load()
    manager.save(1, {"numbers": {}})
    manager.wait()
    (manager.latest().path / "numbers.json").unlink()
    with (
        pytest.warns(UserWarning, match="is broken"),
        pytest.raises(CheckpointError, match="must have a checkpoint that is whole"),
    ):
        manager.resume({"numbers": RandomState()})
    manager.save(2, {"numbers": {}})
    assert manager.load() == {"numbers": {}}


def test_a_newer_format_is_not_passed_over(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path)
    manager.save(1, {"numbers": {}})
    manager.wait()
    with monkeypatch.context() as patched:
        patched.setattr("truthgpt_nb.checkpoint._FORMAT", 2)
        manager.save(2, {"numbers": {}})
        manager.wait()
    with pytest.raises(CheckpointError, match=r"format 2.*pip install -U truthgpt_nb"):
        manager.latest()
    assert manager.load(1) == {"numbers": {}}
    manager.save(3, {"numbers": {}})
    manager.wait()
    assert len(manager._paths()) == 3  # what cannot be read is not removed


# what a run is resumed with


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: torch.nn.Linear(3, 4), r"weight is \(3, 3\) float32 instead of \(4, 3\)"),
        (lambda: torch.nn.Linear(3, 3, bias=False), "unexpected bias"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(3, 3)), r"missing 0\.weight.*unexpected weight"),
        (lambda: torch.nn.Linear(3, 3, dtype=torch.bfloat16), r"float32 instead of \(3, 3\) bfloat16"),
    ],
)
def test_another_model_is_refused(tmp_path, change, message):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": torch.nn.Linear(3, 3)})
        with pytest.raises(CheckpointError, match=message):
            manager.resume({"model": change()})


def test_another_optimizer_or_average_is_refused(tmp_path):
    model, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False)
    run = {"optimizer": torch.optim.AdamW(model.parameters()), "ema": EMAManager(model)}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, run)
        with pytest.raises(CheckpointError, match="optimizer must fit the one that was saved"):
            manager.resume({**run, "optimizer": torch.optim.AdamW(other.parameters())})
        for wrong, message in ((EMAManager(other), "bias"), (EMAManager(model, decay=0.5), "must have the settings")):
            with pytest.raises(CheckpointError, match=message):
                manager.resume({**run, "ema": wrong})
        with pytest.raises(InputError, match=r"parts\['ema'\] must have load_state_dict"):
            manager.resume({**run, "ema": {}})


@pytest.mark.parametrize("name", ["", "a/b", "manifest", "..", "a b"])
def test_names_that_make_no_file_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="the name of a part must be"):
        CheckpointManager(tmp_path).save(1, {name: {}})


@pytest.mark.parametrize("wrong", [{"step": -1}, {"step": 1.5}, {"step": True}, {"metrics": {"loss": "low"}}])
def test_steps_and_metrics_are_numbers(tmp_path, wrong):
    with pytest.raises(InputError, match="must be a"):
        CheckpointManager(tmp_path).save(**{"step": 1, "parts": {}, **wrong})
    for keep in ({"keep_last": 0}, {"keep_best": -1}):
        with pytest.raises(InputError, match="keep_"):
            CheckpointManager(tmp_path, **keep)


def test_a_run_that_was_taken_back_goes_on_from_there(tmp_path):
    with CheckpointManager(tmp_path, keep_last=2) as manager:
        for step in (10, 20, 30):
            manager.save(step, {"numbers": {"run": 1}})
        manager.save(15, {"numbers": {"run": 2}})
        manager.wait()
        assert manager.latest().step == 15 and manager.steps() == [30, 15]


@pytest.mark.cuda
def test_a_run_on_a_gpu_is_resumed(tmp_path):
    model, other = (torch.nn.Linear(64, 64, device="cuda") for _ in range(2))
    run, again = ({"model": one, "ema": EMAManager(one), "random": RandomState()} for one in (model, other))
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, run)
        expected = torch.rand(3, device="cuda"), torch.rand(3)
        manager.resume(again)
    assert all(map(torch.equal, (torch.rand(3, device="cuda"), torch.rand(3)), expected))
    assert same(model.state_dict(), other.state_dict()) and other.weight.is_cuda
    assert same(run["ema"].state_dict(), again["ema"].state_dict())


def test_the_average_goes_where_the_model_goes():
    model = torch.nn.Linear(2, 2)
    ema = EMAManager(model)
    model.to(device="meta")
    ema.update()
    assert {average.device.type for average in ema.state_dict()["average"].values()} == {"meta"}


# errors of the writer


def failing(*_):
    raise OSError(28, "No space left on device")


def test_an_error_of_the_thread_surfaces_once(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("truthgpt_nb.checkpoint._write_file", failing)
        manager.save(1, {"numbers": {}})
        with pytest.raises(CheckpointError, match="must have room"):
            manager.save(2, {"numbers": {}})
        manager.save(3, {"numbers": {}})
        with pytest.raises(CheckpointError, match="must have room"):
            manager.close()
    assert manager._paths() == [] and list(tmp_path.glob(".aside-*")) == []
    with pytest.raises(InputError, match="save must come before close"):
        manager.save(4, {"numbers": {}})


def test_without_a_thread_the_error_is_there_at_once(tmp_path, monkeypatch):
    manager = CheckpointManager(tmp_path, background=False)
    monkeypatch.setattr("truthgpt_nb.checkpoint._write_file", failing)
    with pytest.raises(CheckpointError, match="must have room"):
        manager.save(1, {"numbers": {}})


def python(code, *arguments, **options):
    "Runs code in a fresh interpreter; returns the finished process."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


DISKS = """
import os, resource, sys
import torch
from truthgpt_nb.checkpoint import CheckpointManager
from truthgpt_nb.core import CheckpointError

folder = sys.argv[1]
manager = CheckpointManager(folder)
manager.save(1, {"weight": torch.ones(1000)})
manager.wait()

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the system refuses to write further
manager.save(2, {"weight": torch.ones(100_000)})
try:
    manager.wait()
except CheckpointError as error:
    print(error)
print(manager.steps(), [name for name in os.listdir(folder) if name.startswith(".aside")])
forgotten = CheckpointManager(folder)
forgotten.save(2, {"weight": torch.ones(100_000)})
while not forgotten._pending[0].done():
    pass

if os.getuid() == 0:
    os.chmod(folder, 0o755)
    os.setuid(65534)
else:
    os.chmod(folder, 0o555)
reader = CheckpointManager(folder)  # reading is still possible
print(reader.latest().step)
try:
    reader.save(3, {"weight": torch.ones(1000)})
except CheckpointError as error:
    print(error)
"""


def test_a_disk_that_is_full_and_a_folder_that_is_read_only():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # root, who may write anywhere, becomes another user in the script
        done = python(DISKS, f"{folder}/run")
    assert done.returncode == 0, done.stderr
    full, left, latest, read_only = done.stdout.splitlines()
    assert "must have room for a checkpoint" in full and "File too large" in full and "lower keep_last" in full
    assert (left, latest) == ("[1] []", "1")
    assert "UserWarning: the last checkpoint was not written" in done.stderr  # an error that nobody asked for
    assert "must be one that can be written to" in read_only and "Pass another folder." in read_only


def test_two_writers_take_turns_and_a_reader_sees_whole_ones_only(tmp_path):
    weight, errors, over = torch.zeros(20_000), [], threading.Event()

    def write(start):
        with CheckpointManager(tmp_path, keep_last=2) as manager:
            for step in range(start, start + 60, 2):
                manager.save(step, {"weight": torch.full((20_000,), float(step))})

    def read():
        reader = CheckpointManager(tmp_path)
        while not over.is_set():
            found = reader.latest()
            try:
                if found and not (found.load()["weight"] == found.step).all():
                    errors.append(found.step)
            except CheckpointError:
                if found.path.exists():
                    errors.append(found)

    threads = [threading.Thread(target=write, args=(start,)) for start in (1, 2)]
    reading = threading.Thread(target=read)
    for thread in [*threads, reading]:
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    reading.join()
    assert errors == [] and len(CheckpointManager(tmp_path).steps()) == 2
    assert len({path.name.split("-")[0] for path in CheckpointManager(tmp_path)._paths()}) == 2
    assert weight.sum() == 0


def test_a_folder_that_a_living_writer_has_aside_stays(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        aside = tmp_path / ".aside-1"
        with manager._lock():
            aside.mkdir()
            CheckpointManager(tmp_path)
            assert aside.exists()
        CheckpointManager(tmp_path)
        assert not aside.exists()


# kills: processes that fork from one that has imported torch, and are killed by the system


FORKS = """
import os, random, signal, sys, time
import torch
from truthgpt_nb.checkpoint import CheckpointManager, RandomState, read_checkpoint

torch.set_num_threads(1)

def forked(work, *arguments):
    "A child that does some work and ends; its process id."
    child = os.fork()
    if not child:
        code = 1
        signal.alarm(40)
        try:
            work(*arguments)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    return child
"""

RANDOM_KILLS = (
    FORKS
    + """
def made():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 64))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "random": RandomState()}

def step(run):
    run["optimizer"].zero_grad()
    run["model"](torch.rand(4, 64)).square().mean().backward()
    run["optimizer"].step()

def endless(folder, ready):
    run = made()
    manager = CheckpointManager(folder, keep_last=2)
    found = manager.resume(run)
    done = found.step if found else 0
    while True:
        step(run)
        done += 1
        manager.save(done, run)
        os.write(ready, b".")

folder, rng, last, asides = sys.argv[1], random.Random(0), 0, 0
first = made()
with CheckpointManager(folder) as manager:
    manager.save(0, first)
for kill in range(100):
    reader, ready = os.pipe()
    child = forked(endless, folder, ready)
    os.read(reader, 1)  # it has begun to write
    time.sleep(0.08 * rng.random())
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it ended by itself"
    os.close(reader), os.close(ready)
    asides += any(name.startswith(".aside") for name in os.listdir(folder))
    found = CheckpointManager(folder).latest()  # a warning here is an error
    assert found.step >= last, (found.step, last)
    last = found.step
    assert not any(name.startswith(".aside") for name in os.listdir(folder))

straight, run = made(), made()
for _ in range(last + 3):
    step(straight)
assert CheckpointManager(folder).resume(run).step == last
for _ in range(3):
    step(run)
ends = [list(one["model"].state_dict().values()) for one in (straight, run)]
assert all(map(torch.equal, *ends))
print(last, asides)
"""
)


def test_a_hundred_kills_leave_a_good_checkpoint_each_time(tmp_path):
    done = python("import warnings; warnings.simplefilter('error', UserWarning)" + RANDOM_KILLS, tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    last, asides = map(int, done.stdout.split())
    print(f"{last} steps, {asides} kills while a checkpoint was being written")
    assert last > 10, "the run got on between the kills"
    assert asides > 5, "some kills came while a checkpoint was being written"


EACH_STEP = (
    FORKS
    + """
import random
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from truthgpt_nb.checkpoint import EMAManager

class Packs(Dataset):
    "Rows of packed documents, each augmented by a generator of its own."

    def __init__(self):
        rng = random.Random(0)
        self.lengths = [[7, 12, 5], [12, 12], [20, 4], [8, 8, 8]]
        self.rows = [[rng.randrange(32) for _ in range(24)] for _ in range(18)]

    def __getitem__(self, key):
        epoch, index = key
        own = torch.Generator().manual_seed(1000 * epoch + index)
        tokens, other = torch.tensor(self.rows[index]), torch.randint(32, (24,), generator=own)
        positions = torch.cat([torch.arange(length) for length in self.lengths[index % 4]])
        return torch.where(torch.rand(24, generator=own) < 0.2, other, tokens), positions

class Loader:
    "Batches from two workers; knows how many were consumed, however many were fetched."

    def __init__(self):
        self.epoch = self.batch = 0
        self.batches = self.endless()

    def __iter__(self):
        epoch, batch = self.epoch, self.batch
        while True:
            order = torch.randperm(18, generator=torch.Generator().manual_seed(epoch)).view(9, 2).tolist()
            yield from ([(epoch, index) for index in pair] for pair in order[batch:])
            epoch, batch = epoch + 1, 0

    def endless(self):
        own = torch.Generator().manual_seed(0)  # making an iterator draws from it, not from the global one
        for rows in DataLoader(Packs(), batch_sampler=self, num_workers=2, generator=own):
            self.batch += 1
            self.epoch, self.batch = self.epoch + self.batch // 9, self.batch % 9
            yield rows

    def state_dict(self):
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state):
        self.epoch, self.batch = state["epoch"], state["batch"]

class Tracker:
    def __init__(self):
        self.run_id = str(random.SystemRandom().random())

    def state_dict(self):
        return {"run_id": self.run_id}

    def load_state_dict(self, state):
        self.run_id = state["run_id"]

def made():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, attention_dropout=0.1, use_cache=False, **size))
    lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=31)
    run = {"model": model, "optimizer": optimizer, "schedule": schedule, "ema": EMAManager(model, decay=0.9)}
    run["scaler"] = torch.amp.GradScaler("cpu", growth_interval=5)
    return run | {"random": RandomState(), "loader": Loader(), "tracker": Tracker()}

def step(run):
    run["model"].train()
    for _ in range(2):
        tokens, positions = next(run["loader"].batches)
        loss = run["model"](input_ids=tokens, position_ids=positions, labels=tokens).loss / 2
        run["scaler"].scale(loss).backward()
    run["scaler"].step(run["optimizer"])
    run["scaler"].update()
    run["optimizer"].zero_grad()
    run["schedule"].step()
    run["ema"].update()

def train(folder, until, killed):
    run = made()
    manager = CheckpointManager(folder, keep_last=2)
    found = manager.resume(run)
    for done in range(found.step if found else 0, until):
        step(run)
        if done + 1 >= until - 1:  # the last two; the kill may come while the last one is written
            manager.save(done + 1, run)
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    manager.close()

def ended(child):
    return os.waitpid(child, 0)[1]

def killed(after):
    folder = f"{root}/{after}"
    assert os.WIFSIGNALED(ended(forked(train, folder, after, True)))
    left = CheckpointManager(folder).latest()
    tracked = left.load(["tracker"]) if left else None
    assert ended(forked(train, folder, 30, False)) == 0
    found = CheckpointManager(folder).load()
    for one, other in ((straight["model"], found["model"]), (straight["ema"]["average"], found["ema"]["average"])):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), after
    assert found["loader"] == straight["loader"] == {"epoch": 6, "batch": 6}
    assert tracked is None or tracked["tracker"] == found["tracker"]

root = sys.argv[1]
assert ended(forked(train, f"{root}/straight", 30, False)) == 0
straight = CheckpointManager(f"{root}/straight").load()
for after in range(1, 31, 2):  # two at a time
    assert [ended(child) for child in [forked(killed, after), forked(killed, after + 1)]] == [0, 0]
moved = [name for name, value in straight["model"].items() if "lora_B" in name and value.abs().max() > 0]
print(len(moved))
"""
)


def test_a_run_killed_after_each_of_its_steps_ends_with_the_same_weights(tmp_path):
    done = python(EACH_STEP, tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n", "the LoRA has learned something"


TWO_PROCESSES = (
    FORKS
    + """
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from truthgpt_nb.checkpoint import EMAManager, ShardedOptimizer, resume_sharded, save_sharded
from truthgpt_nb.core import CheckpointError

def group(rank, size, root, work):
    store = dist.FileStore(f"{root}/{work.__name__}", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    work(f"{root}/run", rank, size)
    dist.destroy_process_group()

def made(width=10):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Dropout(0.5), torch.nn.Linear(width, 1))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return {"model": model, "optimizer": optimizer, "random": RandomState()}

def train(run, steps):
    for _ in range(steps):
        run["model"](torch.rand(16, 4)).square().mean().backward()
        run["optimizer"].optimizer.step()
        run["optimizer"].optimizer.zero_grad()

def weights(run):
    return {name: weight.full_tensor() for name, weight in run["model"].state_dict().items()}

def refused(call, what):
    try:
        call()
    except CheckpointError as error:
        assert what in str(error), error
    else:
        raise AssertionError(what)

def saves(folder, rank, size):
    run, manager = made(), CheckpointManager(folder)
    assert resume_sharded(manager, run) is None
    torch.manual_seed(rank)
    train(run, 3)
    save_sharded(manager, 3, run, {"loss": 1.0})
    train(run, 3)
    torch.save(weights(run), f"{folder}/../straight{rank}")

def resumes(folder, rank, size):
    run, manager = made(), CheckpointManager(folder)
    torch.manual_seed(99)
    assert resume_sharded(manager, run).step == 3
    train(run, 3)
    straight = torch.load(f"{folder}/../straight{rank}")
    assert all(torch.equal(weight, straight[name]) for name, weight in weights(run).items())
    refused(lambda: resume_sharded(manager, made(11)), "model must be the one that was saved")
    real = os.fsync
    os.fsync = real if rank == 0 else lambda handle: os.close(-1)  # one process cannot write
    refused(lambda: save_sharded(manager, 6, run), "must be written, got process 1: [Errno 9]")
    os.fsync = real
    assert manager.steps() == [3] and not any(name.startswith(".aside") for name in os.listdir(folder))
    dist.barrier()  # the other one has looked too
    save_sharded(manager, 6, run)

def alone(folder, rank, size):
    run, manager = made(), CheckpointManager(folder)
    refused(lambda: resume_sharded(manager, run), "the run must have 2 processes, got 1")
    assert resume_sharded(manager, run, any_processes=True).step == 6
    straight = torch.load(f"{folder}/../straight0")
    assert all(torch.equal(weight, straight[name]) for name, weight in weights(run).items())
    train(run, 1)

signal.alarm(40)  # an end to a wait for a process that is gone
root = sys.argv[1]
for work, size in ((saves, 2), (resumes, 2), (alone, 1)):
    children = [forked(group, rank, size, root, work) for rank in range(size)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * size, work
(last,) = (name for name in os.listdir(f"{root}/run") if name.endswith("-step-6"))
kinds = {name.rpartition(".")[2] for _, _, names in os.walk(f"{root}/run/{last}") for name in names}
print(sorted(kinds))
"""
)


def test_two_processes_save_and_two_or_one_resume(tmp_path):
    done = python(TWO_PROCESSES, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "['json', 'safetensors']"
