"What would bore a reader of nbs/api/06e_loader.ipynb: each architecture, random stops, ranks, kills, damaged caches."

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from itertools import chain, islice, pairwise

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import byte_tokenizer, random_model
from test_text import CONFIGS

from truthgpt_nb import loader as loader_module
from truthgpt_nb.core import InputError
from truthgpt_nb.data import RecordSource
from truthgpt_nb.loader import NO_LOSS, DataLoaderBuilder, encode_record, packing_error

CHOOSE = random.Random(0)
RECORDS = [{"input_ids": [CHOOSE.randrange(1, 50) for _ in range(CHOOSE.randint(2, 60))]} for _ in range(150)]
STREAM = {"streaming": True, "part_records": 40}


def tokens(data=RECORDS, seed=3, **options):
    return DataLoaderBuilder(seed=seed).source(data, **options).tokenize(None, 60, vocab_size=50, cache_dir=None)


KINDS = {
    "rows": lambda: tokens().batch(7),
    "buckets": lambda: tokens().bucket(300),
    "packed": lambda: tokens().pack(64).batch(3),
    "stream": lambda: tokens(**STREAM).batch(7),
    "packed stream": lambda: tokens(**STREAM).pack(64).bucket(256),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def same(a, b):
    equal = (torch.equal(a[n], b[n]) if isinstance(a[n], torch.Tensor) else a[n] == b[n] for n in a)
    return (a.keys(), a.examples, a.weight) == (b.keys(), b.examples, b.weight) and all(equal)


def documents(batches):
    "Each document with its labels, from batches that have a weight."
    found = Counter()
    for batch in (batch for batch in batches if batch.weight):
        for row, labels in enumerate(batch["labels"]):
            if "position_ids" in batch:
                starts = [*torch.nonzero(batch["position_ids"][row] == 0).flatten().tolist(), len(labels)]
            else:
                starts = [0, len(labels)]
            for a, b in pairwise(starts):
                if (part := labels[a:b])[part != NO_LOSS].numel():
                    found[tuple(part[part != NO_LOSS].tolist())] += 1
    return found


WANTED = Counter(tuple(record["input_ids"][1:]) for record in RECORDS)


# order, ranks, resuming


@each_kind
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_each_example_once_whatever_the_workers(kind, workers):
    batches = list(KINDS[kind]().workers(workers).build())
    assert documents(batches) == WANTED
    assert all(map(same, batches, KINDS[kind]().build()))
    assert all(batch.weight == int((batch["labels"] != NO_LOSS).sum()) for batch in batches)


@each_kind
def test_a_run_that_stops_after_any_batch_goes_on_with_the_next(kind):
    whole = KINDS[kind]().build()
    wanted = [*whole, *whole]
    for stop in range(1, len(wanted) + 1, 3):
        begun, resumed = KINDS[kind]().build(), KINDS[kind]().build()
        stepped = 0
        while stepped < stop:
            for _ in islice(iter(begun), stop - stepped):
                stepped += 1
        resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
        rest = list(resumed)
        while resumed.state_dict()["epoch"] < 2:
            rest += resumed
        assert len(rest) == len(wanted) - stop and all(map(same, rest, wanted[stop:]))


@each_kind
@settings(max_examples=15, deadline=None)
@given(worlds=st.lists(st.integers(1, 5), min_size=1, max_size=4), steps=st.integers(0, 4))
def test_on_any_number_of_ranks_in_turn_nothing_is_lost_or_doubled(kind, worlds, steps):
    built = KINDS[kind]().build()
    seen, state = [], built.state_dict()
    for number, world in enumerate(worlds):
        ranks = [built.for_rank(rank, world) for rank in range(world)]
        for one in ranks:
            one.load_state_dict(state)
        stop = None if number == len(worlds) - 1 else steps
        shares = [list(islice(iter(one), stop)) for one in ranks]
        seen += chain(*shares)
        assert len(set(map(len, shares))) == 1
        state = ranks[0].state_dict()
        assert all(one.state_dict() == state for one in ranks)
        if state["epoch"] == 1:
            break
    assert documents(seen) == WANTED


def test_a_rank_without_work_gets_a_batch_without_weight():
    ranks = [list(tokens(RECORDS[:3]).batch(3).build().for_rank(rank, 5)) for rank in range(5)]
    assert [len(batches) for batches in ranks] == [1] * 5
    assert sorted(batches[0].weight > 0 for batches in ranks) == [False, False, True, True, True]
    assert all((b["labels"] == NO_LOSS).all() for (b,) in ranks if not b.weight)


def test_epochs_can_be_set_and_the_current_one_is_not_begun_again():
    built = KINDS["rows"]().build()
    first = list(built)
    built.set_epoch(0)
    assert all(map(same, first, built))
    built.set_epoch(5)
    fifth = list(islice(iter(built), 3))
    built.set_epoch(5)
    assert len(list(built)) == len(first) - 3
    built.set_epoch(5)
    assert all(map(same, fifth, built)) and not same(fifth[0], first[0])


def test_without_shuffling_the_order_is_that_of_the_data():
    plain = DataLoaderBuilder(shuffle=False).source(RECORDS).tokenize(None, 60, vocab_size=50, cache_dir=None)
    assert list(chain(*(batch.examples for batch in plain.batch(7).build()))) == list(range(150))


# streams


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_of_hugging_face_is_read_once_by_any_number_of_workers(workers):
    rows = datasets.Dataset.from_list(RECORDS).to_iterable_dataset(num_shards=4)
    built = tokens(rows, part_records=20).batch(7).workers(workers).build()
    assert documents(built) == WANTED
    with pytest.raises(TypeError, match="a stream has no length"):
        len(built)
    with pytest.raises(InputError, match="plan is known in advance only for data that are held"):
        built.plan()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_record_of_a_stream_is_named_or_counted(workers, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(record) for record in RECORDS[:50]]
    path.write_text("\n".join([*lines[:30], "{", '{"input_ids": [1, 50]}', *lines[30:]]))
    source = partial(RecordSource, path, streaming=True)
    built = tokens(source(broken="skip"), part_records=10).batch(5).workers(workers).build()
    assert sum(map(len, (batch.examples for batch in built))) == 50
    assert built.source.broken == 2 and "a token must be from 0 to 49" in str(built.source.report())
    with pytest.raises(InputError, match=r"a\.jsonl, line 31: the line must be JSON"):
        list(tokens(source(), part_records=10).batch(5).workers(workers).build())


def test_a_stream_that_changes_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS))
    built = tokens(path, streaming=True, part_records=30).batch(5).build()
    batches = iter(built)
    next(batches)
    with path.open("a") as file:
        file.write("\n" + json.dumps(RECORDS[0]))
    with pytest.raises(InputError, match="data must not change while it is used"):
        list(batches)


# random augmentation


def noisy(example):
    "Random numbers of each kind."
    shift = random.randrange(2) + np.random.randint(2) + int(torch.rand(()) < 0.5)
    return example | {"input_ids": (example["input_ids"] + shift) % 50}


@each_kind
def test_augmentation_depends_on_seed_epoch_and_example_and_takes_nothing_from_the_training(kind):
    def state():
        return random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    built, helped = KINDS[kind]().map(noisy).build(), KINDS[kind]().map(noisy).workers(2).build()
    first, second = list(built), list(built)
    assert all(map(same, first, helped))
    assert state() == before
    resumed = KINDS[kind]().map(noisy).build()
    for _ in islice(iter(resumed), 2):
        pass
    assert all(map(same, first[2:], resumed))
    assert not all(map(same, first, KINDS[kind]().build()))
    assert not any(map(same, first, second))


@pytest.mark.parametrize("options", [{}, STREAM])
def test_each_example_has_random_numbers_of_its_own_in_each_epoch(options):
    drawn = []

    def note(example):
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return example

    built = tokens(**options).batch(7).map(note).build()
    for _ in (*built, *built):
        pass
    assert all(len(set(column)) == 300 for column in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    "function",
    [
        lambda e: {"input_ids": e["input_ids"]},
        lambda e: {n: t[1:] for n, t in e.items()},
        lambda e: e | {"more": 1},
        lambda e: None,
    ],
)
def test_what_map_gives_back_must_fit_the_plan(function):
    with pytest.raises(InputError, match="map must give back input_ids and labels of the same lengths"):
        next(iter(tokens().batch(2).map(function).build()))


# what documents see


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "opt"])
@torch.no_grad()
def test_packed_documents_have_the_loss_that_they_have_alone(name, attention):
    model = random_model(CONFIGS[name]).eval()
    model.set_attn_implementation(attention)
    packed = tokens().pack(100).batch(2).build()
    for batch in islice(iter(packed), 3):
        assert packing_error(model, batch) < 1e-5
        alone = sum(
            float(model(input_ids=ids[None], labels=ids[None]).loss) * (len(ids) - 1)
            for ids in (torch.tensor(RECORDS[index]["input_ids"]) for index in batch.examples)
        )
        assert abs(float(model(**batch).loss) - alone / batch.weight) < 1e-5


def test_a_model_that_lets_packed_documents_see_each_other_is_refused():
    opt = random_model(CONFIGS["opt"])  # takes position_ids, and does not tell documents by them
    with pytest.raises(InputError, match="check must keep packed documents apart"):
        tokens().pack(100, check=opt).batch(2).build()
    good = random_model(CONFIGS["llama"])
    forward = good.forward
    good.forward = lambda **kwargs: forward(**{**kwargs, "use_cache": True})
    with pytest.raises(InputError, match="check must keep packed documents apart"):
        tokens().pack(100, check=good).batch(2).build()
    with pytest.raises(InputError, match="check must keep packed documents apart"):
        tokens(**STREAM).pack(100, check=good).batch(2).build()


# where the loss is


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}"
)


def learned(encoded, tokenizer):
    "The text whose tokens have a loss."
    return tokenizer.decode([i for i, label in zip(*encoded, strict=True) if label != NO_LOSS])


@pytest.mark.parametrize(
    ("template", "wanted"), [(CHATML, "Hi été!<|im_end|>\nB<|im_end|>\n"), (MARKED, "Hi été!<|im_end|>B<|im_end|>")]
)
def test_a_conversation_has_its_loss_on_what_the_assistant_says(template, wanted):
    tokenizer = byte_tokenizer()
    turns = [
        ("system", "Be brief."),
        ("user", "Hi, été"),
        ("assistant", "Hi été!"),
        ("user", "Bye"),
        ("assistant", "B"),
    ]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    encoded = encode_record(record, "messages", tokenizer, template)
    assert learned(encoded, tokenizer) == wanted
    assert tokenizer.decode(encoded.ids).count("<|im_start|>") == 5


def test_a_prompt_is_split_as_it_is_alone():
    tokenizer = byte_tokenizer()
    encoded = encode_record({"prompt": "2 + 2 =", "completion": " 4"}, "completion", tokenizer)
    assert encoded.ids == [*tokenizer("2 + 2 = 4")["input_ids"], tokenizer.eos_token_id]
    assert encoded.labels == [NO_LOSS] * 7 + encoded.ids[7:]
    joining = lambda text, **_: {"input_ids": [sum(map(ord, text))]}  # a pair is one token
    joining = type("Joining", (), {"eos_token_id": 0, "__call__": staticmethod(joining)})()
    encoded = encode_record({"prompt": "a", "completion": "b"}, "completion", joining)
    assert encoded == ([97, 98, 0], [NO_LOSS, 98, 0])


def test_a_template_that_refuses_a_conversation_breaks_that_record_only():
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + CHATML
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    source = RecordSource([good, {"messages": good["messages"][::-1]}, good], broken="skip")
    built = DataLoaderBuilder().source(source).tokenize(byte_tokenizer(), 300, chat_template=template, cache_dir=None)
    assert len(built.batch(2).build().plan().lengths) == 2
    assert "messages must fit the chat template, got the user begins" in str(source.report())


# the cache


def build_words(folder, path):
    tokenizer = byte_tokenizer()
    return DataLoaderBuilder().source(path).tokenize(tokenizer, 200, cache_dir=folder).batch(4).build()


def count_and_build(folder, path, log):
    before = loader_module._tokenized

    def counted(*args):
        with open(log, "a") as file:
            file.write("once\n")
        time.sleep(0.3)
        return before(*args)

    loader_module._tokenized = counted
    build_words(folder, path)


def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(f"line {n} " + "word " * (n % 9) for n in range(50)))
    return path


def test_several_processes_tokenize_once(tmp_path):
    path, log = words(tmp_path), tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_and_build, args=(tmp_path / "c", path, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert log.read_text() == "once\n"


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_loader import build_words, loader_module
write = loader_module.write_whole
def slow(path, data):
    print("writing", flush=True)
    time.sleep({wait})
    write(path, data)
loader_module.write_whole = slow
build_words({folder!r}, {path!r})
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nothing_that_is_half(tmp_path):
    path, folder = words(tmp_path), tmp_path / "cache"
    code = KILLED.format(tests=os.path.dirname(__file__), wait=60, folder=str(folder), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(folder.glob("*.safetensors"))
    assert len(build_words(folder, path)) == 13  # and nobody holds the lock


def test_a_damaged_file_is_made_anew_and_the_oldest_go(tmp_path, monkeypatch):
    path, folder = words(tmp_path), tmp_path / "cache"
    wanted = list(build_words(folder, path))
    (kept,) = folder.glob("*.safetensors")
    whole = kept.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        kept.write_bytes(damaged)
        assert all(map(same, build_words(folder, path), wanted))
        assert loader_module._read_store(kept) is not None and len(kept.read_bytes()) == len(whole)
    monkeypatch.setattr(loader_module, "_CACHE_BYTES", len(whole) + 10)
    path.write_text(path.read_text() + "\nmore")
    build_words(folder, path)
    assert not kept.exists() and len(list(folder.glob("*.safetensors"))) == 1


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    path = words(tmp_path)
    with pytest.raises(InputError, match="cache_dir must be a folder that can be written to"):
        build_words(path, path)


def test_another_tokenizer_or_setting_has_another_file(tmp_path):
    path, folder = words(tmp_path), tmp_path / "cache"
    build_words(folder, path)
    builder = DataLoaderBuilder().source(path)
    other = byte_tokenizer(eos_token="a")
    for count, (tokenizer, most, long) in enumerate(
        [(byte_tokenizer(), 100, "cut"), (byte_tokenizer(), 100, "split"), (other, 200, "cut")], start=2
    ):
        builder.tokenize(tokenizer, most, long, cache_dir=folder).batch(1).build()
        assert len(list(folder.glob("*.safetensors"))) == count


# refusals


def test_states_of_others_are_refused():
    built = KINDS["rows"]().build()
    state = built.state_dict()
    for wrong in ({}, state | {"version": 2}, state | {"epoch": "1"}):
        with pytest.raises(InputError, match="state must be what state_dict gives"):
            built.load_state_dict(wrong)
    for other in (tokens(seed=4).batch(7), tokens(RECORDS[:-1]).batch(7), tokens().pack().batch(7)):
        with pytest.raises(InputError, match="state must be of the same data and settings"):
            other.build().load_state_dict(state)


def test_a_builder_is_not_changed_by_its_steps():
    base = tokens()
    packed, plain = base.pack(64).batch(2), base.batch(2)
    assert "position_ids" in next(iter(packed.build())) and "attention_mask" in next(iter(plain.build()))
