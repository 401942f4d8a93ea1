"""Training that is killed, runs in several processes, on adapters and in half precision, and its settings."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from small_training import Data, model
from torch.nn import functional as F

from truthgpt_nb.configs import TrainingConfig
from truthgpt_nb.core import ConfigError
from truthgpt_nb.loader import DataLoaderBuilder
from truthgpt_nb.manager import ModelManager
from truthgpt_nb.models import Source, TextModel, load_text_model
from truthgpt_nb.trainer import (
    Objective,
    Trainer,
    evaluate,
    next_token_count,
    next_token_loss,
    parameter_groups,
    stoppable,
)

HEAD = """
import json, os, sys, torch
from small_training import RANK, Data, model
from truthgpt_nb.trainer import Trainer
"""


def weights(trainer):
    return torch.cat([weight.flatten() for weight in trainer.bare.state_dict().values()])


def program(tmp_path, body):
    file = tmp_path / "program.py"
    file.write_text(HEAD + textwrap.dedent(body))
    return file


def launched(file, *words, processes=1, **options):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, file, *map(str, words)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launcher, file, *map(str, words)]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **options,
    )


def finished(process, timeout=180):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-2000:]
    return out


RUN = """
    net = model()
    if "sharded" in sys.argv:
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("gloo", **alone)
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for block in net.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
    validation = [batch for batch, _ in zip(Data(), range(2))]
    trainer = Trainer(net, Data(), steps=int(sys.argv[2]), accumulate=2, learning_rate=1e-2, folder=sys.argv[1],
                      save_every=3, schedule="constant", ema=0.9, validation=validation, evaluate_every=2)
    report = trainer.fit()
    if RANK == 0:
        rows = [[one.loss, one.gradient_norm, one.items] for one in report.steps]
        print(json.dumps([rows, [[one.loss, one.items] for one in report.evaluations]]))
"""


def close(found, expected, rtol=1e-5):
    "Compare what two runs printed."
    assert [row[-1] for part in found for row in part] == [row[-1] for part in expected for row in part]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose([row[:-1] for row in one], [row[:-1] for row in other], rtol=rtol)


def test_two_processes_train_as_one_and_either_goes_on_from_the_other(tmp_path):
    file = program(tmp_path, RUN)
    one = json.loads(finished(launched(file, tmp_path / "one", 9)))
    two = json.loads(finished(launched(file, tmp_path / "two", 9, processes=2)))
    close(one, two)
    more = json.loads(finished(launched(file, tmp_path / "one", 12, processes=2)))  # one process, then two
    again = json.loads(finished(launched(file, tmp_path / "two", 12)))  # two, then one
    assert more[0][:9] == one[0]
    close(more, again, rtol=1e-4)


def test_shards_train_as_a_whole_and_any_number_of_processes_goes_on(tmp_path):
    file = program(tmp_path, RUN)
    whole = json.loads(finished(launched(file, tmp_path / "whole", 9)))
    first = json.loads(finished(launched(file, tmp_path / "run", 6, "sharded", processes=2)))
    assert list(tmp_path.glob("run/*/shards/*.safetensors"))
    found = json.loads(finished(launched(file, tmp_path / "run", 9, "sharded", processes=2)))
    assert found[0][:6] == first[0]
    close(found, whole)
    close(
        json.loads(finished(launched(file, tmp_path / "run", 12, "sharded"))),
        json.loads(finished(launched(file, tmp_path / "whole", 12))),
        rtol=1e-4,
    )


def test_a_bad_gradient_is_rolled_back_in_all_processes_together(tmp_path):
    body = """
        from truthgpt_nb.trainer import Objective, next_token_count, next_token_loss

        def spoilt(net, batch):
            loss = next_token_loss(net, batch)
            spoilt.calls += 1
            return loss * float("nan") if (spoilt.calls, RANK) == (6, 1) else loss

        def weights(trainer):
            return torch.cat([weight.detach().clone().flatten() for weight in trainer.bare.parameters()])

        spoilt.calls = 0
        trainer = Trainer(model(), Data(), steps=9, folder=sys.argv[1], save_every=2, on_bad_gradients="roll back",
                          objective=Objective(spoilt, next_token_count), schedule="constant", warmup=0.0)
        before = {}
        trainer.callbacks = [lambda trainer, what: before.setdefault((trainer.step, what), weights(trainer))]
        report = trainer.fit()
        same = torch.equal(before[4, "step"], before[6, "step"])
        flat = weights(trainer)
        both = [torch.empty_like(flat) for _ in range(2)]
        torch.distributed.all_gather(both, flat)
        print(json.dumps([same, torch.equal(*both), [one.step for one in report.steps if one.skipped]]))
    """
    out = finished(launched(program(tmp_path, body), tmp_path / "run", processes=2))
    assert [json.loads(line) for line in out.splitlines()] == [[True, True, [6]]] * 2


def test_a_loader_is_divided_and_a_process_with_nothing_left_takes_part(tmp_path):
    body = """
        from truthgpt_nb.loader import DataLoaderBuilder
        rows = [{"input_ids": list(range(1, 4 + n)), "labels": list(range(1, 4 + n))} for n in range(5)]
        loader = DataLoaderBuilder(seed=3).source(rows).tokenize(None, max_length=16, vocab_size=29).batch(2).build()
        trainer = Trainer(model(), loader, epochs=2, validation=loader, evaluate_every=1, schedule="constant")
        report = trainer.fit()
        if RANK == 0:
            sizes = [[one.loss, one.items] for one in report.evaluations]
            print(json.dumps([sum(one.items for one in report.steps), sizes]))
    """
    file = program(tmp_path, body)
    items, sizes = json.loads(finished(launched(file, processes=2)))
    assert items == 2 * sum(2 + n for n in range(5))
    assert {size for _, size in sizes} == {items // 2}


def test_data_parallel_is_taken_apart_with_advice():
    with pytest.warns(UserWarning, match="truthgpt train --processes"):
        trainer = Trainer(torch.nn.DataParallel(model()), Data(), steps=2)
    assert type(trainer.bare) is hf.GPT2LMHeadModel
    assert [one.step for one in trainer.fit(progress=False).steps] == [1, 2]


def test_a_process_that_is_killed_ends_the_others_and_leaves_a_good_checkpoint(tmp_path):
    body = """
        import signal

        def die(trainer, what):
            if what == "step" and trainer.step == 5 and RANK == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        callbacks = [die] * int(sys.argv[2])
        trainer = Trainer(model(), Data(), steps=9, folder=sys.argv[1], save_every=2, callbacks=callbacks)
        report = trainer.fit()
        if RANK == 0:
            print(json.dumps([one.step for one in report.steps]))
    """
    file = program(tmp_path, body)
    process = launched(file, tmp_path / "run", 1, processes=2)
    _, err = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "SIGKILL" in err or "Signal 9" in err
    assert json.loads(finished(launched(file, tmp_path / "run", 0, processes=2))) == list(range(1, 10))


def test_killed_at_any_moment_it_goes_on_and_ends_the_same(tmp_path):
    body = """
        plan = {"steps": 40, "save_every": 1, "ema": 0.9, "precision": "bf16"}
        trainer = Trainer(model(dropout=0.3), Data(), folder=sys.argv[1], **plan)
        print("begins", flush=True)
        trainer.fit()
        torch.save(torch.cat([w.flatten() for w in trainer.bare.state_dict().values()]), sys.argv[2])
    """
    file, rng = program(tmp_path, body), np.random.default_rng(0)
    finished(launched(file, tmp_path / "whole", tmp_path / "expected"))
    for _ in range(4):
        process = launched(file, tmp_path / "killed", tmp_path / "never")
        assert process.stdout.readline() == "begins\n"
        time.sleep(rng.uniform(0.0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finished(launched(file, tmp_path / "killed", tmp_path / "found"))
    assert torch.equal(torch.load(tmp_path / "found"), torch.load(tmp_path / "expected"))


def test_sigterm_ends_a_run_with_a_checkpoint(tmp_path):
    body = """
        say = lambda trainer, what: print(what, flush=True)
        report = Trainer(model(), Data(), steps=10**6, folder=sys.argv[1], callbacks=[say]).fit()
        print(json.dumps([report.ended, len(report.steps)]))
    """
    process = launched(program(tmp_path, body), tmp_path / "run")
    while process.stdout.readline() != "step\n":
        pass
    process.send_signal(signal.SIGTERM)
    ended, steps = json.loads(finished(process).splitlines()[-1])
    assert ended == "stopped by SIGTERM"
    trainer = Trainer(model(), Data(), steps=steps, folder=tmp_path / "run")
    assert trainer.checkpoints.steps() == [steps]


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"accumulate": 3}, {"gradient_checkpointing": True}])
def test_adapters_are_trained_alone_and_resumed_bit_for_bit(tmp_path, settings):
    def run(folder, callbacks=()):
        torch.manual_seed(1)
        manager = ModelManager(
            TextModel(model(0.1), load_text_model("tiny-english").tokenizer, Source("x", "object", ""))
        )
        manager.add_adapter("one", rank=2, dropout=0.1)
        plan = {"steps": 12, "save_every": 5, "learning_rate": 1e-2} | settings
        return manager, Trainer(manager.model, Data(), folder=folder, callbacks=callbacks, **plan)

    def die(trainer, what):
        if what == "step" and trainer.step == 8:
            raise KeyError

    manager, trainer = run(tmp_path / "whole")
    before = {name: weight.clone() for name, weight in manager.model.named_parameters()}
    trainer.fit()
    moved = {name for name, weight in manager.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    with pytest.raises(KeyError):
        run(tmp_path / "killed", [die])[1].fit()
    _, resumed = run(tmp_path / "killed")
    resumed.fit()
    assert torch.equal(weights(resumed), weights(trainer))


@pytest.mark.parametrize("packed", [True, False])
def test_loaded_text_is_trained_on_and_resumed_bit_for_bit(tmp_path, packed):
    tokenizer = load_text_model("tiny-english").tokenizer
    texts = [f"The captain said {n} times: " + "the sea was calm. " * (1 + n % 7) for n in range(80)]

    def run(folder, callbacks=()):
        builder = DataLoaderBuilder(seed=3).source(texts).tokenize(tokenizer, max_length=64, cache_dir=None)
        loader = (builder.pack() if packed else builder).batch(4).build()
        network = load_text_model("tiny-english").model
        plan = {"steps": 12, "save_every": 5, "accumulate": 2, "learning_rate": 1e-3}
        return Trainer(network, loader, folder=folder, callbacks=callbacks, **plan)

    def die(trainer, what):
        if what == "step" and trainer.step == 9:
            raise KeyError

    whole = run(tmp_path / "whole")
    report = whole.fit()
    assert report.steps[-1].loss < report.steps[0].loss
    with pytest.raises(KeyError):
        run(tmp_path / "killed", [die]).fit()
    resumed = run(tmp_path / "killed")
    assert [one.loss for one in resumed.fit().steps] == [one.loss for one in report.steps]
    assert torch.equal(weights(resumed), weights(whole))


def test_what_is_counted_is_what_the_loader_counts():
    tokenizer = load_text_model("tiny-english").tokenizer
    texts = ["the sea was calm. " * (1 + n % 7) for n in range(30)]
    builder = DataLoaderBuilder(seed=3).source(texts).tokenize(tokenizer, max_length=64, cache_dir=None)
    for loader in (builder.pack().batch(4).build(), builder.batch(4).build()):
        assert all(next_token_count(batch) == batch.weight > 0 for batch in loader)


def test_the_loop_is_the_plain_loop():
    trainer = Trainer(model(), Data(), steps=10, learning_rate=1e-2, warmup=0.0, schedule="constant", clip=1.0)
    trainer.fit()
    plain, data = model().train(), iter(Data())
    optimizer = torch.optim.AdamW(parameter_groups(plain, 0.1), lr=1e-2, betas=(0.9, 0.95), fused=True)
    for batch in [next(data) for _ in range(10)]:
        logits = plain(input_ids=batch["input_ids"]).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.cat([weight.flatten() for weight in plain.state_dict().values()])
    torch.testing.assert_close(weights(trainer), expected, atol=1e-5, rtol=1e-5)


def test_a_second_signal_is_not_waited_for(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def press_twice():
        with stoppable() as wish:
            os.kill(os.getpid(), signal.SIGINT)
            assert wish.signal == "SIGINT"
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_evaluating_changes_nothing():
    network = model(dropout=0.5).train()
    state = torch.get_rng_state()
    first, second = (evaluate(network, Data(batches=3)) for _ in range(2))
    assert first == second
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert first.perplexity == pytest.approx(np.exp(first.loss))


def test_a_spike_is_held_back():
    def objective(network, batch):
        objective.calls += 1
        return next_token_loss(network, batch) * (1000 if objective.calls == 20 else 1)

    objective.calls = 0
    trainer = Trainer(model(), Data(), steps=24, spike=10.0, objective=Objective(objective, next_token_count))
    with pytest.warns(UserWarning, match="step 20 is held back: the gradient norm is .* the median of the last"):
        report = trainer.fit()
    assert [one.step for one in report.steps if one.skipped] == [20]


SIZES = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
TIED = {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 4}
MODELS = {
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=37, n_embd=16, n_layer=1, n_head=2)),
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "Gemma 2, whose logits are capped": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES | TIED)),
    "Cohere, whose logits are scaled": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES)),
    "GPT-NeoX": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_loss_and_its_gradient_are_those_of_all_logits(name, share):
    torch.manual_seed(int(share * 10))
    network = MODELS[name]().double().eval()
    ids = torch.randint(37, (3, 9))
    labels = ids.masked_fill(torch.rand(ids.shape) >= share, -100)
    logits = network(input_ids=ids, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    of_all = torch.autograd.grad(expected, list(network.parameters()), allow_unused=True)
    seen = []
    network.get_output_embeddings().register_forward_hook(lambda head, inputs, output: seen.append(output.shape))
    found = next_token_loss(network, {"input_ids": ids, "labels": labels})
    assert seen == [(next_token_count({"labels": labels}), 37)]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)  # the last step is in float32
    for one, other in zip(
        torch.autograd.grad(found, list(network.parameters()), allow_unused=True), of_all, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_model_without_a_known_head_gives_all_logits():
    network, batch = model(), next(iter(Data()))
    expected = next_token_loss(network, batch)

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, **inputs):
            return self.inner(**inputs)

    torch.testing.assert_close(next_token_loss(Hidden(), batch), expected)
    assert not network.lm_head._forward_pre_hooks


def test_bad_gradients_in_a_row_end_a_run():
    nan = Objective(lambda network, batch: next_token_loss(network, batch) * float("nan"), next_token_count)
    with pytest.warns(UserWarning, match="held back"):
        report = Trainer(model(), Data(), steps=50, objective=nan).fit()
    assert report.ended.startswith("bad gradients")
    assert len(report.steps) == 10


def test_a_batch_without_labels_is_held_back():
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.full((2, 5), -100)}
    with pytest.warns(UserWarning, match="no item has a label"):
        report = Trainer(model(), [batch], steps=1).fit()
    assert report.steps[0].skipped


def test_another_model_is_refused_before_the_first_step(tmp_path):
    Trainer(model(), Data(), steps=2, folder=tmp_path).fit()
    other = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=29, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    )
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    with pytest.raises(Exception, match=r"transformer\.h\.1"):
        Trainer(other, Data(), steps=4, folder=tmp_path).fit()
    assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())


def test_a_run_that_is_done_stays_done(tmp_path):
    first = Trainer(model(), Data(), steps=3, folder=tmp_path)
    first.fit()
    again = Trainer(model(), Data(), steps=3, folder=tmp_path)
    assert len(again.fit().steps) == 3
    assert torch.equal(weights(first), weights(again))


def test_other_settings_are_named_when_a_run_goes_on(tmp_path):
    Trainer(model(), Data(), steps=3, folder=tmp_path, learning_rate=1e-3).fit()
    with pytest.warns(UserWarning, match=r"goes on with other settings: steps 3 → 5, learning_rate 0\.001 → 0\.002"):
        report = Trainer(model(), Data(), steps=5, folder=tmp_path, learning_rate=2e-3).fit()
    assert len(report.steps) == 5


def test_epochs_count_windows_that_are_not_full():
    trainer = Trainer(model(), Data(batches=7), epochs=2, accumulate=3)
    assert trainer.total == 6
    items = [one.items for one in trainer.fit().steps]
    assert min(items[2], items[5]) < min(items[:2])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"patience": 3}, "counts evaluations"),
        ({"beta2": 1.0}, "less than 1"),
        ({"stesp": 3}, "steps"),
    ],
)
def test_settings_that_contradict_each_other(settings, why):
    with pytest.raises(ConfigError, match=why):
        TrainingConfig(**settings)


@pytest.mark.slow
def test_compiled_layers_train_as_they_are():
    from torch._dynamo.utils import counters

    def losses(**settings):
        trainer = Trainer(model(), Data(), steps=4, accumulate=2, learning_rate=1e-2, **settings)
        return [one.loss for one in trainer.fit(progress=False).steps]

    expected, before = losses(), counters["stats"]["unique_graphs"]
    np.testing.assert_allclose(losses(compile=True), expected, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] > before
