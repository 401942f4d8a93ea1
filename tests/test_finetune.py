"""Fine-tuning on several architectures: what is trained, what is put back, what is saved, and what is refused."""

import json
import os
import signal
import warnings
from importlib.util import find_spec

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors.torch import load_file

from truthgpt_nb import finetune as module
from truthgpt_nb.configs import FinetuneConfig, TrainingConfig
from truthgpt_nb.core import CheckpointError, ConfigError, InputError, ModelError, TruthGPTError
from truthgpt_nb.data import RecordSource
from truthgpt_nb.finetune import (
    DocumentLosses,
    attach_adapter,
    document_losses,
    finetune,
    finetune_files,
    four_bit_problem,
    load_in_four_bits,
    loss_change,
    merge_finetuned,
    prepare_data,
    save_finetuned,
    split_records,
    target_layers,
)
from truthgpt_nb.loader import NO_LOSS
from truthgpt_nb.manager import ModelManager
from truthgpt_nb.models import Source, TextModel, load_text_model

TOKENIZER = load_text_model("tiny-english").tokenizer
SMALL = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
KINDS = {
    "Llama": lambda: hf.LlamaConfig(**SMALL, **ENDS, intermediate_size=48, num_key_value_heads=2),
    "Qwen2": lambda: hf.Qwen2Config(
        **SMALL, **ENDS, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "GPT2": lambda: hf.GPT2Config(vocab_size=4096, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1),
    "OPT": lambda: hf.OPTConfig(**SMALL, **ENDS, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128),
    "Phi": lambda: hf.PhiConfig(**SMALL, **ENDS, intermediate_size=48),
}
QUICK = {"steps": 6, "max_length": 32, "batch_tokens": 256, "samples": 1, "sample_tokens": 4, "progress": False}
LEARN = QUICK | {"steps": 12, "learning_rate": 3e-2}
RECORDS = [
    {"prompt": f"The {a} asks the {b}:", "completion": f" where is the {b} of the {a}?"}
    for a in ("king", "queen", "child", "captain", "sailor", "whale")
    for b in ("house", "ship", "river", "garden")
]
FAR = [f"Rain falls on the hill in month {number}, and no one is there." for number in range(6)]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


def small(kind="Llama", seed=0):
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(KINDS[kind]()).eval()
    return TextModel(model, TOKENIZER, Source(kind, "object", ""))


def state(model):
    "Everything that the weights of a model are, copied."
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def attributes(model):
    "The names of what each module holds beside its weights, and whether it is in training."
    held = lambda m: sorted(name for name in vars(m) if "checkpointing" not in name)  # transformers leaves its function
    hooks = lambda m: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
    return {name: (type(m), m.training, held(m), hooks(m)) for name, m in model.named_modules()}


def logits(model, ids=None):
    ids = torch.randint(5, 4000, (2, 17), generator=torch.Generator().manual_seed(3)) if ids is None else ids
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def trained(report):
    return {name: p.detach().clone() for name, p in report.manager.model.named_parameters() if p.requires_grad}


def stop_after(step, how=None):
    def callback(trainer, what):
        if what == "step" and trainer.step == step:
            os.kill(os.getpid(), how) if how else setattr(trainer, "stop", "stopped")

    return callback


# what is trained


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_only_what_is_meant_is_trained_and_a_gain_is_kept(kind, method, tmp_path):
    text_model = small(kind)
    before, plain = state(text_model.model), logits(text_model.model)
    seen = {}

    def look(trainer, what):
        if what == "start":
            seen.update({name: p.requires_grad for name, p in trainer.bare.whole.named_parameters()})

    report = finetune(text_model, RECORDS, method=method, callbacks=[look], **LEARN)
    assert report.verdict == "kept", report.reason
    assert {name for name, trains in seen.items() if trains} == (
        set(seen) if method == "full" else {name for name in seen if "lora_" in name}
    )
    manager = report.manager
    assert (logits(manager.model) - plain).abs().max() > 1e-3
    if method == "full":
        assert not equal(state(manager.model), before)
        assert report.cost.trained == report.cost.parameters
        saved = load_text_model(save_finetuned(report, tmp_path / "model"))
        assert torch.equal(logits(saved.model), logits(manager.model))
        return
    assert report.cost.layers[0] == report.cost.layers[1] == sum(map(len, target_layers(small(kind).model).values()))
    frozen = {name: p for name, p in manager.model.named_parameters() if "lora_" not in name}
    for name, weight in frozen.items():
        assert torch.equal(weight, before[name.removeprefix("base_model.model.").replace(".base_layer", "")]), name
    # the adapter alone loads with peft alone, and merged it gives the same
    folder = save_finetuned(report, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = PeftModel.from_pretrained(small(kind).model, folder)
    assert torch.equal(logits(other), logits(manager.model))
    learnt = logits(manager.model)
    moved = merge_finetuned(report)
    assert moved.metrics["relative_error"] < 1e-5
    torch.testing.assert_close(logits(manager.model), learnt, atol=2e-5, rtol=1e-4)
    assert manager.adapters == []
    whole = load_text_model(save_finetuned(report, tmp_path / "merged"))
    assert torch.equal(logits(whole.model), logits(manager.model))


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT"])
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_without_a_gain_the_model_is_what_it_was_bit_for_bit(kind, method):
    text_model = small(kind)
    model = text_model.model
    model.get_input_embeddings().weight.requires_grad_(False)  # a flag of the caller's is put back too
    model.train()
    flags = [p.requires_grad for p in model.parameters()]
    before, outside = state(model), attributes(model)
    extra = {"gradient_checkpointing": True} if kind == "Llama" else {"ema": 0.9}
    report = finetune(text_model, RECORDS, method=method, learning_rate=1e-12, **QUICK | extra)
    assert report.verdict == "no gain"
    assert report.manager.model is model and report.manager.adapters == []
    assert equal(state(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert attributes(model) == outside
    if kind == "Llama":
        assert not model.is_activation_checkpointing
    with pytest.raises(ModelError, match="must be of a run that was kept"):
        save_finetuned(report, "nowhere")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_error_in_the_middle_puts_the_model_back(method):
    text_model = small()
    before, outside = state(text_model.model), attributes(text_model.model)

    def fail(trainer, what):
        if trainer.step == 3:
            raise RuntimeError("a callback of the caller's")

    with pytest.raises(RuntimeError, match="of the caller's"):
        finetune(text_model, RECORDS, method=method, callbacks=[fail], **LEARN)
    assert equal(state(text_model.model), before)
    assert attributes(text_model.model) == outside


def test_too_much_forgotten_is_not_kept():
    text_model = load_text_model("tiny-english")
    before = state(text_model.model)
    much = LEARN | {"steps": 24, "learning_rate": 1e-2}
    report = finetune(text_model, RECORDS, unrelated=FAR, forgetting=0.05, **much)
    assert report.verdict == "drifts" and report.held_out.interval[1] < 0 and report.unrelated.change > 0.05
    assert equal(state(text_model.model), before)


# what is measured


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_documents_are_those_of_each_alone_in_float64(kind):
    text_model = small(kind)
    text_model.model.double()
    rng = torch.Generator().manual_seed(4)
    words = [f"w{i}" for i in range(50)]
    records = []
    for _ in range(23):
        size = int(torch.randint(1, 20, (), generator=rng))
        picked = [words[int(i)] for i in torch.randint(50, (size,), generator=rng)]
        records.append({"prompt": "say", "completion": " " + " ".join(picked)})
    data = prepare_data(text_model, RECORDS, FinetuneConfig(max_length=96, batch_tokens=200), validation=records)
    found = document_losses(text_model.model, data.held_out)
    for record, loss, count in zip(records, found.losses, found.tokens, strict=True):
        start = len(TOKENIZER(record["prompt"])["input_ids"])
        ids = TOKENIZER(record["prompt"] + record["completion"])["input_ids"] + [TOKENIZER.eos_token_id]
        row = torch.tensor([ids])
        with torch.no_grad():
            logp = text_model.model(input_ids=row).logits[0, :-1].log_softmax(-1)
        expected = -logp.gather(1, row[0, 1:, None])[start - 1 :].sum()
        assert count == len(ids) - start
        assert abs(loss - float(expected)) < 1e-4 * float(expected)  # row losses are summed from float32


def test_only_the_turns_of_the_assistant_have_a_loss():
    tokenizer = load_text_model("tiny-english").tokenizer
    tokenizer.chat_template = CHAT
    text_model = TextModel(small().model, tokenizer, Source("x", "object", ""))
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"hello {number}"},
                {"role": "assistant", "content": "who is there?"},
                {"role": "user", "content": "it is me"},
                {"role": "assistant", "content": f"come in, {number}"},
            ]
        }
        for number in range(20)
    ]
    config = FinetuneConfig(max_length=64, batch_tokens=64, packing="off")
    data = prepare_data(text_model, chats, config, validation=chats[:6])
    batch = next(iter(data.held_out.for_rank(0, 1)))
    for row, number in enumerate(batch.examples):
        pieces = [
            (f"<user>hello {number}</s><assistant>", False),
            ("who is there?</s>", True),
            ("<user>it is me</s><assistant>", False),
            (f"come in, {number}</s>", True),
        ]
        text = "".join(piece for piece, _ in pieces)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends, wanted, place = [], [], 0
        for piece, learnt in pieces:
            place += len(piece)
            ends.append((place, learnt))
        for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            learnt = next(learnt for end, learnt in ends if start < end)
            wanted.append(token if learnt else NO_LOSS)
        size = len(wanted)
        assert batch["labels"][row, :size].tolist() == wanted
        assert (batch["labels"][row, size:] == NO_LOSS).all()
    assert data.prompts[0] == chats[0]["messages"][:3]
    report = finetune(text_model, chats, packing="off", **LEARN)
    assert report.verdict == "kept" and report.samples[0].asked == "it is me"


def test_the_interval_holds_the_true_change_as_often_as_it_says():
    rng, inside, kept = torch.Generator().manual_seed(0), 0, 0
    for trial in range(200):
        tokens = torch.randint(10, 100, (12,), generator=rng).double()
        before = tokens * (3 + 0.5 * torch.randn(12, generator=rng, dtype=torch.float64))
        after = before + tokens * 0.2 * torch.randn(12, generator=rng, dtype=torch.float64)
        sides = [DocumentLosses(side.tolist(), tokens.int().tolist()) for side in (before, after)]
        low, high = loss_change(*sides, level=0.95, resamples=500, seed=trial).interval
        inside += low <= 0 <= high
        kept += high < 0
    assert 0.86 < inside / 200 <= 1 and kept / 200 < 0.08
    same = DocumentLosses([3.0, 5.0], [2, 2])
    assert loss_change(same, same).interval == (0.0, 0.0)
    with pytest.raises(InputError, match="must be of the documents of before"):
        loss_change(same, DocumentLosses([3.0], [2]))


def test_rows_are_packed_only_where_documents_do_not_see_each_other():
    config = FinetuneConfig(max_length=96, batch_tokens=192)
    assert prepare_data(small("Llama"), RECORDS, config).packing == "packed"
    apart = prepare_data(small("OPT"), RECORDS, config)
    assert apart.packing.startswith("not packed: packed documents see each other")
    assert "attention_mask" in next(iter(apart.train))
    with pytest.raises(InputError, match="packing must be off or auto"):
        prepare_data(small("OPT"), RECORDS, FinetuneConfig(max_length=96, batch_tokens=192, packing="on"))


def test_what_is_held_out_is_a_function_of_the_content():
    train, held_out = split_records(RECORDS)
    assert len(held_out) == 8 and len(train) + len(held_out) == len(RECORDS)
    again = split_records([*RECORDS[::-1], *held_out, *train[:4]])
    key = lambda records: {json.dumps(record) for record in records}
    assert key(again[1]) == key(held_out) and not key(again[0]) & key(again[1])
    one_more = split_records([*RECORDS, {"prompt": "a", "completion": "b"}])
    assert len(key(one_more[1]) & key(held_out)) >= 7


# to go on, and to stop


@pytest.mark.parametrize(("kind", "method"), [("Llama", "lora"), ("GPT2", "dora"), ("OPT", "full")])
def test_a_run_that_was_stopped_ends_with_the_same_weights(kind, method, tmp_path):
    settings = QUICK | {"method": method, "learning_rate": 1e-2, "steps": 7, "samples": 0, "accumulate": 2}
    settings |= {} if method == "full" else {"dropout": 0.2}
    whole = finetune(small(kind), RECORDS, **settings)
    for stop in (2, 5):
        part = finetune(small(kind), RECORDS, folder=tmp_path, callbacks=[stop_after(stop)], **settings)
        assert len(part.training.steps) == stop
    found = finetune(small(kind), RECORDS, folder=tmp_path, **settings)
    assert found.verdict == whole.verdict == "kept"
    assert equal(trained(found), trained(whole))
    assert [step.loss for step in found.training.steps] == [step.loss for step in whole.training.steps]
    if method != "full":
        sizes = [file.stat().st_size for file in tmp_path.rglob("model*.safetensors")]
        assert sizes and max(sizes) < 2 * whole.cost.trained_bytes + 10_000  # the adapter, not the model
    with pytest.raises(CheckpointError, match="must go on with the model that it began with"):
        finetune(small(kind, seed=1), RECORDS, folder=tmp_path, **settings)


def test_the_stop_button_gives_a_checkpoint_and_a_report(tmp_path):
    text_model = small()
    report = finetune(text_model, RECORDS, folder=tmp_path, callbacks=[stop_after(4, signal.SIGINT)], **LEARN)
    assert report.training.ended == "stopped by SIGINT" and len(report.training.steps) == 4
    assert report.verdict in ("kept", "no gain") and report.held_out is not None
    assert any(tmp_path.glob("*-step-4"))


def test_a_second_stop_while_it_is_measured_keeps_nothing(monkeypatch, tmp_path):
    text_model, real, calls = small(), module.document_losses, []
    before = state(text_model.model)

    def measured(model, loader, go_on):
        calls.append(1)
        if len(calls) == 3:  # the first after training
            os.kill(os.getpid(), signal.SIGINT)
        return real(model, loader, go_on)

    monkeypatch.setattr(module, "document_losses", measured)
    report = finetune(text_model, RECORDS, folder=tmp_path, **LEARN)
    assert (report.verdict, report.held_out) == ("unverified", None)
    assert equal(state(text_model.model), before)
    assert any(tmp_path.glob("*-step-12"))
    assert "unverified" in repr(report) and json.dumps(report.to_dict()) and report._repr_html_() and report.figure()


# what is refused, before a step is made


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "lroa"}, InputError, "Did you mean 'lora'?"),
        ({"rank": 0}, ConfigError, "rank should be greater than or equal to 1"),
        ({"rnak": 4}, InputError, "Did you mean 'rank'?"),
        ({"dropout": 1.0}, ConfigError, "dropout should be less than 1"),
        ({"method": "full", "rank": 4}, ConfigError, "rank is of an adapter"),
        ({"targets": ("q_prj",)}, InputError, "Did you mean 'q_proj'?"),
        ({"targets": ("q_proj", "nothing")}, InputError, "targets must name layers"),
        ({"max_length": 2}, InputError, "must"),
        ({"evaluate_every": 0}, ConfigError, "evaluate_every"),
        ({"prompts": ["word " * 5000]}, InputError, "prompts must each have"),
        ({"prompts": [[{"role": "user", "content": "?"}]]}, TruthGPTError, "chat template"),
        ({"validation": RECORDS[:2]}, InputError, "validation must leave 5 documents"),
    ],
)
def test_wrong_settings_are_refused_before_the_model_is_touched(settings, error, message):
    text_model = small()
    before, outside = state(text_model.model), attributes(text_model.model)
    with pytest.raises(error, match=message.replace("?", r"\?")):
        finetune(text_model, RECORDS, **QUICK | settings)
    assert equal(state(text_model.model), before) and attributes(text_model.model) == outside


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "must hold at least one record"),
        ([{"question": "a", "answer": "b"}] * 20, "must have the fields of a schema"),
        (RECORDS[:9], "must hold 10 different ones"),
        (RECORDS[:1] * 30, "must hold 10 different ones"),
        ([{"input_ids": [7, 8, 5000 + n]} for n in range(20)], "must be from 0 to 4095"),
        ([{"input_ids": [7, 8, 9], "labels": [7, 8, 4096 + n]} for n in range(20)], "must be from 0 to 4095"),
        ([{"messages": [{"role": "assistant", "content": f"{n}"}]} for n in range(20)], "must have a chat template"),
        ([{"image": "a.png", "text": f"{n}"} for n in range(20)], "must be"),
        ("no-such-file.jsonl", "must name files that exist"),
        (iter(RECORDS), "read more than once"),
        (lambda: iter(RECORDS), "must be held"),
    ],
)
def test_wrong_data_is_refused_before_the_model_is_touched(records, message):
    text_model = small()
    before, outside = state(text_model.model), attributes(text_model.model)
    with pytest.raises(InputError, match=message):
        finetune(text_model, records, **QUICK)
    assert equal(state(text_model.model), before) and attributes(text_model.model) == outside


def test_models_that_a_method_cannot_train_are_refused():
    half = small()
    half.model.bfloat16()
    with pytest.raises(InputError, match="must be in float32 for method='full'"):
        finetune(half, RECORDS, method="full", **QUICK)
    quantized = small()
    quantized.model.is_quantized = True
    with pytest.raises(InputError, match="must not be quantized for method='full'"):
        finetune(quantized, RECORDS, method="full", **QUICK)
    manager = ModelManager(small())
    manager.add_adapter("mine")
    with pytest.raises(InputError, match="must have no adapters yet"):
        finetune(manager, RECORDS, **QUICK)
    with pytest.raises(InputError, match="must be in four bits"):
        finetune(small(), RECORDS, method="qlora", **QUICK)
    with pytest.raises(InputError, match="tokenizer must be a transformers tokenizer"):
        finetune(small().model, RECORDS, **QUICK)


def test_several_processes_are_told_how(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="runs in one process"):
        finetune(small(), RECORDS, **QUICK)


# adapters in low precision


def test_an_adapter_of_a_model_in_half_precision_is_trained_in_float32():
    text_model = small()
    text_model.model.bfloat16()
    report = finetune(text_model, RECORDS, **LEARN)
    assert report.verdict == "kept"
    assert {weight.dtype for weight in trained(report).values()} == {torch.float32}
    assert merge_finetuned(report).metrics["relative_error"] < 0.05


@pytest.mark.parametrize("rank", [1, 4])
def test_rslora_is_what_peft_makes_of_it(rank):
    from peft import LoraConfig, get_peft_model

    manager = ModelManager(small())
    attach_adapter(manager, FinetuneConfig(rank=rank, alpha=3.0, rslora=True, targets=("q_proj", "down_proj")))
    config = LoraConfig(r=rank, lora_alpha=3.0, use_rslora=True, target_modules=["q_proj", "down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(small().model, config)
    scales = lambda model: [next(iter(m.scaling.values())) for m in model.modules() if hasattr(m, "lora_A")]
    assert scales(manager.model) == pytest.approx(scales(theirs)) and len(scales(theirs)) == 4


def test_four_bits_need_bitsandbytes_and_say_so(monkeypatch):
    monkeypatch.setattr(module, "four_bit_problem", lambda device="auto": "no kernel for this device")
    with pytest.raises(ModelError, match="no kernel for this device"):
        finetune("tiny-english", RECORDS, method="qlora", **QUICK)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: the extra qlora")
def test_an_adapter_on_four_bits_learns_and_leaves_the_weights_alone(tmp_path):
    assert four_bit_problem("cpu") is None
    text_model = load_in_four_bits("tiny-english", device="cpu")
    packed = {n: p.detach().clone() for n, p in text_model.model.named_parameters() if p.dtype == torch.uint8}
    assert packed
    report = finetune(text_model, RECORDS, method="qlora", **LEARN)
    assert report.verdict == "kept"
    now = dict(report.manager.model.named_parameters())
    for name, weight in packed.items():
        place = f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight"
        assert torch.equal(now.get(place, now.get(f"base_model.model.{name}")), weight)
    with pytest.raises(ModelError, match="must not be in fewer bits to be merged"):
        merge_finetuned(report)
    folder = save_finetuned(report, tmp_path / "adapter")
    plain = ModelManager("tiny-english")
    plain.load_adapter(folder, "learnt")
    plain.merge()
    with pytest.raises(InputError, match="must not be quantized for method='full'"):
        finetune(load_in_four_bits("tiny-english", device="cpu"), RECORDS, method="full", **QUICK)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: the extra qlora")
def test_gradients_through_four_bits_are_those_through_the_same_weights_in_float32():
    from bitsandbytes import functional, nn

    coarse, fine = load_in_four_bits("tiny-english", device="cpu"), load_text_model("tiny-english")
    for name, layer in coarse.model.named_modules():
        if isinstance(layer, nn.Linear4bit):
            weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            fine.model.get_submodule(name).weight.data.copy_(weight)
    found = []
    for text_model in (coarse, fine):
        manager = ModelManager(text_model)
        torch.manual_seed(0)
        attach_adapter(manager, FinetuneConfig(rank=2))
        logits(manager.model)  # in eval mode first, as a run measures first
        ids = torch.randint(5, 4000, (2, 16), generator=torch.Generator().manual_seed(1))
        manager.model.train()(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in manager.model.named_parameters() if "lora_" in name})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=1e-7, rtol=1e-4)
    packing = load_in_four_bits("tiny-english", device="cpu")
    for layer in packing.model.modules():
        if isinstance(layer, nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = True
    with pytest.raises(InputError, match="no gradient passes them"):
        finetune(packing, RECORDS, method="lora", **QUICK)


# files


def test_files_give_a_folder_that_goes_on(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    settings = LEARN | {"max_length": 64}
    report = finetune_files(data, tmp_path / "out", **settings)
    assert report.verdict == "kept"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "checkpoints", "report.json"]
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["verdict"] == "kept" and len(record["training"]["steps"]) == 12
    weights = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    again = finetune_files(data, tmp_path / "out", merged=True, **settings)
    assert len(again.training.steps) == 12  # nothing is left to train
    assert equal(load_file(tmp_path / "out/adapter/adapter_model.safetensors"), weights)
    assert (tmp_path / "out/model/model.safetensors").is_file()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="output must be a folder"):
        finetune_files(data, tmp_path / "file", **settings)


def test_broken_lines_are_refused_or_skipped_as_the_source_says(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + "{broken\n")
    with pytest.raises(InputError, match="line 25"):
        finetune(small(), data, **QUICK)
    report = finetune(small(), RecordSource(data, broken="skip"), training=TrainingConfig(steps=1), **QUICK)
    assert len(report.training.steps) == 6  # a single setting goes before a config
