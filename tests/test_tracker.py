"""The tracker where it hurts: kills, full disks, forks, ranks, backends that fail at random; files read back."""

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from argparse import Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truthgpt_nb import tracker as module
from truthgpt_nb.backends import About, Backend, WandbBackend, _has_wandb_key
from truthgpt_nb.core import DependencyError, InputError, RemoteError
from truthgpt_nb.runs import (
    RecordFile,
    Run,
    RunRecord,
    binned,
    find_runs,
    masked,
    read_records,
    run_lock,
    without_secrets,
)
from truthgpt_nb.tracker import ExperimentTracker, TrackerWarning, refill

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "WANDB_MODE": "offline"}
KEY = "0123456789abcdef" * 2 + "01234567"  # in the form of W&B's older keys, and nobody's


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    "W&B offline, no waiting before a call is made again."
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(module, "_WAITS", (0.01, 0.01))
    monkeypatch.chdir(tmp_path)


def script(code, *arguments, **options):
    "A process of its own that runs code with the tracker imported."
    code = "import os, sys, time\nfrom truthgpt_nb.tracker import ExperimentTracker\n" + code
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    return subprocess.Popen(command, **(pipes | options))


def metrics(path):
    return list(Run(path).records("metrics"))


# backends that fail


class Kept(Backend):
    "Keeps what it is sent; each test makes its own class of it."

    taken: list

    def start(self, about):
        pass

    def send(self, record):
        self.taken.append(record)

    def finish(self, state):
        self.taken.append(state)


def kept(name="Kept", **methods):
    return type(name, (Kept,), {"taken": [], **methods})


def caught(call):
    "What a call gives back, and the texts of its warnings."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        return call(), [str(one.message) for one in found if one.category is TrackerWarning]


@pytest.mark.parametrize("seed", range(8))
def test_random_failures_lose_nothing_and_keep_the_order(tmp_path, seed):
    rng = random.Random(seed)

    def send(self, record):
        if rng.random() < 0.3:
            raise ConnectionError("away")
        self.taken.append(record)

    backend = kept(send=send)
    tracker = ExperimentTracker([backend], folder=tmp_path, run_name="r", system_seconds=None)
    for step in range(100):
        tracker.log({"loss": step})
    (report, texts) = caught(tracker.finish)
    steps = [record.step for record in backend.taken if isinstance(record, RunRecord) and record.kind == "metrics"]
    assert steps == sorted(set(steps))
    left_out = tracker._feeds[0].left_out
    assert (
        len([r for r in backend.taken if isinstance(r, RunRecord)]) + left_out == 104
    )  # a status at each end, two configs
    assert len(texts) == (left_out > 0)
    assert report.rows[1]["state"] == "finished"
    assert [record.step for record in metrics(tracker.path)] == list(range(100))


def test_a_record_that_is_always_refused_is_left_out_alone(tmp_path):
    def send(self, record):
        if record.kind == "text":
            raise ValueError("no texts here")
        self.taken.append(record)

    backend = kept(send=send)
    tracker = ExperimentTracker([backend], folder=tmp_path, run_name="r", system_seconds=None)
    for step in range(5):
        tracker.log({"loss": step, "sample": "text"})
    report, texts = caught(tracker.finish)
    assert len([r for r in backend.taken if isinstance(r, RunRecord) and r.kind == "metrics"]) == 5
    assert (report.rows[1]["state"], len(texts)) == ("finished", 1) and "did not take 5 records" in texts[0]


def test_three_refusals_in_a_row_set_a_backend_aside_and_refill_goes_on_from_there(tmp_path):
    there = {"working": False}

    def send(self, record):
        if not there["working"] and record.step >= 10:
            raise ConnectionError("away")
        self.taken.append(record)

    backend = kept("Away", send=send)
    tracker = ExperimentTracker([backend], folder=tmp_path, run_name="r", system_seconds=None)
    for step in range(20):
        tracker.log({"loss": step})
    report, texts = caught(tracker.finish)
    assert report.rows[1]["state"] == "set aside" and len(texts) == 1
    assert "ConnectionError: away" in texts[0] and "refill(" in texts[0]
    with pytest.raises(RemoteError, match="Away must take the records"):
        refill(tracker.path, backend)
    there["working"] = True
    refill(tracker.path, backend)
    steps = [r.step for r in backend.taken if isinstance(r, RunRecord) and r.kind == "metrics"]
    assert steps == list(range(20))


def test_a_service_that_is_away_at_the_end_gets_the_end_later(tmp_path):
    there = {"working": True}

    def send(self, record):
        if not there["working"] and (record.kind == "status" or record.step == 4):
            raise ConnectionError("away")
        self.taken.append(record)

    backend = kept("Away", send=send)
    tracker = ExperimentTracker([backend], folder=tmp_path, run_name="r", system_seconds=None)
    for step in range(4):
        tracker.log({"loss": step})
    while len(backend.taken) < 7:
        time.sleep(0.01)
    there["working"] = False
    tracker.log({"loss": 4})
    report, texts = caught(tracker.finish)
    assert report.rows[1]["state"] == "set aside" and len(texts) == 1
    there["working"] = True
    assert refill(tracker.path, backend).rows[0]["sent now"] == 2
    assert [r.step for r in backend.taken if isinstance(r, RunRecord) and r.kind == "metrics"] == list(range(5))


def test_a_call_that_hangs_holds_up_neither_the_loop_nor_the_end(tmp_path):
    hang = threading.Event()
    backend = kept("Hangs", send=lambda self, record: hang.wait())
    tracker = ExperimentTracker([backend, "tensorboard"], folder=tmp_path, run_name="r", patience_seconds=0.05)
    for step in range(100):
        tracker.log({"loss": step})
    report, texts = caught(tracker.finish)
    hang.set()
    assert [row["state"] for row in report.rows] == ["written", "set aside", "finished"]
    assert len(texts) == 1 and "no answer within 0.05 s" in texts[0]
    assert len(scalars(tracker.path, "loss")) == 100


def test_ctrl_c_ends_the_waiting(tmp_path, monkeypatch):
    def interrupted(self, deadline):
        raise KeyboardInterrupt

    backend = kept("Slow", send=lambda self, record: time.sleep(0.5))
    tracker = ExperimentTracker([backend], folder=tmp_path, run_name="r")
    with monkeypatch.context() as patched:
        patched.setattr(ExperimentTracker, "_await", interrupted)
        with pytest.warns(TrackerWarning, match="Slow is set aside"), pytest.raises(KeyboardInterrupt):
            tracker.finish()
    assert Run(tracker.path).status == "finished"
    ExperimentTracker(folder=tmp_path, run_name="r", resume=True).finish()


def test_another_thread_may_finish(tmp_path):
    tracker = ExperimentTracker(folder=tmp_path, run_name="r")
    thread = threading.Thread(target=tracker.finish)
    thread.start()
    thread.join()
    ExperimentTracker(folder=tmp_path, run_name="r", resume=True).finish()


def test_the_process_may_move_to_another_folder(tmp_path, monkeypatch):
    tracker = ExperimentTracker(["tensorboard"], run_name="r")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tracker.log({"loss": 1.0})
    tracker.log_image("picture", torch.ones(2, 2))
    assert tracker.finish().rows[1]["state"] == "finished"
    assert scalars(tmp_path / "runs/truthgpt/r", "loss") == {0: 1.0}


def test_a_backend_that_is_too_slow_is_left_behind_at_the_end(tmp_path):
    backend = kept("Slow", send=lambda self, record: time.sleep(0.2))
    tracker = ExperimentTracker([backend], folder=tmp_path, run_name="r", finish_seconds=0.3)
    for step in range(1000):
        tracker.log({"loss": step})
    report, texts = caught(tracker.finish)
    assert report.rows[1]["state"] == "set aside" and "not done within 0.3 s" in texts[0]
    assert len(metrics(tracker.path)) == 1000


def test_a_call_that_comes_back_after_it_was_given_up_does_nothing_more(tmp_path):
    calls, slow = [], threading.Event()

    def send(self, record):
        calls.append(threading.current_thread().ident)
        if len(calls) == 1:
            slow.wait(30)

    tracker = ExperimentTracker([kept(send=send)], folder=tmp_path, run_name="r", patience_seconds=0.05)
    tracker.log({"loss": 1})
    while len(set(calls)) < 2:
        time.sleep(0.01)
    slow.set()
    tracker.finish()
    assert calls.count(calls[0]) == 1  # the second thread has the rest
    assert tracker.table().rows[1]["state"] == "finished"


def test_warnings_that_are_errors_do_not_reach_the_loop(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker = ExperimentTracker(["tensorboard"], folder=tmp_path, run_name="r")
        tracker.log({"list": [1, 2]})
        tracker.log_image("picture", "no picture")
        tracker.log_histogram("weights", ["a"])
        tracker.log_audio("sound", 3)
        tracker.log_table("table", 3)
        tracker.log_file("file", "no/such/file")
        tracker.log_graph(torch.nn.Linear(2, 2), torch.ones(3))
        tracker.log_config(3)
        tracker.finish()
        tracker.log({"loss": 1})
    said = capfd.readouterr().err
    assert said.count("default/") + said.count("truthgpt/r:") == 9


# kills, disks, forks, threads


LOOP = """
about = {"folder": sys.argv[1], "project": "p", "run_name": "r"}
tracker = ExperimentTracker(["tensorboard"], **about, resume=True, system_seconds=None)
for _ in range(int(sys.argv[2])):
    tracker.log({"loss": 0.5})
    sys.stdout.write(f"{tracker.step}\\n")
    sys.stdout.flush()
tracker.finish()
"""


def test_a_kill_loses_nothing_and_the_run_goes_on(tmp_path):
    rng, said = random.Random(0), -1
    for _ in range(4):
        process = script(LOOP, tmp_path, 10**9)
        for line in process.stdout:
            said = int(line)
            if rng.random() < 0.002:
                break
        process.kill()
        said = max([said, *map(int, process.stdout.read().split())])
        process.wait()
        run = Run(tmp_path / "p/r")
        assert run.status == "killed"
        steps = run.series("loss")[0]
        assert steps[-1] in (said, said + 1)  # the last may have been killed before it could say so
        assert steps.tolist() == list(range(len(steps)))
    process = script(LOOP, tmp_path, 1)
    assert process.wait() == 0, process.stderr.read()
    run = Run(tmp_path / "p/r")
    assert run.status == "finished"
    assert sorted(set(scalars(run.path, "loss"))) == run.series("loss")[0].tolist()  # TensorBoard has them too


@pytest.mark.parametrize("cut", [1, 20, 35, 60])
def test_half_a_line_is_cut_off(tmp_path, cut):
    with ExperimentTracker(folder=tmp_path, project="p", run_name="r", system_seconds=None) as tracker:
        tracker.log({"loss": 1.0})
        tracker.log({"loss": 2.0})
    path = tracker.path / "record.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with ExperimentTracker(folder=tmp_path, project="p", run_name="r", resume=True, system_seconds=None) as tracker:
        tracker.log({"loss": 3.0})
    assert [json.loads(line)["kind"] for line in path.read_bytes().splitlines()]
    assert Run(tracker.path).series("loss")[1].tolist() == [1.0, 2.0, 3.0]


FULL = """
import resource, signal, warnings
warnings.simplefilter("ignore")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tracker = ExperimentTracker(folder=sys.argv[1], project="p", run_name="r", system_seconds=None)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
for step in range(1000):
    tracker.log({"loss": step})
size = os.path.getsize(tracker.path / "record.jsonl")
last = (tracker.path / "record.jsonl").read_bytes()[-1:]
behind = tracker.table().rows[0]["state"]
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
tracker.log({"loss": 1000})
tracker.finish()
print(size, last == b"\\n", behind)
"""


def test_a_full_disk_is_waited_out(tmp_path):
    process = script(FULL, tmp_path)
    out, err = process.communicate()
    size, whole, behind = out.split()
    assert 19_000 < int(size) <= 20_000 and (whole, behind) == ("True", "behind"), err
    assert Run(tmp_path / "p/r").series("loss")[1].tolist() == list(range(1001))


def test_what_waits_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("truthgpt_nb.runs._WAITING", 3)
    file = RecordFile(tmp_path / "record.jsonl")
    monkeypatch.setattr(file, "_write", lambda data: (_ for _ in ()).throw(OSError(28, "full")))
    for number in range(5):
        with pytest.raises(OSError, match="full"):
            file.append(f"{number}\n".encode())
    assert (list(file.waiting), file.lost) == ([b"2\n", b"3\n", b"4\n"], 2)
    monkeypatch.undo()
    file.close()
    assert (tmp_path / "record.jsonl").read_bytes() == b"2\n3\n4\n"


FORK = """
tracker = ExperimentTracker(folder=sys.argv[1], project="p", run_name="r", system_seconds=None)
tracker.log({"loss": 1.0})
child = os.fork()
if not child:
    tracker.log({"loss": 2.0})
    tracker.finish()
    os._exit(0)
os.waitpid(child, 0)
tracker.log({"loss": 3.0})
tracker.finish()
"""


def test_a_forked_child_writes_nothing(tmp_path):
    process = script(FORK, tmp_path)
    assert process.wait() == 0, process.stderr.read()
    assert [record.data["loss"] for record in metrics(tmp_path / "p/r")] == [1.0, 3.0]


def test_threads_write_whole_lines(tmp_path):
    with ExperimentTracker(folder=tmp_path, run_name="r", system_seconds=None) as tracker:
        workers = [
            threading.Thread(target=lambda n=n: [tracker.log({f"m{n}": i}, step=i) for i in range(500)])
            for n in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    run = Run(tracker.path)
    assert [run.series(f"m{n}")[1].tolist() for n in range(4)] == [list(range(500))] * 4


def test_what_was_logged_does_not_change_afterwards(tmp_path):
    value, values, data = torch.tensor(1.0), torch.ones(10), {"nested": {"x": 1}}
    with ExperimentTracker(["tensorboard"], folder=tmp_path, run_name="r", system_seconds=None) as tracker:
        tracker.log({"loss": value} | data)
        tracker.log_histogram("values", values)
        value.zero_(), values.zero_(), data["nested"].clear()
    run = Run(tracker.path)
    assert run.last == {"loss": 1.0, "nested/x": 1.0}
    assert next(run.records("histogram")).data["min"] == 1.0
    assert scalars(tracker.path, "loss") == {0: 1.0}


@pytest.mark.parametrize("ending", ["pass", "raise RuntimeError('boom')", "sys.exit(3)"])
def test_a_script_that_does_not_finish_leaves_everything(tmp_path, ending):
    begin = 'tracker = ExperimentTracker(["tensorboard"], folder=sys.argv[1], project="p", run_name="r")\n'
    process = script(begin + f"for i in range(500): tracker.log({{'loss': i}})\n{ending}", tmp_path)
    process.wait()
    run = Run(tmp_path / "p/r")
    assert run.status == "ended"
    assert len(scalars(run.path, "loss")) == len(run.series("loss")[0]) == 500


def test_an_error_makes_the_run_failed(tmp_path):
    with (
        pytest.raises(RuntimeError),
        ExperimentTracker(folder=tmp_path, run_name="r") as tracker,
    ):
        raise RuntimeError("no entry with hf_" + "x" * 30)
    *_, status = Run(tracker.path).records("status")
    assert status.data == {"state": "failed", "error": "RuntimeError: no entry with ***"}
    assert Run(tracker.path).status == "failed"


HOLD = """
tracker = ExperimentTracker(folder=sys.argv[1], project="p", run_name="r")
print("ready", flush=True)
time.sleep(600)
"""


def test_a_run_of_another_process_cannot_be_taken(tmp_path):
    holder = script(HOLD, tmp_path)
    assert holder.stdout.readline() == "ready\n"
    assert Run(tmp_path / "p/r").status == "running"
    before = (tmp_path / "p/r/record.jsonl").read_bytes()
    with pytest.raises(InputError, match="run_name must not be in use"):
        ExperimentTracker(folder=tmp_path, project="p", run_name="r", resume=True)
    with pytest.raises(InputError, match="run_name must not be in use"):
        refill(tmp_path / "p/r", "tensorboard")
    assert (tmp_path / "p/r/record.jsonl").read_bytes() == before
    holder.kill()
    holder.wait()
    assert Run(tmp_path / "p/r").status == "killed"
    ExperimentTracker(folder=tmp_path, project="p", run_name="r", resume=True).finish()


RANKS = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
tracker = ExperimentTracker(["tensorboard"], folder=sys.argv[1], project="p", run_name="r", system_seconds=None)
for step in range(10):
    tracker.log({"loss": step, "rank": accelerator.process_index})
accelerator.wait_for_everyone()
tracker.finish()
print("written" if tracker.table().rows else "left to another", accelerator.num_processes)
"""


def test_of_two_processes_of_accelerate_one_writes(tmp_path):
    (tmp_path / "train.py").write_text("import sys\nfrom truthgpt_nb.tracker import ExperimentTracker\n" + RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "train.py", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "left to another 2", "written 2"]
    run = Run(tmp_path / "runs/p/r")
    assert run.series("rank")[1].tolist() == [0.0] * 10


# what trackers wrote, read with their own readers


def scalars(path, name):
    "Step and value, as TensorBoard's own reader finds them."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def wandb_records(path):
    "The records of a .wandb file: W&B's own messages, in the log format of LevelDB, each piece under its checksum."
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    data, place, pieces = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
            continue
        checksum, length, kind = struct.unpack("<IHB", data[place : place + 7])
        piece = data[place + 7 : place + 7 + length]
        assert checksum == zlib.crc32(bytes([kind]) + piece)
        pieces, place = pieces + piece, place + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield WandbRecord.FromString(pieces)
            pieces = b""


def wandb_history(path):
    rows = []
    for file in sorted(path.rglob("*.wandb")):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({"/".join([i.key] if i.key else i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def logged_run(tmp_path, trackers, name="r"):
    "One thing of each kind."
    with ExperimentTracker(
        trackers, "p", name, {"lr": 0.1, "api_key": "12345"}, tmp_path, system_seconds=None
    ) as tracker:
        for step in range(50):
            tracker.log({"loss": math.nan if step == 7 else 1 / (step + 1), "eval": {"accuracy": step / 50}})
        tracker.log({"sample": "Once upon a time"}, step=20)  # earlier than the last: a resumed run does that
        tracker.log_histogram("weights", torch.arange(1000.0))
        tracker.log_image("picture", torch.rand(3, 16, 16), caption="noise")
        tracker.log_audio("tone", torch.rand(2, 500), sample_rate=8000)
        tracker.log_table("table", [{"prompt": "Once", "score": 0.5}])
        tracker.log_graph(torch.nn.Linear(2, 2), torch.ones(1, 2))
        tracker.log_file("notes", tracker.path / "config.json")
    return tracker


def test_wandb_has_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--hf-token", "a-secret-word"])
    tracker = logged_run(tmp_path, ["wandb"])
    assert tracker.table().rows[1]["state"] == "finished" and tracker._feeds[0].left_out == 0, tracker
    history = wandb_history(tracker.path)
    losses = {row["step"]: row["loss"] for row in history if "loss" in row}
    assert len(losses) == 50 and losses[1] == 0.5 and math.isnan(losses[7])
    assert [row["eval/accuracy"] for row in history if "eval/accuracy" in row] == [step / 50 for step in range(50)]
    assert next(row for row in history if "sample" in row)["step"] == 20
    found = {name: value for row in history for name, value in row.items()}
    assert sum(found["weights/values"]) == 1000 and len(found["weights/bins"]) == 65
    kinds = {name: found[f"{name}/_type"] for name in ("weights", "picture", "tone", "table", "model")}
    assert list(kinds.values()) == ["histogram", "image-file", "audio-file", "table-file", "table-file"]
    times = {row["step"]: row["_timestamp"] for row in history if "loss" in row}
    assert times == {record.step: record.time for record in metrics(tracker.path) if "loss" in record.data}
    (file,) = tracker.path.rglob("*.wandb")
    assert [(r.metric.glob_name, r.metric.step_metric) for r in wandb_records(file) if r.HasField("metric")] == [
        ("*", "step")
    ]
    settings = {u.key: u.value_json for r in wandb_records(file) for u in r.config.update}
    assert (settings["lr"], settings["api_key"]) == ("0.1", '"***"') and "torch" in settings["environment"]
    written = [path.read_bytes() for path in tracker.path.rglob("*") if path.is_file()]
    assert not any(secret in data for data in written for secret in (b"12345", b"a-secret-word"))


def test_tensorboard_filled_in_is_as_if_it_had_been_there(tmp_path):
    live, late = logged_run(tmp_path, ["tensorboard"], "live"), logged_run(tmp_path, [], "late")
    refill(late.path, "tensorboard")
    for name in ("loss", "eval/accuracy"):
        one, other = scalars(live.path, name), scalars(late.path, name)
        assert len(one) == 50 and repr(one) == repr(other)


def test_wandb_needs_no_account(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not _has_wandb_key()
    with ExperimentTracker(["wandb"], "p", "r", folder=tmp_path, system_seconds=None) as tracker:
        tracker.log({"loss": 1.0})
    assert tracker.table().rows[1]["state"] == "finished"
    assert tracker.table().rows[1]["where"].startswith("wandb sync ")
    with ExperimentTracker(["wandb"], "p", "r", folder=tmp_path, resume=True, system_seconds=None) as tracker:
        tracker.log({"loss": 2.0})
    losses = [(row["step"], row["loss"]) for row in wandb_history(tracker.path) if "loss" in row]
    assert sorted(losses) == [(0, 1.0), (1, 2.0)]
    assert len({path.name for path in tracker.path.rglob("*.wandb")}) == 1  # one run to W&B
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert _has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert not _has_wandb_key()  # that key is for another server
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert _has_wandb_key()


UNREACHABLE = """
import warnings
from truthgpt_nb import tracker
tracker._WAITS = (0.1, 0.1)
warnings.simplefilter("always")
about = {"folder": sys.argv[1], "project": "p", "run_name": "r"}
tracker = ExperimentTracker(["wandb"], **about, patience_seconds=20, finish_seconds=100)
for step in range(100):
    tracker.log({"loss": step})
print(tracker.finish().rows[1]["state"])
"""


@pytest.mark.parametrize("key", ["short", pytest.param(KEY, marks=pytest.mark.slow)])  # W&B tries for half a minute
def test_a_wrong_key_and_a_server_that_is_not_there_are_one_warning(tmp_path, key):
    wrong = {"WANDB_MODE": "online", "WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    process = script(UNREACHABLE, tmp_path, env=ENVIRONMENT | wrong)
    out, err = process.communicate(timeout=200)
    assert out.strip() == "set aside", err
    assert err.count("wandb is set aside") == 1 and "Traceback" not in err and KEY not in err
    assert len(metrics(tmp_path / "p/r")) == 100


@pytest.mark.parametrize("name", ["mlflow", "aim"])
def test_an_optional_tracker_takes_everything_or_says_how_to_install_it(tmp_path, name, monkeypatch):
    if find_spec(name) is None:
        with pytest.raises(DependencyError, match=f"pip install {name}"):
            ExperimentTracker([name], folder=tmp_path)
        assert not any(tmp_path.iterdir())
        return
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    tracker = logged_run(tmp_path / "runs", [name])
    assert tracker.table().rows[1]["state"] == "finished" and tracker._feeds[0].left_out == 0, tracker
    if name == "mlflow":
        import mlflow

        client, run_id = mlflow.MlflowClient(), tracker._feeds[0].about.state["run_id"]
        history = client.get_metric_history(run_id, "eval/accuracy")
        assert [(m.step, m.value) for m in history] == [(step, step / 50) for step in range(50)]
        assert client.get_run(run_id).data.params["lr"] == "0.1"
        assert {item.path for item in client.list_artifacts(run_id)} >= {"picture", "tone", "weights", "table"}
    else:
        import aim
        from aim.sdk.index_manager import RepoIndexManager

        repository, run_hash = aim.Repo(str(tmp_path / "runs")), tracker._feeds[0].about.state["run_hash"]
        RepoIndexManager.get_index_manager(repository).index(run_hash)  # as `aim up` does
        (run,) = aim.Repo(str(tmp_path / "runs")).iter_runs()
        (metric,) = (m for m in run.metrics() if m.name == "eval/accuracy")
        assert sorted(metric.values.sparse_numpy()[1].tolist()) == [step / 50 for step in range(50)]
        assert run["config"]["lr"] == 0.1


# secrets and lines


@dataclass
class Settings:
    lr: float
    hub_token: str


def test_what_configs_are_made_of():
    assert masked(Settings(0.1, "x")) == {"lr": 0.1, "hub_token": "***"}
    assert masked(Namespace(lr=0.1, wandb_api_key="x", nested=Settings(1, "y"))) == {
        "lr": 0.1,
        "wandb_api_key": "***",
        "nested": {"lr": 1, "hub_token": "***"},
    }
    assert masked({"tokens": {"secret": {"a": 1}, 3: [torch.tensor(2)]}}) == {"tokens": {"secret": "***", "3": [2]}}
    assert masked({"password": None, "use_auth_token": True, "secret": ""}) == {
        "password": None,
        "use_auth_token": True,
        "secret": "***",
    }


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(
    plain, st.sampled_from(["hf_", "sk-", "ghp_", "glpat-"]), st.text("abcdefXYZ0123456789", min_size=24, max_size=40)
)
def test_no_key_survives_at_any_depth(data, kind, rest):
    key = kind + rest
    hidden = masked({"deep": [{"note": f"it is {key}.", "rest": data}, key], "api_key": key})
    assert rest not in json.dumps(hidden)
    assert key not in without_secrets(f"({key})")


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(max_size=10), st.floats() | st.integers(-(2**63), 2**63), max_size=5), st.text(max_size=20)
)
def test_a_line_is_one_line_of_strict_json_and_reads_back(tmp_path_factory, numbers, text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path_factory.mktemp("line") / "record.jsonl"
    lines = [RunRecord("metrics", "", 3, 1.5, numbers).line(), RunRecord("text", text, 4, 2.5, {"text": text}).line()]
    assert all(line.count(b"\n") == 1 and json.loads(line, parse_constant=refuse) for line in lines)
    path.write_bytes(b"".join(lines))
    (first, middle), (second, end) = read_records(path)
    assert repr(first.data) == repr(numbers) and second.data["text"] == second.name == text
    assert (middle, end) == (len(lines[0]), path.stat().st_size)
    assert [record for record, _ in read_records(path, middle)] == [second]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=200),
    st.integers(1, 100),
)
def test_a_histogram_counts_every_value_once(values, bins):
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        with pytest.raises(InputError):
            binned(values)
        return
    found = binned(values, bins)
    assert (sum(found["counts"]), found["nonfinite"]) == (len(finite), len(values) - len(finite))
    assert len(found["edges"]) == len(found["counts"]) + 1 == bins + 1
    assert (found["min"], found["max"]) == (min(finite), max(finite))


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "a\\b", "a:b", "a\nb", "x" * 300, 3, "../up"])
def test_a_run_name_is_one_folder(tmp_path, name):
    if name == "":
        return  # the same as none: a name is made
    with pytest.raises(InputError, match="run_name must name a folder"):
        ExperimentTracker(folder=tmp_path, run_name=name)
    assert not any(tmp_path.iterdir())


def test_a_refused_run_leaves_nothing_behind(tmp_path):
    for wrong in ({"trackers": ["wanbd"]}, {"config": 3}, {"trackers": [object()]}, {"project": "a/b"}):
        with pytest.raises(InputError):
            ExperimentTracker(**({"folder": tmp_path / "runs", "run_name": "r"} | wrong))
    assert not any(tmp_path.iterdir())


def test_the_lock_is_let_go(tmp_path):
    tracker = ExperimentTracker(folder=tmp_path, run_name="r")
    tracker.finish()
    with run_lock(tracker.path).acquire(timeout=0):
        assert len(find_runs(tmp_path)) == 1


def test_about_is_what_a_backend_is_told(tmp_path):
    told = []
    backend = kept(start=lambda self, about: told.append(about))
    ExperimentTracker([backend], "p", "r", {"lr": 1}, tmp_path).finish()
    assert isinstance(told[0], About) and (told[0].project, told[0].name, told[0].config) == ("p", "r", {"lr": 1})
    assert len(told[0].identity) == 8 and issubclass(WandbBackend, Backend)
    assert signal.getsignal(signal.SIGINT) is not None
