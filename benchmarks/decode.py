"""Time one token through one layer with a cache: this book's, its parts, and Hugging Face's LlamaAttention.

    python benchmarks/decode.py            # d 2048, 32 heads, 8 KV heads; 256, 1024 and 4096 tokens in the cache
    python benchmarks/decode.py --cached 64 --rounds 3

All sides have the same weights, and keys and values of the same text; their outputs are compared with float64 before
anything is timed. They run in turn in one process, the order changing; printed are medians of the ratio within a round.
"Parts" are the four F.linear and one fused attention over the filled slots: no positions, no writing, no checks. Nothing
is asserted about time: machines differ. Ratios within about 5 % of 1 are noise.
"""
import argparse
import random
import statistics
import time

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from attn_nb import GroupedQueryAttention, KVCache

D, H, HKV, DH = 2048, 32, 8, 64


def parts(layer, x, keys, values):
    """The bare calls that any implementation must make."""
    q, k, v = (F.linear(x, p.weight) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    rows = q.view(1, HKV, H // HKV, DH)                      # the query heads of a group become rows of its KV head
    return F.linear(F.scaled_dot_product_attention(rows, keys, values).view(1, 1, D), layer.o_proj.weight)


def sides(layer, text, max_len):
    """Name -> a function that reads the last token after all others, again and again; and the exact output."""
    config = LlamaConfig(hidden_size=D, num_attention_heads=H, num_key_value_heads=HKV, head_dim=DH, num_hidden_layers=1,
                         max_position_embeddings=max_len, attn_implementation="sdpa")
    theirs = LlamaAttention(config, 0).eval()
    theirs.load_state_dict(layer.state_dict())
    past, last = text[:, :-1], text[:, -1:]
    tables = LlamaRotaryEmbedding(config)(text, torch.arange(text.shape[1])[None])
    before, now = ([t[:, s] for t in tables] for s in (slice(-1), slice(-1, None)))
    half = [tuple(t[..., :DH // 2].contiguous() for t in pair) for pair in (before, now)]

    ours, static = KVCache(1, HKV, max_len, DH), StaticCache(config=config, max_cache_len=text.shape[1])
    layer(past, cache=ours, rope=half[0])
    theirs(past, tuple(before), past_key_values=static)
    kept, length = static.layers[0], past.shape[1]
    keys, values = (x.clone() for x in (ours.keys, ours.values))

    def our_token():
        ours.crop(length)
        return layer(last, cache=ours, rope=half[1])

    def static_token():
        kept.cumulative_length.fill_(length)
        return theirs(last, tuple(now), past_key_values=static)[0]

    dynamic = DynamicCache(config=config)
    theirs(past, tuple(before), past_key_values=dynamic)

    def dynamic_token():
        out = theirs(last, tuple(now), past_key_values=dynamic)[0]
        dynamic.crop(-1)
        return out

    exact = GroupedQueryAttention(D, H, HKV, head_dim=DH).double()
    exact.load_state_dict(layer.state_dict())
    want = exact(text.double(), rope=tuple(t[..., :DH // 2].double() for t in tables))[:, -1:]
    return want, {"ours": our_token, "parts": lambda: parts(layer, last, keys, values), "StaticCache": static_token,
                  "DynamicCache": dynamic_token}


def median_ratios(functions, rounds):
    """Median over rounds of time(first) / time(each); the first round warms up."""
    ratios, order = {name: [] for name in functions}, random.Random(0)
    for number in range(rounds + 1):
        took = {}
        for name in order.sample(sorted(functions), len(functions)):
            start = time.perf_counter()
            functions[name]()
            took[name] = time.perf_counter() - start
        if number:
            for name in functions:
                ratios[name].append(took["ours"] / took[name])
    return {name: statistics.median(values) for name, values in ratios.items()}


@torch.inference_mode()
def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cached", type=int, nargs="+", default=[256, 1024, 4096], metavar="N")
    options.add_argument("--rounds", type=int, default=200)
    options = options.parse_args()
    if min(*options.cached, options.rounds) < 2:
        options.error("N and rounds must be at least 2")
    torch.manual_seed(0)
    layer = GroupedQueryAttention(D, H, HKV, head_dim=DH).eval()
    print(f"one token, d {D}, {H} heads, {HKV} KV heads, float32, {torch.get_num_threads()} threads; time of ours / theirs")
    for cached in options.cached:
        want, functions = sides(layer, torch.randn(1, cached, D), 2 * cached)
        errors = {name: (fn().double() - want).abs().max().item() for name, fn in functions.items() if name != "parts"}
        if errors["ours"] > 2 * errors["StaticCache"] + 1e-5:
            raise SystemExit(f"{cached} cached: errors {errors}")
        ratios = median_ratios(functions, options.rounds)
        seconds = Timer("fn()", globals={"fn": functions["ours"]}).blocked_autorange(min_run_time=0.5).median
        print(f"{cached:5} in the cache: " + "   ".join(f"{name} {ratios[name]:.3f}" for name in functions if name != "ours")
              + f"   ({1e6 * seconds:.0f} microseconds)", flush=True)


if __name__ == "__main__":
    main()
