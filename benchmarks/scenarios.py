"""What is compared. Each scenario builds all sides on the same weights and says what the right answer is.

A side is a function without arguments. Kinds: "ours"; "peer", a library's; "parts", the bare F.linear and fused attention
that any implementation must call; "step", an earlier step of the book. Nothing here is timed.
"""
import copy
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from attn_nb import (
    DecoderConfig,
    DecoderLM,
    GroupedQueryAttention,
    KVCache,
    MultiHeadAttention,
    MultiHeadAttentionWrapper,
    attention,
    causal_mask,
    generate,
    onednn_linears,
    rope_cos_sin,
    split_heads,
)


@dataclass
class Case:
    """One comparison. want: the right outputs in float64, for each side that is compared.

    Sides that write text: `same` says that all must write exactly what the first one writes, and `regret` gives the error of
    a text, judged in float64.
    """
    title: str
    sides: dict[str, tuple[str, Callable]]
    want: dict[str, tuple[Tensor, ...]] | None = None
    flops: float = 0.0
    bytes: float = 0.0
    rounds: int = 20
    dtype: torch.dtype = torch.float32
    unchecked: tuple[str, ...] = ()          # parts, which leave something out
    trains: bool = False
    same: bool = False
    regret: Callable[[Tensor], float] | None = None
    token: tuple[float, float] = (0.0, 0.0)  # FLOPs and bytes of the next token, and its cache
    cache_bytes: int = 0


def missing(package: str) -> str:
    """Why a package that is welcome, and not required, cannot be used; empty if it can."""
    try:
        importlib.import_module(package)
    except Exception as error:               # whatever a broken installation raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def lively(module: nn.Module) -> nn.Module:
    """Weights for which scores have a standard deviation of about 2."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 1.4 * p.shape[1] ** -0.5 if p.dim() == 2 else 0.5)
    return module


def layer_cost(B: int, T: int, past: int, D: int, H: int, Hkv: int, size: int) -> tuple[float, float]:
    """FLOPs and bytes of T causal tokens of B texts after `past` cached ones."""
    weights = 2 * D * (D + D // H * Hkv)
    pairs = T * past + T * (T + 1) // 2
    return (B * (2 * T * weights + 4 * pairs * D),
            size * (weights + B * (2 * T * D + 2 * (past + T) * (D // H) * Hkv)))


# --- a whole prompt through one layer

def bare(layer: nn.Module, x: Tensor, rope=None) -> Tensor:
    """The same numbers from bare calls: no module, no check, no helper."""
    H, Hkv = layer.num_heads, getattr(layer, "num_kv_heads", layer.num_heads)
    q, k, v = (F.linear(x, p.weight, p.bias).unflatten(-1, (heads, -1)).transpose(1, 2) for p, heads in (
        (layer.q_proj, H), (layer.k_proj, Hkv), (layer.v_proj, Hkv)))
    if rope is not None:
        q, k = turned(q, *rope), turned(k, *rope)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != Hkv)
    return F.linear(out.transpose(1, 2).flatten(2), layer.o_proj.weight, layer.o_proj.bias)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions by bare calls; cos and sin are (B, T, half)."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def gradients(run: Callable, x: Tensor, parameters: list[Tensor], out_grad: Tensor) -> Callable:
    """A forward and backward pass: the output, the gradient of x, and the size of the matrices' gradients together."""
    matrices = [p for p in parameters if p.dim() == 2]

    def step():
        with torch.enable_grad():
            for t in (x, *parameters):
                t.grad = None
            out = run()
            out.backward(out_grad)
        return out.detach(), x.grad, torch.stack([p.grad.double().square().sum() for p in matrices]).sum().sqrt()
    return step


def heads_of(layer: MultiHeadAttention) -> MultiHeadAttentionWrapper:
    """The layer's heads as layers of their own; its output matrix is left out."""
    state = layer.state_dict()
    D, H = layer.q_proj.in_features, layer.num_heads
    wrapper = MultiHeadAttentionWrapper(D, D // H, 4096, 0.0, H).to(layer.q_proj.weight)
    wrapper.load_state_dict({f"heads.{h}.{name}": part for name in state if name[0] in "qkv"
                             for h, part in enumerate(state[name].chunk(H))})
    return wrapper.eval()


def with_biases(layer: MultiHeadAttention) -> nn.MultiheadAttention:
    """PyTorch's layer with biases, all 0: the same function, which takes its fast path in inference."""
    other = MultiHeadAttention(layer.q_proj.in_features, layer.o_proj.out_features, None, 0.0, layer.num_heads, qkv_bias=True)
    other = other.to(layer.q_proj.weight)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(layer.get_parameter(name)) if p.dim() == 2 else p.zero_()
    return other.eval().to_torch()


def pytorchs(layer: nn.MultiheadAttention, x: Tensor, closed: Tensor, weights: bool = False) -> Tensor:
    """PyTorch's layer, told in every way that it is causal."""
    if weights:
        return layer(x, x, x, attn_mask=closed, average_attn_weights=False)[0]
    return layer(x, x, x, need_weights=False, is_causal=True, attn_mask=closed)[0]


def mha(dtype: torch.dtype, device: str, quick: bool, train: bool = False) -> Case:
    B, T, D, H = (2, 32, 64, 4) if quick else (2, 1024, 768, 12)
    torch.manual_seed(0)
    layer = lively(MultiHeadAttention(D, D, None, 0.0, H, out_bias=False)).to(device, dtype).eval()
    theirs, biased = layer.to_torch(), with_biases(layer)
    wrapper = heads_of(layer)
    x = torch.randn(B, T, D, device=device, dtype=dtype)
    closed = ~causal_mask(T, device=device)
    runs = {
        "ours": ("ours", layer, lambda: layer(x)),
        "parts": ("parts", layer, lambda: bare(layer, x)),
        "nn.MultiheadAttention": ("peer", theirs, lambda: pytorchs(theirs, x, closed)),
        "nn.MultiheadAttention, with biases": ("peer", biased, lambda: pytorchs(biased, x, closed)),
        "nn.MultiheadAttention, weights returned": ("peer", theirs, lambda: pytorchs(theirs, x, closed, True)),
        "heads one by one (04)": ("step", nn.ModuleList([wrapper, layer.o_proj]), lambda: layer.o_proj(wrapper(x))),
        "scores kept (05)": ("step", layer, lambda: layer(x, return_weights=True)[0]),
    }
    if not missing("x_transformers"):
        from x_transformers.x_transformers import Attention
        other = Attention(D, dim_head=D // H, heads=H, causal=True, flash=True).to(device, dtype).eval()
        with torch.no_grad():
            for theirs_, ours_ in ((other.to_q, layer.q_proj), (other.to_k, layer.k_proj), (other.to_v, layer.v_proj),
                                   (other.to_out, layer.o_proj)):
                theirs_.weight.copy_(ours_.weight)
        runs["x-transformers"] = ("peer", other, lambda: other(x))
    exact, wide = copy.deepcopy(layer).double(), x.detach().double()
    flops, traffic = layer_cost(B, T, 0, D, H, H, dtype.itemsize)
    if dtype == torch.float32 and device == "cpu" and not train:
        twin = on_onednn(layer)
        runs["ours, onednn_linears"] = ("ours", twin, lambda: twin(x))
    if not train:
        with torch.no_grad():
            want = (exact(wide, return_weights=True)[0],)
        return Case(f"a prompt through one layer: B {B}, T {T}, d {D}, {H} heads", {n: (k, f) for n, (k, _, f) in runs.items()},
                    dict.fromkeys(runs, want), flops, traffic, 10, dtype)
    x.requires_grad_()
    wide.requires_grad_()
    out_grad = torch.randn_like(x)
    steps = {n: (k, gradients(f, x, [*m.parameters()], out_grad)) for n, (k, m, f) in runs.items()}
    want = gradients(lambda: exact(wide, return_weights=True)[0], wide, [*exact.parameters()], out_grad.double())()
    return Case(f"forward and backward: B {B}, T {T}, d {D}, {H} heads", steps, dict.fromkeys(runs, want), 3 * flops,
                3 * traffic, 5, dtype, trains=True)


def mha_train(dtype: torch.dtype, device: str, quick: bool) -> Case:
    return mha(dtype, device, quick, train=True)


def llama(D: int, H: int, Hkv: int, max_len: int, kind: str) -> LlamaConfig:
    return LlamaConfig(hidden_size=D, num_attention_heads=H, num_key_value_heads=Hkv, head_dim=D // H, num_hidden_layers=1,
                       max_position_embeddings=max_len, attn_implementation=kind)


def gqa(dtype: torch.dtype, device: str, quick: bool) -> Case:
    B, T, D, H, Hkv = (2, 32, 64, 4, 2) if quick else (2, 1024, 768, 12, 3)
    torch.manual_seed(0)
    layer = lively(GroupedQueryAttention(D, H, Hkv)).to(device, dtype).eval()
    x = torch.randn(B, T, D, device=device, dtype=dtype)
    positions = torch.arange(T, device=device)[None]
    rope = tuple(t.to(dtype) for t in rope_cos_sin(positions, D // H))
    sides = {"ours": ("ours", lambda: layer(x, rope=rope)), "parts": ("parts", lambda: bare(layer, x, rope))}
    for kind in ("sdpa", "eager"):
        theirs = LlamaAttention(llama(D, H, Hkv, T, kind), 0).to(device, dtype).eval()
        theirs.load_state_dict(layer.state_dict(), assign=True)        # the same memory
        tables = LlamaRotaryEmbedding(theirs.config).to(device)(x, positions)
        mask = None if kind == "sdpa" else torch.zeros(1, 1, T, T, device=device, dtype=dtype).masked_fill(
            ~causal_mask(T, device=device), torch.finfo(dtype).min)
        sides[f"transformers, {kind}"] = ("peer", lambda theirs=theirs, tables=tables, mask=mask: theirs(x, tables, mask)[0])
    if dtype == torch.float32 and device == "cpu":
        twin = on_onednn(layer)
        sides["ours, onednn_linears"] = ("ours", lambda: twin(x, rope=rope))
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()
        want = (exact(x.double(), rope=tuple(t.double() for t in rope), return_weights=True)[0],)
    return Case(f"{H} query heads, {Hkv} KV heads, rotary: B {B}, T {T}, d {D}", sides, dict.fromkeys(sides, want),
                *layer_cost(B, T, 0, D, H, Hkv, dtype.itemsize), 10, dtype)


# --- one token after a cache

def decode(cached: int) -> Callable:
    def make(dtype: torch.dtype, device: str, quick: bool) -> Case:
        return one_token(16 if quick else cached, dtype, device, quick)
    return make


def one_token(cached: int, dtype: torch.dtype, device: str, quick: bool) -> Case:
    D, H, Hkv = (64, 4, 2) if quick else (2048, 32, 8)
    Dh = D // H
    torch.manual_seed(0)
    layer = lively(GroupedQueryAttention(D, H, Hkv)).to(device, dtype).eval()
    text = torch.randn(1, cached + 1, D, device=device, dtype=dtype)
    past, last = text[:, :-1], text[:, -1:]
    config = llama(D, H, Hkv, cached + 1, "sdpa")
    theirs = LlamaAttention(config, 0).to(device, dtype).eval()
    theirs.load_state_dict(layer.state_dict(), assign=True)        # the same memory
    tables = LlamaRotaryEmbedding(config).to(device)(text, torch.arange(cached + 1, device=device)[None])
    before, now = ([t[:, s] for t in tables] for s in (slice(-1), slice(-1, None)))
    half = [tuple(t[..., :Dh // 2].contiguous() for t in pair) for pair in (before, now)]

    ours = KVCache(1, Hkv, 2 * cached, Dh, dtype=dtype, device=device)
    static, dynamic = StaticCache(config=config, max_cache_len=cached + 1), DynamicCache(config=config)
    with torch.no_grad():
        layer(past, cache=ours, rope=half[0])
        for cache in (static, dynamic):
            theirs(past, tuple(before), past_key_values=cache)
        kept, slots = static.layers[0], [x.clone() for x in (ours._keys, ours._values)]
        exact = copy.deepcopy(layer).double()
        want = (exact(text.double(), rope=tuple(t[..., :Dh // 2].double() for t in tables))[:, -1:],)

    def our_token(layer=layer):
        ours.crop(cached)
        return layer(last, cache=ours, rope=half[1])

    def static_token():
        kept.cumulative_length.fill_(cached)
        return theirs(last, tuple(now), past_key_values=static)[0]

    def dynamic_token():
        out = theirs(last, tuple(now), past_key_values=dynamic)[0]
        dynamic.crop(-1)
        return out

    def parts(turn):
        q, k, v = (F.linear(last, p.weight) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        if turn:                             # positions, and the new slot
            q, k = turned(torch.cat([q, k], -1).view(1, H + Hkv, 1, Dh), *half[1]).split([H, Hkv], 1)
            for x, new in zip(slots, (k, v)):
                x[:, :, cached:cached + 1] = new.view(1, Hkv, 1, Dh)
        k, v = (x[:, :, :cached + turn] for x in slots)
        out = F.scaled_dot_product_attention(q.reshape(1, Hkv, H // Hkv, Dh), k, v)
        return F.linear(out.view(1, 1, D), layer.o_proj.weight)

    sides = {"ours": ("ours", our_token), "parts": ("parts", lambda: parts(0)),
             "parts, with positions and the new slot": ("parts", lambda: parts(1)),
             "transformers, StaticCache": ("peer", static_token), "transformers, DynamicCache": ("peer", dynamic_token)}
    if dtype == torch.float32 and device == "cpu":
        sides["ours, onednn_linears"] = ("ours", partial(our_token, on_onednn(layer)))
    return Case(f"one token after {cached}: d {D}, {H} heads, {Hkv} KV heads", sides, dict.fromkeys(sides, want),
                *layer_cost(1, 1, cached, D, H, Hkv, dtype.itemsize), 50, dtype, unchecked=("parts",))


def on_onednn(model: nn.Module) -> nn.Module:
    """A copy inside a block of onednn_linears that stays open."""
    twin = copy.deepcopy(model)
    twin.block = onednn_linears(twin)
    twin.block.__enter__()
    return twin


# --- a whole text

def writing(dtype: torch.dtype, device: str, quick: bool) -> Case:
    prompt, new = (8, 24) if quick else (64, 48)
    config = DecoderConfig(*((97, 32, 2, 4, 2, 48) if quick else (32000, 512, 8, 8, 2, 1408)))
    torch.manual_seed(0)
    ours = lively(DecoderLM(config)).eval()
    with torch.no_grad():
        ours.model.embed_tokens.weight.normal_()         # so that the best token is clear
    ours = ours.to(device, dtype)
    theirs = LlamaForCausalLM(LlamaConfig(**{**config.to_hf(), "attn_implementation": "sdpa"})).to(device, dtype).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    ids = torch.randint(config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1)).to(device)
    options = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0,
               "eos_token_id": None}

    def static():
        cache = StaticCache(config=theirs.config, max_cache_len=prompt + new)
        return theirs.generate(ids, past_key_values=cache, **options, disable_compile=device == "cpu")

    def write(model=ours):
        return generate(model, ids, max_new_tokens=new)

    sides = {"ours": ("ours", write), "parts": ("parts", bare_text(ours, prompt, new)),
             "transformers, DynamicCache": ("peer", lambda: theirs.generate(ids, **options)),
             "transformers, StaticCache": ("peer", static),
             "without a cache (10)": ("step", lambda: generate(ours, ids, max_new_tokens=new, use_cache=False))}
    if dtype == torch.float32 and device == "cpu":
        sides["ours, onednn_linears"] = ("ours", partial(write, on_onednn(ours)))
    table = config.vocab_size * config.d_model
    weights = sum(p.numel() for p in ours.parameters()) - table      # one row of the table is read, not all
    exact = copy.deepcopy(theirs).double()   # a judge that we did not write

    def regret(text):
        """How far below the best score the worst written token is, in parts of the largest score."""
        if text.shape != (1, prompt + new) or not torch.equal(text[:, :prompt], ids):
            return math.inf
        scores = exact(text).logits[:, prompt - 1:-1]
        chosen = scores.gather(-1, text[:, prompt:, None]).squeeze(-1)
        return ((scores.max(-1).values - chosen).max() / scores.abs().max()).item()
    kept = 2 * config.num_layers * config.num_kv_heads * config.head_dim * (prompt + new // 2)
    return Case(f"write {new} tokens after {prompt}: {config.num_layers} layers, d {config.d_model}, {config.num_heads} heads, "
                f"{config.num_kv_heads} KV heads, vocabulary {config.vocab_size}", sides, None,
                2 * (weights - table) * (prompt + new - 1) + 2 * table * new, dtype.itemsize * new * (weights + kept), 7, dtype,
                unchecked=("parts",), regret=regret, same=dtype == torch.float32)    # in bfloat16 two may be about equal


def bare_text(model: DecoderLM, prompt: int, new: int) -> Callable:
    """The matrix products and the attention of each pass, on numbers of the right shapes."""
    c, table = model.config, model.model.embed_tokens.weight
    keys, values = torch.randn(2, 1, c.num_kv_heads, prompt + new, c.head_dim, device=table.device).to(table.dtype)

    def through(T, kv_len):
        x = table[:T][None]
        for layer in model.model.layers:
            at, mlp = layer.self_attn, layer.mlp
            q, _, _ = (F.linear(x, p.weight) for p in (at.q_proj, at.k_proj, at.v_proj))
            k, v = keys[:, :, :kv_len], values[:, :, :kv_len]
            if T == 1:
                q = q.view(1, c.num_kv_heads, -1, c.head_dim)
                out = F.scaled_dot_product_attention(q, k, v).view(1, 1, -1)
            else:
                q = q.view(1, T, c.num_heads, c.head_dim).transpose(1, 2)
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
            x = F.linear(out, at.o_proj.weight)
            x = F.linear(F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight), mlp.down_proj.weight)
        return F.linear(x[:, -1:], model.lm_head.weight).argmax(-1)

    def run():
        with torch.inference_mode():
            through(prompt, prompt)
            for n in range(1, new):
                through(1, prompt + n)
    return run


# --- against the length of the text

def ladder(T: int, device: str, quick: bool) -> Case:
    """The steps of the book on one text of T tokens; "next token, cached" reads one more."""
    D, H, Hkv = (32, 4, 2) if quick else (512, 8, 2)
    torch.manual_seed(0)
    layer = lively(MultiHeadAttention(D, D, None, 0.0, H, out_bias=False)).to(device).eval()
    grouped = lively(GroupedQueryAttention(D, H, Hkv)).to(device).eval()
    wrapper = heads_of(layer)
    x = torch.randn(1, T + 1, D, device=device)
    text, last = x[:, :-1], x[:, -1:]
    cache = KVCache(1, Hkv, T + 1, D // H, device=device)
    with torch.no_grad():
        grouped(text, cache=cache)

    def loops():
        q, k, v = (split_heads(p(text), H) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        rows = [torch.cat([attention(q[:, h, t:t + 1], k[:, h, :t + 1], v[:, h, :t + 1])[0] for h in range(H)], -1)
                for t in range(T)]
        return layer.o_proj(torch.cat(rows, 1))

    def next_token():
        cache.crop(T)
        return grouped(last, cache=cache)

    sides = {"loops over tokens and heads (01)": ("step", loops),
             "heads one by one (04)": ("step", lambda: layer.o_proj(wrapper(text))),
             "scores kept (05)": ("step", lambda: layer(text, return_weights=True)[0]),
             "fused (05)": ("ours", lambda: layer(text)),
             "grouped, 2 KV heads (06)": ("ours", lambda: grouped(text)),
             "next token, cached (07)": ("ours", next_token)}
    if T > (16 if quick else 512):           # a call for each token and head: seconds
        del sides["loops over tokens and heads (01)"]
    with torch.no_grad():
        exact, shared = copy.deepcopy(layer).double(), copy.deepcopy(grouped).double()
        want = dict.fromkeys(sides, (exact(text.double(), return_weights=True)[0],))
        want["grouped, 2 KV heads (06)"] = (shared(text.double(), return_weights=True)[0],)
        want["next token, cached (07)"] = (shared(x.double(), return_weights=True)[0][:, -1:],)
    return Case(f"the steps of the book, T {T}", sides, want, *layer_cost(1, T, 0, D, H, H, 4),
                token=layer_cost(1, 1, T, D, H, Hkv, 4), cache_bytes=cache.nbytes)


def memory(T: int, device: str, quick: bool) -> Case:
    """Sides whose peak memory is compared; B 1, d 768, 12 heads."""
    dtype = torch.float32
    D, H = (64, 4) if quick else (768, 12)
    torch.manual_seed(0)
    layer = lively(MultiHeadAttention(D, D, None, 0.0, H, out_bias=False)).to(device, dtype).eval()
    theirs, biased = layer.to_torch(), with_biases(layer)
    x = torch.randn(1, T, D, device=device, dtype=dtype)
    closed = ~causal_mask(T, device=device)
    sides = {
        "ours": ("ours", lambda: layer(x)), "parts": ("parts", lambda: bare(layer, x)),
        "nn.MultiheadAttention": ("peer", lambda: pytorchs(theirs, x, closed)),
        "nn.MultiheadAttention, with biases": ("peer", lambda: pytorchs(biased, x, closed)),
        "nn.MultiheadAttention, weights returned": ("peer", lambda: pytorchs(theirs, x, closed, True)),
        "scores kept (05)": ("step", lambda: layer(x, return_weights=True)[0])}
    with torch.no_grad():
        want = (copy.deepcopy(layer).double()(x.double(), return_weights=True)[0],)
    return Case(f"peak memory, T {T}", sides, dict.fromkeys(sides, want))


def growth(new: int, device: str, quick: bool) -> Case:
    """Write `new` tokens after one, with and without a cache."""
    torch.manual_seed(0)
    model = lively(DecoderLM(DecoderConfig(97, 32, 2, 4, 2, 48) if quick else DecoderConfig(256, 128, 4, 4, 2, 352)))
    model = model.to(device).eval()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    return Case(f"write {new} tokens", {
        "with a cache": ("ours", lambda: generate(model, ids, max_new_tokens=new)),
        "without": ("step", lambda: generate(model, ids, max_new_tokens=new, use_cache=False))}, same=True)


# --- torch.compile

def compile_steps(device: str, quick: bool) -> list[tuple[str, Callable, Callable, list[int]]]:
    """Name, what is compiled, how it is called with a length (it or its compiled form), and the lengths."""
    D, H, Hkv = (64, 4, 2) if quick else (768, 12, 3)
    lengths = [16, 12, 8] if quick else [256, 192, 128, 64]      # falling: a cache can only be cropped
    torch.manual_seed(0)
    layer = lively(GroupedQueryAttention(D, H, Hkv)).to(device).eval()
    model = DecoderLM(DecoderConfig(97, D, 2, H, Hkv, 2 * D)).to(device)
    x = torch.randn(1, lengths[0] + 1, D, device=device)
    ids = torch.randint(97, (2, lengths[0]), generator=torch.Generator().manual_seed(0)).to(device)
    cache = KVCache(1, Hkv, 2 * lengths[0], D // H, device=device)
    writer = DecoderLM(DecoderConfig(97, 32, 2, 4, 2, 48) if quick else DecoderConfig(32000, 512, 8, 8, 2, 1408))
    writer = writer.to(device).eval()
    kept = writer.new_cache(1, 2 * lengths[0])
    with torch.no_grad():
        layer(x, cache=cache)
        writer(ids[:1], cache=kept)

    def prompt(fn, T):
        with torch.no_grad():
            return fn(x[:, :T])

    def token(fn, T):
        cache.crop(T)
        with torch.no_grad():
            return fn(x[:, T:T + 1], cache=cache)

    def written(fn, T):
        for layer_cache in kept:
            layer_cache.crop(T - 1)
        with torch.no_grad():
            return fn(ids[:1, T - 1:T], cache=kept)

    def train(fn, T):
        model.zero_grad()
        text = ids[:, :T].clone()
        loss = fn(text, labels=text)[0]
        loss.backward()
        return loss.detach(), model.lm_head.weight.grad
    return [("a prompt through a layer", layer, prompt, lengths),
            ("one token through a layer, any length of its cache", layer, token, lengths),
            ("one token through eight layers, any length", writer, written, lengths),
            ("a training step of two layers", model, train, lengths)]


SCENARIOS: dict[str, Callable] = {"mha": mha, "mha-train": mha_train, "gqa": gqa, "decode-256": decode(256),
                                  "decode-1024": decode(1024), "decode-4096": decode(4096), "generate": writing}
