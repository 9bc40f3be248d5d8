"""The encoder-decoder: against PyTorch's own layers and Hugging Face's Marian with copied weights; pads, caches, translation."""
import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import HALVES, with_parameters
from torch import nn
from torch.testing import assert_close

from attn_nb.causal import causal_mask, mask_to_bias, padding_mask
from attn_nb.encoder_decoder import (
    CrossDecoderLayer,
    EncoderLayer,
    FeedForward,
    Seq2SeqTransformer,
    Transformer,
    translate,
)
from attn_nb.kv_cache import KVCache
from attn_nb.multi_head import MultiHeadAttention
from attn_nb.positions import sinusoidal_positions
from attn_nb.testing import (
    assert_cache_equals_full,
    assert_causal,
    assert_eval_deterministic,
    assert_parity,
    assert_permutation_equivariant,
    assert_rows_sum_to_one,
)

BOTH = pytest.mark.parametrize("norm_first", [False, True])
SRC_REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
TGT_REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
SRC_PADS, TGT_PADS = padding_mask(SRC_REAL), padding_mask(TGT_REAL)
BOS, EOS, PAD = 1, 2, 0


def lively(module):
    """Weights for which scores, activations, norms and biases count: a library's first ones hide mistakes."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() > 1:
                p.normal_(0, (2 if "in_proj" in name or "q_proj" in name or "k_proj" in name else 1.3) * p.shape[1] ** -0.5)
            else:
                p.normal_(1 if "norm" in name and "weight" in name else 0, 0.4)
    return module


def encoder(**options):
    return lively(EncoderLayer(12, 3, 20, **options).double())


def decoder(**options):
    return lively(CrossDecoderLayer(12, 3, 20, **options).double())


def stacks(**options):
    return lively(Transformer(12, 3, 2, 2, 20, 0.0, **options).double())


def model(**options):
    made = Seq2SeqTransformer(11, 13, **{"d_model": 12, "num_heads": 3, "num_encoder_layers": 2, "num_decoder_layers": 2,
                                         "d_ff": 20, "dropout": 0.0, "norm_first": True, "max_len": 40, **options})
    made = lively(made.double())
    for table in (made.src_embed, made.tgt_embed):           # of the size of the waves
        table.weight.data.mul_(1.0)
    return made


def tensors(B=3, Tk=7, Tq=5, D=12):
    return torch.randn(B, Tk, D).double(), torch.randn(B, Tq, D).double()


def ids(B=3, Tk=7, Tq=5):
    return torch.randint(11, (B, Tk)), torch.randint(13, (B, Tq))


def first(out):
    return out[0] if isinstance(out, tuple) else out


# --- the network

@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation, function", [("relu", F.relu), ("gelu", F.gelu), (torch.tanh, torch.tanh)])
@pytest.mark.parametrize("lead", [(5,), (3, 5), (2, 3, 5), (0, 5), (3, 0)])
def test_network_is_two_matrices_and_two_convolutions(bias, activation, function, lead):
    ours = lively(FeedForward(12, 20, activation=activation, bias=bias).double())
    x = 2 * torch.randn(*lead, 12).double()
    up, down = ours.up_proj, ours.down_proj
    assert {n: tuple(p.shape) for n, p in ours.named_parameters() if "weight" in n} == {
        "up_proj.weight": (20, 12), "down_proj.weight": (12, 20)} and (up.bias is not None) == bias == (down.bias is not None)

    def formula(x):
        return F.linear(function(F.linear(x, up.weight, up.bias)), down.weight, down.bias)
    assert_close(ours(x), formula(x), rtol=0, atol=1e-9)
    if x.numel():
        assert_parity(with_parameters(ours, ours), with_parameters(ours, formula), x, *ours.parameters())
        flat = x.reshape(-1, lead[-1], 12)
        inner = function(F.conv1d(flat.mT, up.weight[..., None], up.bias))
        out = F.conv1d(inner, down.weight[..., None], down.bias).mT
        assert_close(ours(x), out.reshape(x.shape), rtol=0, atol=1e-9)
        for wrong in (F.silu, torch.sigmoid, lambda x: x):
            changed = copy.deepcopy(ours)
            changed.activation = wrong
            assert (changed(x) - ours(x)).abs().max() > 1e-2
    if len(lead) > 1 and x.numel():
        assert_permutation_equivariant(ours, x)


def test_networks_dropout_is_inside():
    ours, x = lively(FeedForward(12, 20, 0.5).double()), torch.randn(4, 5, 12).double()
    assert_eval_deterministic(ours, x)
    ours.train().dropout.p = 1.0             # nothing is left but the last bias
    assert_close(ours(x), ours.down_proj.bias.expand(4, 5, 12))


@pytest.mark.parametrize("call, error, words", [
    (lambda: FeedForward(0, 4), ValueError, "d_model"),
    (lambda: FeedForward(4, 0), ValueError, "d_ff"),
    (lambda: FeedForward(4, 4.0), TypeError, "d_ff"),
    (lambda: FeedForward(4, 4, 1.5), ValueError, "dropout"),
    (lambda: FeedForward(4, 4, activation="swish"), ValueError, "activation"),
    (lambda: FeedForward(4, 4, activation=None), TypeError, "activation"),
    (lambda: FeedForward(4, 4, bias=1), TypeError, "bias"),
    (lambda: FeedForward(4, 6)(torch.ones(2, 5)), ValueError, "x"),
    (lambda: FeedForward(4, 6)(torch.ones(2, 4).double()), TypeError, "x"),
    (lambda: FeedForward(4, 6)(torch.ones(2, 4).long()), TypeError, "x"),
    (lambda: EncoderLayer(12, 5, 20), ValueError, "num_heads"),
    (lambda: EncoderLayer(12, 3, 0), ValueError, "d_ff"),
    (lambda: EncoderLayer(12, 3, 20, norm_first=1), TypeError, "norm_first"),
    (lambda: EncoderLayer(12, 3, 20, norm_eps=0.0), ValueError, "eps"),
    (lambda: EncoderLayer(12, 3, 20, -0.1), ValueError, "dropout"),
    (lambda: CrossDecoderLayer(12, 3, 20, norm_eps=None), TypeError, "eps"),
    (lambda: CrossDecoderLayer(12, 3, 20, is_causal=None), TypeError, "is_causal"),
    (lambda: CrossDecoderLayer(12.0, 3, 20), TypeError, "d_model"),
    (lambda: Transformer(12, 3, -1, 2, 20), ValueError, "num_encoder_layers"),
    (lambda: Transformer(12, 3, 2, 2.0, 20), TypeError, "num_decoder_layers"),
    (lambda: Transformer(12, 3, 1, 1, 20, final_norm=0), TypeError, "final_norm"),
    (lambda: Seq2SeqTransformer(0, 5, 12, 3), ValueError, "src_vocab"),
    (lambda: Seq2SeqTransformer(5, 0, 12, 3), ValueError, "tgt_vocab"),
    (lambda: Seq2SeqTransformer(5, 5, 12, 3, 1, 0), ValueError, "num_decoder_layers"),
    (lambda: Seq2SeqTransformer(5, 5, 12, 3, max_len=0), ValueError, "max_len"),
    (lambda: Seq2SeqTransformer(5, 5, 12, 3, tie_embeddings=1), TypeError, "tie_embeddings"),
    (lambda: Seq2SeqTransformer(5, 5, 12, 3, share_embeddings=1), TypeError, "share_embeddings"),
    (lambda: Seq2SeqTransformer(5, 6, 12, 3, share_embeddings=True), ValueError, "src_vocab"),
])
def test_wrong_settings_are_refused(call, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        call()


# --- against PyTorch's layers: outputs, and gradients of inputs and of all parameters

def their_options(data):
    return {"norm_first": data.draw(st.booleans()), "batch_first": data.draw(st.booleans()), "bias": data.draw(st.booleans()),
            "activation": data.draw(st.sampled_from(["relu", "gelu", F.silu])), "layer_norm_eps": data.draw(
                st.sampled_from([1e-5, 0.3]))}


def sequence(x, batch_first, batched=True):
    """(B, T, D) as the layer wants it; and back."""
    return x if batch_first or not batched else x.transpose(0, 1)


def drawn_mask(data, B, Tq, Tk, H=3, per_row=True):
    """(ours, theirs): of PyTorch's kinds, and never a row that sees nothing, which is NaN there."""
    kind = data.draw(st.sampled_from(["none", "bool", "float", "heads"] if per_row else ["none", "bool", "float"]))
    if kind == "none":
        return None, None
    if kind == "float":
        bias = torch.randn(Tq, Tk).double()
        return bias, bias
    lead = (B, H) if kind == "heads" else ()
    may = (torch.rand(*lead, Tq, Tk) > 0.4) | (torch.arange(Tk) == 0)
    return may, ~may.flatten(0, 1) if kind == "heads" else ~may


def drawn_pads(data, B, Tk):
    """(ours, theirs): key padding; the first key stays, so that no row is empty."""
    if not data.draw(st.booleans()):
        return None, None
    real = (torch.rand(B, Tk) > 0.4) | (torch.arange(Tk) == 0)
    return padding_mask(real), ~real


def both_masks(a, b):
    """A mask and pads of ours as one, a bias if the mask is one."""
    if a is None or b is None:
        return b if a is None else a
    return a & b if a.dtype == torch.bool else a + mask_to_bias(b, a.dtype)


def as_bias(drop, like):
    """PyTorch wants a key padding mask of the kind of its attn_mask."""
    return drop if drop is None or like is None or like.dtype == torch.bool else mask_to_bias(~drop, like.dtype)


@given(data=st.data(), B=st.integers(1, 3), T=st.integers(1, 6), H=st.sampled_from([1, 3]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_encoder_layer_equals_pytorch(data, B, T, H):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    options = their_options(data)
    theirs = lively(nn.TransformerEncoderLayer(12, H, 20, 0.0, **options).double())
    ours, x = EncoderLayer.from_torch(theirs), torch.randn(B, T, 12).double()
    (may, drop), (real, pads) = drawn_mask(data, B, T, T, H), drawn_pads(data, B, T)
    mask, order = both_masks(may, real), partial(sequence, batch_first=options["batch_first"])

    def reference(layer, x):
        return order(layer(order(x), src_mask=drop, src_key_padding_mask=as_bias(pads, drop)))

    def again(x):
        return ours.to_torch()(x, src_mask=drop, src_key_padding_mask=as_bias(pads, drop))
    params = [theirs.get_parameter(n) for n, _ in theirs.named_parameters()]
    assert_parity(lambda x: ours(x, attn_mask=mask), lambda x: reference(theirs, x), x)
    assert_parity(lambda x: ours(x, attn_mask=mask, return_weights=True)[0], lambda x: reference(theirs, x), x)
    assert_close(again(x), reference(theirs, x), rtol=0, atol=1e-9)
    assert {n: p.shape for n, p in ours.to_torch().state_dict().items()} == {n: p.shape for n, p in
                                                                             theirs.state_dict().items()}
    for n, p in ours.to_torch().named_parameters():
        assert torch.equal(p, theirs.get_parameter(n))
    assert_their_gradients(partial(ours, attn_mask=mask), partial(reference, theirs), ours, theirs, [x], params)


def assert_their_gradients(run, reference, ours, theirs, inputs, params):
    """Gradients of their parameters = gradients of ours, put under their names by to_torch."""
    cotangent = torch.randn(run(*inputs).shape).double()
    theirs.zero_grad()
    ours.zero_grad()
    reference(*inputs).backward(cotangent)
    run(*inputs).backward(cotangent)
    moved = copy.deepcopy(ours)
    with torch.no_grad():
        for p, q in zip(moved.parameters(), ours.parameters()):
            p.copy_(q.grad)
    moved = dict(moved.to_torch().named_parameters())
    for name, p in theirs.named_parameters():
        assert_close(moved[name], p.grad, rtol=1e-7, atol=1e-9, msg=name)


@given(data=st.data(), B=st.integers(1, 3), Tq=st.integers(1, 6), Tk=st.integers(1, 6), H=st.sampled_from([1, 3]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_decoder_layer_equals_pytorch(data, B, Tq, Tk, H):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    options, causal = their_options(data), data.draw(st.booleans())
    theirs = lively(nn.TransformerDecoderLayer(12, H, 20, 0.0, **options).double())
    ours = CrossDecoderLayer.from_torch(theirs, is_causal=causal)
    memory, x = tensors(B, Tk, Tq)
    (may, drop), (real, pads) = drawn_mask(data, B, Tq, Tq, H), drawn_pads(data, B, Tq)
    (look, hide), (there, gone) = drawn_mask(data, B, Tq, Tk, H), drawn_pads(data, B, Tk)
    mask, memory_mask = both_masks(may, real), both_masks(look, there)
    if causal:                               # theirs needs it as a mask
        future = ~causal_mask(Tq)
        drop = future if drop is None else drop | future if drop.dtype == torch.bool else drop.masked_fill(future, -torch.inf)
    order = partial(sequence, batch_first=options["batch_first"])

    def reference(layer, x, memory, order=order):
        return order(layer(order(x), order(memory), tgt_mask=drop, tgt_key_padding_mask=as_bias(pads, drop),
                           memory_mask=hide, memory_key_padding_mask=as_bias(gone, hide)))

    def run(x, memory, **more):
        return first(ours(x, memory, attn_mask=mask, memory_mask=memory_mask, **more))
    assert_parity(run, partial(reference, theirs), x, memory)
    assert_parity(partial(run, return_weights=True), partial(reference, theirs), x, memory)
    assert_parity(lambda x, m: run(x, ours.project_memory(m)), partial(reference, theirs), x, memory)
    assert_close(reference(ours.to_torch(), x, memory, lambda t: t), reference(theirs, x, memory), rtol=0, atol=1e-9)
    assert_their_gradients(run, partial(reference, theirs), ours, theirs, [x, memory], None)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_whole_model_equals_pytorch(norm_first, batch_first, bias, activation):
    """In both directions; all masks at once, then none; lengths that differ; a text without a batch."""
    theirs = lively(nn.Transformer(12, 3, 2, 3, 20, 0.0, norm_first=norm_first, batch_first=batch_first, bias=bias,
                                   activation=activation).double())
    ours = Transformer.from_torch(theirs)
    (src, tgt), order = tensors(), partial(sequence, batch_first=batch_first)
    bias_mask, may = torch.randn(7, 7).double(), (torch.rand(5, 7) > 0.3) | (torch.arange(7) == 2)
    future = ~causal_mask(5)
    own = TGT_PADS | torch.eye(5).bool()     # their pads see themselves: softmax over nothing is NaN
    masks = {"src_mask": bias_mask, "tgt_mask": (future | ~own).expand(3, 3, 5, 5).flatten(0, 1), "memory_mask": ~may,
             "src_key_padding_mask": mask_to_bias(SRC_REAL.bool(), torch.float64), "memory_key_padding_mask": SRC_REAL == 0}
    ours_masks = {"src_mask": bias_mask + mask_to_bias(SRC_PADS, torch.float64), "tgt_mask": own, "memory_mask": may & SRC_PADS}

    def reference(model, src, tgt, order=order):
        return order(model(order(src), order(tgt), **masks))
    assert_parity(lambda s, t: ours(s, t, **ours_masks), partial(reference, theirs), src, tgt)
    assert_parity(lambda s, t: ours(s, t, return_weights=True, **ours_masks)[0], partial(reference, theirs), src, tgt)
    assert_their_gradients(lambda s, t: ours(s, t, **ours_masks), partial(reference, theirs), ours, theirs, [src, tgt], None)
    back = ours.to_torch()
    assert back.batch_first and {n for n, _ in back.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    assert all(torch.equal(p, theirs.get_parameter(n)) for n, p in back.named_parameters())
    assert_close(reference(back, src, tgt, lambda t: t), reference(theirs, src, tgt), rtol=0, atol=1e-9)
    plain = Transformer.from_torch(theirs, is_causal=False)
    assert_close(plain(src, tgt), order(theirs(order(src), order(tgt))), rtol=0, atol=1e-9)
    assert_close(ours(src[0], tgt[0]), theirs(src[0], tgt[0], tgt_mask=future), rtol=0, atol=1e-9)
    with torch.no_grad():                    # their fast path
        assert_close(ours.eval()(src, tgt), order(theirs.eval()(order(src), order(tgt), tgt_mask=future)), rtol=0, atol=1e-9)
    # controls
    want = reference(theirs, src, tgt)
    for name, wrong in {"memory's pads forgotten": {"memory_mask": may}, "source's pads forgotten": {"src_mask": bias_mask},
                        "polarity": {"memory_mask": ~may & SRC_PADS}, "target's mask forgotten": {"tgt_mask": None}}.items():
        assert (ours(src, tgt, **{**ours_masks, **wrong}) - want).abs().max() > 1e-7, name
    for name in ("encoder_norm", "decoder_norm"):
        changed = copy.deepcopy(ours)
        setattr(changed, name, nn.Identity())
        assert (changed(src, tgt, **ours_masks) - want).abs().max() > 1e-3
    for stack in (ours.encoder_layers, ours.decoder_layers):
        for layer in stack:
            layer.norm_first = not norm_first
        assert (ours(src, tgt, **ours_masks) - want).abs().max() > 1e-3
        for layer in stack:
            layer.norm_first = norm_first


def test_without_the_norm_at_the_end():
    """The paper's model: PyTorch's stacks can be built without the second norm."""
    options = {"batch_first": True, "dropout": 0.0}
    layers = nn.TransformerEncoderLayer(12, 3, 20, **options), nn.TransformerDecoderLayer(12, 3, 20, **options)
    theirs = nn.Transformer(12, 3, custom_encoder=nn.TransformerEncoder(layers[0], 2, enable_nested_tensor=False),
                            custom_decoder=nn.TransformerDecoder(layers[1], 1), batch_first=True).double()
    lively(theirs)
    ours, (src, tgt) = Transformer.from_torch(theirs), tensors()
    assert isinstance(ours.encoder_norm, nn.Identity) and isinstance(ours.decoder_norm, nn.Identity)
    assert_parity(ours, lambda s, t: theirs(s, t, tgt_mask=~causal_mask(5)), src, tgt)
    assert ours.to_torch().encoder.norm is None and ours.to_torch().decoder.norm is None
    assert len(ours.to_torch().encoder.layers) == 2 and len(ours.to_torch().decoder.layers) == 1
    fresh = Transformer(12, 3, 2, 1, 20)
    assert {n for n, _ in fresh.named_parameters()} == {n for n, _ in ours.named_parameters()}
    assert isinstance(Transformer(12, 3, 1, 1, 20, norm_first=True).decoder_norm, nn.LayerNorm)
    assert isinstance(Transformer(12, 3, 1, 1, 20, final_norm=True).encoder_norm, nn.LayerNorm)
    assert isinstance(Transformer(12, 3, 1, 1, 20, norm_first=True, final_norm=False).encoder_norm, nn.Identity)


def test_copies_keep_mode_dtype_and_dropout_and_are_copies():
    theirs = nn.TransformerDecoderLayer(12, 3, 20, 0.25).half().eval()
    state = torch.get_rng_state()
    ours = CrossDecoderLayer.from_torch(theirs)
    back = ours.to_torch()
    assert torch.equal(torch.get_rng_state(), state)
    for layer in (ours, back):
        assert not layer.training and {p.dtype for p in layer.parameters()} == {torch.float16}
        assert all(p.requires_grad for p in layer.parameters())
        assert {m.p for m in layer.modules() if isinstance(m, nn.Dropout) and m is not getattr(
            ours.self_attn, "out_dropout", None)} == {0.25}
    assert back.self_attn.dropout == back.multihead_attn.dropout == 0.25 and ours.self_attn.is_causal
    with torch.no_grad():
        ours.feed_forward.up_proj.weight.fill_(7)
        ours.cross_attn.q_proj.weight.fill_(7)
    for layer in (theirs, back):
        assert not (layer.linear1.weight == 7).any() and not (layer.multihead_attn.in_proj_weight == 7).any()
    assert CrossDecoderLayer.from_torch(theirs.train()).training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = Transformer.from_torch(nn.Transformer(12, 3, 1, 1, 20).eval())
    assert not whole.training and not whole.encoder_layers[0].training and not whole.to_torch().training
    assert whole.to_torch().encoder.layers[0].dropout.p == 0.1


@pytest.mark.parametrize("ours, theirs", [(EncoderLayer, nn.TransformerEncoderLayer),
                                          (CrossDecoderLayer, nn.TransformerDecoderLayer)])
def test_a_learned_activation_is_copied(ours, theirs):
    layer = lively(theirs(12, 3, 20, 0.0, activation=nn.PReLU(), batch_first=True).double())
    copied, (memory, x) = ours.from_torch(layer), tensors()
    back, args = copied.to_torch(), (x,) if ours is EncoderLayer else (x, memory)
    more = {} if ours is EncoderLayer else {"tgt_mask": ~causal_mask(5)}
    for same in (copied(*args), back(*args, **more)):
        assert_close(same, layer(*args, **more), rtol=0, atol=1e-9)
    with torch.no_grad():
        copied.feed_forward.activation.weight.fill_(9)
    assert not (layer.activation.weight == 9).any() and not (back.activation.weight == 9).any()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_what_cannot_be_copied_is_refused():
    layer = nn.TransformerEncoderLayer(12, 3, 20)
    with pytest.raises(TypeError, match=r"\blayer\b"):
        EncoderLayer.from_torch(nn.TransformerDecoderLayer(12, 3, 20))
    with pytest.raises(TypeError, match=r"\blayer\b"):
        CrossDecoderLayer.from_torch(layer)
    with pytest.raises(TypeError, match=r"\blayer\b"):
        EncoderLayer.from_torch(None)

    class Other(nn.TransformerEncoderLayer):
        def forward(self, src):
            return src
    with pytest.raises(TypeError, match=r"\blayer\b"):
        EncoderLayer.from_torch(Other(12, 3, 20))
    strange = nn.Transformer(12, 3, 1, 1, 20)
    strange.__class__ = type("Strange", (nn.Transformer,), {"forward": lambda self, a, b: b})
    with pytest.raises(TypeError, match=r"\bmodel\b"):
        Transformer.from_torch(strange)
    layer.dropout1.p = 0.5
    with pytest.raises(ValueError, match=r"\blayer\b.*\bdropout\b"):
        EncoderLayer.from_torch(layer)
    layer = nn.TransformerEncoderLayer(12, 3, 20)
    layer.self_attn.dropout = 0.3
    with pytest.raises(ValueError, match=r"\blayer\b.*\bdropout\b"):
        EncoderLayer.from_torch(layer)
    layer = nn.TransformerDecoderLayer(12, 3, 20)
    layer.norm3.eps = 0.1
    with pytest.raises(ValueError, match=r"\blayer\b.*\beps\b"):
        CrossDecoderLayer.from_torch(layer)
    with pytest.raises(TypeError, match=r"\bmodel\b"):
        Transformer.from_torch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"\bmodel\b"):
        Transformer.from_torch(nn.Transformer(12, 3, 1, 1, 20, custom_encoder=nn.Identity()))
    with pytest.raises(ValueError, match=r"\bmodel\b"):
        Transformer(12, 3, 0, 1, 20).to_torch()


# --- against Hugging Face's Marian: ids in, logits and translations out

def marian(tie=True, max_len=40):
    """Their model, lively, and ours with its weights."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=13, d_model=12, encoder_layers=2, decoder_layers=3, encoder_attention_heads=3, decoder_attention_heads=3,
        encoder_ffn_dim=20, decoder_ffn_dim=24, activation_function="relu", dropout=0.0, scale_embedding=True,
        max_position_embeddings=max_len, decoder_start_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
        forced_eos_token_id=None, attn_implementation="sdpa")
    theirs = lively(MarianMTModel(config).double()).eval()
    theirs.final_logits_bias.zero_()
    with torch.no_grad():
        theirs.model.shared.weight.copy_(F.normalize(theirs.model.shared.weight))         # no token is always the best
        for half in (theirs.model.encoder, theirs.model.decoder):        # theirs has the sines first
            half.embed_positions.weight.copy_(sinusoidal_positions(max_len, 12))
        usual = theirs.model(input_ids=torch.randint(13, (64, 7)), decoder_input_ids=torch.randint(13, (64, 9)))
        theirs.model.decoder.layers[-1].final_layer_norm.bias.sub_(usual.last_hidden_state.mean((0, 1)))
    ours = Seq2SeqTransformer(13, 13, 12, 3, 2, 3, 20, 0.0, tie_embeddings=True, share_embeddings=True, max_len=max_len)
    for layer in ours.transformer.decoder_layers:
        layer.feed_forward = FeedForward(12, 24)
    ours = ours.double().eval()
    names = {"self_attn_layer_norm": "self_attn_norm", "encoder_attn_layer_norm": "cross_attn_norm",
             "final_layer_norm": "feed_forward_norm", "encoder_attn": "cross_attn", "out_proj": "o_proj",
             "fc1": "feed_forward.up_proj", "fc2": "feed_forward.down_proj"}
    state = {"tgt_embed.weight": theirs.model.shared.weight, "src_embed.weight": theirs.model.shared.weight,
             "lm_head.weight": theirs.model.shared.weight}
    for half in ("encoder", "decoder"):
        for name, p in getattr(theirs.model, half).layers.named_parameters():
            path = ".".join(names.get(part, part) for part in name.split("."))
            state[f"transformer.{half}_layers.{path}"] = p
    ours.load_state_dict(state, strict=True)
    return ours, theirs


def test_equals_marian():
    """Logits from ids, with pads in the source on either side, and in the target on the right."""
    ours, theirs = marian()
    src, tgt = torch.randint(3, 13, (3, 7)), torch.randint(3, 13, (3, 5))
    src_real = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]])
    tgt_real = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    with torch.no_grad():
        want = theirs(input_ids=src, attention_mask=src_real, decoder_input_ids=tgt, decoder_attention_mask=tgt_real).logits
        got = ours(src, tgt, src_real, tgt_real)
        assert want.std() > 0.2
        assert_close(got[tgt_real == 1], want[tgt_real == 1], rtol=0, atol=1e-9)      # what pads say is nobody's business
        assert_close(ours(src, tgt, src_real)[tgt_real == 1], want[tgt_real == 1], rtol=0, atol=1e-9)
        controls = {"no source mask": ours(src, tgt), "no scale": None, "sines first": None, "no positions": None}
        for name in ("no scale", "sines first", "no positions"):
            changed = copy.deepcopy(ours)
            if name == "no scale":
                changed.tgt_embed.weight.div_(12 ** 0.5)
                changed.lm_head.weight = nn.Parameter(ours.lm_head.weight.clone())
            elif name == "sines first":
                changed.waves = torch.cat([ours.waves[:, ::2], ours.waves[:, 1::2]], 1)
            else:
                changed.waves = torch.zeros_like(ours.waves)
            controls[name] = changed(src, tgt, src_real)
        for name, wrong in controls.items():
            assert (wrong - want)[tgt_real == 1].abs().max() > 1e-3, name


@pytest.mark.filterwarnings("ignore:.*generation flags")
def test_translates_like_marian():
    """The same tokens as their generate, greedy, with and without our cache; rows that end early."""
    ours, theirs = marian()
    found = set()
    for seed in range(6):
        torch.manual_seed(seed)
        src = torch.randint(3, 13, (4, 7))
        real = (torch.arange(7) < torch.randint(1, 8, (4, 1))).long()
        want = theirs.generate(input_ids=src, attention_mask=real, num_beams=1, do_sample=False, max_new_tokens=9,
                               bad_words_ids=None)
        for use_cache in (False, True):
            got = translate(ours, src, real, max_new_tokens=9, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
                            use_cache=use_cache)
            assert torch.equal(got, want)
        found |= set(want.flatten().tolist())
    assert len(found) > 3


def test_marians_table_has_the_sines_first():
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    theirs, ours = MarianSinusoidalPositionalEmbedding(9, 12), sinusoidal_positions(9, 12)
    assert_close(theirs.create_weight(), torch.cat([ours[:, ::2], ours[:, 1::2]], 1))


# --- masks, pads, the future

@BOTH
def test_the_encoder_sees_everything_and_the_decoder_no_future(norm_first):
    layer, (memory, x) = encoder(norm_first=norm_first), tensors()
    assert_permutation_equivariant(layer, memory)
    with pytest.raises(AssertionError, match=r"\bfuture\b"):
        assert_causal(layer, memory)
    layer = decoder(norm_first=norm_first)
    assert_causal(lambda x: layer(x, memory), x)
    assert_causal(lambda x: layer(x, memory, attn_mask=TGT_PADS, memory_mask=SRC_PADS, return_weights=True)[0], x)
    moved = memory.clone()
    moved[:, 6] += 1                         # every target token reads all of the memory
    assert ((layer(x, moved) - layer(x, memory)).abs().amax(-1) > 1e-6).all()
    free = CrossDecoderLayer.from_torch(layer.to_torch(), is_causal=False)
    with pytest.raises(AssertionError, match=r"\bfuture\b"):
        assert_causal(lambda x: free(x, memory), x)
    whole = stacks(norm_first=norm_first)
    assert_causal(lambda x: whole(memory, x, src_mask=SRC_PADS, memory_mask=SRC_PADS), x)


@BOTH
def test_weights_are_returned_for_each_layer_and_are_averages(norm_first):
    whole, (src, tgt) = stacks(norm_first=norm_first), tensors()
    options = {"src_mask": SRC_PADS, "tgt_mask": TGT_PADS, "memory_mask": SRC_PADS}
    out, maps = whole(src, tgt, return_weights=True, **options)
    assert_close(out, whole(src, tgt, **options), rtol=0, atol=1e-9)
    assert [*maps] == ["encoder", "decoder", "cross"] and {len(m) for m in maps.values()} == {2}
    for name, may in (("encoder", SRC_PADS), ("decoder", TGT_PADS & causal_mask(5)), ("cross", SRC_PADS)):
        for weights in maps[name]:
            assert_rows_sum_to_one(weights, may)
            assert (weights > 0).sum() > 20 and weights.std() > 0.05
    assert [tuple(maps[n][0].shape) for n in maps] == [(3, 3, 7, 7), (3, 3, 5, 5), (3, 3, 5, 7)]
    layer, u = whole.decoder_layers[0], tgt
    memory = whole.encode(src, src_mask=SRC_PADS)
    _, own, look = layer(u, memory, attn_mask=TGT_PADS, memory_mask=SRC_PADS, return_weights=True)
    assert_close(own, maps["decoder"][0], rtol=0, atol=1e-9)
    assert_close(look, maps["cross"][0], rtol=0, atol=1e-9)
    h = u + layer.self_attn(layer.self_attn_norm(u) if norm_first else u, attn_mask=TGT_PADS)
    q = layer.cross_attn_norm(h) if norm_first else layer.self_attn_norm(h)
    mha = MultiHeadAttention(12, 12, None, 0.0, 3, qkv_bias=True).double()
    mha.load_state_dict(layer.cross_attn.state_dict())       # chapter 05's layer, queries from here, keys from there
    assert_close(mha(q, memory, attn_mask=SRC_PADS, return_weights=True)[1], look, rtol=0, atol=1e-9)


@BOTH
@pytest.mark.parametrize("weights_too", [False, True])
def test_what_is_behind_a_mask_does_not_matter(norm_first, weights_too):
    whole, (src, tgt) = stacks(norm_first=norm_first), tensors()
    options = {"src_mask": SRC_PADS, "tgt_mask": TGT_PADS, "memory_mask": SRC_PADS, "return_weights": weights_too}
    want = first(whole(src, tgt, **options))
    src[SRC_REAL == 0], tgt[TGT_REAL == 0] = 1e6, -1e6
    got = first(whole(src, tgt, **options))
    assert_close(got[TGT_REAL == 1], want[TGT_REAL == 1], rtol=0, atol=1e-9)
    free = first(whole(src, tgt, **{**options, "memory_mask": None}))
    assert (free - got)[TGT_REAL == 1].abs().max() > 1e-3


@BOTH
@pytest.mark.parametrize("weights_too", [False, True])
def test_queries_that_see_nothing(norm_first, weights_too):
    """No source at all: cross-attention gives the bias of its last matrix, and gradients are finite."""
    layer, (memory, x) = decoder(norm_first=norm_first), tensors()
    none = torch.zeros(3, 1, 1, 7, dtype=torch.bool)
    none[1:] = True
    out = first(layer(x, memory, memory_mask=none, return_weights=weights_too))
    silent = copy.deepcopy(layer)
    silent.cross_attn.o_proj.weight.data.zero_()
    assert_close(out[0], silent(x, memory)[0], rtol=0, atol=1e-9)
    assert (out[1:] - silent(x, memory)[1:]).abs().max() > 0.1
    x.requires_grad_()
    memory.requires_grad_()
    grads = torch.autograd.grad(first(layer(x, memory, attn_mask=torch.zeros(5, 5).bool(), memory_mask=none,
                                            return_weights=weights_too)).square().sum(), [x, memory, *layer.parameters()])
    assert all(g.isfinite().all() for g in grads) and not grads[1][0].any() and grads[1][1:].any()
    rest = encoder(norm_first=norm_first)
    assert_close(rest(x, attn_mask=torch.zeros(5, 5).bool())[0, 0], rest(x[:1, :1], attn_mask=torch.zeros(1, 1).bool())[0, 0])


def test_does_the_decoder_need_a_padding_mask():
    """Pads on the right: no. On the left: yes. In cross-attention: yes."""
    seq, (src, tgt) = model(), ids()
    right, left = torch.tensor([[1, 1, 1, 0, 0]] * 3), torch.tensor([[0, 0, 1, 1, 1]] * 3)
    with torch.no_grad():
        assert_close(seq(src, tgt, tgt_mask=right)[:, :3], seq(src, tgt)[:, :3], rtol=0, atol=1e-9)
        alone = seq(src, tgt[:, 2:])
        assert_close(seq(src, tgt, tgt_mask=left)[:, 2:], alone, rtol=0, atol=1e-9)
        assert (seq(src, tgt)[:, 2:] - alone).abs().max() > 0.1
        memory = seq.encode(src, SRC_REAL)
        assert (seq.decode(tgt, memory) - seq.decode(tgt, memory, SRC_REAL))[1:].abs().max() > 0.1


@BOTH
@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_a_padded_batch_is_each_text_alone(norm_first, kind):
    seq, (src, tgt) = model(norm_first=norm_first), ids()
    out, maps = seq(src, tgt, SRC_REAL.to(kind), TGT_REAL.to(kind), return_weights=True)
    assert_close(seq(src, tgt, SRC_REAL.to(kind), TGT_REAL.to(kind)), out, rtol=0, atol=1e-9)
    for b in range(3):
        s, t = SRC_REAL[b] == 1, TGT_REAL[b] == 1
        alone, own = seq(src[b:b + 1, s], tgt[b:b + 1, t], return_weights=True)
        assert_close(out[b, t], alone[0], rtol=0, atol=1e-9)
        assert_close(maps["cross"][1][b][:, t][:, :, s], own["cross"][1][0], rtol=0, atol=1e-9)
    other = src.clone()
    other[SRC_REAL == 0] = (other[SRC_REAL == 0] + 3) % 11
    assert_close(seq(other, tgt, SRC_REAL, TGT_REAL)[TGT_REAL == 1], out[TGT_REAL == 1], rtol=0, atol=1e-9)


# --- caches

@BOTH
@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_cached_layer_equals_full(norm_first, weights_too, projected):
    layer, (memory, x) = decoder(norm_first=norm_first), tensors(Tq=6)
    memory = layer.project_memory(memory) if projected else memory

    def step(new, cache):
        cache = KVCache(3, 3, 6, 4, dtype=torch.float64) if cache is None else cache
        with torch.no_grad():
            return first(layer(new, memory, cache=cache, memory_mask=SRC_PADS, return_weights=weights_too)), cache
    assert_cache_equals_full(step, x)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("weights_too", [False, True])
def test_cached_ids_equal_full(padded, projected, weights_too):
    """With pads on the left of the target, positions go on where each row is."""
    seq, tgt = model(), torch.randint(13, (3, 6))
    real = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]) if padded else torch.ones(3, 6).long()
    memory = seq.encode(ids()[0], SRC_REAL)
    memory = seq.project_memory(memory) if projected else memory

    def step(new, caches):
        caches = seq.new_cache(3, 6) if caches is None else caches
        with torch.no_grad():
            past = caches[0].length
            out = seq.decode(new, memory, SRC_REAL, real[:, :past + new.shape[1]] if padded else None, caches=caches,
                             return_weights=weights_too)
            return first(out), caches
    assert_cache_equals_full(step, tgt)


def test_a_refused_step_leaves_the_cache():
    layer, (memory, x) = decoder(), tensors()
    cache = KVCache(3, 3, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        layer(x[:, :2], memory, cache=cache)
        for bad, options in ((memory[:2], {}), (memory, {"memory_mask": SRC_PADS[..., :6]}), (None, {}),
                             (memory[..., :6], {}), (memory, {"attn_mask": TGT_PADS[..., :3]}),
                             (memory, {"memory_mask": SRC_PADS.long()})):
            with pytest.raises((TypeError, ValueError)):
                layer(x[:, 2:4], bad, cache=cache, **options)
            assert cache.length == 2
        assert_close(layer(x[:, 2:], memory, cache=cache), layer(x, memory)[:, 2:], rtol=0, atol=1e-9)


def test_new_cache_has_room_and_the_models_format():
    caches = model(num_decoder_layers=3).new_cache(4, 9)
    assert len(caches) == 3 and len({id(c) for c in caches}) == 3
    assert all(c.max_len == 9 and c.keys.shape == (4, 3, 0, 4) and c.keys.dtype == torch.float64 for c in caches)
    assert model().half().new_cache(1, 1)[0].keys.dtype == torch.float16


def test_the_memory_is_projected_once():
    """A step of the cached road does not touch the key and value matrices of cross-attention."""
    seq, (src, _) = model(), ids()
    calls = []
    for layer in seq.transformer.decoder_layers:
        for p in (layer.cross_attn.k_proj, layer.cross_attn.v_proj):
            p.register_forward_hook(lambda m, args, out: calls.append(args[0].shape))
    own = []
    seq.transformer.decoder_layers[0].self_attn.k_proj.register_forward_hook(lambda m, args, out: own.append(args[0].shape[1]))
    options = {"max_new_tokens": 6, "bos_token_id": BOS}
    n, options["eos_token_id"] = max((translate(seq, src, eos_token_id=e, **options).shape[1] - 1, e) for e in range(13))
    calls.clear(), own.clear()
    translate(seq, src, **options)
    assert n == 6 and len(calls) == 4 and own == [1] * n
    calls.clear(), own.clear()
    assert translate(seq, src, use_cache=False, **options).shape[1] == n + 1
    assert len(calls) == 4 * n and own == [*range(1, n + 1)]


# --- translate

def slow_translate(seq, src, real, n, pad=PAD):
    """Row by row, token by token, without pads, masks or caches."""
    rows, looks = [], []
    for b in range(len(src)):
        text = src[b:b + 1][:, real[b] == 1]
        row = [BOS]
        while len(row) <= n and row[-1:] != [EOS]:
            logits, maps = seq(text, torch.tensor([row]), return_weights=True)
            row.append(logits[0, -1].argmax().item())
            looks.append(maps["cross"][1][0, :, -1])
        rows.append(row)
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


@given(data=st.data(), B=st.integers(1, 4), Tk=st.integers(1, 6), n=st.integers(1, 6), norm_first=st.booleans(),
       tie=st.booleans(), share=st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_translate_equals_one_row_at_a_time(data, B, Tk, n, norm_first, tie, share):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    seq = lively(Seq2SeqTransformer(6, 6, 12, 3, 1, 2, 20, 0.0, norm_first=norm_first, tie_embeddings=tie,
                                    share_embeddings=share, max_len=9).double())
    seq.tgt_embed.weight.data.mul_(3)
    src, real = torch.randint(6, (B, Tk)), (torch.rand(B, Tk) > 0.4) | (torch.arange(Tk) == Tk - 1)
    with torch.no_grad():
        want = slow_translate(seq, src, real, n)
    options = {"max_new_tokens": n, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    for use_cache in (True, False):
        got = translate(seq, src, real, use_cache=use_cache, **options)
        assert torch.equal(got, want) and got.dtype == src.dtype and not got.is_inference()
    ids_, cached = translate(seq, src, real, return_weights=True, **options)
    _, full = translate(seq, src, real, return_weights=True, use_cache=False, **options)
    assert torch.equal(ids_, want) and len(cached) == len(full) == 2
    with torch.no_grad():
        maps = seq(src, ids_[:, :-1], real, return_weights=True)[1]["cross"]
    for a, b, c in zip(cached, full, maps):
        assert_close(a, b, rtol=0, atol=1e-9)
        assert_close(a, c, rtol=0, atol=1e-9)
        assert_rows_sum_to_one(a, padding_mask(real))


def test_translations_end_and_are_filled():
    """Rows that end early get pads, by default the end token; all rows ended: stop."""
    seq, src = model(), torch.arange(4)[:, None]
    script = {0: [5, EOS, 9, 9], 1: [5, 6, 7, 8], 2: [EOS, 9, 9, 9], 3: [EOS, EOS, 9, 9]}

    class Scripted(Seq2SeqTransformer):
        def decode(self, tgt_ids, memory, src_mask=None, tgt_mask=None, *, caches=None, return_weights=False):
            out = super().decode(tgt_ids, memory, src_mask, tgt_mask, caches=caches, return_weights=return_weights)
            logits = torch.zeros_like(first(out))
            step = caches[0].length if caches else tgt_ids.shape[1]
            for b in range(len(tgt_ids)):
                logits[b, -1, script[b][step - 1]] = 1
            return (logits, *out[1:]) if return_weights else logits
    seq.__class__ = Scripted
    for use_cache in (False, True):
        run = partial(translate, seq, src, bos_token_id=BOS, eos_token_id=EOS, use_cache=use_cache)
        assert run(max_new_tokens=4, pad_token_id=PAD).tolist() == [
            [1, 5, 2, 0, 0], [1, 5, 6, 7, 8], [1, 2, 0, 0, 0], [1, 2, 0, 0, 0]]
        assert run(max_new_tokens=2).tolist() == [[1, 5, 2], [1, 5, 6], [1, 2, 2], [1, 2, 2]]
        script[1] = [5, 6, EOS, 9]
        got, looks = run(max_new_tokens=4, return_weights=True)
        assert got.shape == (4, 4) and {tuple(w.shape) for w in looks} == {(4, 3, 3, 1)}
        script[1] = [5, 6, 7, 8]


def test_translate_is_greedy_and_quiet():
    seq, (src, _) = model(dropout=0.1), ids()
    seq.eval()
    state = torch.get_rng_state()
    before = {n: p.clone() for n, p in seq.state_dict().items()}
    src_copy, real = src.clone(), SRC_REAL.clone()
    options = {"max_new_tokens": 5, "bos_token_id": BOS, "eos_token_id": EOS}
    out = translate(seq, src, real, **options)
    assert torch.equal(out, translate(seq, src, real, **options)) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(src, src_copy) and torch.equal(real, SRC_REAL) and not out.requires_grad
    assert all(torch.equal(p, before[n]) for n, p in seq.state_dict().items()) and not seq.training
    assert translate(seq, src.int(), **options).dtype == torch.int32
    logits = seq(src, out[:, :-1], real)
    live = (out[:, :-1] != EOS).cummin(1).values
    assert torch.equal(logits.argmax(-1)[live], out[:, 1:][live])
    with pytest.raises(ValueError, match=r"\bbatch_size\b"):
        translate(seq, src[:0], **options)
    seq.train()
    translate(seq, src, real, **options)
    assert seq.training                      # the mode is the caller's


@pytest.mark.parametrize("options, error, words", [
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens"),
    ({"max_new_tokens": 41}, ValueError, "max_new_tokens"),
    ({"bos_token_id": 13}, ValueError, "bos_token_id"),
    ({"eos_token_id": -1}, ValueError, "eos_token_id"),
    ({"eos_token_id": None}, TypeError, "eos_token_id"),
    ({"pad_token_id": 99}, ValueError, "pad_token_id"),
    ({"use_cache": None}, TypeError, "use_cache"),
    ({"return_weights": 1}, TypeError, "return_weights"),
    ({"model": nn.Linear(2, 2)}, TypeError, "model"),
    ({"src_mask": torch.ones(3, 6).bool()}, ValueError, "src_mask"),
    ({"src_mask": torch.ones(3, 7)}, TypeError, "src_mask"),
    ({"src_ids": torch.ones(3, 7)}, TypeError, "src_ids"),
    ({"src_ids": [1]}, TypeError, "src_ids"),
    ({"src_ids": torch.ones(7).long()}, ValueError, "src_ids"),
    ({"src_ids": torch.ones(3, 41).long()}, ValueError, "src_ids"),
])
def test_wrong_translations_are_refused(options, error, words):
    given = {"model": model(), "src_ids": ids()[0], "max_new_tokens": 3, "bos_token_id": BOS, "eos_token_id": EOS, **options}
    with pytest.raises(error, match=rf"\b{words}\b"):
        translate(given.pop("model"), given.pop("src_ids"), given.pop("src_mask", None), **given)
    assert translate(model(), ids()[0], max_new_tokens=40, bos_token_id=0, eos_token_id=12, pad_token_id=0).shape[1] <= 41


@pytest.mark.parametrize("call, error, words", [
    (lambda m: m(ids()[0], torch.ones(3, 41).long()), ValueError, "tgt_ids"),
    (lambda m: m(*ids(), tgt_mask=TGT_REAL[:, :4]), ValueError, "tgt_mask"),
    (lambda m: m(*ids(), TGT_REAL), ValueError, "src_mask"),
    (lambda m: m(*ids(), SRC_REAL.double()), TypeError, "src_mask"),
    (lambda m: m(ids()[0], ids()[1].short()), TypeError, "tgt_ids"),
    (lambda m: m(ids()[0][:2], ids()[1]), ValueError, "memory"),
    (lambda m: m(ids()[0] + 11, ids()[1]), IndexError, ""),
    (lambda m: m.decode(ids()[1], m.encode(ids()[0]), caches=m.new_cache(3, 5)[:1]), ValueError, "caches"),
    (lambda m: m.decode(ids()[1], m.project_memory(m.encode(ids()[0]))[:1]), ValueError, "memory"),
    (lambda m: m.transformer.decode(tensors()[1], [None, None]), TypeError, "memory"),
    (lambda m: m.transformer.decode(tensors()[1], [tensors()] * 2), ValueError, "memory"),
    (lambda m: m.transformer(tensors()[0][..., :5], tensors()[1]), ValueError, "x"),
    (lambda m: m.transformer(*tensors(), memory_mask=SRC_PADS[:2]), ValueError, "attn_mask"),
    (lambda m: m.transformer(*tensors(), src_mask=SRC_PADS[..., :5]), ValueError, "attn_mask"),
    (lambda m: m.project_memory(tensors()[0].float()), TypeError, "memory"),
    (lambda m: m.project_memory(tensors()[0][..., :5]), ValueError, "memory"),
])
def test_wrong_input_is_refused(call, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        call(model())


# --- embeddings, tying, the whole by hand

@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_ids_in_logits_out_by_hand(tie, share):
    """Scale, waves, PyTorch's stacks, the table as head; and the paper's share of parameters."""
    seq = lively(Seq2SeqTransformer(13, 13, 12, 3, 2, 2, 20, 0.0, tie_embeddings=tie, share_embeddings=share).double())
    assert (seq.src_embed.weight is seq.tgt_embed.weight) == share and (seq.lm_head.weight is seq.tgt_embed.weight) == tie
    tables = 3 - tie - share
    assert sum(p.numel() for p in seq.parameters()) == tables * 13 * 12 + sum(p.numel() for p in seq.transformer.parameters())
    src, tgt = torch.randint(13, (3, 7)), torch.randint(13, (3, 5))
    theirs = Transformer.from_torch(seq.transformer.to_torch())
    waves = sinusoidal_positions(7, 12).double()

    def by_hand(_):
        a = F.embedding(src, seq.src_embed.weight) * 12 ** 0.5 + waves
        b = F.embedding(tgt, seq.tgt_embed.weight) * 12 ** 0.5 + waves[:5]
        return theirs(a, b) @ seq.lm_head.weight.T
    assert_close(seq(src, tgt), by_hand(None), rtol=0, atol=1e-9)
    other = Seq2SeqTransformer(13, 13, 12, 3, 2, 2, 20, 0.0, tie_embeddings=tie, share_embeddings=share, max_len=9).double()
    other.load_state_dict(seq.state_dict())  # max_len changes no weights
    assert torch.equal(other(src, tgt), seq(src, tgt)) and "waves" not in seq.state_dict()
    seq(src, tgt).square().sum().backward()
    other(src, tgt).square().sum().backward()
    assert torch.equal(other.tgt_embed.weight.grad, seq.tgt_embed.weight.grad)


def test_first_weights():
    """Embeddings of standard deviation 1/sqrt(D): after the scale, of the size of the waves; Xavier elsewhere."""
    seq = Seq2SeqTransformer(1000, 900, 64, 4, 1, 1, 256, tie_embeddings=True)
    for table in (seq.src_embed, seq.tgt_embed):
        assert 0.97 < table.weight.std() * 8 < 1.03
    for name, p in seq.transformer.named_parameters():
        if p.dim() > 1:
            bound = (6 / sum(p.shape)) ** 0.5
            assert 0.98 * bound < p.abs().max() <= bound and p.abs().mean() > 0.48 * bound, name
    assert seq.dropout.p == 0.1 and seq.waves.shape == (1024, 64) and not seq.waves.requires_grad
    base = Transformer()
    assert len(base.encoder_layers) == len(base.decoder_layers) == 6 and base.encoder_layers[0].dropout.p == 0.1
    assert base.encoder_layers[0].feed_forward.up_proj.weight.shape == (2048, 512)
    assert base.decoder_layers[0].self_attn.num_heads == base.encoder_layers[0].self_attn.num_heads == 8
    assert not base.encoder_layers[0].norm_first and isinstance(base.decoder_norm, nn.Identity)


def test_published_size():
    """The paper's base model: 65 million with one shared table of 37,000."""
    with torch.device("meta"):
        base = Seq2SeqTransformer(37000, 37000, tie_embeddings=True, share_embeddings=True)
        theirs = nn.Transformer(dim_feedforward=2048)
    count = sum(p.numel() for p in base.parameters())
    assert count == 63_082_496 and 37000 * 512 + sum(p.numel() for p in theirs.parameters()) - 4 * 512 == count


# --- the layers' lives

@pytest.mark.parametrize("make, shape", [(encoder, "e"), (decoder, "d")])
def test_dropout_is_in_three_places_and_in_training_only(make, shape):
    layer, (memory, x) = make(dropout=0.5), tensors()
    run = layer if shape == "e" else lambda x: layer(x, memory)

    class Runner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return run(x)
    assert_eval_deterministic(Runner(), x)
    drops = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Dropout)}
    assert {n for n, m in drops.items() if m.p} == {"dropout", "feed_forward.dropout", "self_attn.dropout"} | (
        {"cross_attn.dropout"} if shape == "d" else set())
    layer.eval()
    assert torch.equal(run(x), make_like(layer, make)(x, *([memory] if shape == "d" else [])))
    for name, m in drops.items():            # each of them acts, alone
        for other in drops.values():
            other.p = 0.0
        m.p = 0.5
        if name == "self_attn.out_dropout":
            continue
        layer.eval()
        plain = run(x)
        layer.train()
        assert (run(x) - plain).abs().max() > 1e-3, name
    for m in drops.values():
        m.p = 0.0
    layer.dropout.p = 1.0                    # every branch is dropped: only norms are left
    norms = [layer.self_attn_norm, *([layer.cross_attn_norm] if shape == "d" else []), layer.feed_forward_norm]
    want = x
    for norm in norms:
        want = norm(want)
    assert_close(run(x), want)


def make_like(layer, make):
    plain = make()
    plain.load_state_dict(layer.state_dict())
    return plain


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (2, 0), (2, 1)])
def test_any_leading_axes(shape):
    lead = shape[:-1]
    whole, src, tgt = stacks(), torch.randn(*lead, 7, 12).double(), torch.randn(*shape, 12).double()
    out, maps = whole(src, tgt, return_weights=True)
    assert out.shape == whole(src, tgt).shape == tgt.shape
    assert maps["cross"][0].shape == (*lead, 3, shape[-1], 7) and maps["encoder"][0].shape == (*lead, 3, 7, 7)
    memory = whole.encode(src)
    assert_close(whole.decode(tgt, whole.project_memory(memory)), out)
    if len(shape) == 3:
        assert_close(out[1, 2], whole(src[1, 2], tgt[1, 2]))
        pads = padding_mask(torch.tensor([7, 4, 3, 2, 1, 5]))
        assert_close(whole(src, tgt, memory_mask=pads).flatten(0, 1), whole(
            src.flatten(0, 1), tgt.flatten(0, 1), memory_mask=pads))


def test_arguments_are_left_alone():
    whole, inputs = stacks(), [*tensors(), torch.randn(7, 7).double(), torch.randn(5, 5).double(), torch.randn(5, 7).double()]
    before = [t.clone() for t in inputs]
    for weights_too in (False, True):
        whole(*inputs[:2], src_mask=inputs[2], tgt_mask=inputs[3], memory_mask=inputs[4], return_weights=weights_too)
    pairs = whole.project_memory(inputs[0])
    kept = [t.clone() for pair in pairs for t in pair]
    whole.decode(inputs[1], pairs, memory_mask=SRC_PADS)
    assert all(map(torch.equal, inputs, before)) and all(map(torch.equal, [t for pair in pairs for t in pair], kept))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_runs_in_every_dtype_and_under_autocast(dtype):
    exact, (src, tgt) = model(), ids()
    want = exact(src, tgt, SRC_REAL, TGT_REAL)
    size, real = want.abs().max(), TGT_REAL == 1
    seq = copy.deepcopy(exact).to(dtype)
    for weights_too in (False, True):
        out = first(seq(src, tgt, SRC_REAL, TGT_REAL, return_weights=weights_too))
        assert out.dtype == dtype and (out.double() - want)[real].abs().max() < 40 * torch.finfo(dtype).eps * size
    options = {"max_new_tokens": 4, "bos_token_id": BOS, "eos_token_id": EOS}
    assert translate(seq, src, SRC_REAL, **options).shape[0] == 3
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype=dtype):
            out = exact.float()(src, tgt, SRC_REAL, TGT_REAL)
            translate(exact, src, SRC_REAL, **options)
        assert (out.double() - want)[real].abs().max() < 40 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", HALVES)
@BOTH
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_as_precise_as_pytorch(dtype, norm_first):
    """Error at most twice, for gradients three times, that of PyTorch's model in the same dtype. With a smooth activation
    and in root mean square: where rounding turns a ReLU on or off, single gradients jump, in PyTorch's model as in ours."""
    whole, (src, tgt) = stacks(norm_first=norm_first, activation="gelu"), tensors(B=64)
    low = copy.deepcopy(whole).to(dtype)
    exact = copy.deepcopy(low).double()
    theirs, errors, grads = low.to_torch(), [], []
    truth = None
    for run, f in ((exact, exact), (low, low), (lambda s, t: theirs(s, t, tgt_mask=~causal_mask(5)), theirs)):
        s, t = (x.to(dtype).to(next(f.parameters()).dtype).requires_grad_() for x in (src, tgt))
        out = run(s, t)
        grad = torch.autograd.grad(out.double().square().sum(), [s, t])
        truth = truth or (out.double(), [g.double() for g in grad])
        errors.append((out.double() - truth[0]).square().mean().sqrt())
        grads.append(max((a.double() - b).square().mean().sqrt() for a, b in zip(grad, truth[1])))
    assert errors[1] <= 2 * errors[2] + 1e-5 and grads[1] <= 3 * grads[2] + 2e-4


def test_life_of_a_model():
    seq, (src, tgt) = model(dropout=0.1, tie_embeddings=True), ids()
    seq.eval()
    want = seq(src, tgt, SRC_REAL)
    other = model(dropout=0.1, tie_embeddings=True)
    other.load_state_dict(seq.state_dict())
    for same in (other.eval(), copy.deepcopy(seq), pickle.loads(pickle.dumps(seq))):
        assert torch.equal(same(src, tgt, SRC_REAL), want) and same.lm_head.weight is same.tgt_embed.weight
    assert_close(torch.vmap(lambda s, t: seq(s[None], t[None])[0])(src, tgt), seq(src, tgt))
    params = dict(seq.named_parameters())
    stacked = {name: torch.stack([p, 1.5 * p]) for name, p in params.items()}
    both = torch.vmap(lambda ps: torch.func.functional_call(seq, ps, (src, tgt, SRC_REAL.bool())))(stacked)
    assert_close(both[0], want) and (both[0] - both[1]).abs().max() > 0.1
    before = [set(vars(m)) for m in seq.modules()]
    seq(src, tgt, return_weights=True)
    translate(seq, src, max_new_tokens=3, bos_token_id=BOS, eos_token_id=EOS)
    assert [set(vars(m)) for m in seq.modules()] == before   # nothing is kept
    with pytest.raises(TypeError):
        seq.transformer(*tensors(), None)    # options are keywords


def test_survives_meta():
    with torch.device("meta"):
        late = Seq2SeqTransformer(11, 13, 12, 3, 2, 2, 20, 0.0).double()
        out, maps = late(*(torch.zeros(3, n, dtype=torch.long) for n in (7, 5)), return_weights=True)
    assert out.shape == (3, 5, 13) and out.is_meta and maps["cross"][1].shape == (3, 3, 5, 7)
    with torch.device("meta"):
        layers = stacks()
    src, tgt = tensors()
    layers.to_empty(device="cpu").load_state_dict((real := stacks()).state_dict())
    assert torch.equal(layers(src, tgt), real(src, tgt))


@pytest.mark.slow
def test_one_program_for_all_steps():
    torch.compiler.reset()
    seq, (src, tgt) = model(), ids(2, 7, 9)
    programs = []

    def count(graph, inputs):
        programs.append(graph)
        return graph.forward
    step = torch.compile(seq.decode, fullgraph=True, backend=count, dynamic=True)
    with torch.no_grad():
        want, memory = seq(src, tgt), seq.project_memory(seq.encode(src))
        caches = seq.new_cache(2, 9)
        parts = [step(part, memory, caches=caches) for part in tgt.split([5, 1, 1, 1, 1], 1)]
    assert_close(torch.cat(parts, 1), want)
    assert len(programs) <= 2


@pytest.mark.slow
def test_exports_with_free_lengths():
    seq, (src, tgt) = model().eval(), ids()
    a, b = torch.export.Dim("source", min=2, max=40), torch.export.Dim("target", min=2, max=40)
    program = torch.export.export(seq, (src, tgt, SRC_REAL.bool()), dynamic_shapes=({1: a}, {1: b}, {1: a}))
    src, tgt = ids(3, 9, 8)
    real = torch.arange(9) < torch.tensor([[9], [3], [5]])
    assert_close(program.module()(src, tgt, real), seq(src, tgt, real))


def test_translate_runs_in_evaluation_mode_and_gives_the_mode_back():
    noisy = Seq2SeqTransformer(13, 13, 8, 2, 1, 1, 16, 0.5)
    noisy.transformer.encoder_layers[0].eval()           # a part with a mode of its own
    modes = [part.training for part in noisy.modules()]
    run = partial(translate, noisy, ids()[0] % 13, max_new_tokens=5, bos_token_id=BOS, eos_token_id=EOS)
    assert torch.equal(run(), run()) and torch.equal(run(), run(use_cache=False))
    assert modes == [part.training for part in noisy.modules()]


@pytest.mark.parametrize("mask, error", [(torch.ones(3, 1).bool(), ValueError), (SRC_REAL[:1], ValueError),
                                         (torch.ones(3), TypeError), (SRC_REAL.tolist(), TypeError)])
def test_decode_checks_the_mask_of_the_source(mask, error):
    seq = model()
    with pytest.raises(error, match=r"\bsrc_mask\b"):
        seq.decode(ids()[1], seq.encode(ids()[0]), mask)


def test_decode_checks_its_caches_before_it_writes():
    seq = model()
    memory, caches = seq.encode(ids()[0]), seq.new_cache(3, 9)
    seq.decode(ids()[1], memory, caches=caches)
    caches[1].crop(2)
    before = [cache.length for cache in caches]
    for bad in (caches, caches[0], [caches[0]] * 2, [1, 2]):
        with pytest.raises((TypeError, ValueError), match=r"\bcaches\b"):
            seq.decode(ids()[1][:, :1], memory, caches=bad)
    caches[0].crop(2)
    with pytest.raises(TypeError, match=r"\bmemory\b"):
        seq.decode(ids()[1][:, :1], None, caches=caches)
    pairs = [tuple(t.half() for t in pair) for pair in seq.project_memory(memory)]
    with pytest.raises(TypeError, match=r"\bmemory\b"):
        seq.decode(ids()[1][:, :1], pairs, caches=caches)
    assert [cache.length for cache in caches] == [2, 2] != before


@pytest.mark.parametrize("block", ["_sa_block", "_ff_block"])
def test_a_layer_that_computes_something_else_is_refused(block):
    Other = type("Other", (nn.TransformerEncoderLayer,), {block: lambda self, *args, **kwargs: args[0]})
    with pytest.raises(TypeError, match=r"\blayer\b"):
        EncoderLayer.from_torch(Other(8, 2, 16, batch_first=True))
