"""Generation on a cluster of two nodes on this machine: what is lost, killed or broken, and what comes out."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest
from house import ROOT

from truthgpt_nb import scale
from truthgpt_nb.core import EngineError, InputError
from truthgpt_nb.scale import generate_dataset, read_generated
from truthgpt_nb.text import TextGenerator

PROMPTS = [f"{start} {number}" for number in range(6) for start in ("Once upon a time", "The sea", "My dear")]
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module")
def plain():
    "The generator that everything is compared with."
    return TextGenerator("tiny-english", use_cache=False)


@pytest.fixture(scope="module")
def nodes():
    "A cluster of two nodes with room for one worker each, in use by this process; none of its processes is left."
    ray = pytest.importorskip("ray", reason="the extra scale is not installed")
    from ray.cluster_utils import Cluster

    with scale._environment(RAY_USAGE_STATS_ENABLED="0", RAY_BACKEND_LOG_LEVEL="fatal"), scale._loopback():
        resource_tracker.ensure_running()  # Python's own, which stays until this process ends
        before = descendants()
        made = patient(lambda: Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **NODE}))
        try:
            patient(lambda: made.add_node(**NODE))
            ray.init(made.address, log_to_driver=False, logging_level="ERROR")
            yield made
        finally:
            started = [process for process in descendants() if process not in before]
            ray.shutdown()
            made.shutdown()
    wait_until_gone(started)


def patient(start):
    "Ray gives its processes half a minute to start, which a busy machine may exceed."
    for _ in range(2):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


def descendants(pid=None):
    "The processes that a process has started, and those that they have."
    return psutil.Process(pid).children(recursive=True)


def running(processes, named=""):
    "Those of some processes that still run."
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE and process.name().startswith(named):
                found.append(process)
    return found


def wait_until_gone(processes):
    "Waits for servers and workers; the agents of a node, which take a minute to notice that it is dead, are ended."
    for agent in running(processes, named="ray::DashboardAgent") + running(processes, named="ray::RuntimeEnvAgent"):
        agent.kill()
    wait_until(lambda: not running(processes), lambda: [process.cmdline() for process in running(processes)])


def wait_until(true, instead=lambda: "it did not come"):
    "Waits for what has to come; the bound only ends a test that would hang."
    for _ in range(1200):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError(instead())


def logging_generator(log, act="None"):
    """A function that makes a generator which writes down every prompt that it is given, after doing `act`.

    It is made from text, as what a worker cannot import has to travel whole.
    """
    code = f"""
class Logging:
    def __init__(self):
        from truthgpt_nb.text import TextGenerator
        self.generator, self.calls = TextGenerator("tiny-english", use_cache=False), 0
    def run(self, prompts, *arguments, **settings):
        import os, time
        from pathlib import Path
        here = Path({str(log)!r})
        {act}
        self.calls += 1
        with open(here / "log", "a") as log:
            log.write("".join(prompt + chr(10) for prompt in prompts))
        return self.generator.run(prompts, *arguments, **settings)
def make():
    return Logging()
"""
    made = {"__name__": "__main__"}
    exec(code, made)
    return made["make"]


def logged(folder):
    "The prompts that generators were given, in order."
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def texts(output):
    return [record["text"] for record in read_generated(output)]


def shards(output):
    return {file.name: file.stat().st_mtime_ns for file in (output / "records").iterdir()}


# without a cluster


def test_what_cannot_work_is_refused_before_ray_is_loaded(tmp_path):
    code = """
import sys
from truthgpt_nb.core import TruthGPTError
from truthgpt_nb.scale import generate_dataset
for settings in ({"temperature": 2.0}, {"max_new_tokens": 0}, {"seed": -1, "do_sample": True}, {"prompt_column": "x"},
                 {"workers": 0}, {"records_per_batch": True}, {"model": object()}, {"unknown": 1}):
    try:
        generate_dataset([{"prompt": "a"}], sys.argv[1], **settings)
    except TruthGPTError as error:
        print(type(error).__name__)
assert "ray" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = ["ConfigError"] * 3 + ["InputError"] * 4 + ["ConfigError"]
    assert done.stdout.split() == kinds


def rows(data):
    return [json.loads(line) for line in scale._checked(scale._records(data, "prompt"), "prompt")]


def test_the_forms_of_input_give_the_same_records_in_order(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra scale is not installed")
    import pyarrow

    records = [{"prompt": prompt, "n": n, "of": {"a": [n, None]}} for n, prompt in enumerate(PROMPTS)]
    for folder in ("jsonl", "parquet"):
        (tmp_path / folder / "b").mkdir(parents=True)
    for name, part in (("a", records[:10]), ("b/c", records[10:])):
        (tmp_path / "jsonl" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / "parquet" / f"{name}.parquet", row_group_size=3)
    expected = [[record, None] for record in records]
    assert rows(records) == rows(tmp_path / "jsonl") == rows(str(tmp_path / "parquet")) == expected
    assert rows(PROMPTS) == [[{"prompt": prompt}, None] for prompt in PROMPTS]


def test_bad_records_say_what_is_wrong(tmp_path):
    lines = ['{"prompt": "a"}', "", '{"prompt": ""}', '{"prompt": 7}', "{}", '{"prompt"', '"b"', '{"prompt": NaN}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    problems = [problem for _, problem in rows(tmp_path / "x.jsonl")]
    assert problems[0] is None
    assert problems[1:4] == [
        "the prompt must not be empty",
        "the prompt must be a string, got int",
        "the prompt must be a string, got NoneType",
    ]
    assert problems[4].startswith("line 6 of x.jsonl must be JSON: ")
    assert [problem.split(",")[0] for problem in problems[5:]] == [
        "the record must be an object whose columns have names",
        "the columns must be JSON data",
    ]


def test_mixed_folders_and_remote_paths_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.parquet").write_text("")
    with pytest.raises(InputError, match="must be JSONL or Parquet"):
        rows(tmp_path)
    with pytest.raises(InputError, match="must be a path of this machine"):
        rows("s3://bucket/a.jsonl")
    with pytest.raises(InputError, match="output must be a folder"):
        generate_dataset(["a"], "s3://bucket/out")


def test_a_damaged_file_is_named(tmp_path):
    folder = scale._Folder(tmp_path)
    with folder.locked():
        aside, digest, count = folder.stage(iter([b"1\n", b"2\n"]), 2)
        folder.begin(aside, {"input": digest, "records": count, "records_per_batch": 2})
        folder.shard(0).write_text('{"index": 0}\n')
    with pytest.raises(InputError, match="must hold its records"):
        list(read_generated(tmp_path))


def test_what_was_staged_for_another_job_changes_nothing(tmp_path):
    folder = scale._Folder(tmp_path)
    with folder.locked():
        aside, _, _ = folder.stage(iter([b"1\n"]), 1)
        folder.begin(aside, {"input": "a", "records": 1, "records_per_batch": 1})
    before = folder.manifest.read_bytes()
    with folder.locked():
        aside, _, _ = folder.stage(iter([b"2\n"]), 1)
        with pytest.raises(InputError, match="input is 'b', was 'a'"):
            folder.begin(aside, {"input": "b", "records": 1, "records_per_batch": 1})
    assert folder.manifest.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "manifest.json", "records"]


def test_a_call_that_was_killed_while_staging_leaves_a_usable_folder(tmp_path):
    (tmp_path / ".input.0000").mkdir()
    (tmp_path / ".manifest.json.0000").touch()
    (tmp_path / ".lock").touch()
    with scale._Folder(tmp_path).locked():
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="must not hold anything else, got 'input'"):
        generate_dataset(["a"], tmp_path)
    assert (tmp_path / "input" / "mine.txt").read_text() == "mine"


# on the cluster


def test_a_drawn_text_does_not_depend_on_worker_or_batch(nodes, plain, tmp_path):
    import ray

    drawn = {"do_sample": True, "seed": 5, "temperature": 0.9, "max_new_tokens": 8}
    data = ray.data.from_items([{"prompt": prompt} for prompt in PROMPTS], override_num_blocks=4)
    done = generate_dataset(data, tmp_path, records_per_batch=3, **drawn)
    assert [record["prompt"] for record in done] == PROMPTS
    assert texts(tmp_path) == plain.generate(PROMPTS, **drawn)
    assert done.to_dict() | {"output": ""} == {
        "output": "",
        "records": 18,
        "written": 18,
        "found": 0,
        "failed": 0,
        "tokens": sum(record["tokens"] for record in done),
    }
    assert ray.is_initialized(), "a Ray that was running is left running"


def test_a_bad_record_fails_alone(nodes, plain, tmp_path):
    prompts = [*PROMPTS[:3], "word " * 3000, "", PROMPTS[3], None, PROMPTS[4]]
    data = [{"prompt": prompt} for prompt in prompts]
    done = generate_dataset(data, tmp_path, records_per_batch=8, max_new_tokens=4)
    assert done.failed == 3
    assert [record["index"] for record in done.errors()] == [3, 4, 6]
    assert "shorter than the context" in next(done.errors())["error"]
    assert [text for text in texts(tmp_path) if text is not None] == plain.generate(PROMPTS[:5], max_new_tokens=4)


def test_another_model_under_the_same_name_is_refused(nodes, tmp_path, monkeypatch):
    job = {"records_per_batch": 2, "max_new_tokens": 4}
    with monkeypatch.context() as patch:
        patch.setattr(scale, "_handed_out", lambda *arguments: (row for row in ()))
        generate_dataset(PROMPTS[:4], tmp_path, **job)
    (tmp_path / "model.json").write_text(json.dumps({"fingerprint": "0" * 64}))
    with pytest.raises(EngineError, match="model must be the one that the other records were written with") as raised:
        generate_dataset(PROMPTS[:4], tmp_path, **job)
    wait_until(lambda: not running(descendants(), named="ray::MapWorker"))
    assert raised.tb, "the workers end although the error is kept"
    assert shards(tmp_path) == {}


def test_a_process_that_ends_is_started_again(nodes, plain, tmp_path):
    once = """
        if prompts[0].startswith("The sea") and not (here / "ended").exists():
            (here / "ended").touch()
            os._exit(1)
"""
    job = {"records_per_batch": 1, "max_new_tokens": 4, "workers": 1}
    generate_dataset(PROMPTS[:6], tmp_path / "out", make_generator=logging_generator(tmp_path, once.strip()), **job)
    assert (tmp_path / "ended").exists()
    assert texts(tmp_path / "out") == plain.generate(PROMPTS[:6], max_new_tokens=4)
    assert sorted(logged(tmp_path)) == sorted(PROMPTS[:6])


def test_a_batch_that_ends_every_worker_is_given_up(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "_MOST_STARTS", 2)

    def ending():
        os._exit(1)

    with pytest.raises(EngineError, match="the batch at record 0 must not end its worker, got '2 ends'"):
        generate_dataset(["a"], tmp_path, make_generator=ending)


HELD = """
        if self.calls == 2:
            (here / "held").touch()
            time.sleep(3600)
"""
SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:3]
import test_scale as t
from pathlib import Path
here = Path(sys.argv[3])
make = t.logging_generator(here, t.HELD.strip())
t.generate_dataset(t.PROMPTS, here / "out", make_generator=make, records_per_batch=3, max_new_tokens=4, workers=1)
"""


def test_a_call_that_is_killed_and_made_again_does_what_is_missing(nodes, plain, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(ROOT / "tests"), str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with open(tmp_path / "stderr", "w") as errors:
        first = subprocess.Popen(command, cwd=ROOT, stderr=errors, env=environment)
    try:
        wait_until(lambda: (tmp_path / "held").exists() or first.poll() is not None)
        assert first.poll() is None, (tmp_path / "stderr").read_text()
        theirs = descendants(first.pid)
        ports = [port for process in running(theirs) for port in process.net_connections("tcp")]
        assert {port.laddr.ip for port in ports if port.status == psutil.CONN_LISTEN} <= LOOPBACK
        with pytest.raises(InputError, match="must not be in use by another call"):
            generate_dataset(PROMPTS, tmp_path / "out")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    wait_until_gone(theirs)

    before = shards(tmp_path / "out")
    assert list(before) and logged(tmp_path) == PROMPTS[:6]
    job = {"records_per_batch": 3, "max_new_tokens": 4}
    done = generate_dataset(PROMPTS, tmp_path / "out", make_generator=logging_generator(tmp_path), **job)
    assert (done.found, done.written) == (6, 12)
    assert sorted(logged(tmp_path)) == sorted(PROMPTS), "each prompt was continued once"
    assert {name: time for name, time in shards(tmp_path / "out").items() if name in before} == before
    assert texts(tmp_path / "out") == plain.generate(PROMPTS, max_new_tokens=4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock",
        "manifest.json",
        "model.json",
        "records",
    ]


def test_nothing_is_lost_or_doubled_when_a_node_is_lost(nodes, plain, tmp_path):
    (victim,) = nodes.worker_nodes
    # the worker on that node takes a second batch and holds it until the node is killed; the other one waits for that
    hold = f"""
        import ray
        victim = ray.get_runtime_context().get_node_id() == {victim.node_id!r}
        if victim and self.calls == 1:
            (here / "held").write_text(prompts[0])
            time.sleep(3600)
        while not victim and not (here / "held").exists():
            time.sleep(0.05)
"""
    killed, started = [], descendants()

    def kill():
        wait_until((tmp_path / "held").exists)
        started.extend(descendants())
        nodes.remove_node(victim, allow_graceful=False)
        killed.append(victim)

    killer = threading.Thread(target=kill)
    killer.start()
    make = logging_generator(tmp_path, hold.strip())
    done = generate_dataset(PROMPTS, tmp_path / "out", make_generator=make, records_per_batch=2, max_new_tokens=4)
    killer.join()
    assert killed
    assert [record["index"] for record in done] == list(range(len(PROMPTS)))
    assert texts(tmp_path / "out") == plain.generate(PROMPTS, max_new_tokens=4)
    assert sorted(logged(tmp_path)) == sorted(PROMPTS), "each prompt was continued once"
    held = Path(tmp_path / "held").read_text()
    assert logged(tmp_path).index(held) > 0
    wait_until_gone([process for process in started if process not in descendants()])
