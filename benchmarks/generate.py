"""Time whole greedy writing: this book's generate, and transformers' generate with its caches, on the same weights.

    python benchmarks/generate.py                  # 8 layers, d 512, 8 heads, 2 KV heads, d_ff 1408, vocabulary 32000
    python benchmarks/generate.py --rounds 3 --new 16

Prompt of 64 tokens, 48 new ones, float32, one text. All sides must write the same tokens, and the logits of the prompt
are compared with float64, before anything is timed. They run in turn in one process, the order changing; printed are
medians of the ratio within a round. "Parts" are the bare F.linear and fused attention calls of every token, without norms,
positions, writing, checks or loops over texts: a floor for stock operations. Nothing is asserted about time.
"""
import argparse
import copy
import random
import statistics
import time

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from attn_nb import DecoderConfig, DecoderLM, generate


def models():
    """Ours and theirs, with the same weights, scaled so that the best token is clear."""
    torch.manual_seed(0)
    config = DecoderConfig(32000, 512, 8, 8, 2, 1408)
    ours = DecoderLM(config).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0, 1.4 * p.shape[1] ** -0.5 if p.dim() == 2 else 0.5)
        ours.model.embed_tokens.weight.normal_()
    theirs = LlamaForCausalLM(LlamaConfig(**{**config.to_hf(), "attn_implementation": "sdpa"})).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def parts(model, prompt_len, new):
    """The matrix products and the attention of each pass, on numbers of the right shapes."""
    c = model.config
    keys, values = torch.randn(2, 1, c.num_kv_heads, prompt_len + new, c.head_dim)

    def pass_through(T, kv_len):
        x = model.model.embed_tokens.weight[:T][None]
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
            pass_through(prompt_len, prompt_len)
            for n in range(1, new):
                pass_through(1, prompt_len + n)
    return run


def sides(ours, theirs, ids, new):
    """Name -> a function that writes all tokens."""
    options = {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}

    def static():
        cache = StaticCache(config=theirs.config, max_cache_len=ids.shape[1] + new)
        return theirs.generate(ids, past_key_values=cache, **options, disable_compile=True)

    return {"ours": lambda: generate(ours, ids, max_new_tokens=new),
            "transformers, dynamic": lambda: theirs.generate(ids, **options),
            "transformers, static": static,
            "parts": parts(ours, ids.shape[1], new)}


def check(ours, theirs, found, ids):
    """All sides wrote the same; prompt logits are as near to float64 as theirs."""
    first = found["ours"]()
    for name in ("transformers, dynamic", "transformers, static"):
        assert torch.equal(found[name](), first), f"{name} writes other tokens"
    with torch.no_grad():
        exact = copy.deepcopy(ours).double()(ids)
        errors = [(logits - exact).abs().max().item() for logits in (ours(ids), theirs(ids).logits)]
    assert errors[0] <= 2 * errors[1] + 1e-5, errors
    print(f"{len(first[0].unique())} different tokens; error of prompt logits {errors[0]:.1e}, theirs {errors[1]:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="also torch.compile our model (takes a minute)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours, theirs = models()
    ids = torch.randint(32000, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    found = sides(ours, theirs, ids, args.new)
    check(ours, theirs, found, ids)
    if args.compile:
        compiled = torch.compile(ours, dynamic=True)
        found["ours, compiled"] = lambda: generate(compiled, ids, max_new_tokens=args.new)
        assert torch.equal(found["ours, compiled"](), found["ours"]())
    times = {name: [] for name in found}
    for _ in range(args.rounds):
        for name in random.sample([*found], len(found)):
            start = time.perf_counter()
            found[name]()
            times[name].append(time.perf_counter() - start)
    for name in found:
        if name != "ours":
            ratio = statistics.median(a / b for a, b in zip(times["ours"], times[name]))
            print(f"ours / {name:24} {ratio:.2f}")
    print(f"ours: {1000 * statistics.median(times['ours']) / args.new:.2f} ms a token")


if __name__ == "__main__":
    main()
