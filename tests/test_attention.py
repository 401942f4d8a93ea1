"""Attention: positions against transformers, backends against the definition in float64, swaps taken back."""

import copy
import json
import sys
import types
import warnings
from itertools import product

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj import modeling_gptj
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from truthgpt_nb import attention
from truthgpt_nb.attention import (
    AttentionMask,
    EfficientAttention,
    KVCache,
    PositionalEncoding,
    RotaryPositionalEmbedding,
    attend,
    attention_map,
    attention_weights,
    backend_refusal,
    choose_backend,
    convert_rope_layout,
    packed_documents,
    swap_attention,
)
from truthgpt_nb.core import InputError

LONG = {"original_max_position_embeddings": 128}
LLAMA3 = LONG | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = [
    ("default", {}),
    ("linear", {"factor": 2.5}),
    ("dynamic", {"factor": 4.0}),
    ("yarn", {"factor": 4.0} | LONG),
    ("yarn", {"factor": 16.0, "beta_fast": 20, "beta_slow": 2, "truncate": False} | LONG),
    ("yarn", {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8} | LONG),
    ("yarn", {"factor": 4.0, "attention_factor": 1.3} | LONG),
    ("llama3", {"factor": 8.0} | LLAMA3),
    ("llama3", {"factor": 32.0, "original_max_position_embeddings": 200, "low_freq_factor": 2, "high_freq_factor": 8}),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    "What `auto` measures goes to a folder of the test."
    monkeypatch.setenv("TRUTHGPT_HOME", str(tmp_path / "home"))
    attention._chosen.clear()
    print("seed", torch.seed())  # fresh inputs each time; pytest shows the seed of a test that fails


# positions


@pytest.mark.parametrize(("kind", "settings"), SCALINGS)
@pytest.mark.parametrize(("dim", "theta"), [(16, 10000.0), (128, 500000.0)])
def test_rotation_equals_transformers(kind, settings, dim, theta):
    parameters = {"rope_type": kind, "rope_theta": theta, **settings}
    config = LlamaConfig(
        hidden_size=dim, num_attention_heads=1, max_position_embeddings=256, rope_parameters=dict(parameters)
    )
    rope, reference = RotaryPositionalEmbedding(dim, 256, theta, parameters), LlamaRotaryEmbedding(config)
    if kind in ROPE_INIT_FUNCTIONS:
        frequencies, sharpening = ROPE_INIT_FUNCTIONS[kind](config, seq_len=torch.tensor(300))
        assert torch.equal(rope.frequencies(300), frequencies)
        assert rope.sharpening == sharpening
    for length in (50, 300, 900):
        q, k = torch.randn(2, 2, length, dim), torch.randn(2, 1, length, dim)
        cos, sin = reference(q, torch.arange(length)[None])
        for ours, theirs in zip(rope(q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_interleaved_equals_gptj_and_a_part_of_a_head_may_be_turned():
    q = torch.randn(2, 3, 20, 48)
    table = modeling_gptj.create_sinusoidal_positions(64, 32)[torch.arange(20)][None]
    sin, cos = table.chunk(2, dim=-1)
    theirs = modeling_gptj.apply_rotary_pos_emb(q[..., :32].transpose(1, 2), sin, cos).transpose(1, 2)
    ours = RotaryPositionalEmbedding(32, layout="interleaved").turned(q)
    torch.testing.assert_close(ours[..., :32], theirs, rtol=0, atol=1e-6)
    assert torch.equal(ours[..., 32:], q[..., 32:])


@pytest.mark.parametrize(("kind", "settings"), [one for one in SCALINGS if one[0] != "dynamic"])
def test_tables_that_grow_are_those_that_were_long_from_the_beginning(kind, settings):
    scaling = {"rope_type": kind, **settings}
    short, long = (RotaryPositionalEmbedding(16, length, scaling=scaling) for length in (4, 5000))
    for length in (3, 17, 4999):
        q = torch.randn(1, 1, length, 16)
        assert torch.equal(short.turned(q), long.turned(q))


def test_dynamic_scaling_is_a_function_of_the_input_alone():
    rope = RotaryPositionalEmbedding(16, 32, scaling={"rope_type": "dynamic", "factor": 2.0})
    q = torch.randn(1, 1, 100, 16)
    before = rope.turned(q[:, :, :40])
    rope.turned(q)
    assert torch.equal(rope.turned(q[:, :, :40]), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_stay_exact_in_a_module_that_is_cast(dtype):
    rope, encoding = RotaryPositionalEmbedding(32).to(dtype), PositionalEncoding(32).to(dtype)
    q = torch.randn(1, 1, 3000, 32).to(dtype)
    exact = RotaryPositionalEmbedding(32).turned(q.double())
    assert (rope.turned(q).double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    zeros = torch.zeros(1, 3000, 32)
    assert torch.equal(encoding(zeros), PositionalEncoding(32)(zeros))


def test_layouts_convert_weight_and_bias_for_grouped_heads_and_partial_rotation():
    x, weight, bias = torch.randn(2, 7, 24), torch.randn(3 * 20, 24), torch.randn(3 * 20)
    heads = lambda w, b: (x @ w.T + b).view(2, 7, 3, 20).transpose(1, 2)
    moved = [convert_rope_layout(t, 3, "half", "interleaved", dim=12) for t in (weight, bias)]
    half, interleaved = (RotaryPositionalEmbedding(12, layout=layout) for layout in ("half", "interleaved"))
    a, b = half.turned(heads(weight, bias)), interleaved.turned(heads(*moved))
    torch.testing.assert_close(a @ a.mT, b @ b.mT, rtol=1e-4, atol=1e-4)
    assert torch.equal(convert_rope_layout(moved[0], 3, "interleaved", "half", dim=12), weight)
    with pytest.raises(InputError, match="5 heads divide"):
        convert_rope_layout(torch.randn(64, 8), 5, "half", "interleaved")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotaryPositionalEmbedding(7), "dim must be an even"),
        (lambda: RotaryPositionalEmbedding(8, 0), "max_seq_len must be"),
        (lambda: RotaryPositionalEmbedding(8, theta=0.5), "theta must be"),
        (lambda: RotaryPositionalEmbedding(8, layout="halves"), "half or interleaved"),
        (lambda: RotaryPositionalEmbedding(2, scaling={"rope_type": "dynamic", "factor": 2.0}), "at least 4"),
        (lambda: RotaryPositionalEmbedding(8, scaling={"rope_type": "linear"}), "must have factor for linear"),
        (
            lambda: RotaryPositionalEmbedding(8, scaling={"rope_type": "linear", "factor": 0.5}),
            "a number of at least 1",
        ),
        (
            lambda: RotaryPositionalEmbedding(8, scaling={"rope_type": "linear", "factor": 2.0, "bta": 1}),
            "of linear only",
        ),
        (lambda: RotaryPositionalEmbedding(8, scaling="yarn"), "scaling must be a mapping"),
        (lambda: RotaryPositionalEmbedding(8, scaling={"rope_type": "linear", "factor": "2"}), "that is a number"),
        (lambda: RotaryPositionalEmbedding(8).turned(torch.ones(1, 2, 3, 4)), "head_dim at least 8"),
        (lambda: RotaryPositionalEmbedding(8).turned(torch.ones(1, 1, 2, 8), torch.tensor([0, -1])), "not be negative"),
        (lambda: RotaryPositionalEmbedding(8).turned(torch.ones(1, 1, 2, 8), torch.rand(2)), "whole numbers"),
        (lambda: PositionalEncoding(8, dropout=1.0), "dropout must be"),
        (lambda: PositionalEncoding(8)(torch.ones(1, 2, 6)), "last dimension"),
    ],
)
def test_bad_positions_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# every backend against the definition in float64


def exact_attention(q, k, v, mask, scale=None):
    "Written a second time, query by query, so that the definition is tested as well."
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    dense = mask.dense(q.shape[2], k.shape[2])
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool) if dense is None else dense
    added = None
    if seen.dtype != torch.bool:
        added = seen.expand(*q.shape[:3], k.shape[2]).double()
        seen = seen > torch.finfo(seen.dtype).min
    seen = seen.expand(*q.shape[:3], k.shape[2])
    for b, h, t in product(*map(range, q.shape[:3])):
        keys = seen[b, h, t].nonzero()[:, 0]
        if len(keys):
            group = h // (q.shape[1] // k.shape[1])
            scores = k[b, group, keys] @ q[b, h, t] * (scale or q.shape[-1] ** -0.5)
            scores = scores if added is None else scores + added[b, h, t, keys]
            out[b, h, t] = scores.softmax(0) @ v[b, group, keys]
    return out


def documents_of(*rows):
    return torch.tensor([[number for number, count in row for _ in range(count)] for row in rows])


PACKED = documents_of([(0, 20), (1, 20), (2, 10), (-1, 46)], [(-1, 5), (4, 60), (5, 31)])
HOLES = documents_of([(0, 20), (-1, 3), (0, 73)], [(-1, 96)])
MASKS = {
    "full": AttentionMask(),
    "causal": AttentionMask(True),
    "window": AttentionMask(True, 7),
    "wide window": AttentionMask(True, 90),
    "both sides": AttentionMask(False, 5),
    "packed": AttentionMask(True, None, PACKED),
    "packed both ways": AttentionMask(False, None, PACKED),
    "packed window": AttentionMask(True, 7, PACKED),
    "packed both sides": AttentionMask(False, 4, PACKED),
    "holes": AttentionMask(True, None, HOLES),
    "holes and window": AttentionMask(False, 9, HOLES),
}


def masks(name, queries=96, keys=96):
    if name == "arbitrary":
        return AttentionMask(visible=torch.rand(2, 4, queries, keys) > 0.7)
    if name == "added":
        return AttentionMask(
            causal=True, visible=torch.randn(1, 4, queries, keys).where(torch.rand(keys) > 0.3, -torch.inf)
        )
    if name == "lowest number":
        lowest = torch.finfo(torch.float32).min
        return AttentionMask(visible=torch.zeros(2, 1, queries, keys).masked_fill(torch.rand(queries, 1) > 0.5, lowest))
    return MASKS[name]


NAMES = [*MASKS, "arbitrary", "added", "lowest number"]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random_heads(dtype, queries=96, keys=96, heads=4, kv_heads=2, head_dim=24):
    shapes = [(2, heads, queries, head_dim), (2, kv_heads, keys, head_dim), (2, kv_heads, keys, head_dim)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def assert_agrees(out, inputs, mask, tolerance):
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, weight = attend(*exact, mask, "eager"), torch.randn(out.shape)
    (out.float() * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for ours, theirs in [(out, expected), *[(a.grad, b.grad) for a, b in zip(inputs, exact, strict=True)]]:
        assert ours.isfinite().all()
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_definition_is_the_sum_over_the_keys_that_are_seen(name):
    mask = masks(name)
    q, k, v = (x.detach().double() for x in random_heads(torch.float64))
    torch.testing.assert_close(attend(q, k, v, mask, "eager"), exact_attention(q, k, v, mask), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["eager", "torch", "math", "flash"])
@pytest.mark.parametrize("name", NAMES)
def test_backends_agree_with_the_definition(name, backend, dtype):
    mask, inputs = masks(name), random_heads(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fallback
        out = attend(*inputs, mask, backend)
    assert out.dtype == dtype
    assert_agrees(out, inputs, mask, TOLERANCE[dtype])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("wide window",)])
@pytest.mark.parametrize("queries", [1, 5])
def test_a_few_queries_belong_to_the_last_keys(name, queries):
    mask = masks(name, queries)
    inputs = random_heads(torch.float32, queries)
    assert_agrees(attend(*inputs, mask, "torch"), inputs, mask, 2e-6)


@pytest.mark.parametrize(
    ("length", "window", "causal"), [*product((400, 511, 777), (1, 2, 63, 64, 65, 129), (True, False))]
)
def test_blocks_of_a_window_are_the_window(length, window, causal):
    documents = (torch.rand(2, length) < 0.02).cumsum(1).masked_fill(torch.rand(2, length) < 0.05, -1)
    q, k, v = (x.detach() for x in random_heads(torch.float32, length, length, head_dim=8))
    for numbers in (None, documents):
        mask = AttentionMask(causal, window, numbers)
        assert attention._in_blocks(mask, q, k)
        through_matrix = AttentionMask(visible=mask.dense(length, length))
        torch.testing.assert_close(
            attend(q, k, v, mask, "torch"), attend(q, k, v, through_matrix, "eager"), rtol=0, atol=5e-6
        )


@pytest.mark.parametrize("backend", ["eager", "torch", "math", "flash"])
def test_nothing_seen_gives_zeros_and_no_gradient(backend):
    inputs = random_heads(torch.float32)
    for mask in (
        AttentionMask(visible=torch.zeros(1, 1, 96, 96, dtype=torch.bool)),
        AttentionMask(documents=torch.full((2, 96), -1)),
        AttentionMask(True, 3, torch.full((2, 96), -1)),
    ):
        out = attend(*inputs, mask, backend)
        out.sum().backward()
        assert (out == 0).all() and all((x.grad == 0).all() for x in inputs)


def test_a_kernel_that_knows_no_blind_queries_is_guarded():
    def naive(q, k, v, mask, causal, dropout, scale):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ v

    for name in ("arbitrary", "added"):
        mask, inputs = masks(name), random_heads(torch.float32, kv_heads=4)
        dense = mask.dense(96, 96).clone()
        blind = False if dense.dtype == torch.bool else -torch.inf
        dense[:, :, 10:20] = blind
        assert naive(*inputs, dense, False, 0.0, None).isnan().any()
        out = attention._guarded(naive, *inputs, dense, False, 0.0, None)
        assert_agrees(out, inputs, AttentionMask(visible=dense), 2e-6)


def test_empty_and_single_inputs():
    assert attend(*(torch.ones(0, 2, 5, 8) for _ in range(3)), AttentionMask(True), "torch").shape == (0, 2, 5, 8)
    one = torch.randn(1, 1, 1, 8)
    torch.testing.assert_close(attend(one, one, one, AttentionMask(True, 1), "torch"), one)


@pytest.mark.slow  # it compiles
@pytest.mark.skipif(backend_refusal("flex", "cpu") is not None, reason=str(backend_refusal("flex", "cpu")))
def test_flex_agrees_where_it_can_be_compiled():
    q, k, v = (x.detach() for x in random_heads(torch.float32))
    mask = AttentionMask(True, 30, PACKED)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert choose_backend(q, k, mask, "flex").used == "flex"
        out = attend(q, k, v, mask, "flex")
    torch.testing.assert_close(out, attend(q, k, v, mask, "eager"), rtol=0, atol=2e-6)


def test_flex_rules_are_the_mask():
    from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

    q, k, v = (x.detach() for x in random_heads(torch.float32))
    for name in NAMES:
        mask = masks(name)
        seen, added = attention._flex_rules(mask, q, k)
        dense = mask.dense(96, 96)
        expected = torch.ones(1, 1, 96, 96) if dense is None else attention.seen_keys(dense)
        assert torch.equal(create_mask(seen, 2, 4, 96, 96, device="cpu"), expected.bool().expand(2, 4, 96, 96)), name
        assert (added is None) == (name not in ("added", "lowest number"))
    for name in ("packed window", "added"):
        mask = masks(name)
        seen, added = attention._flex_rules(mask, q, k)
        blocks = create_block_mask(seen, 2, 4, 96, 96, device="cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not compiled
            out = flex_attention(q, k, v, added, blocks, enable_gqa=True)
        torch.testing.assert_close(out, attend(q, k, v, mask, "eager"), rtol=0, atol=2e-6)


def test_flex_beyond_the_limit_of_shapes_is_replaced_and_said(monkeypatch):
    from torch._dynamo.exc import FailOnRecompileLimitHit

    def beyond(*_, **__):
        raise FailOnRecompileLimitHit("limit")

    monkeypatch.setattr(attention, "_compiled_flex", lambda: beyond)
    monkeypatch.setattr(attention, "compiler_problem", lambda: None)
    q, k, v = (x.detach() for x in random_heads(torch.float32))
    with pytest.warns(UserWarning, match="torch instead of flex: RuntimeError: FlexAttention was compiled for"):
        out = attend(q, k, v, backend="flex")
    assert torch.equal(out, attend(q, k, v, backend="torch"))


# packages that are not here, with stand-ins of the same signature


def test_xformers_is_called_in_its_own_layout(monkeypatch):
    class Lower:
        pass

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        heads = [x.transpose(1, 2) for x in (query, key, value)]
        assert heads[0].shape[1] == heads[1].shape[1] == heads[2].shape[1]
        mask = AttentionMask(isinstance(attn_bias, Lower))
        if isinstance(attn_bias, torch.Tensor):
            assert attn_bias.shape == (*heads[0].shape[:3], heads[1].shape[2]) and attn_bias.stride(-2) % 8 == 0
            assert attn_bias.dtype == query.dtype
            mask = AttentionMask(visible=attn_bias)
        return attend(*heads, mask, "eager").transpose(1, 2)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention, ops.LowerTriangularMask = memory_efficient_attention, Lower
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    for name in NAMES:
        for length in (96, 93):
            mask = masks(name, length, length)
            if mask.documents is not None:
                mask = AttentionMask(mask.causal, mask.window, mask.documents[:, :length])
            inputs = random_heads(torch.float32, length, length)
            assert_agrees(attention._computed("xformers", *inputs, mask), inputs, mask, 2e-6)


def test_flash_attention_is_called_in_its_own_layout(monkeypatch):
    def window_mask(causal, window_size, documents=None):
        left, right = window_size
        assert left == -1 or right == (0 if causal else left)
        return AttentionMask(causal, None if left < 0 else left + 1, documents)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **_):
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        return attend(*heads, window_mask(causal, window_size), "eager").transpose(1, 2)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), **_,
    ):  # fmt: skip
        assert cu_seqlens_q.dtype == torch.int32 and int(cu_seqlens_q.diff().max()) == max_seqlen_q == max_seqlen_k
        documents = attention.documents_between(cu_seqlens_q)
        heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return attend(*heads, window_mask(causal, window_size, documents), "eager")[0].transpose(0, 1)

    module = types.ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    for name in ("full", "causal", "window", "both sides", "packed", "packed window", "packed both ways"):
        inputs, mask = random_heads(torch.float32), MASKS[name]
        assert_agrees(attention._flash_package(*inputs, mask, 0.0, None), inputs, mask, 2e-6)
    for queries in (1, 5):
        inputs = random_heads(torch.float32, queries)
        assert_agrees(attention._flash_package(*inputs, MASKS["causal"], 0.0, None), inputs, MASKS["causal"], 2e-6)


# what cannot be done


@pytest.mark.parametrize(
    ("backend", "dropout", "reason"),
    [
        ("xformers", 0, "xformers"),
        ("flex", 0, "no gradient on a CPU"),
        ("flash", 0.1, "no dropout"),
        ("cudnn", 0, "CUDA"),
    ],
)
def test_a_fallback_is_said(backend, dropout, reason):
    q, k, v = random_heads(torch.float32)
    choice = choose_backend(q, k, backend=backend, dropout=dropout)
    assert (choice.used, choice.fell_back) == ("torch", True) and reason in choice.reason
    with pytest.warns(UserWarning, match=reason):
        attend(q, k, v, backend=backend, dropout=dropout)


def test_a_kernel_that_fails_is_replaced_and_said_but_torch_itself_is_not(monkeypatch):
    def fails(*_):
        raise RuntimeError("No available kernel. Aborting execution.")

    q, k, v = random_heads(torch.float32)
    monkeypatch.setattr(attention, "_sdpa_by", fails)
    with pytest.warns(UserWarning, match="torch instead of flash: RuntimeError: No available kernel"):
        out = attend(q, k, v, backend="flash")
    assert torch.equal(out, attend(q, k, v, backend="torch"))
    monkeypatch.setattr(attention, "_sdpa", fails)
    with pytest.raises(RuntimeError, match="No available kernel"):
        attend(q, k, v, backend="torch")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: attend(q, k, v[:, :, 1:]), "heads of q that those of k and v divide"),
        (lambda q, k, v: attend(q[0], k[0], v[0]), "must be"),
        (lambda q, k, v: attend(q, k.bfloat16(), v), "of one type and on one device"),
        (lambda q, k, v: attend(q, k[:, :, :9], v[:, :, :9], AttentionMask(True)), "no more than 9 tokens"),
        (lambda q, k, v: attend(q, k, v, AttentionMask(visible=torch.ones(2, 3, 96, 96) > 0)), "visible must go with"),
        (lambda q, k, v: attend(q, k, v, AttentionMask(documents=PACKED[:1])), "one number for each key"),
        (lambda q, k, v: AttentionMask(documents=torch.ones(2, 3)), "whole numbers"),
        (lambda q, k, v: AttentionMask(visible=torch.ones(2, 3)), "visible must be"),
        (lambda q, k, v: attend(q, k, v, backend="Flash"), "Did you mean 'flash'"),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(*random_heads(torch.float32))


# auto


def measured(monkeypatch, times):
    "What auto would measure, and how often it does."
    asked = []

    def seconds(q, k, mask, backends, training):
        asked.append(training)
        return {name: times[name] for name in backends}

    monkeypatch.setattr(attention, "attention_seconds", seconds)
    return asked


@pytest.mark.parametrize(("eager", "used"), [(0.5, "eager"), (0.95, "torch"), (2.0, "torch")])
def test_auto_takes_another_only_beyond_a_margin(monkeypatch, eager, used):
    asked = measured(monkeypatch, {"torch": 1.0, "eager": eager})
    q, k, v = random_heads(torch.float32)
    for _ in range(3):
        assert choose_backend(q, k).used == used
    with torch.no_grad():
        choose_backend(q, k)
    choose_backend(q, k, AttentionMask(True))
    assert asked == [True, False, True]  # once for each class
    attend(q, k, v)


def test_auto_remembers_on_disk_and_survives_what_is_wrong_there(monkeypatch, tmp_path):
    asked = measured(monkeypatch, {"torch": 1.0, "eager": 0.5})
    q, k, _ = random_heads(torch.float32)
    file = tmp_path / "home/attention.json"
    choose_backend(q, k)
    for broken in ("{", "[]", '{"a": 1}', json.dumps(dict.fromkeys(json.loads(file.read_text()), 1))):
        attention._chosen.clear()
        assert choose_backend(q, k).used == "eager" and len(asked) == 1
        file.write_text(broken)
        attention._chosen.clear()
        assert choose_backend(q, k).used == "eager"
        asked.pop()
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("a file, not a folder")
    attention._chosen.clear()
    assert choose_backend(q, k).used == "eager"


def test_auto_leaves_random_numbers_and_gradients_alone():
    q, k, v = random_heads(torch.float32, heads=2, kv_heads=1, head_dim=8)
    state = torch.get_rng_state()
    out = attend(q, k, v)
    assert torch.equal(torch.get_rng_state(), state)
    assert_agrees(out, [q, k, v], AttentionMask(), 2e-6)
    with torch.inference_mode():
        x = torch.randn(1, 1, 40, 8)
        attend(x, x, x)


def test_auto_does_not_make_a_matrix_that_is_too_large(monkeypatch):
    asked = measured(monkeypatch, {"torch": 1.0, "eager": 0.1})
    q = torch.empty(64, 32, 1, 8).expand(64, 32, 1024, 8)
    assert choose_backend(q, q).used == "torch" and asked == []


# the layer

LAYERS = [
    {"rope": True, "num_kv_heads": 1},
    {"rope": True, "window": 6, "qk_norm": True, "bias": True},
    {"rope": RotaryPositionalEmbedding(8, 4, scaling={"rope_type": "yarn", "factor": 4.0} | LONG), "head_dim": 10},
    {"num_kv_heads": 2, "window": 3},
]


def made(setting, **more):
    return EfficientAttention(32, 4, causal=True, **{"attention_backend": "torch"} | setting | more).eval()


@pytest.mark.parametrize("setting", LAYERS)
def test_decoding_equals_the_full_pass_and_so_do_its_gradients(setting):
    layer, x = made(setting), torch.randn(3, 23, 32)
    whole = layer(x)
    cache = KVCache()
    pieces = [layer(part, cache=cache) for part in x.split([5, 1, 1, 9, 7], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-5)
    assert len(cache) == 23
    weight = torch.randn_like(whole)
    grads = [
        torch.autograd.grad((out * weight).sum(), layer.k_proj.weight, retain_graph=True)
        for out in (whole, torch.cat(pieces, 1))
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        cache.reset()
        again = [layer(part, cache=cache) for part in x.split([5, 1, 1, 9, 7], dim=1)]
    torch.testing.assert_close(torch.cat(again, dim=1), whole, rtol=0, atol=1e-5)


def test_each_token_decoded_with_dynamic_scaling_equals_the_full_pass_over_its_beginning():
    rope = RotaryPositionalEmbedding(8, 8, scaling={"rope_type": "dynamic", "factor": 3.0})
    layer, x, cache = made({"rope": rope}), torch.randn(2, 20, 32), KVCache()
    with torch.no_grad():
        layer(x[:, :6], cache=cache)
        for t in range(6, 20):
            torch.testing.assert_close(
                layer(x[:, t : t + 1], cache=cache), layer(x[:, : t + 1])[:, -1:], rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("setting", LAYERS)
@pytest.mark.parametrize("backend", ["torch", "eager", "flash"])
def test_packed_documents_see_only_themselves(setting, backend):
    layer, lengths = made(setting, attention_backend=backend), torch.randint(1, 30, (2, 4))
    lengths[1, 3] += lengths[0].sum() - lengths[1].sum() if lengths[0].sum() > lengths[1].sum() else 0
    lengths[0, 3] += lengths[1].sum() - lengths[0].sum()
    rows = [[torch.randn(1, n, 32) for n in row] for row in lengths.tolist()]
    x = torch.cat([torch.cat(row, dim=1) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths.tolist()])
    alone = torch.cat([torch.cat([layer(document) for document in row], dim=1) for row in rows])
    for mask in (None, torch.ones(2, x.shape[1])):
        torch.testing.assert_close(layer(x, mask, positions), alone, rtol=0, atol=1e-5)
    ends = torch.tensor([0, *lengths[0].cumsum(0).tolist()])
    torch.testing.assert_close(layer(x[:1], cu_seqlens=ends), alone[:1], rtol=0, atol=1e-5)
    changed = x.clone()
    first = int(lengths[0, 0])
    changed[0, :first] += 1
    assert torch.equal(layer(x, position_ids=positions)[0, first:], layer(changed, position_ids=positions)[0, first:])


@pytest.mark.parametrize("setting", LAYERS)
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(setting, side):
    layer, x = made(setting), torch.randn(2, 17, 32)
    at = {"left": 0, "right": 17, "middle": 9}[side]
    padding = torch.full((2, 6, 32), 1e3)
    padded = torch.cat([x[:, :at], padding, x[:, at:]], dim=1)
    mask = torch.cat([torch.ones(2, at), torch.zeros(2, 6), torch.ones(2, 17 - at)], dim=1)
    if side == "middle":  # tokens count, places do not: a window reaches over padding only after a cache
        cache = KVCache()
        out = torch.cat([layer(padded[:, :15], mask[:, :15], cache=cache), layer(padded[:, 15:], cache=cache)], dim=1)
    else:
        out = layer(padded, mask)
    torch.testing.assert_close(out[:, mask[0] > 0], layer(x), rtol=0, atol=1e-5)


def test_a_mask_of_four_dimensions_holds_besides_causal():
    layer, x = made({}), torch.randn(2, 9, 32)
    mask = torch.rand(2, 1, 9, 9) > 0.4
    both = mask & torch.ones(9, 9, dtype=torch.bool).tril()
    free = EfficientAttention(32, 4, attention_backend="eager").eval()
    free.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, mask), free(x, both), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer(x, mask[:, 0]), layer(x, mask))


def test_a_layer_copies_casts_compiles_and_trains():
    layer, x = made(LAYERS[0], dropout=0.2), torch.randn(2, 30, 32)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    torch.testing.assert_close(layer.to(torch.bfloat16)(x.bfloat16()).float(), expected, rtol=0, atol=0.05)
    layer.float()
    positions = torch.cat([torch.arange(10), torch.arange(20)])
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(x, position_ids=positions), layer(x, position_ids=positions))
    layer.train()
    assert not torch.equal(layer(x), layer(x))  # dropout
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == made(LAYERS[1])(x).dtype == torch.bfloat16


def test_the_weights_of_a_layer_are_those_it_uses():
    layer, x = made(LAYERS[1], bias=False), torch.randn(1, 12, 32)
    weights = layer.weights(x)
    values = layer.v_proj(x).unflatten(-1, (4, 8)).transpose(1, 2)
    out = layer.o_proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-5)
    assert torch.equal(attention_map(layer, x, head=2).weights, weights[0, 2].detach())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EfficientAttention(30, 4), "multiple of num_heads=4"),
        (lambda: EfficientAttention(32, 4, 3), "num_kv_heads must divide"),
        (lambda: EfficientAttention(32, 4, attention_backend="sdp"), "backend must name"),
        (lambda: EfficientAttention(32, 4, dropout=1.5), "dropout"),
        (lambda: EfficientAttention(32, 4, window=0), "window"),
        (lambda: EfficientAttention(32, 0), "num_heads"),
        (lambda: EfficientAttention(12, 4, rope=True), "dim must be an even"),
        (lambda: EfficientAttention(32, 4, rope=RotaryPositionalEmbedding(16)), "rope must turn at most the 8"),
        (lambda: made({})(torch.randn(2, 3, 31)), r"x must be \[batch, seq, 32\]"),
        (lambda: made({})(torch.randn(2, 3, 32), torch.ones(2, 4)), "attention_mask must be"),
        (lambda: made({})(torch.randn(2, 3, 32), position_ids=torch.arange(4)), "position_ids must be"),
        (lambda: made({})(torch.randn(2, 3, 32), cu_seqlens=torch.tensor([0, 3])), "cu_seqlens must end with seq"),
        (lambda: made({})(torch.randn(2, 3, 32), position_ids=torch.zeros(3, 3).long()), "of a batch of 2"),
        (lambda: made({})(torch.randn(1, 3, 32), cu_seqlens=[0, 3]), "boundaries"),
        (lambda: made({})(torch.randn(2, 3, 32), cache={}), "cache must be a KVCache"),
        (lambda: EfficientAttention(32, 4, rope="yes"), "rope must be"),
        (lambda: packed_documents(torch.arange(3)), "batch, seq"),
    ],
)
def test_bad_layers_and_inputs_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# swaps


def small(kind="gpt2"):
    if kind == "bert":
        return BertModel(
            BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        ).eval()
    if kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=32, n_positions=64)).eval()


def drawing(cross=False, added=False):
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16, "layers_per_block": 1}
    if not cross:
        blocks |= {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        return UNet2DModel(**blocks).eval()
    names = (
        ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
        if added
        else ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    )
    blocks |= {"down_block_types": ("DownBlock2D", names[0]), "up_block_types": (names[1], "UpBlock2D")}
    if added:
        blocks |= {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}
    return UNet2DConditionModel(**blocks, cross_attention_dim=8, attention_head_dim=4).eval()


IDS = torch.arange(12)[None]


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_a_transformers_model_is_swapped_verified_and_put_back(kind):
    model = small(kind)
    held = {n: p.clone() for n, p in model.state_dict().items()}
    reference = model(IDS)[0]
    report = swap_attention(model, "eager", sample={"input_ids": IDS})
    assert report.verdict == "verified" and report.difference <= 1e-4
    assert model.config._attn_implementation == "eager"
    assert report.calls["after"]["softmax"] >= 2 and "scaled_dot_product_attention" not in report.calls["after"]
    (change,) = report.to_dict()["changes"]
    assert (change["before"], change["after"], change["layers"]) == ("sdpa", "eager", 2)
    report.undo()
    report.undo()
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(IDS)[0], reference)
    assert all(torch.equal(p, held[n]) for n, p in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize(("cross", "added"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("backend", ["eager", "sliced", "torch"])
def test_a_diffusers_model_is_swapped_by_its_processors(cross, added, backend):
    unet, step = drawing(cross, added), torch.tensor([3])
    sample = (torch.randn(2, unet.config.in_channels, 16, 16), step, *[torch.randn(2, 5, 8)] * cross)
    processors = [m.processor for m in unet.modules() if isinstance(m, Attention)]
    process_wide = _AttentionBackendRegistry.get_active_backend()
    report = swap_attention(unet, backend, sample=sample)
    assert report.verdict == "verified", report
    assert sum(change.layers for change in report.changes) == len(processors)
    report.undo()
    assert all(
        a is b
        for a, b in zip([m.processor for m in unet.modules() if isinstance(m, Attention)], processors, strict=True)
    )
    assert _AttentionBackendRegistry.get_active_backend() == process_wide


def test_a_newer_diffusers_model_is_swapped_without_touching_the_process():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    sample = {
        "hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip
    process_wide = _AttentionBackendRegistry.get_active_backend()
    with swap_attention(model, "eager", sample=sample) as report:
        assert report.verdict == "verified" and report.changes[0].after == "_native_math"
        assert _AttentionBackendRegistry.get_active_backend() == process_wide
    assert {m.processor._attention_backend for m in model.modules() if hasattr(m, "processor")} == {None}
    assert swap_attention(model, "sliced").verdict == "does not apply"


def test_a_pipeline_is_swapped_in_all_its_parts():
    pipeline = DDIMPipeline(drawing(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    report = swap_attention(pipeline, "eager", sample={"num_inference_steps": 2, "output_type": "np"})
    assert report.verdict == "verified" and report.changes[0].part == "unet"


def test_layers_of_ours_inside_a_model():
    model = nn.Sequential(
        EfficientAttention(16, 2, attention_backend="torch"), EfficientAttention(16, 2, attention_backend="math")
    )
    report = swap_attention(model, "eager", sample=torch.randn(1, 5, 16))
    assert report.verdict == "verified" and [m.attention_backend for m in model] == ["eager", "eager"]
    report.undo()
    assert [m.attention_backend for m in model] == ["torch", "math"]


def test_an_output_that_moves_is_taken_back():
    model = small()

    def spoil(module, inputs, out):
        if module.config._attn_implementation == "eager":
            out.logits = out.logits + 1
        return out

    model.register_forward_hook(spoil)
    report = swap_attention(model, "eager", sample=IDS)
    assert report.verdict == "undone" and "moves by" in report.reason
    assert model.config._attn_implementation == "sdpa"
    assert swap_attention(model, "eager", sample=IDS, tolerance=1e6).verdict == "verified"


@pytest.mark.parametrize("error", [RuntimeError("no"), torch.OutOfMemoryError("much")])
def test_a_model_that_fails_is_taken_back(error):
    model = small()

    def fail(module, inputs):
        if module.config._attn_implementation == "eager":
            raise error

    model.register_forward_pre_hook(fail)
    report = swap_attention(model, "eager", sample=IDS)
    assert report.verdict == "undone" and model.config._attn_implementation == "sdpa"


def test_an_interrupt_is_passed_on_with_everything_put_back():
    model = small()

    def stop(module, inputs):
        if module.config._attn_implementation == "eager":
            raise KeyboardInterrupt

    model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        swap_attention(model, "eager", sample=IDS)
    assert model.config._attn_implementation == "sdpa" and not model.training


def test_a_switch_without_effect_is_noticed(monkeypatch):
    model = small()
    monkeypatch.setattr("transformers.models.gpt2.modeling_gpt2.ALL_ATTENTION_FUNCTIONS", _always_sdpa())
    report = swap_attention(model, "eager", sample=IDS)
    assert report.verdict == "undone" and "no effect" in report.reason


def _always_sdpa():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    class Stubborn:
        def get_interface(self, *_):
            return ALL_ATTENTION_FUNCTIONS["sdpa"]

        def __getitem__(self, _):
            return ALL_ATTENTION_FUNCTIONS["sdpa"]

    return Stubborn()


def test_what_a_swap_cannot_do_is_said():
    assert "transformers has no attention by xformers" in swap_attention(small(), "xformers").reason
    assert swap_attention(nn.Linear(2, 2), "torch").reason == "no attention was found"
    assert swap_attention(small(), "eager").verdict == "unverified"
    assert "flash is SDPA's own flash kernel for cpu" in swap_attention(small(), "flash", IDS).reason
    with pytest.raises(InputError, match="Did you mean 'eager'"):
        swap_attention(small(), "eagr")
    with pytest.raises(InputError, match="must be a module or a pipeline"):
        swap_attention([], "torch")


def test_a_sample_that_fails_before_the_swap_changes_nothing():
    model = small()
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        swap_attention(model, "eager", sample={"no_such_argument": 1})
    assert model.config._attn_implementation == "sdpa"


def test_weights_are_read_from_a_model_that_stays_as_it_was():
    model = small("llama").train()
    shown = attention_map(model, {"input_ids": IDS}, layer=-1, head=1, labels=list("abcdefghijkl"))
    assert shown.layer == 1 and torch.allclose(shown.weights.sum(1), torch.ones(12))
    assert (shown.weights.triu(1) == 0).all()
    assert model.training and model.config._attn_implementation == "sdpa"
    assert shown.figure().axes
    with pytest.raises(InputError, match="labels must be one for each of 12 keys"):
        attention_map(model, IDS, labels=["a"])


def test_weights_of_grouped_heads_and_of_blind_queries():
    q, k, _ = (x.detach() for x in random_heads(torch.float32))
    weights = attention_weights(q, k, masks("packed").dense(96, 96))
    seen = PACKED >= 0
    torch.testing.assert_close(weights.sum(-1), seen[:, None].float().expand(2, 4, 96))
