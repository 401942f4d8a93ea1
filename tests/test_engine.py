"""The engine against `generate`, architecture by architecture, and under faults."""

import _thread
import asyncio
import gc
import itertools
import random
import signal
import threading
import time

import matplotlib.pyplot as plt
import pytest
import torch
import transformers as hf

from truthgpt_nb import engine as engine_module
from truthgpt_nb import precision, ragged
from truthgpt_nb.configs import EvidenceConfig, GenerationConfig, Tolerance
from truthgpt_nb.core import EngineError, InputError
from truthgpt_nb.devices import compiler_problem
from truthgpt_nb.engine import EngineStats, InferenceEngine, StepRecord, end_ids
from truthgpt_nb.ragged import RaggedModel, Slots

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ARCHITECTURES = {
    "Llama": hf.LlamaConfig(**GROUPED),
    "Qwen2": hf.Qwen2Config(**GROUPED),
    "Qwen3": hf.Qwen3Config(**GROUPED, head_dim=16),
    "Mistral": hf.MistralConfig(**GROUPED, sliding_window=12),
    "Gemma": hf.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8),
    "Gemma2": hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=12),
    "Gemma3": hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=12),
    "GPT2": hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, **ENDS),
    "GPTNeoX": hf.GPTNeoXConfig(**SMALL),
    "OPT": hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=256,
        word_embed_proj_dim=32,
        **ENDS,
    ),
    "Phi": hf.PhiConfig(**SMALL),
    "Phi3": hf.Phi3Config(**GROUPED),
    "StableLm": hf.StableLmConfig(**GROUPED),
    "SmolLM3": hf.SmolLM3Config(**GROUPED),
    "GptOss": hf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=12),
}


def made(name: str, seed: int = 0) -> torch.nn.Module:
    "A model with weights that are large enough for its texts to differ."
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def alone(model, ids: list[int], count: int) -> list[int]:
    "What `generate` writes for one prompt."
    row = torch.tensor([ids])
    plain = {"attention_mask": torch.ones_like(row), "do_sample": False, "pad_token_id": 0}
    written = model.generate(row, max_new_tokens=count, **plain)[0, len(ids) :].tolist()
    return written[:-1] if written[-1] in end_ids(model) else written


def some_requests(seed: int, count: int = 12) -> list[tuple[list[int], int]]:
    rng = random.Random(seed)
    return [
        ([rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 60))], rng.randint(1, 30)) for _ in range(count)
    ]


def settings_of(requests: list[tuple[list[int], int]]) -> list[GenerationConfig]:
    return [GenerationConfig(max_new_tokens=count) for _, count in requests]


@pytest.fixture(scope="module")
def llama():
    return made("Llama")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_writes_what_generate_writes(name, monkeypatch):
    model, requests = made(name), some_requests(seed=1)
    expected = [alone(model, *request) for request in requests]
    assert len({token for text in expected for token in text}) > 8  # texts that can be told apart
    for kernel, options in (("stock", {"max_batch_size": 5, "chunk_tokens": 24}), ("packed", {"max_batch_size": 16})):
        monkeypatch.setattr(precision, "fastest_kernel", lambda *_, kernel=kernel, **__: kernel)
        with InferenceEngine(model, **options) as engine:
            assert engine.fallback is None
            together = engine.generate_batch([ids for ids, _ in requests], settings_of(requests))
            assert list(engine._work.replaced.kernels) == [kernel]
        assert [one.tokens for one in together] == expected


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2", "Mistral"])
def test_what_is_done_on_a_gpu_writes_the_same(name, monkeypatch):
    def run_again(run, device, pool):  # in place of a CUDA graph
        out, calls = run().clone(), itertools.count()
        return lambda: out.copy_(run()) if next(calls) else None, out

    made_ones = []

    def capturing(model, slots, length, capture):
        made_ones.append(RaggedModel(model, slots, length, capture=True))
        made_ones[-1].captured.make = run_again
        return made_ones[-1]

    batches = []

    def in_a_batch(chunks, device):
        batches.append(len(chunks) > 1 and not any(part.start for part in chunks))
        return batches[-1]

    monkeypatch.setattr(engine_module, "RaggedModel", capturing)
    monkeypatch.setattr(ragged, "_in_a_batch", in_a_batch)
    model, requests = made(name), some_requests(seed=3, count=30)
    expected = [alone(model, *request) for request in requests]
    with InferenceEngine(model, max_batch_size=5, chunk_tokens=150) as engine:
        together = engine.generate_batch([ids for ids, _ in requests], settings_of(requests))
        assert [one.tokens for one in together] == expected
        assert "steps replayed from" in str(engine.stats())
    assert any(batches)
    assert made_ones[-1].captured.problem is None and made_ones[-1].captured.count > 30


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_of_joins_and_cancels_leaves_every_text_as_it_is(llama, seed):
    rng, requests = random.Random(seed), some_requests(seed, count=24)
    expected = [alone(llama, *request) for request in requests]
    sizes = {"max_batch_size": rng.randint(1, 6), "chunk_tokens": rng.choice([3, 16, 512]), "max_tokens": 400}
    with InferenceEngine(llama, **sizes) as engine:
        generations = []
        for (ids, _), settings in zip(requests, settings_of(requests), strict=True):
            generations.append(engine.submit(ids, settings))
            if rng.random() < 0.3:
                time.sleep(rng.random() / 100)
            if rng.random() < 0.2:
                rng.choice(generations).cancel()
        for generation, text in zip(generations, expected, strict=True):
            written = generation.result(timeout=60)
            if written.finish_reason == "cancelled":
                assert written.tokens == text[: len(written.tokens)]
            else:
                assert written.tokens == text
        assert engine._work.open == {}


def test_a_seed_gives_the_same_text_beside_anything(llama):
    drawn = GenerationConfig(do_sample=True, temperature=0.9, top_p=0.95, seed=11, max_new_tokens=20)
    with InferenceEngine(llama, max_batch_size=4) as engine:
        first = engine.generate_batch([[5, 6, 7]], drawn)[0].tokens
        others = [GenerationConfig(do_sample=True, seed=seed, max_new_tokens=20) for seed in range(9)]
        mixed = engine.generate_batch([[8] * n for n in range(1, 10)] + [[5, 6, 7]], [*others, drawn])
    assert mixed[-1].tokens == first
    assert len({tuple(one.tokens) for one in mixed}) > 5


def test_log_probabilities_are_those_of_the_model(llama):
    with InferenceEngine(llama) as engine:
        written = engine.generate_batch([[5, 6, 7]], GenerationConfig(max_new_tokens=6), logprobs=True)[0]
    with torch.no_grad():
        logits = llama(torch.tensor([[5, 6, 7, *written.tokens]])).logits[0, 2:-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(written.tokens)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(written.logprobs), expected, atol=1e-4)


def test_a_token_that_ends_the_text_and_one_that_the_caller_names(llama):
    text = alone(llama, [9, 10], 20)
    with InferenceEngine(llama) as engine:
        settings = GenerationConfig(max_new_tokens=20)
        named = engine.submit([9, 10], settings, stop_ids=[text[4]]).result()
        until = engine.submit([9, 10], settings, until=lambda tokens: len(tokens) == 3).result()
    first = text.index(text[4])
    assert (named.tokens, named.finish_reason) == (text[:first], "stop")
    assert (until.tokens, until.finish_reason) == (text[:3], "stop")


def test_weights_that_were_changed_in_place_are_seen():
    model = made("Llama")
    with InferenceEngine(model) as engine:
        engine.generate_batch([[5, 6, 7]], GenerationConfig(max_new_tokens=8))
        with torch.no_grad():
            model.lm_head.weight.data.copy_(model.lm_head.weight.data.flip(0))
        changed = engine.generate_batch([[5, 6, 7]], GenerationConfig(max_new_tokens=8))[0].tokens
    assert changed == alone(model, [5, 6, 7], 8)


def test_the_model_of_the_caller_stays_as_it_is(llama):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    classes, config = [type(m) for m in llama.modules()], llama.config.to_dict()
    with InferenceEngine(llama, precision="float32") as engine:
        engine.generate_batch([[5, 6, 7]])
    assert [type(m) for m in llama.modules()] == classes and llama.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert llama.config._attn_implementation == "sdpa"


# faults


@pytest.mark.skipif(compiler_problem() is not None, reason=f"torch.compile: {compiler_problem()}")
@pytest.mark.filterwarnings("ignore:torch.compile is taken back")
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2"])
def test_compiled_layers_write_what_generate_writes(name, monkeypatch):
    monkeypatch.setattr(precision, "fastest_kernel", lambda shape, row_counts, kernels: "packed")
    model, requests = made(name), some_requests(5)
    with InferenceEngine(model, compile=True, chunk_tokens=16, max_batch_size=4) as engine:
        engine.generate_batch([[5, 6, 7]], GenerationConfig(max_new_tokens=2))
        assert engine.compiled.verdict in ("kept", "no gain", "slower"), engine.compiled.reason
        assert engine._work.ragged.compiled == (engine.compiled.verdict == "kept")
        engine._work.ragged.use_compiled(True)
        monkeypatch.setattr(ragged, "_attended", None)  # a layer that is not compiled would call it
        written = engine.generate_batch([ids for ids, _ in requests], settings_of(requests))
    assert [one.tokens for one in written] == [alone(model, ids, count) for ids, count in requests]


def test_a_compiler_that_fails_is_left_out_with_its_reason(llama, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(torch, "compile", refuse)
    with InferenceEngine(llama, compile=True) as engine:
        with pytest.warns(UserWarning, match="torch.compile failed, and is left out: .*no compiler today"):
            one = engine.generate_batch([[5, 6, 7]], GenerationConfig(max_new_tokens=4))[0]
        assert engine.compiled.verdict == "failed"
    assert one.tokens == alone(llama, [5, 6, 7], 4)


def failing(monkeypatch, when, error):
    "Let the forward pass raise when `when` holds for its parts."
    forward = RaggedModel.forward

    def broken(self, parts):
        if when(parts):
            raise error
        return forward(self, parts)

    monkeypatch.setattr(RaggedModel, "forward", broken)


def test_one_request_that_breaks_the_model_fails_alone(llama, monkeypatch):
    requests = [([3 + i, 4 + i], 6) for i in range(9)]
    expected = [alone(llama, *request) for request in requests]
    with InferenceEngine(llama) as engine:
        failing(
            monkeypatch, lambda parts: any(9 in part.ids and len(part.ids) == 2 for part in parts), ValueError("nine")
        )
        generations = [engine.submit(ids, GenerationConfig(max_new_tokens=count)) for ids, count in requests]
        for (ids, _), generation, text in zip(requests, generations, expected, strict=True):
            if 9 in ids:
                with pytest.raises(EngineError, match="ValueError: nine"):
                    generation.result(timeout=30)
            else:
                assert generation.result(timeout=30).tokens == text


def test_out_of_memory_halves_the_batch_and_loses_nothing(llama, monkeypatch):
    requests = some_requests(seed=3, count=10)
    expected = [alone(llama, *request) for request in requests]
    with InferenceEngine(llama, max_batch_size=8) as engine:
        failing(monkeypatch, lambda parts: len(parts) > 3, RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        with pytest.warns(UserWarning, match="memory ran out"):
            together = engine.generate_batch([ids for ids, _ in requests], settings_of(requests))
        assert [one.tokens for one in together] == expected
        assert engine.stats().max_batch_size <= 3  # and it is remembered


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_no_memory_for_the_slots_leaves_fewer_of_them_or_fails_with_the_reason(llama, monkeypatch):
    make, resize, requests = Slots._make, Slots.resize, some_requests(seed=4, count=9)
    expected = [alone(llama, *request) for request in requests]

    def make_some(slots, layer):
        allow(slots.count * slots.length)
        make(slots, layer)

    def resize_some(slots, count, length, used):
        if used:
            allow(count * length)
        resize(slots, count, length, used)

    def allow(tokens):
        if tokens > 192:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with InferenceEngine(llama, max_batch_size=8) as engine:
        engine.generate_batch([[5]], GenerationConfig(max_new_tokens=1))
        monkeypatch.setattr(Slots, "_make", make_some)
        monkeypatch.setattr(Slots, "resize", resize_some)
        together = engine.generate_batch([ids for ids, _ in requests], settings_of(requests))
        assert [one.tokens for one in together] == expected
        assert engine._work.ragged.slots.count <= 3
        with pytest.raises(EngineError, match="for want of memory"):
            engine.generate_batch([[5] * 200], GenerationConfig(max_new_tokens=2))
        (again,) = engine.generate_batch([requests[0][0]], settings_of(requests[:1]))
        assert again.tokens == expected[0]


def test_the_timeline_is_at_zero_while_nothing_is_done():
    steps = [StepRecord(start, 1.0, 0.5, writing, 0, 0, 0) for start, writing in ((0.0, 2), (1.0, 1), (5.0, 3))]
    figure = EngineStats({}, [], steps, 6, 0, 32, 0, "").figure()
    written, _ = figure.axes[0].lines
    assert written.get_xydata().tolist() == [[0, 2], [1, 1], [2, 0], [5, 3], [6, 0]]
    plt.close(figure)


def test_the_share_that_the_engine_takes_for_itself(llama):
    steps = [StepRecord(start, 1.0, in_model, 1, 0, 0, 0) for start, in_model in ((0.0, 0.5), (1.0, 1.0))]
    assert EngineStats({}, [], steps, 2, 0, 32, 0, "").beside_model == 0.25
    assert EngineStats({}, [], [], 0, 0, 32, 0, "").beside_model is None
    with InferenceEngine(llama) as engine:
        engine.generate_batch([[5, 6, 7]], GenerationConfig(max_new_tokens=4))
        assert all(0 < step.model_seconds < step.seconds for step in engine.stats().steps)


def test_slots_are_not_kept_as_long_as_a_long_request_needed_them(llama):
    with InferenceEngine(llama, max_batch_size=16) as engine:
        engine.generate_batch([[5] * 240], GenerationConfig(max_new_tokens=2))
        engine.generate_batch([[5, 6]] * 12, GenerationConfig(max_new_tokens=2))
        slots = engine._work.ragged.slots
        assert (slots.count, slots.length) == (12, 64)


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_a_request_that_is_too_large_alone_fails_with_the_reason(llama, monkeypatch):
    with InferenceEngine(llama) as engine:
        failing(monkeypatch, lambda parts: any(len(part.ids) > 50 for part in parts), MemoryError("too much"))
        large, small = engine.submit([5] * 60), engine.submit([5], GenerationConfig(max_new_tokens=4))
        with pytest.raises(EngineError, match="MemoryError: too much"):
            large.result(timeout=30)
        assert small.result(timeout=30).tokens == alone(llama, [5], 4)


def test_nan_in_one_request_fails_it_and_leaves_nothing_behind(llama, monkeypatch):
    forward = RaggedModel.forward

    def with_nan(self, parts):
        logits = forward(self, parts).clone()
        for index, part in enumerate(parts):
            if 66 in part.ids:
                self.slots.keys[0][part.slot] = float("nan")
                self.slots.values[0][part.slot] = float("nan")
                logits[index] = float("nan")
        return logits

    monkeypatch.setattr(RaggedModel, "forward", with_nan)
    expected = alone(llama, [5, 6, 7], 12)
    with InferenceEngine(llama, max_batch_size=3) as engine:
        good = [engine.submit([5, 6, 7], GenerationConfig(max_new_tokens=12)) for _ in range(2)]
        with pytest.raises(EngineError, match="logits must be numbers"):
            engine.submit([66, 5]).result(timeout=30)
        later = [engine.submit([5, 6, 7], GenerationConfig(max_new_tokens=12)) for _ in range(3)]
        assert [one.result(timeout=30).tokens for one in good + later] == [expected] * 5


def test_a_callback_that_raises_fails_its_request_only(llama):
    def broken(tokens):
        raise KeyError("mine")

    with InferenceEngine(llama) as engine:
        good = engine.submit([5, 6], GenerationConfig(max_new_tokens=5))
        with pytest.raises(EngineError, match="KeyError"):
            engine.submit([5, 6], until=broken).result(timeout=30)
        assert good.result(timeout=30).tokens == alone(llama, [5, 6], 5)


def test_an_error_in_the_engine_itself_fails_everything_and_nothing_hangs(llama, monkeypatch):
    with InferenceEngine(llama, max_batch_size=2) as engine:
        with monkeypatch.context() as patch:
            patch.setattr("truthgpt_nb.engine._Work._parts", lambda self: 1 / 0)
            generations = [engine.submit([5, 6]) for _ in range(5)]
            for generation in generations:
                with pytest.raises(EngineError, match="ZeroDivisionError"):
                    generation.result(timeout=30)
        assert engine.submit([5, 6], GenerationConfig(max_new_tokens=3)).result(timeout=30).tokens  # it goes on


@pytest.fixture
def heeding_ctrl_c():
    "A shell that starts a command in the background lets it ignore Ctrl-C, and Python keeps that."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_in_the_middle_of_a_batch_leaves_the_engine_ready(llama):
    requests = some_requests(seed=5)
    expected = [alone(llama, *request) for request in requests]
    with InferenceEngine(llama, max_batch_size=4) as engine:
        for tokens in (3, 17, 40):
            seen = []

            def interrupt(written, seen=seen, tokens=tokens):
                seen.append(1)
                if len(seen) == tokens:
                    _thread.interrupt_main()
                return False

            with pytest.raises(KeyboardInterrupt):
                engine.generate_batch([ids for ids, _ in requests], settings_of(requests), until=interrupt)
        together = engine.generate_batch([ids for ids, _ in requests], settings_of(requests))
        assert [one.tokens for one in together] == expected
        assert engine.stats().requests["cancelled"] > 0


def test_a_full_queue_refuses_or_waits(llama):
    with InferenceEngine(llama, max_queue=2, when_full="refuse", max_batch_size=1) as engine:
        submitted, refusals = [], []
        for _ in range(10):
            try:
                submitted.append(engine.submit([5, 6], GenerationConfig(max_new_tokens=200), stop_ids=()))
            except EngineError as error:
                refusals.append(str(error))
        assert refusals and all("queue must have room" in refusal for refusal in refusals)
        assert [len(one.result(timeout=60).tokens) for one in submitted] == [200] * len(submitted)
    with InferenceEngine(llama, max_queue=2, max_batch_size=2) as engine:
        written = engine.generate_batch([[5, 6]] * 9, GenerationConfig(max_new_tokens=3))
        assert [len(one.tokens) for one in written] == [3] * 9


def test_a_callback_that_calls_the_engine_is_refused_instead_of_waiting_for_itself(llama):
    with InferenceEngine(llama) as engine:
        asking = engine.submit([5, 6], until=lambda tokens: engine.generate_batch([[5]]))
        with pytest.raises(EngineError, match="EngineError: engine must not be called"):
            asking.result(timeout=30)
        assert engine.submit([5, 6], GenerationConfig(max_new_tokens=3)).result(timeout=30).tokens


def test_a_request_keeps_its_engine(llama):
    generation = InferenceEngine(llama).submit([5, 6], GenerationConfig(max_new_tokens=20))
    gc.collect()
    assert generation.result(timeout=30).tokens == alone(llama, [5, 6], 20)


def test_several_threads_share_an_engine(llama):
    requests, written = some_requests(seed=7), {}
    expected = [alone(llama, *request) for request in requests]
    with InferenceEngine(llama, max_batch_size=3) as engine:

        def ask(index):
            ids, count = requests[index]
            written[index] = engine.generate_batch([ids], GenerationConfig(max_new_tokens=count))[0].tokens

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert [written[index] for index in range(len(requests))] == expected


def test_a_closed_engine_ends_what_it_had_and_takes_nothing_more(llama):
    engine = InferenceEngine(llama, max_batch_size=1)
    generations = [engine.submit([5, 6], GenerationConfig(max_new_tokens=200), stop_ids=()) for _ in range(3)]
    engine.close()
    assert generations[-1].result(timeout=10).finish_reason == "cancelled"
    assert threading.active_count() == len(threading.enumerate())
    assert not [thread for thread in threading.enumerate() if thread.name == "truthgpt engine"]
    with pytest.raises(EngineError, match="engine must be open"):
        engine.submit([5])


def test_awaiting_a_request_and_giving_it_up(llama):
    async def main():
        with InferenceEngine(llama) as engine:
            short = engine.submit([5, 6], GenerationConfig(max_new_tokens=4))
            written = await asyncio.wrap_future(short.future)
            long = engine.submit([5, 6], GenerationConfig(max_new_tokens=200), stop_ids=())
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(long.future), 0.01)
            assert long.future.cancelled()
            return written.tokens

    assert asyncio.run(main()) == alone(llama, [5, 6], 4)


def test_a_deadline_ends_a_request_with_what_it_has(llama):
    with InferenceEngine(llama, max_batch_size=1) as engine:
        late = engine.submit([5, 6], GenerationConfig(max_new_tokens=250), stop_ids=(), timeout=0.1)
        waiting = engine.submit([5, 6], GenerationConfig(max_new_tokens=250), stop_ids=(), timeout=0.05)
        assert late.result(timeout=30).finish_reason == "timeout"
        assert waiting.result(timeout=30).finish_reason == "timeout"
        assert waiting.result().tokens == []
        assert late.result().tokens == alone(llama, [5, 6], 250)[: len(late.tokens)]


def test_many_short_requests_hold_memory_flat(llama):
    with InferenceEngine(llama, max_batch_size=8) as engine:
        written = engine.generate_batch([[5 + i % 50] for i in range(500)], GenerationConfig(max_new_tokens=2))
        stats = engine.stats()
    assert len(written) == 500 and sum(stats.requests.values()) == 500
    assert stats.cache_bytes == 8 * 64 * 2 * 2 * 2 * 8 * 4  # slots × length × layers × (k, v) × heads × size × bytes


def test_a_model_that_needs_generate_streams_and_stops_all_the_same():
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = hf.T5ForConditionalGeneration(config).eval()
    with pytest.warns(UserWarning, match="encoder-decoder"):
        engine = InferenceEngine(model)
    with engine:
        generation = engine.submit([5, 6, 7], GenerationConfig(max_new_tokens=9), stop_ids=())
        streamed = list(generation)
        cut = engine.submit([5, 6, 7], until=lambda tokens: len(tokens) == 2).result(timeout=30)
    plain = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert len(streamed) == 9 and cut.finish_reason == "stop"
    assert streamed[:3] == plain[0, 1:4].tolist()


def test_what_is_no_model_or_no_setting_is_refused(llama):
    with pytest.raises(InputError, match="must be a transformers model"):
        InferenceEngine("tiny-english")
    with pytest.raises(ValueError, match="max_batch_size"):
        InferenceEngine(llama, max_batch_size=0)
    with pytest.raises(ValueError, match="Did you mean 'precision'"):
        InferenceEngine(llama, precison="exact")
    with InferenceEngine(llama) as engine:
        with pytest.raises(InputError, match="an engine knows no strings"):
            engine.submit([5], GenerationConfig(stop=("x",)))
        with pytest.raises(InputError, match="settings must be one, or 2"):
            engine.generate_batch([[5], [6]], [GenerationConfig()])
        assert engine.generate_batch([]) == []


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.fixture
def exchanged(monkeypatch):
    "Whatever a precision allows last is used, also where a model is too small for it to be faster."
    monkeypatch.setattr("truthgpt_nb.precision.fastest_kernel", lambda shape, row_counts, kernels: kernels[-1])


SAMPLE = [[n * 7 % VOCABULARY for n in range(60)], [n * 11 % VOCABULARY for n in range(40)]]


@pytest.mark.usefixtures("exchanged")
def test_auto_takes_what_the_model_bears_and_looks_again_when_it_changes():
    model = made("Llama", seed=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)  # flat distributions: no rounding moves them far
    with InferenceEngine(model, precision="auto", sample=SAMPLE) as engine:
        assert engine.choice is None
        engine.generate_batch([[5, 6, 7]], GenerationConfig(max_new_tokens=3))
        first = engine.choice
        assert engine.precision == first.precision == first.trials[0].precision and first.tokens == 100
        assert not first.trials[0].violations
        with torch.no_grad():
            model.lm_head.weight.mul_(10_000)  # sharp ones: every rounding does
            model.model.layers[0].mlp.up_proj.weight[:2] *= 3000
        engine.generate_batch([[5, 6, 7]], GenerationConfig(max_new_tokens=3))
        violated = {trial.precision: trial.violations for trial in engine.choice.trials}
        assert violated["int8"] and not violated["exact"] and engine.precision != "int8"


def test_auto_of_a_model_that_is_not_float32_or_not_run_here():
    half = made("Llama").bfloat16()
    with InferenceEngine(half, precision="auto") as engine:
        assert engine.precision == "exact" and len(engine.choice.trials) == 1
    bloom = hf.AutoModelForCausalLM.from_config(
        hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)
    ).eval()
    with pytest.warns(UserWarning, match="one by one"):
        engine = InferenceEngine(bloom, precision="auto")
    assert engine.precision == "exact" and engine.choice is None


@pytest.mark.parametrize(
    ("sample", "message"),
    [([[VOCABULARY]], "must be whole numbers"), ([[5]], "at least two tokens"), ([], "at least two")],
)
def test_samples_that_nothing_can_be_judged_on(llama, sample, message):
    with pytest.raises(InputError, match=message):
        _ = InferenceEngine(llama, precision="auto", sample=sample).precision


@pytest.mark.usefixtures("exchanged")
def test_evidence_counts_identical_continuations_and_judges_distributions(llama):
    quick = EvidenceConfig(rounds=6, memory=False, min_sample_seconds=0)
    with InferenceEngine(llama, precision="int8") as engine:
        found = engine.evidence([[5, 6, 7], [8, 9, 10, 11]], 8, quick, Tolerance(kl_divergence=0))
        metrics = found.fidelity.metrics
        assert found.verdict == "drifts" and "KL" in found.reason
        assert metrics["identical"] in (0, 0.5, 1) and metrics["kl_divergence"] > 0 and metrics["perplexity"] > 1
        lenient = Tolerance(kl_divergence=100, top1_agreement=0, cosine=-1)
        assert engine.evidence([[5, 6, 7]], 8, quick, lenient).verdict in ("kept", "no gain", "slower")
