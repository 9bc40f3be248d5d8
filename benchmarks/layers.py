"""Time a layer of this book against its parts: the bare F.linear and fused-attention calls on the same weights.

    python benchmarks/layers.py            # B 2, T 1024, d 768, 12 heads
    python benchmarks/layers.py --length 64 --rounds 3

Both sides run alternately in one process, after their outputs were compared with a float64 reference. Printed are
medians of the ratio of neighbouring runs, and the memory that a forward pass takes at T and 2 T. Nothing is asserted
about time: machines differ. Ratios within about 5 % of 1 are noise.
"""
import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attn_nb import GroupedQueryAttention, MultiHeadAttention, attention, causal_mask, repeat_kv


def heads_of(layer):
    return layer.num_heads, getattr(layer, "num_kv_heads", layer.num_heads)


def parts(layer, x):
    """The same numbers from bare calls, without a module, a check or a helper."""
    q, k, v = (F.linear(x, p.weight, p.bias).unflatten(-1, (heads, -1)).transpose(1, 2) for p, heads in zip(
        (layer.q_proj, layer.k_proj, layer.v_proj), heads_of(layer) + heads_of(layer)[1:]))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return F.linear(out.transpose(1, 2).flatten(2), layer.o_proj.weight, layer.o_proj.bias)


def exact(layer, x):
    """The readable attention in float64."""
    layer = layer.double()
    q, k, v = (p(x.double()).unflatten(-1, (heads, -1)).transpose(1, 2) for p, heads in zip(
        (layer.q_proj, layer.k_proj, layer.v_proj), heads_of(layer) + heads_of(layer)[1:]))
    shared = q.shape[1] // k.shape[1]
    out, _ = attention(q, repeat_kv(k, shared), repeat_kv(v, shared), causal_mask(x.shape[1]))
    out = layer.o_proj(out.transpose(1, 2).flatten(2))
    layer.to(x.dtype)
    return out


def ratio(first, second, rounds):
    """Median of time(first) / time(second) over neighbouring runs, the order changing each time."""
    ratios = []
    for number in range(rounds + 1):
        took = {}
        for fn in (first, second) if number % 2 else (second, first):
            start = time.perf_counter()
            fn()
            took[fn] = time.perf_counter() - start
        ratios.append(took[first] / took[second])
    return statistics.median(ratios[1:])                     # the first round warms up


class Allocated(TorchDispatchMode):
    """Adds up the bytes of new tensors."""
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old:
                self.total += t.nbytes
        return out


def allocated(fn):
    with Allocated() as counting:
        fn()
    return counting.total


@torch.inference_mode()
def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--length", type=int, default=1024)
    options.add_argument("--rounds", type=int, default=40)
    options = options.parse_args()
    if min(options.length, options.rounds) < 1:
        raise SystemExit("length and rounds must be at least 1")
    torch.manual_seed(0)
    D, H = 768, 12
    x = torch.randn(2, options.length, D)
    layers = {"MultiHeadAttention": MultiHeadAttention(D, D, None, 0.0, H, out_bias=False),
              **{f"GroupedQueryAttention, {Hkv} KV heads": GroupedQueryAttention(D, H, Hkv) for Hkv in (12, 3)}}
    print(f"B 2, T {options.length}, d {D}, {H} heads, float32, causal, {torch.get_num_threads()} threads")
    for name, layer in layers.items():
        layer.eval()
        want = exact(layer, x)
        errors = [(fn(x).double() - want).abs().max().item() for fn in (layer, lambda x: parts(layer, x))]
        if errors[0] > 2 * errors[1] + 1e-5:
            raise SystemExit(f"{name}: error {errors[0]:.2g}, of the parts {errors[1]:.2g}")
        twice = torch.randn(2, 2 * options.length, D)
        growth = allocated(lambda: layer(twice)) / allocated(lambda: layer(x))
        print(f"{name:34} time / parts {ratio(lambda: layer(x), lambda: parts(layer, x), options.rounds):.3f}   "
              f"memory at 2 T / at T {growth:.2f}")


if __name__ == "__main__":
    main()
