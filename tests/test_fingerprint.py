"Fingerprints and keys against every ingredient of an answer."

from __future__ import annotations

import copy
import functools
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from truthgpt_nb import fingerprint as fingerprint_module
from truthgpt_nb.configs import GenerationConfig
from truthgpt_nb.core import InputError
from truthgpt_nb.fingerprint import response_key, tokenizer_fingerprint, uncacheable_reason, weights_fingerprint


def tiny_llama(seed=0, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, **changes)).eval()


def changed_and_back(model, change, undo):
    before = weights_fingerprint(model)
    change()
    changed = weights_fingerprint(model)
    undo()
    assert weights_fingerprint(model) == before
    return before, changed


def test_every_kind_of_change_is_another_fingerprint():
    model = tiny_llama()
    attention, norm = model.model.layers[1].self_attn, model.model.norm
    rotary, weight = model.model.rotary_emb, model.model.layers[0].mlp.up_proj.weight
    saved, frequencies = weight.detach().clone(), rotary.inv_freq.clone()
    changes = [
        (lambda: weight.data.mul_(2), lambda: weight.data.copy_(saved)),
        (lambda: setattr(weight, "data", saved + 1), lambda: setattr(weight, "data", saved.clone())),
        (lambda: rotary.inv_freq.mul_(2), lambda: rotary.inv_freq.copy_(frequencies)),
        (lambda: setattr(norm, "variance_epsilon", 0.1), lambda: setattr(norm, "variance_epsilon", 1e-6)),
        (lambda: setattr(attention, "scaling", 1.0), lambda: setattr(attention, "scaling", 8**-0.5)),
        (lambda: model.set_attn_implementation("eager"), lambda: model.set_attn_implementation("sdpa")),
        (lambda: setattr(attention, "bias", torch.ones(2)), lambda: delattr(attention, "bias")),
    ]
    prints = [fingerprint for change in changes for fingerprint in changed_and_back(model, *change)]
    assert len(set(prints)) == 1 + len(changes)
    assert weights_fingerprint(model.to(torch.bfloat16)) not in prints
    assert weights_fingerprint(tiny_llama(seed=1)) not in prints
    assert weights_fingerprint(tiny_llama(rms_norm_eps=1e-5)) not in prints
    assert weights_fingerprint(tiny_llama()) == prints[0]


def test_a_replaced_module_and_a_tie_are_seen():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    first = weights_fingerprint(model)
    model[1] = torch.nn.GELU()
    second = weights_fingerprint(model)
    model[2].load_state_dict(model[0].state_dict())
    third = weights_fingerprint(model)
    model[2].weight = model[0].weight  # same values, now one tensor
    assert len({first, second, third, weights_fingerprint(model)}) == 4


layouts = {
    "transposed": lambda: torch.arange(600.0).view(20, 30).t(),
    "channels_last": lambda: torch.arange(4800.0).view(2, 24, 10, 10).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.ones(1, 5).expand(100, 5),
    "gaps": lambda: torch.arange(900.0).view(30, 30)[::3, ::7],
    "scalar": lambda: torch.tensor(2.0),
    "complex": lambda: torch.ones(100, dtype=torch.complex64),
    "float8": lambda: torch.ones(100).to(torch.float8_e4m3fn),
    "inference": lambda: torch.ones(100),
}


@pytest.mark.parametrize("layout", layouts)
def test_tensors_of_every_layout(layout):
    model = torch.nn.Module()
    with torch.inference_mode(layout == "inference"):
        model.register_buffer("tensor", layouts[layout]())
    first = weights_fingerprint(model)
    assert weights_fingerprint(model) == first
    model.tensor = (layouts[layout]().to(torch.complex64) + 1).to(model.tensor.dtype)
    assert weights_fingerprint(model) != first
    model.tensor = layouts[layout]()
    assert weights_fingerprint(model) == first


def test_adapters_are_part_of_the_fingerprint():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    chosen = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), chosen).eval()
    model.add_adapter("second", chosen)
    on = weights_fingerprint(model)
    with model.disable_adapter():
        off = weights_fingerprint(model)
    assert weights_fingerprint(model) == on
    model.set_adapter("second")
    second = weights_fingerprint(model)
    model.set_adapter("default")
    assert weights_fingerprint(model) == on
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.scaling["default"] *= 2
    scaled = weights_fingerprint(model)
    layer.scaling["default"] /= 2
    assert weights_fingerprint(model) == on
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    merged = weights_fingerprint(model)
    model.unmerge_adapter()
    model.load_state_dict(saved)  # unmerging may leave other last bits
    assert weights_fingerprint(model) == on
    assert len({on, off, second, scaled, merged}) == 5


def test_quantized_and_compiled_models():
    def network(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()

    def quantized(seed):
        return torch.ao.quantization.quantize_dynamic(network(seed), {torch.nn.Linear}, dtype=torch.qint8)

    model = network(0)
    plain = weights_fingerprint(model)
    prints = [plain, weights_fingerprint(quantized(0)), weights_fingerprint(quantized(1))]
    assert weights_fingerprint(quantized(0)) == prints[1]
    changing = quantized(0)
    assert weights_fingerprint(changing) == prints[1]
    changing[0].set_weight_bias(*quantized(1)[0]._weight_bias())
    prints.append(weights_fingerprint(changing))
    prints.append(weights_fingerprint(torch.compile(model)))
    model.forward = torch.compile(model.forward)
    assert uncacheable_reason(model) is None
    prints.append(weights_fingerprint(model))
    del model.forward
    assert weights_fingerprint(model) == plain
    model.compile()
    prints.append(weights_fingerprint(model))
    assert len(set(prints)) == len(prints)


def test_what_is_not_in_memory_is_refused():
    with pytest.raises(InputError, match="model must have its weights in memory"):
        weights_fingerprint(torch.nn.Linear(2, 2, device="meta"))
    assert "meta" in uncacheable_reason(torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta")))


def test_strange_hooks_and_forwards_have_no_key():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    add_hook_to_module(model[0], ModelHook())
    assert uncacheable_reason(model) is None
    hook = model.register_forward_pre_hook(lambda module, inputs: None)
    assert "forward hook" in uncacheable_reason(model)
    hook.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *parts: None)
    assert "all modules" in uncacheable_reason(model)
    everywhere.remove()
    model.forward = lambda x: x
    assert "was replaced" in uncacheable_reason(model)


def of_this_package(module, inputs, factor=2):
    return tuple(part * factor for part in inputs)


of_this_package.__module__ = "truthgpt_nb.optimization"


def test_hooks_of_this_package_are_part_of_the_fingerprint():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    prints = [weights_fingerprint(model)]
    for hook in (of_this_package, functools.partial(of_this_package, factor=3)):
        handle = model[0].register_forward_pre_hook(hook)
        assert uncacheable_reason(model) is None
        prints.append(weights_fingerprint(model))
        handle.remove()
        assert weights_fingerprint(model) == prints[0]
    assert len(set(prints)) == 3


def test_attributes_that_come_go_and_change_their_kind():
    module = torch.nn.Linear(2, 2)
    first = weights_fingerprint(module)
    prints = [first]
    for value in (1, 1.0, True, "1", None, [1], {"a": 1}, {"a": 2}, torch.ones(3), torch.zeros(3)):
        module.extra = value
        prints.append(weights_fingerprint(module))
    module.extra = changing = {"default": 1.0}
    prints.append(weights_fingerprint(module))
    changing["default"] = 2.0  # in place, as peft sets its scaling
    prints.append(weights_fingerprint(module))
    del module.extra
    assert weights_fingerprint(module) == first
    module.other = module.__dict__.pop("in_features")  # as many attributes as before
    prints.append(weights_fingerprint(module))
    module.bias = None
    prints.append(weights_fingerprint(module))
    assert len(set(prints)) == len(prints)


def test_names_and_order_of_modules_are_seen():
    parts = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    model = torch.nn.Module()
    model.add_module("a", parts[0])
    model.add_module("b", parts[1])
    prints = [weights_fingerprint(model)]
    model.a, model.b = parts[1], parts[0]
    prints.append(weights_fingerprint(model))
    model.add_module("c", model._modules.pop("b"))
    prints.append(weights_fingerprint(model))
    model.add_module("d", None)
    prints.append(weights_fingerprint(model))
    assert len(set(prints)) == len(prints)


def test_watching_keeps_no_model_and_no_weight_alive():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    model.forward = torch.compile(model.forward)  # leads back to the model
    weights_fingerprint(model)
    replaced, model[0] = weakref.ref(model[0]), torch.nn.Linear(4, 4)
    gc.collect()
    assert replaced() is None
    whole = weakref.ref(model)
    del model
    gc.collect()
    assert whole() is None


def test_a_copy_has_the_same_fingerprint_until_it_is_changed():
    model = tiny_llama()
    first, other = weights_fingerprint(model), copy.deepcopy(model)
    assert weights_fingerprint(other) == first
    other.lm_head.weight.data += 1
    assert weights_fingerprint(other) != first == weights_fingerprint(model)


def tiny_tokenizer(**changes):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "a": 1, "b": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]", **changes
    )


def test_tokenizers():
    from tokenizers.normalizers import Lowercase

    first = tokenizer_fingerprint(tiny_tokenizer())
    assert tokenizer_fingerprint(tiny_tokenizer()) == first
    tokenizer = tiny_tokenizer()
    prints = [first, tokenizer_fingerprint(tiny_tokenizer(pad_token="a"))]
    for change in (
        lambda: tokenizer.add_tokens(["new"]),
        lambda: tokenizer.add_special_tokens({"eos_token": "b"}),
        lambda: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda: setattr(tokenizer.backend_tokenizer, "normalizer", Lowercase()),
    ):
        change()
        prints.append(tokenizer_fingerprint(tokenizer))
    assert len(set(prints)) == len(prints)


# --- keys ------------------------------------------------------------------------------------------------------------

base = {"do_sample": True, "seed": 1}
other_settings = {
    "max_new_tokens": 7,
    "do_sample": False,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "seed": 2,
    "stop": ("x",),
    "batch_size": 3,
    "num_return_sequences": 2,
}


def key(**changes):
    parts = {"weights": "w", "tokenizer": "t", "prompt_ids": [1, 2], "settings": GenerationConfig(**base)}
    return response_key(**{**parts, "generation_config": {"eos_token_id": 1}, "dtype": "float32", **changes})


def test_each_ingredient_changes_the_key(monkeypatch):
    assert set(other_settings) == set(GenerationConfig.__dataclass_fields__)
    keys = [key()]
    for name, value in other_settings.items():
        chosen = {} if name == "do_sample" else {**base, name: value}
        keys.append(key(settings=GenerationConfig(**chosen)))
    for change in (
        {"weights": "w2"},
        {"tokenizer": "t2"},
        {"prompt_ids": [1, 2, 3]},
        {"prompt_ids": [2, 1]},
        {"prompt_ids": []},
        {"generation_config": {"eos_token_id": 2}},
        {"generation_config": None},
        {"dtype": "bfloat16"},
        {"extra": {"position": 1}},
    ):
        keys.append(key(**change))
    real = fingerprint_module._versions()
    for place in range(3):
        other = (*real[:place], "0", *real[place + 1 :])
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint_module, "_versions", lambda other=other: other)
            keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[0] and key(prompt_ids=(1, 2)) == keys[0]
    assert key(settings=GenerationConfig(do_sample=True)) is None


@pytest.mark.parametrize("wrong", [{"prompt_ids": [1.5]}, {"prompt_ids": [2**70]}, {"extra": {"a": object()}}])
def test_a_key_of_what_is_not_plain_is_refused(wrong):
    with pytest.raises(InputError, match="must be plain data"):
        key(**wrong)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_fingerprint import key, tiny_llama, tiny_tokenizer
from truthgpt_nb.fingerprint import tokenizer_fingerprint, weights_fingerprint
from transformers import LlamaForCausalLM
print(weights_fingerprint(tiny_llama()), tokenizer_fingerprint(tiny_tokenizer()), key())
print(weights_fingerprint(LlamaForCausalLM.from_pretrained({folder!r}).eval()))
"""


def test_another_process_makes_the_same_keys(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    here = f"{weights_fingerprint(model)} {tokenizer_fingerprint(tiny_tokenizer())} {key()}"
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split("\n")[:2] == [here, here.split()[0]]
