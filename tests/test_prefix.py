"""What would bore a reader of 07b_prefix: each architecture, restarts, changed weights, damaged and shared folders."""

import random
from pathlib import Path

import pytest
import torch
from test_engine import ARCHITECTURES, VOCABULARY, alone, made

from truthgpt_nb.configs import GenerationConfig
from truthgpt_nb.core import CacheError
from truthgpt_nb.engine import InferenceEngine
from truthgpt_nb.prefix import BLOCK, PrefixCache

NEW = GenerationConfig(max_new_tokens=6)


def beginning_alike(seed, count=6, length=80):
    "Prompts that share a beginning, some of them more of it than others."
    rng = random.Random(seed)
    shared = [rng.randrange(3, VOCABULARY) for _ in range(length)]
    cuts = [length, length, 40, 33, 32, 31][:count]
    return [[*shared[:cut], *(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 9)))] for cut in cuts]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recalled_beginnings_change_no_token(name, tmp_path):
    model, prompts = made(name), beginning_alike(1)
    expected = [alone(model, ids, 6) for ids in prompts]
    for chunk in (512, 16):
        with InferenceEngine(model, prefix_dir=str(tmp_path / str(chunk)), chunk_tokens=chunk) as engine:
            assert [one.tokens for one in engine.generate_batch(prompts, NEW)] == expected
            first = engine.stats().prefix.recalled
            assert first >= 64 + 3 * 32  # of the second the shared blocks, of the next three the first block
            assert [one.tokens for one in engine.generate_batch(prompts, NEW)] == expected
            assert engine.stats().prefix.recalled - first == 2 * 64 + 4 * 32
        with InferenceEngine(model, prefix_dir=str(tmp_path / str(chunk))) as engine:
            assert [one.tokens for one in engine.generate_batch(prompts[::-1], NEW)] == expected[::-1]
            assert engine.stats().prefix.from_disk == 3 * 32 and engine.stats().prefix.broken == 0


def test_a_conversation_goes_on_from_where_it_was():
    model, ids = made("Llama"), [random.Random(2).randrange(3, VOCABULARY) for _ in range(50)]
    with InferenceEngine(model) as engine:
        for turn in range(3):
            (one,) = engine.generate_batch([ids], GenerationConfig(max_new_tokens=20), stop_ids=[])
            before = engine.stats().prefix.recalled
            row = torch.tensor([ids])
            plain = {"attention_mask": torch.ones_like(row), "do_sample": False, "eos_token_id": None}
            assert one.tokens == model.generate(row, max_new_tokens=20, **plain)[0, len(ids) :].tolist()
            known = (len(ids) + 19) // BLOCK * BLOCK
            ids = [*ids, *one.tokens, 5, 6, 7]
            engine.generate_batch([ids], GenerationConfig(max_new_tokens=1))
            assert engine.stats().prefix.recalled - before == known, turn


def test_other_weights_are_not_recalled(tmp_path):
    model, prompts = made("Llama"), beginning_alike(3)
    with InferenceEngine(model, prefix_dir=str(tmp_path)) as engine:
        engine.generate_batch(prompts, NEW)
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        before = engine.stats().prefix
        assert [one.tokens for one in engine.generate_batch(prompts, NEW)] == [alone(model, ids, 6) for ids in prompts]
        assert engine.stats().prefix.recalled - before.recalled == 64 + 3 * 32
    with InferenceEngine(model, prefix_dir=str(tmp_path), precision="float32") as engine:
        engine.generate_batch(prompts[:1], NEW)
        assert engine.stats().prefix.recalled == 0  # other kernels are another key


def test_what_was_kept_while_the_weights_changed_is_forgotten(tmp_path):
    model, prompts = made("Llama"), beginning_alike(4)
    weight, changed = model.model.layers[0].self_attn.k_proj.weight, []

    def until(tokens):
        if not changed:
            changed.append(weight.detach().clone())
            with torch.no_grad():
                weight.mul_(1.5)
        return False

    with InferenceEngine(model, prefix_dir=str(tmp_path)) as engine:
        engine.generate_batch(prompts[:1], NEW, until=until)
        with torch.no_grad():
            weight.mul_(2)  # neither as it was nor as it is
        engine.generate_batch(prompts[:1], NEW)
        with torch.no_grad():
            weight.copy_(changed[0])
        before = engine.stats().prefix.recalled
        (one,) = engine.generate_batch(prompts[:1], NEW)
        assert engine.stats().prefix.recalled == before
        assert one.tokens == alone(model, prompts[0], 6)


def test_requests_wait_for_a_beginning_that_is_being_computed():
    model = made("Llama")
    rng = random.Random(5)
    shared = [rng.randrange(3, VOCABULARY) for _ in range(160)]
    prompts = [[*shared, n] for n in range(5, 15)]
    with InferenceEngine(model, chunk_tokens=48) as engine:
        together = engine.generate_batch(prompts, NEW)
        stats = engine.stats()
    assert [one.tokens for one in together] == [alone(model, ids, 6) for ids in prompts]
    assert stats.prompt_tokens == 161 + 9 and stats.prefix.recalled == 9 * 160


def test_without_memory_nothing_is_kept():
    model, prompts = made("Llama"), beginning_alike(6)
    with InferenceEngine(model, prefix_bytes=0) as engine:
        engine.generate_batch(prompts, NEW)
        assert engine.stats().prefix is None
    with InferenceEngine(model, prefix_bytes=10) as engine:
        engine.generate_batch(prompts, NEW)
        assert (engine.stats().prefix.blocks, engine.stats().prefix.recalled) == (0, 0)


def test_a_limit_keeps_the_beginnings_used_last():
    model, rng = made("Llama"), random.Random(7)
    with InferenceEngine(model) as engine:
        engine.generate_batch([[5] * 40], NEW)
        block = engine.stats().prefix.bytes
    with InferenceEngine(model, prefix_bytes=4 * block) as engine:
        prompts = [[rng.randrange(3, VOCABULARY) for _ in range(70)] for _ in range(5)]
        for ids in prompts:
            engine.generate_batch([ids], NEW)
        stats = engine.stats().prefix
        assert (stats.blocks, stats.bytes, stats.evicted) == (4, 4 * block, 6)
        for ids in prompts[:2:-1]:
            engine.generate_batch([ids], NEW)
        assert engine.stats().prefix.recalled == 4 * BLOCK


def test_memory_that_runs_out_and_requests_that_move_lose_nothing(monkeypatch):
    from truthgpt_nb.ragged import RaggedModel

    model, prompts = made("Llama"), beginning_alike(8) * 3
    expected = [alone(model, ids, 6) for ids in prompts]
    real, calls = RaggedModel.forward, []

    def forward(self, parts):
        calls.append(len(parts))
        if len(calls) in (3, 9):
            raise MemoryError("out of memory")
        return real(self, parts)

    with InferenceEngine(model, chunk_tokens=64, max_batch_size=9) as engine:
        engine.generate_batch([[5]], NEW)
        monkeypatch.setattr(RaggedModel, "forward", forward)
        with pytest.warns(UserWarning, match="memory ran out"):
            written = engine.generate_batch(prompts, NEW)
    assert [one.tokens for one in written] == expected and len(calls) > 9


def test_damage_to_any_byte_is_found_or_harmless(tmp_path):
    model, (ids, *_) = made("Llama"), beginning_alike(9, length=40)
    with InferenceEngine(model, prefix_dir=str(tmp_path)) as engine:
        engine.generate_batch([ids], NEW)
    (file,) = tmp_path.glob("*.safetensors")
    whole, choose = file.read_bytes(), random.Random(0)
    for place in [*range(0, 60, 7), *(choose.randrange(len(whole)) for _ in range(30))]:
        data = bytearray(whole)
        data[place] ^= 1 << choose.randrange(8)
        file.write_bytes(data)
        with InferenceEngine(model, prefix_dir=str(tmp_path)) as engine:
            (one,) = engine.generate_batch([ids], NEW)
            assert one.tokens == alone(model, ids, 6)
    for cut in (0, 1, 9, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with InferenceEngine(model, prefix_dir=str(tmp_path)) as engine:
            engine.generate_batch([ids], NEW)
            assert engine.stats().prefix.broken == 1
        assert file.read_bytes() == whole


def test_two_engines_share_a_folder(tmp_path):
    model, prompts = made("Llama"), beginning_alike(10)
    settings = {"prefix_dir": str(tmp_path), "prefix_disk_bytes": 40_000}
    with InferenceEngine(model, **settings) as one, InferenceEngine(model, **settings) as other:
        for ids in prompts:
            expected = alone(model, ids, 6)
            assert [engine.generate_batch([ids], NEW)[0].tokens for engine in (one, other)] == [expected] * 2
        assert other.stats().prefix.from_disk > 0
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
        assert one.generate_batch(prompts, NEW)[0].tokens == alone(model, prompts[0], 6)


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    model = made("Llama")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CacheError, match="prefix_dir must be a folder that can be written to"):
            InferenceEngine(model, prefix_dir=str(wrong))


def test_a_disk_that_is_full_costs_the_cache_only(tmp_path, monkeypatch):
    model, prompts = made("Llama"), beginning_alike(11)

    def full(*_):
        raise OSError(28, "No space left on device")

    with InferenceEngine(model, prefix_dir=str(tmp_path)) as engine:
        monkeypatch.setattr("truthgpt_nb.prefix.write_whole", full)
        assert engine.generate_batch(prompts, NEW)[0].tokens == alone(model, prompts[0], 6)
        assert engine.generate_batch(prompts, NEW)[0].tokens == alone(model, prompts[0], 6)
    assert list(Path(tmp_path).glob("*.safetensors")) == []


def test_a_cache_without_a_model_knows_nothing():
    cache = PrefixCache()
    assert cache.known(cache.names(list(range(70)))) == 0 and cache.stats().recalled == 0
