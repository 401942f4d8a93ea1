"What would bore a reader of nbs/api/09a_jobs.ipynb: kills, locks, odd lines, large files."

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_text import byte_tokenizer, model_of

from truthgpt_nb.core import ConfigError, EngineError, InputError
from truthgpt_nb.jobs import write_file
from truthgpt_nb.text import TextGenerator


@pytest.fixture(scope="module")
def generator():
    return TextGenerator(model_of("llama"), byte_tokenizer(), use_cache=False)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts_in(path, count):
    records = [{"prompt": f"{n} {'word ' * (n % 7)}", "id": n} for n in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [record["prompt"] for record in records]


def test_each_line_has_the_text_of_its_prompt(generator, tmp_path):
    prompts, target = prompts_in(tmp_path / "in.jsonl", 100), tmp_path / "out.jsonl"
    result = write_file(generator, tmp_path / "in.jsonl", target, 6)
    assert (result.written, result.known, result.rejected) == (100, 0, 0)
    by_line = {record["line"]: record for record in lines(target)}
    texts = generator.generate(prompts, 6)
    assert [by_line[n + 1]["text"] for n in range(100)] == texts
    assert [by_line[n + 1]["id"] for n in range(100)] == list(range(100))
    assert result.tokens == sum(record["tokens"] for record in by_line.values())
    assert not Path(f"{target}.rejected").exists() and not Path(f"{target}.lock").exists()


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from test_jobs import TextGenerator, byte_tokenizer, model_of, write_file
generator = TextGenerator(model_of("llama"), byte_tokenizer(), use_cache=False)
write_file(generator, {source!r}, {target!r}, 20)
"""


def test_killed_at_any_moment_and_started_again_it_does_the_missing_ones(generator, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts, choose = prompts_in(source, 300), random.Random(0)
    script = KILLED.format(tests=str(Path(__file__).parent), source=str(source), target=str(target))
    before = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
        wanted = before + choose.randint(1, 60)
        while process.poll() is None and (not target.exists() or target.read_bytes().count(b"\n") < wanted):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        before = target.read_bytes().count(b"\n")
        assert wanted <= before < 300
    result = write_file(generator, source, target, 20)
    assert (result.written, result.known) == (300 - before, before)
    records = lines(target)
    assert sorted(record["line"] for record in records) == list(range(1, 301))
    texts = dict(zip(range(1, 301), generator.generate(prompts, 20), strict=True))
    assert {record["line"]: record["text"] for record in records} == texts


def test_a_line_cut_at_any_byte_is_written_again(generator, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"naïve \N{SLIGHTLY SMILING FACE}"\n"b"\n', encoding="utf-8")
    write_file(generator, source, target, 4)
    whole = target.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (0, 1, first // 2, first - 1, first, first + 1, len(whole) - 1):
        target.write_bytes(whole[:end])
        result = write_file(generator, source, target, 4)
        assert result.known == (end >= first) and result.written == 2 - result.known
        assert sorted(lines(target), key=lambda r: r["line"]) == sorted(
            map(json.loads, whole.splitlines()), key=lambda r: r["line"]
        )


ODD = [
    (b"{", "must be JSON"),
    (b"[1]", "must be a string, or an object"),
    (b"null", "must be a string, or an object"),
    (b"3", "must be a string, or an object"),
    (b"{}", "must be a string, or an object"),
    (b'{"prompt": "a", "messages": []}', "must be a string, or an object"),
    (b'{"prompt": 3}', "must be a string"),
    (b'{"prompt": ["a"]}', "must have a string as its prompt"),
    (b'""', "must not be empty"),
    (b'{"prompt": ""}', "must not be empty"),
    (b'{"messages": []}', "must be a list of messages"),
    (b'{"messages": [{"role": "user"}]}', "must have a role and a content"),
    (b'{"prompt": "a", "line": 3}', "must not have a field named line"),
    (b'"\\ud800"', "must be valid Unicode"),
    (b'"\xff"', "must be JSON"),
    (json.dumps("x" * 200).encode(), "must be shorter than the context"),
    (json.dumps("x" * 125).encode(), "must fit into the context"),
]


def test_odd_lines_are_kept_aside_and_the_rest_is_done(generator, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"".join(line + b'\n\n"good"\n' for line, _ in ODD))
    result = write_file(generator, source, target, 4)
    assert (result.written, result.rejected) == (len(ODD), len(ODD))
    assert [record["line"] for record in lines(target)] == [3 * n + 3 for n in range(len(ODD))]
    aside = lines(Path(f"{target}.rejected"))
    assert sorted(record["line"] for record in aside) == [3 * n + 1 for n in range(len(ODD))]
    for record in aside:
        line, why = ODD[record["line"] // 3]
        assert why in record["error"] and record["input"] == line.decode("utf-8", "replace")
    again = write_file(generator, source, target, 4)
    assert (again.written, again.known, again.rejected) == (0, len(ODD), len(ODD))


def test_a_prompt_on_which_the_model_fails_is_kept_aside(generator, tmp_path, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"a"\n"bad"\n"b"\n')
    real = type(generator._writer).start

    def start(self, job, *options):
        flight = real(self, job, *options)
        if job.prompt == "bad":
            flight.future.set_exception(EngineError("logits", "must be numbers", "NaN", "Look at the weights."))
        return flight

    with monkeypatch.context() as patch:
        patch.setattr(type(generator._writer), "start", start)
        assert write_file(generator, source, target, 4).rejected == 1
    assert "logits must be numbers" in lines(Path(f"{target}.rejected"))[0]["error"]
    result = write_file(generator, source, target, 4)
    assert (result.written, result.known, result.rejected) == (1, 2, 0)


@pytest.mark.parametrize("change", [{"max_new_tokens": 5}, {"stop": ("x",)}, {"do_sample": True, "seed": 1}])
def test_another_job_does_not_go_on_in_the_same_file(generator, tmp_path, change):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"a"\n')
    write_file(generator, source, target, **{"max_new_tokens": 4})
    before = target.read_bytes()
    with pytest.raises(InputError, match="target must belong to this job"):
        write_file(generator, source, target, **{"max_new_tokens": 4} | change)
    assert target.read_bytes() == before
    assert write_file(generator, source, target, **{"max_new_tokens": 4, "batch_size": 2}).known == 1


def test_another_model_or_prompt_does_not_go_on_in_the_same_file(generator, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"a"\n"b"\n')
    write_file(generator, source, target, 4)
    other = TextGenerator(model_of("llama", seed=1), byte_tokenizer(), use_cache=False)
    with pytest.raises(InputError, match="target must belong to this job"):
        write_file(other, source, target, 4)
    source.write_text('"c"\n"b"\n"d"\n')
    with pytest.raises(InputError, match="line 1 must be as it was"):
        write_file(generator, source, target, 4)
    source.write_text('"a"\n"b"\n"d"\n')
    assert write_file(generator, source, target, 4).written == 1


def test_what_is_refused_before_anything_is_written(generator, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"a"\n')
    (tmp_path / "notes").write_text("my own\n")
    for wrong, message in (
        ((tmp_path / "none", target), "source must be a file"),
        ((tmp_path, target), "source must be a file"),
        ((source, tmp_path), "target must be a file"),
        ((source, source), "target must be another file than the source"),
        ((source, tmp_path / "no" / "out.jsonl"), "target must be another file than the source, in a folder"),
        ((source, tmp_path / "notes"), "target must be a file that was written here"),
    ):
        with pytest.raises(InputError, match=message):
            write_file(generator, *wrong)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        write_file(generator, source, target, -1)
    with pytest.raises(InputError, match="num_return_sequences must be 1 here"):
        write_file(generator, source, target, 4, do_sample=True, num_return_sequences=2)
    assert (tmp_path / "notes").read_text() == "my own\n"
    assert lines(source) == ["a"]


def hold(target, held, done):
    from truthgpt_nb.jobs import _alone

    with _alone(target):
        held.set()
        done.wait(60)


def test_two_processes_do_not_write_one_file(generator, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('"a"\n')
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(target, held, done))
    other.start()
    assert held.wait(60)
    with pytest.raises(InputError, match="target must not be in use by another process"):
        write_file(generator, source, target, 4)
    done.set()
    other.join()
    assert write_file(generator, source, target, 4).written == 1


def test_an_empty_file(generator, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n")
    result = write_file(generator, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (result.written, result.known, result.rejected) == (0, 0, 0)


def test_ctrl_c_leaves_whole_lines(generator, tmp_path, request, monkeypatch):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts_in(source, 80)
    real, count = generator.each, []

    def each(*args, **settings):
        for answered in real(*args, **settings):
            count.append(1)
            if len(count) == 20:
                os.kill(os.getpid(), signal.SIGINT)
            yield answered

    monkeypatch.setattr(generator, "each", each)
    with pytest.raises(KeyboardInterrupt):
        write_file(generator, source, target, 8)
    monkeypatch.undo()
    known = len(lines(target))
    assert 0 < known < 80
    result = write_file(generator, source, target, 8)
    assert (result.known, result.written) == (known, 80 - known)
    assert generator._flights == {}
