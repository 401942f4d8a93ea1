"""What would bore a reader of 09_text: each architecture, each stop string, each way to interrupt."""

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from test_models import byte_tokenizer, llama_config, random_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

from truthgpt_nb import engine as engine_module
from truthgpt_nb import text as text_module
from truthgpt_nb.cache import CacheManager
from truthgpt_nb.configs import InferenceConfig
from truthgpt_nb.core import CacheError, ConfigError, EngineError, InputError
from truthgpt_nb.text import GeneratedText, TextGenerator

SIZE = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDE, KV = {"intermediate_size": 64}, {"num_key_value_heads": 2}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZE, **WIDE, **KV, max_position_embeddings=128),
    "gpt2": transformers.GPT2Config(**SIZE, n_positions=128),
    "qwen2": transformers.Qwen2Config(**SIZE, **WIDE, **KV, max_position_embeddings=128),
    "qwen3": transformers.Qwen3Config(**SIZE, **WIDE, **KV, head_dim=8, max_position_embeddings=128),
    "gemma": transformers.GemmaConfig(**SIZE, **WIDE, **KV, head_dim=8, max_position_embeddings=128),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZE, **WIDE, max_position_embeddings=128),
    "opt": transformers.OPTConfig(**SIZE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128),
    "phi": transformers.PhiConfig(**SIZE, **WIDE, max_position_embeddings=128),
    "mistral": transformers.MistralConfig(**SIZE, **WIDE, **KV, sliding_window=9, max_position_embeddings=128),
}
PROMPTS = [
    "a",
    "the second of the prompts",
    "of",
    "x" * 60,
    "naïve \N{SLIGHTLY SMILING FACE}",
    "the second of the",
    " ",
    "Once upon a time",
]


def model_of(name, seed=0):
    "A random model whose next-token distributions are sharp enough to make few near ties."
    model = random_model(CONFIGS[name], seed).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model


def reference(model, tokenizer, prompt, new, ends, **settings):
    "The tokens that transformers writes for a prompt alone, without the end."
    row = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**row, max_new_tokens=new, do_sample=False, eos_token_id=ends, pad_token_id=0, **settings)
    tokens = out[0, row.input_ids.shape[1] :].tolist()
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def gap(model, tokenizer, prompt, tokens):
    "How far apart the two likeliest next tokens are, computed in float64."
    ids = torch.tensor([tokenizer(prompt).input_ids + tokens])
    with torch.no_grad():
        best = model.double()(ids).logits[0, -1].topk(2).values
    model.float()
    return float(best[0] - best[1])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_list_gives_the_tokens_of_each_alone(name, penalty):
    model, tokenizer = model_of(name), byte_tokenizer()
    free = [reference(model, tokenizer, p, 24, [300], repetition_penalty=penalty) for p in PROMPTS]
    ends = sorted({0, free[1][5], free[4][2]})  # two rows end early, at least
    model.generation_config.eos_token_id = ends
    expected = [reference(model, tokenizer, p, 24, ends, repetition_penalty=penalty) for p in PROMPTS]
    assert len({len(tokens) for tokens in expected}) > 1
    generator = TextGenerator(model, tokenizer, use_cache=False)
    ties = 0
    for size in (8, 3, 1):
        written = generator.run(PROMPTS, 24, batch_size=size, repetition_penalty=penalty)
        for prompt, one, tokens in zip(PROMPTS, written, expected, strict=True):
            if one.tokens != tokens:  # an error, unless float64 says that the two next tokens are as good as equal
                same = next((n for n, (a, b) in enumerate(zip(one.tokens, tokens, strict=False)) if a != b), None)
                assert same is not None and penalty == 1.0, (prompt, one.tokens, tokens)
                assert gap(model, tokenizer, prompt, tokens[:same]) < 1e-4
                ties += 1
            assert one.finish_reason == ("length" if len(tokens) == 24 else "stop")
    assert ties <= 1


def test_the_end_is_not_penalised_by_padding():
    # the padding is the end-of-text token: a penalty that saw it would keep short prompts from ending
    model, tokenizer = model_of("llama"), byte_tokenizer(pad_token="<|end|>")
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = model.get_output_embeddings().weight.abs().max() * torch.sign(
            model.get_output_embeddings().weight[0]
        )
    generator = TextGenerator(model, tokenizer, use_cache=False)
    settings = {"max_new_tokens": 40, "repetition_penalty": 3.0}
    together = [one.tokens for one in generator.run(PROMPTS, **settings)]
    assert together == [generator.run(prompt, **settings).tokens for prompt in PROMPTS]


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    "It writes printable ASCII and does not end by itself, so that a stream has a piece for each token."
    model = model_of("llama")
    with torch.no_grad():
        for row in (slice(0, 1), slice(95, None)):
            model.lm_head.weight[row] = 0
    return model


@pytest.fixture
def plain(llama):
    return TextGenerator(llama, byte_tokenizer(), use_cache=False)


def test_a_seed_gives_the_same_text_in_any_company(plain):
    settings = {"max_new_tokens": 20, "do_sample": True, "temperature": 2.0, "top_p": 0.99, "min_p": 0.001, "seed": 5}
    alone = {prompt: plain.run(prompt, **settings).tokens for prompt in PROMPTS}
    for size, order in ((16, PROMPTS), (16, PROMPTS[::-1]), (3, random.Random(0).sample(PROMPTS, len(PROMPTS)))):
        together = plain.run(order, batch_size=size, **settings)
        assert {one.prompt: one.tokens for one in together} == alone
    assert plain.run("a", **settings | {"seed": 6}).tokens != alone["a"]
    assert "".join(plain.stream("a", **settings)) == plain.generate("a", **settings)


def test_the_distribution_is_that_of_the_model(plain, monkeypatch):
    numbers = random.Random(1)  # unseeded calls take fresh seeds: here they are fixed, so that the test is
    monkeypatch.setattr(engine_module.secrets, "randbits", numbers.getrandbits)
    drawn = plain.run(["the"] * 3000, 1, do_sample=True, temperature=3.0, top_k=8, batch_size=1000)
    with torch.no_grad():
        logits = plain.model(torch.tensor([plain.tokenizer("the").input_ids])).logits[0, -1]
    best = (logits / 3).topk(8)
    expected = dict(zip(best.indices.tolist(), (best.values.softmax(0) * 3000).tolist(), strict=True))
    counts = dict.fromkeys(expected, 0)
    for one in drawn:
        counts[one.tokens[0] if one.tokens else 0] += 1  # no token but the end, and a KeyError for one that is cut off
    chi_square = sum((counts[token] - e) ** 2 / e for token, e in expected.items())
    assert chi_square < 24.3  # 7 degrees of freedom, 0.999
    assert min(expected.values()) > 5


def test_unseeded_texts_differ_and_leave_the_random_state_alone(plain):
    state = torch.random.get_rng_state()
    drawn = plain.run(["a"] * 8, 12, do_sample=True, temperature=5.0)
    assert len({tuple(one.tokens) for one in drawn}) == 8
    assert torch.equal(torch.random.get_rng_state(), state)


# --- from tokens to text ---------------------------------------------------------------------------------------------


def by_hand(tokenizer, ids, stops):
    "The text of ids, cut at the first stop string to be completed by a token."
    for n in range(1, len(ids) + 1):
        so_far = tokenizer.decode(ids[:n])
        whole = so_far if n == len(ids) else so_far.rstrip("\ufffd")
        found = [whole.find(stop) for stop in stops if stop in whole]
        if found:
            return whole[: min(found)], True
    return tokenizer.decode(ids), False


def test_readers_against_decoding_at_once():
    tokenizer, choose = byte_tokenizer(), random.Random(0)
    for _ in range(300):
        whole = "".join(choose.choices("ab é\N{SLIGHTLY SMILING FACE}", k=choose.randint(0, 24)))
        stops = [
            "".join(choose.choices("ab é\N{SLIGHTLY SMILING FACE}", k=choose.randint(1, 4)))
            for _ in range(choose.randint(0, 3))
        ]
        ids = tokenizer(whole).input_ids
        reader = text_module._Reader(tokenizer, tokenizer("\N{SLIGHTLY SMILING FACE} prompt").input_ids, stops)
        pieces = []
        for token in ids:
            if reader.finish_reason is None:
                pieces.append(reader.take(token))
                shown = "".join(pieces)
                assert not shown.endswith("\ufffd")
                assert all(stop not in shown for stop in stops)
        pieces.append(reader.finish("length"))
        text, stopped = by_hand(tokenizer, ids, stops)
        assert ("".join(pieces), reader.text) == (text, text), (whole, stops)
        assert reader.finish_reason == ("stop" if stopped else "length")
        assert tokenizer.decode(reader.tokens).startswith(text.rstrip("\ufffd"))
        assert not stopped or len(reader.tokens) <= len(tokenizer(text).input_ids)  # one byte a token: none too many


def test_what_cannot_begin_a_stop_string_is_shown_at_once():
    tokenizer = byte_tokenizer()
    reader = text_module._Reader(tokenizer, [], ["\n\n", "END"])
    assert [reader.take(token) for token in tokenizer("aE\nb").input_ids] == ["a", "", "E", "\nb"]


def test_broken_bytes_end_as_replacement_characters():
    tokenizer = byte_tokenizer()
    half = tokenizer("\N{SLIGHTLY SMILING FACE}").input_ids[:2]
    reader = text_module._Reader(tokenizer, [], [])
    assert [reader.take(token) for token in [*half, *tokenizer("a").input_ids]] == [
        "",
        "",
        tokenizer.decode(half) + "a",
    ]
    reader = text_module._Reader(tokenizer, [], ["\ufffd"])
    assert [reader.take(token) for token in half] == ["", ""]
    assert (reader.finish("length"), reader.finish_reason, reader.tokens) == ("", "stop", [])


def test_a_word_keeps_the_space_before_it():
    words = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "s": 3}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([2]) == "world"  # what a decoding without the prompt would give
    reader = text_module._Reader(tokenizer, [1], [])
    assert [reader.take(token) for token in (2, 3, 2)] == [" world", "s", " world"]


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_stop_strings_end_each_row_for_itself(plain, length):
    free = plain.run(PROMPTS, 24)
    stop = free[1].text[4 : 4 + length]
    expected = []
    for one in free:
        cut, stopped = by_hand(plain.tokenizer, one.tokens, [stop])
        expected.append((cut, "stop" if stopped else one.finish_reason))
    written = plain.run(PROMPTS, 24, stop=stop)
    assert [(one.text, one.finish_reason) for one in written] == expected
    assert expected[1][1] == "stop"
    for prompt, one in zip(PROMPTS, written, strict=True):
        stream = plain.stream(prompt, 24, stop=[stop])
        assert ("".join(stream), stream.result.tokens) == (one.text, one.tokens)
        assert plain.tokenizer.decode(one.tokens).rstrip("\ufffd").startswith(one.text.rstrip("\ufffd"))


def test_several_ends(llama):
    tokenizer = byte_tokenizer()
    free = reference(llama, tokenizer, "abc", 20, [300])
    for end in ([free[3]], [free[7], free[3]]):
        with changed(llama.generation_config, eos_token_id=end):
            one = TextGenerator(llama, tokenizer, use_cache=False).run("abc", 20)
        assert (one.tokens, one.finish_reason) == (free[: free.index(free[3])], "stop")


@contextmanager
def changed(thing, **values):
    before = {name: getattr(thing, name) for name in values}
    thing.__dict__.update(values)
    try:
        yield
    finally:
        thing.__dict__.update(before)


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_models_own_defaults_do_not_leak(llama, plain, capfd):
    expected = plain.run(PROMPTS, 16)
    leaking = {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.1, "repetition_penalty": 5.0}
    leaking |= {"num_beams": 3, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(1, 200)), "max_length": 3}
    leaking |= {"min_new_tokens": 16, "typical_p": 0.2}
    with changed(llama.generation_config, **leaking), warnings.catch_warnings():
        warnings.simplefilter("error")
        own = llama.generation_config.to_dict()
        written = plain.run(PROMPTS, 16)
        drawn = plain.run("a", 4, do_sample=True, temperature=2.0, top_k=5, top_p=0.9, min_p=0.1, seed=1)
        assert llama.generation_config.to_dict() == own
    assert [one.tokens for one in written] == [one.tokens for one in expected]
    assert (
        drawn.tokens == plain.run("a", 4, do_sample=True, temperature=2.0, top_k=5, top_p=0.9, min_p=0.1, seed=1).tokens
    )
    assert capfd.readouterr() == ("", "")  # transformers logs to stderr


def test_dropout_is_off_while_writing():
    model, tokenizer = model_of("gpt2"), byte_tokenizer()
    generator = TextGenerator(model, tokenizer, use_cache=False)
    expected = generator.run(PROMPTS, 16)
    model.train()
    assert [one.tokens for one in generator.run(PROMPTS, 16)] == [one.tokens for one in expected]
    assert all(module.training for module in model.modules())


def test_an_adapter_is_written_with_and_put_back(tmp_path):
    peft = pytest.importorskip("peft")
    base = model_of("llama", seed=3)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    own = base.generation_config
    with TextGenerator(model, byte_tokenizer(), cache_dir=tmp_path).cache as cache:
        generator = TextGenerator(model, byte_tokenizer(), cache=cache)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.mul_(30 if "lora" in name else 1)
        first = generator.run("abc", 12)
        with model.disable_adapter():
            without = generator.run("abc", 12)
        assert (generator.run("abc", 12).cached, without.cached) == (True, False)
        assert first.tokens != without.tokens
    assert base.generation_config is own


def test_autocast_changes_nothing(tmp_path):
    generator = TextGenerator(model_of("llama"), byte_tokenizer(), cache_dir=tmp_path)
    plain = generator.run("abc", 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generator.run("abc", 12).cached
        stream = TextGenerator(generator.model, byte_tokenizer(), use_cache=False).stream("abc", 12)
        assert "".join(stream) == plain.text
    generator.cache.close()


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def generator(llama, tmp_path):
    generator = TextGenerator(llama, byte_tokenizer(), cache_dir=tmp_path / "answers")
    yield generator
    generator.cache.close()


@pytest.fixture
def started(monkeypatch):
    "The prompts that went to the engine."
    prompts, real = [], text_module._Local.start

    def start(self, job, *options):
        prompts.append(job.prompt)
        return real(self, job, *options)

    monkeypatch.setattr(text_module._Local, "start", start)
    return prompts


def test_only_what_is_missing_is_written_and_the_order_kept(generator, started):
    alone = {prompt: generator.run(prompt, 8) for prompt in PROMPTS[:3]}
    del started[:]
    asked = ["new", *PROMPTS[:3], "other", "new"]
    written = generator.run(asked, 8)
    assert started == ["new", "other"]
    assert [one.prompt for one in written] == asked
    assert [one.cached for one in written] == [False, True, True, True, False, False]
    assert [one.text for one in written[1:4]] == [alone[prompt].text for prompt in PROMPTS[:3]]
    assert written[0] == written[5]
    assert [one.cached for one in generator.run(asked, 8)] == [True] * 6
    assert started == ["new", "other"]


def test_a_hundred_prompts_so_many_at_once(generator, started):
    prompts = [f"{'word ' * (n * 7 % 5)}{n}" for n in range(100)]
    for limit, most in ((16, 16), (None, 32)):
        generator.cache.clear()
        del started[:]
        before = len(generator.engine.stats().steps)
        texts = generator.generate(prompts, 4, batch_size=limit)
        assert max(step.writing for step in generator.engine.stats().steps[before:]) == most
        assert started == prompts
        assert texts == [generator.generate(prompt, 4) for prompt in prompts]
        assert started == prompts


def test_the_seconds_of_a_list_add_up(plain):
    start = time.perf_counter()
    written = plain.run(PROMPTS, 30)
    took = time.perf_counter() - start
    assert all(one.seconds > 0 for one in written)
    assert sum(one.seconds for one in written) <= took
    longest, shortest = (max(written, key=lambda one: len(one.tokens)), min(written, key=lambda one: len(one.tokens)))
    assert len(longest.tokens) == len(shortest.tokens) or longest.seconds > shortest.seconds / 3


def test_several_texts_of_one_prompt(generator):
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0, "seed": 5}
    three = generator.generate("abc", **settings, num_return_sequences=3)
    assert len(set(three)) == 3
    assert three == [generator.generate("abc", **settings | {"seed": seed}) for seed in (5, 6, 7)]
    assert all(one.cached for one in generator.run("abc", **settings, num_return_sequences=3))
    pairs = generator.generate(["abc", "d"], **settings, num_return_sequences=2)
    assert pairs == [three[:2], [generator.generate("d", **settings | {"seed": seed}) for seed in (5, 6)]]
    with pytest.raises(ConfigError, match="num_return_sequences has an effect only with do_sample=True"):
        generator.generate("abc", num_return_sequences=2)
    with pytest.raises(InputError, match="num_return_sequences must be 1 here"):
        generator.stream("abc", **settings, num_return_sequences=2)


def test_a_prompt_that_fails_leaves_the_others_in_the_cache(generator, monkeypatch):
    real = text_module._LocalFlight.take

    def take(self, tokens):
        if self.job.prompt == "bad":
            raise ZeroDivisionError("here")
        return real(self, tokens)

    monkeypatch.setattr(text_module._LocalFlight, "take", take)
    with pytest.raises(EngineError, match="ZeroDivisionError: here") as failed:
        generator.generate(["a", "bad", "b"], 8)
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    assert [generator.run(prompt, 8).cached for prompt in ("a", "b")] == [True, True]
    assert generator.stats().puts == 2


# --- the same asked for meanwhile --------------------------------------------------------------------------------


def test_tasks_of_an_event_loop_are_written_together(generator, started):
    expected = generator.generate(["a", "b", "c"], 20)
    generator.cache.clear()
    del started[:]

    async def main():
        asked = [generator.agenerate(prompt, 20) for prompt in ("a", "b", "a", "c", "a")]
        return await asyncio.gather(*asked, generator.agenerate(["c", "a"], 20))

    a, b, c = expected
    assert asyncio.run(main()) == [a, b, a, c, a, [c, a]]
    assert sorted(started) == ["a", "b", "c"]
    assert generator.run("a", 20).cached and generator.stats().puts == 6
    with pytest.raises(InputError, match="prompt must not be empty"):
        asyncio.run(generator.agenerate(""))


def test_a_cancelled_task_leaves_the_text_to_the_others(generator, monkeypatch):
    steps_of(monkeypatch, lambda n: time.sleep(0.01))
    expected = generator.generate("abc", 40)
    generator.cache.clear()
    before = generator.engine.stats().requests.get("cancelled", 0)

    async def main():
        first, second = (asyncio.create_task(generator.agenerate("abc", 40)) for _ in range(2))
        alone = asyncio.create_task(generator.agenerate("d", 100))
        await asyncio.sleep(0.1)
        first.cancel()
        alone.cancel()
        return await asyncio.gather(first, second, alone, return_exceptions=True)

    first, second, alone = asyncio.run(main())
    assert isinstance(first, asyncio.CancelledError) and isinstance(alone, asyncio.CancelledError)
    assert second == expected
    assert generator._flights == {} and not generator.run("d", 100).cached
    assert generator.engine.stats().requests["cancelled"] == before + 1


def test_threads_that_ask_for_the_same(generator, started):
    written = []
    threads = [threading.Thread(target=lambda: written.append(generator.generate("abc", 60))) for _ in range(4)]
    streams = [generator.stream("abc", 60) for _ in range(2)]
    first = next(streams[0])
    for thread in threads:
        thread.start()
    texts = [first + "".join(streams[0]), "".join(streams[1])]
    for thread in threads:
        thread.join()
    assert set(texts + written) == {generator.generate("abc", 60)} and len(written) == 4
    assert started == ["abc"]
    assert generator.stats().puts == 1


def test_drawn_without_a_seed_is_never_shared(plain, started):
    asked = [plain.agenerate("abc", 12, do_sample=True, temperature=5.0) for _ in range(3)]

    async def main():
        return await asyncio.gather(*asked)

    assert len(set(asyncio.run(main()))) == 3 and started == ["abc"] * 3
    assert plain._flights == {}


def test_generators_share_the_engine_of_a_model(llama):
    tokenizer = byte_tokenizer()
    one, other = (TextGenerator(llama, tokenizer, use_cache=False) for _ in range(2))
    small = TextGenerator(llama, tokenizer, use_cache=False, engine=InferenceConfig(max_batch_size=2))
    assert one.engine is other.engine is not small.engine
    assert small.generate(PROMPTS, 8) == one.generate(PROMPTS, 8)
    assert max(step.writing for step in small.engine.stats().steps) == 2


def test_a_bar_for_a_long_list(plain, capsys, monkeypatch):
    monkeypatch.setattr("truthgpt_nb.text._BAR_SECONDS", 0)
    plain.generate(["a", "b", "c"], 4, progress=True)
    assert "0/3" in capsys.readouterr().err
    plain.generate(["a", "b", "c"], 4)  # nobody looks at a captured stderr
    plain.generate(["a", "b", "c"], 4, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "change", [{"max_new_tokens": 7}, {"stop": "x"}, {"repetition_penalty": 1.1}, {"do_sample": True}]
)
def test_other_settings_are_other_answers(generator, change):
    settings = {"max_new_tokens": 6}
    assert not generator.run("a", **settings).cached
    assert not generator.run("a", **settings | change).cached
    assert generator.run("a", **settings).cached


def test_a_changed_weight_is_another_answer(llama, generator):
    generator.run("a", 4)
    llama.lm_head.weight.data.mul_(2)
    assert not generator.run("a", 4).cached
    llama.lm_head.weight.data.div_(2)
    assert generator.run("a", 4).cached


def test_an_answer_that_cannot_be_kept_is_returned(llama, tmp_path):
    class Full(CacheManager):
        def put(self, *args, **kwargs):
            raise CacheError("cache_dir", "must have room", "full", "Free some space.")

    with Full(tmp_path) as cache:
        generator = TextGenerator(llama, byte_tokenizer(), cache=cache)
        with pytest.warns(UserWarning, match="could not be kept: cache_dir must have room") as said:
            texts = generator.generate(["a", "b"], 4, batch_size=1)
        assert len(said) == 1 and len(texts) == 2


def test_a_model_with_a_strange_hook_is_not_cached(llama, generator):
    hook = llama.lm_head.register_forward_hook(lambda module, inputs, output: output)
    try:
        with pytest.warns(UserWarning, match="answers are not cached: a forward hook") as said:
            assert [generator.run("hook", 4).cached for _ in range(2)] == [False, False]
        messages = [str(one.message) for one in said]
        assert sum("not cached" in message for message in messages) == 1
        assert sum("run by transformers' generate, one by one: a forward hook" in message for message in messages) == 1
    finally:
        hook.remove()
    assert generator.stats().puts == 0


def test_a_stream_and_a_call_share_their_answers(generator):
    stream = generator.stream("abc", 12)
    pieces = list(stream)
    assert len(pieces) > 1 and "" not in pieces
    again = generator.run("abc", 12)
    assert (again.cached, again.text, again.tokens) == (True, "".join(pieces), stream.result.tokens)
    second = generator.stream("abc", 12)
    assert "".join(second) == again.text and second.result.cached


def test_without_a_cache_nothing_is_written(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TextGenerator(plain.model, plain.tokenizer, use_cache=False).generate("a", 2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CacheError, match="use_cache must be True"):
        plain.stats()


def test_a_folder_that_cannot_be_used(llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"must be a folder, not a file"):
        TextGenerator(llama, byte_tokenizer(), cache_dir=tmp_path / "file")
    (tmp_path / "cache.sqlite").write_text("notes" * 1000)
    with pytest.raises(CacheError, match="undamaged database"):
        TextGenerator(llama, byte_tokenizer(), cache_dir=tmp_path)


def test_a_locked_database_costs_the_cache_not_the_answer(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("truthgpt_nb.cache._BUSY_SECONDS", 0.1)
    with CacheManager(tmp_path) as cache:
        generator = TextGenerator(llama, byte_tokenizer(), cache=cache)
        other = sqlite3.connect(tmp_path / "cache.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.warns(UserWarning, match="must be free within"):
            assert generator.generate("a", 4)
        other.execute("ROLLBACK")
        other.close()
        assert not generator.run("a", 4).cached
        assert generator.run("a", 4).cached


# --- ending early ----------------------------------------------------------------------------------------------------


def steps_of(monkeypatch, also=lambda n: None):
    "Counts the tokens that are written, and does something at each."
    counted, real = [], text_module._LocalFlight.take

    def take(*args, **kwargs):
        counted.append(threading.current_thread())
        also(len(counted))
        return real(*args, **kwargs)

    monkeypatch.setattr(text_module._LocalFlight, "take", take)
    return counted


def test_a_break_ends_the_writing(generator, monkeypatch):
    steps = steps_of(monkeypatch)
    generator.model.train()
    for n, _ in enumerate(generator.stream("abc", 60)):
        if n == 2:
            break
    assert len(steps) == 3 and set(steps) == {threading.current_thread()}
    assert generator.model.training
    generator.model.eval()
    assert generator.stats().puts == 0
    assert not generator.run("abc", 60).cached


@pytest.mark.parametrize("way", ["close", "with", "cancel", "other thread", "drop"])
def test_each_way_to_close_a_stream(generator, monkeypatch, way):
    steps, cancel = steps_of(monkeypatch), threading.Event()
    before = generator.engine.stats().requests.get("cancelled", 0)
    stream = generator.stream("abc", 60, cancel=cancel)
    first = next(stream)
    if way == "with":
        with stream:
            pass
    elif way == "cancel":
        cancel.set()
    elif way == "other thread":
        thread = threading.Thread(target=stream.close)
        thread.start()
        thread.join()
    elif way == "drop":
        stream = iter(())
    else:
        stream.close()
    assert cancel.is_set() == (way == "cancel")
    assert list(stream) == [] and getattr(stream, "result", None) is None
    assert len(steps) == 1 and generator._flights == {}
    assert generator.stats().puts == 0
    assert generator.generate("abc", 60).startswith(first)
    assert generator.engine.stats().requests["cancelled"] == before + 1


def test_a_stream_is_closed_while_another_thread_waits_for_it(generator, monkeypatch):
    steps, pieces = steps_of(monkeypatch, lambda n: time.sleep(0.01)), []
    stream = generator.stream("abc", 100)
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    while len(steps) < 3:
        time.sleep(0.001)
    stream.close()
    reader.join()
    assert 0 < len(pieces) <= len(steps) < 90 and stream.result is None


def test_a_stream_that_is_never_read_costs_nothing(generator, monkeypatch):
    steps = steps_of(monkeypatch)
    stream = generator.stream("abc")
    stream.close()
    assert (list(stream), steps) == ([], [])


def test_closing_twice_and_after_the_end(generator):
    stream = generator.stream("abc", 4)
    text = "".join(stream)
    result = stream.result
    stream.close()
    stream.close()
    assert (list(stream), stream.result) == ([], result)
    assert isinstance(result, GeneratedText) and result.text == text


def test_an_error_while_writing_reaches_the_reader(generator, monkeypatch):
    def fail(n):
        if n % 4 == 0:
            raise ZeroDivisionError

    generator.model.train()
    own = generator.model.generation_config
    with monkeypatch.context() as patch:
        steps_of(patch, fail)
        stream = generator.stream("abc", 20)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            list(stream)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            generator.run(["abc", "d"], 20)
    assert generator.model.training and generator.model.generation_config is own
    generator.model.eval()
    assert generator.stats().puts == 0
    assert generator.run("abc", 20).tokens


@pytest.mark.parametrize("streaming", [False, True])
def test_ctrl_c(generator, monkeypatch, request, streaming):
    # a process started in the background of a shell ignores Ctrl-C; this one shall heed it
    request.addfinalizer(
        partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
    )

    def interrupt(n):
        if n == 5:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    with monkeypatch.context() as patch:
        steps = steps_of(patch, interrupt)
        write = (
            (lambda: list(generator.stream("abc", 60))) if streaming else (lambda: generator.generate(["abc", "d"], 60))
        )
        with pytest.raises(KeyboardInterrupt):
            write()
        assert len(steps) < 30 and set(steps) == {threading.main_thread()}
    assert generator.stats().puts == 0
    assert generator.run("abc", 60).cached is False
    assert generator._flights == {}


def test_a_call_goes_on_beside_an_open_stream(generator):
    threads = threading.active_count()
    stream = generator.stream("abc", 30)
    first = next(stream)
    other = generator.generate("d", 10)
    assert first + "".join(stream) == generator.generate("abc", 30)
    assert other == generator.generate("d", 10)
    assert threading.active_count() == threads


OPEN_AT_EXIT = """
import sys
sys.path.insert(0, {tests!r})
from test_text import TextGenerator, byte_tokenizer, model_of
generator = TextGenerator(model_of("gpt2"), byte_tokenizer(), use_cache=False)
stream = generator.stream("abc", 120)
next(stream)
print("leaving", generator.model.training)
"""


CHANGED_AT_EXIT = """
import sys
sys.path.insert(0, {tests!r})
from test_text import TextGenerator, byte_tokenizer, model_of
model = model_of("gpt2")
generator = TextGenerator(model, byte_tokenizer(), use_cache=False)
generator.generate("abc", max_new_tokens=2)
model.transformer.ln_f.weight.data.mul_(1.5)
print("leaving", generator.model.training)
"""


@pytest.mark.parametrize("script", [OPEN_AT_EXIT, CHANGED_AT_EXIT])
def test_python_may_end_while_a_stream_is_open_or_the_weights_have_changed(script):
    script = script.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving False\n", "")


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED = [
    ("", {}, InputError, "prompt must not be empty"),
    (None, {}, InputError, "prompt must be a string"),
    (7, {}, InputError, "prompt must be a string"),
    (b"abc", {}, InputError, "prompt must be a string"),
    ({"a": 1}, {}, InputError, "prompt must be a string"),
    (["a", ""], {}, InputError, r"prompt\[1\] must not be empty"),
    (["a", None], {}, InputError, r"prompt\[1\] must be a string"),
    (["a", ["b"]], {}, InputError, r"prompt\[1\] must be a string"),
    ("\ud800", {}, InputError, "prompt must be valid Unicode"),
    ("x" * 128, {}, InputError, "prompt must be shorter than the context of 128 tokens"),
    ("x" * 5000, {}, InputError, "got '5000 tokens'"),
    ("x" * 100, {}, InputError, "28 remain, got 64. Pass 28 or less"),
    (["a", "x" * 100], {}, InputError, r"prompt\[1\] takes 100 of 128"),
    ("a", {"max_new_tokens": 0}, ConfigError, "max_new_tokens"),
    ("a", {"max_new_tokens": -5}, ConfigError, "max_new_tokens"),
    ("a", {"max_new_tokens": 10**9}, ConfigError, "max_new_tokens"),
    ("a", {"max_new_tokens": 1000}, InputError, "max_new_tokens must fit into the context"),
    ("a", {"max_new_tokens": 2.5}, ConfigError, "max_new_tokens"),
    ("a", {"max_new_tokens": "8"}, ConfigError, "max_new_tokens"),
    ("a", {"max_new_tokens": None}, ConfigError, "max_new_tokens"),
    ("a", {"max_new_tokens": True}, ConfigError, "max_new_tokens"),
    ("a", {"temprature": 0.5}, ConfigError, "Did you mean 'temperature'"),
    ("a", {"temperature": 0.5}, ConfigError, "do_sample=True"),
    ("a", {"do_sample": True, "top_p": 1.5}, ConfigError, "top_p"),
    ("a", {"stop": ""}, ConfigError, "stop"),
    ("a", {"stop": [1]}, ConfigError, "stop"),
    ("a", {"batch_size": 0}, ConfigError, "batch_size"),
    ("a", {"do_sample": True, "num_return_sequences": 0}, ConfigError, "num_return_sequences"),
    ("", {"seed": -1}, ConfigError, "seed"),
]


@pytest.mark.parametrize(("prompt", "settings", "kind", "message"), REFUSED)
def test_refusals_come_before_the_model(generator, monkeypatch, prompt, settings, kind, message):
    monkeypatch.setattr(text_module._Local, "start", lambda *_: pytest.fail("the model ran"))
    for call in (generator.generate, generator.run):
        with pytest.raises(kind, match=message):
            call(prompt, **settings)
    if not isinstance(prompt, list) and isinstance(prompt, str):
        with pytest.raises(kind, match=message):
            generator.stream(prompt, **settings)
    stats = generator.stats()
    assert (stats.puts, stats.entries_disk) == (0, 0)


def test_an_empty_list_and_a_context_filled_to_the_last(generator):
    assert generator.generate([]) == [] and generator.run(()) == []
    assert len(generator.run("x" * 100, 28, stop="never").tokens) <= 28


def test_prompts_that_give_nothing_or_the_unknown(llama):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["beyond"])
    with pytest.raises(InputError, match="must give ids below 257"):
        TextGenerator(llama, tokenizer, use_cache=False).generate("beyond")
    backend = Tokenizer(WordLevel({"a": 0}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(InputError, match="must give at least one token"):
        TextGenerator(llama, words, use_cache=False).generate("  ")


TALK = [{"role": "user", "content": "hi"}]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('roles must be user or assistant') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chats(llama, tmp_path):
    tokenizer = byte_tokenizer()
    generator = TextGenerator(llama, tokenizer, use_cache=False)
    with pytest.raises(InputError, match="tokenizer must have a chat template"):
        generator.chat(TALK)
    tokenizer.chat_template = TEMPLATE
    reply = generator.chat(TALK, 16)
    assert reply == generator.generate("<user>hi<assistant>", 16)
    assert "".join(generator.stream(TALK, 16)) == reply
    with pytest.raises(InputError, match="roles must be user or assistant"):
        generator.chat([{"role": "bad", "content": "x"}])
    for wrong in ([], None, "hi", ["hi"], [{"role": "user"}], [TALK[0], {"role": "user", "content": None}]):
        with pytest.raises(InputError, match="messages"):
            generator.chat(wrong)
        if not isinstance(wrong, str):
            with pytest.raises(InputError, match="messages"):
                generator.stream(wrong)


def test_what_names_the_model(llama, tmp_path):
    with pytest.raises(InputError, match="dtype and device are for a model given by name"):
        TextGenerator(llama, byte_tokenizer(), use_cache=False, dtype="bfloat16")
    with pytest.raises(InputError, match="tokenizer must be"):
        TextGenerator(llama, use_cache=False)
    random_model(llama_config()).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = TextGenerator(str(tmp_path), use_cache=False, dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16 and isinstance(loaded.generate("a", 4), str)


def test_results_are_plain_data(plain):
    import json

    one = plain.run("<b>", 4)
    assert json.loads(json.dumps(one.to_dict()))["tokens"] == one.tokens
    assert "&lt;b&gt;" in one._repr_html_() and repr(one).startswith("<b>")


def test_a_stream_over_changed_weights_is_not_kept(generator):
    weight = generator.model.get_output_embeddings().weight
    before = weight.detach().clone()
    stream = generator.stream("abc", 12)
    weight.data.copy_(-before)
    other = "".join(stream)
    weight.data.copy_(before)
    result = generator.run("abc", 12)
    assert not result.cached and result.text != other


@pytest.mark.parametrize("count", [3, 10])
def test_the_beginning_of_a_stop_string_at_the_length_limit(generator, count):
    free = generator.run("abc", count)
    stop = free.text[-1] + "\x01zz"
    expected = (free.text, free.tokens, "length")
    assert (lambda r: (r.text, r.tokens, r.finish_reason))(generator.run("abc", count, stop=stop)) == expected
    with generator.stream("abc", count, stop=stop) as stream:
        assert "".join(stream) == free.text
    assert stream.result.tokens == free.tokens


def test_two_generators_share_a_model_and_leave_it_as_it_was(llama):
    tokenizer = byte_tokenizer()
    own, mode = llama.generation_config, llama.training
    generators = [TextGenerator(llama, tokenizer, use_cache=False) for _ in range(2)]
    expected = generators[0].generate("abc", 12)
    streams = [generator.stream("abc", 12) for generator in generators for _ in range(4)]
    threads = [threading.Thread(target=lambda s=stream: written.append("".join(s))) for stream in streams]
    written = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [expected] * 8
    assert llama.generation_config is own and llama.training is mode


def test_a_model_that_the_engine_cannot_run_is_written_with_one_by_one():
    model = model_of("llama")
    generator = TextGenerator(model, byte_tokenizer(), use_cache=False)
    expected = generator.run(PROMPTS, 10)
    model.forward = partial(model.forward)
    with pytest.warns(UserWarning, match="one by one: its forward method was exchanged or compiled"):
        written = generator.run(PROMPTS, 10)
    assert [one.tokens for one in written] == [one.tokens for one in expected]
    assert [one.finish_reason for one in written] == [one.finish_reason for one in expected]
    stream = generator.stream(PROMPTS[1], 10)
    assert "".join(stream) == expected[1].text and stream.result.finish_reason == expected[1].finish_reason
    del model.forward
    assert generator.run(PROMPTS, 10)[0].tokens == expected[0].tokens and generator.engine.fallback is None


@pytest.mark.filterwarnings("ignore:this model is run by")
def test_a_stream_of_such_a_model_comes_in_pieces_and_ends_when_it_is_closed(monkeypatch):
    model, release = model_of("llama", seed=5), threading.Semaphore(3)
    with torch.no_grad():  # printable ASCII: a piece for each token
        for row in (slice(0, 1), slice(95, None)):
            model.lm_head.weight[row] = 0
    model.forward = partial(model.forward)
    generator = TextGenerator(model, byte_tokenizer(), use_cache=False)
    steps = steps_of(monkeypatch, lambda n: release.acquire(timeout=60))  # the model waits for the reader
    stream = generator.stream("abc", 100)
    for _ in range(3):
        next(stream)
    while len(steps) < 4:
        time.sleep(0.001)
    stream.close()
    release.release(200)
    assert generator.generate("d", 4) and len(steps) < 20
    assert generator.engine.stats().requests["cancelled"] == 1


def test_a_model_with_an_encoder_is_refused():
    config = transformers.T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match="must be a causal language model"):
        TextGenerator(transformers.T5ForConditionalGeneration(config), byte_tokenizer(), use_cache=False)


def test_auto_precision_is_part_of_the_key(llama, tmp_path):
    with CacheManager(tmp_path) as cache:
        exact = TextGenerator(llama, byte_tokenizer(), cache=cache)
        exact.run("abc", 6)
        auto = TextGenerator(llama, byte_tokenizer(), cache=cache, engine=InferenceConfig(precision="auto"))
        one = auto.run("abc", 6)
        assert one.cached == (auto.engine.precision == "exact") and auto.run("abc", 6).cached
        assert auto.engine.choice.tokens > 50
