"""The life of a model under faults: disks that fill up, kills, adapters of every kind on several architectures."""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from truthgpt_nb import manager as module
from truthgpt_nb.core import ConfigError, InputError, ModelError
from truthgpt_nb.devices import compiler_problem
from truthgpt_nb.manager import ModelManager, model_size
from truthgpt_nb.models import Source, TextModel, load_text_model

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "Llama": lambda: hf.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "Qwen2": lambda: hf.Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True),
    "GPT2": lambda: hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    "OPT": lambda: hf.OPTConfig(
        **SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=1, bos_token_id=0
    ),
}


def manager_of(kind, seed=0):
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(KINDS[kind]()).eval()
    return ModelManager(TextModel(model, load_text_model("tiny-english").tokenizer, Source(kind, "object", "")))


def logits(manager):
    with torch.no_grad():
        return manager.model(torch.arange(2, 20)[None]).logits


def disturb(manager, seed):
    "Move what the active adapters learn."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in manager.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.05, generator=generator))


@pytest.fixture
def tiny():
    return ModelManager("tiny-english")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_neutral_learn_save_load_and_merge(kind, dora, tmp_path):
    manager = manager_of(kind)
    plain = logits(manager)
    size = manager.size()
    manager.add_adapter("one", rank=3, dora=dora)
    torch.testing.assert_close(logits(manager), plain, atol=1e-6, rtol=0)
    assert manager.size().trainable == manager.size().adapters > 0
    assert manager.size().parameters - manager.size().adapters == size.parameters
    disturb(manager, 1)
    learnt = logits(manager)
    assert (learnt - plain).abs().max() > 1e-3
    saved = manager.save_adapter("one", tmp_path / "one")
    other = manager_of(kind)
    other.load_adapter(saved, "again")
    assert torch.equal(logits(other), learnt)
    other.merge()
    torch.testing.assert_close(logits(other), learnt, atol=1e-5, rtol=0)
    assert other.size().parameters == size.parameters
    manager.remove("one")
    assert torch.equal(logits(manager), plain)
    assert manager.size() == size


def test_random_orders_of_attaching_using_and_removing(tiny):
    rng, effects = random.Random(0), {}
    plain = logits(tiny)
    for step in range(30):
        names = tiny.adapters
        kind = rng.choice(["add", "use", "remove", "using"] if names else ["add"])
        if kind == "add":
            name = f"a{step}"
            tiny.add_adapter(name, rank=rng.randint(1, 3), targets=rng.choice(["all-linear", ["q_proj", "down_proj"]]))
            disturb(tiny, step)
            effects[name] = logits(tiny)
        elif kind == "use":
            tiny.use(*rng.sample(names, rng.randint(0, len(names))))
        elif kind == "remove":
            tiny.remove(rng.choice(names))
        else:
            before, active = logits(tiny), tiny.active
            with tiny.using(*rng.sample(names, rng.randint(0, len(names)))):
                pass
            assert torch.equal(logits(tiny), before)
            assert tiny.active == active
        if not tiny.active:
            assert torch.equal(logits(tiny), plain)
        if len(tiny.active) == 1:
            torch.testing.assert_close(logits(tiny), effects[tiny.active[0]], atol=1e-4, rtol=0)


def test_using_puts_back_what_was_trained(tiny):
    tiny.add_adapter("one")
    tiny.add_adapter("two")
    tiny.unfreeze("norm")
    before = {name: parameter.requires_grad for name, parameter in tiny.model.named_parameters()}

    def fail_inside():
        with tiny.using("one"):
            assert tiny.active == ["one"]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()

    assert {name: parameter.requires_grad for name, parameter in tiny.model.named_parameters()} == before


def test_an_adapter_of_another_model_is_refused(tiny, tmp_path):
    other = manager_of("Llama")
    other.add_adapter("one")
    other.save_adapter("one", tmp_path / "one")
    plain = logits(tiny)
    with pytest.raises(ModelError, match="folder must hold an adapter of this model"):
        tiny.load_adapter(tmp_path / "one", "one")
    assert tiny.adapters == []
    assert torch.equal(logits(tiny), plain)


def test_a_disk_that_fills_up_keeps_what_was_there(tiny, tmp_path, monkeypatch):
    tiny.save(tmp_path / "mine")
    before = {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny.tokenizer, "save_pretrained", full)
    with pytest.raises(ModelError, match=r"No space left on device.*Free some disk"):
        tiny.save(tmp_path / "mine", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_was_written_wrong_is_not_kept(tiny, tmp_path, monkeypatch):
    write = type(tiny.model).save_pretrained

    def flip_a_bit(self, folder, **kwargs):
        write(self, folder, **kwargs)
        file = Path(folder) / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"][3] += 1e-3
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(type(tiny.model), "save_pretrained", flip_a_bit)
    with pytest.raises(ModelError, match="what was written must equal the model in memory"):
        tiny.save(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_while_saving_leaves_a_whole_folder(tmp_path):
    code = """
        import sys
        from truthgpt_nb.manager import ModelManager
        manager = ModelManager("tiny-english")
        manager.save(sys.argv[1])
        print("saved", flush=True)
        while True:
            manager.save(sys.argv[1], overwrite=True)
    """
    folder, rng = tmp_path / "mine", random.Random(1)
    expected = load_text_model("tiny-english").model.state_dict()
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), folder], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "saved\n"
        time.sleep(rng.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        whole = folder if folder.exists() else next(tmp_path.glob(".mine-*-old"))  # between two renames
        found = load_text_model(whole).model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_unwritable_place_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ModelError, match="folder must be"):
            tiny.save(place)


def test_letting_go_gives_the_memory_back():
    config = hf.LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=512, num_hidden_layers=1)
    model = hf.AutoModelForCausalLM.from_config(config)
    manager = ModelManager(TextModel(model, None, Source("large", "object", "")))
    size = manager.size().bytes
    del model
    freed = manager.free()
    assert freed.before - freed.after > 0.8 * size
    assert repr(manager) == "ModelManager(let go)"


def test_settings_are_checked_also_for_a_model_that_is_loaded():
    with pytest.raises(ConfigError, match="is not a setting of ModelConfig"):
        ModelManager(load_text_model("tiny-english"), dtyp="float32")


def test_a_pattern_that_fits_nothing_changes_nothing(tiny):
    before = model_size(tiny.model)
    with pytest.raises(InputError, match="must be part of a parameter's name"):
        tiny.freeze("no such layer")
    assert model_size(tiny.model) == before


@pytest.mark.skipif(compiler_problem() is not None, reason=f"torch.compile: {compiler_problem()}")
def test_compiled_and_back():
    manager = manager_of("Llama")
    plain = logits(manager)
    manager.compile()
    assert manager.model._compiled_call_impl is not None
    torch.testing.assert_close(logits(manager), plain, atol=1e-5, rtol=0)
    manager.uncompile()
    assert torch.equal(logits(manager), plain)


def test_no_compiler_is_said(tiny, monkeypatch):
    monkeypatch.setattr(module, "compiler_problem", lambda: "there is none")
    with pytest.raises(ModelError, match="compile needs a compiler, got 'there is none'"):
        tiny.compile()
