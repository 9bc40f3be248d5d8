"""Bugs planted by name. Each must be caught twice: by a cell of its chapter, and by the tests.

    python tests/planted.py           # rewrite the report that the book shows

ATTN_NB_PLANT=<name> makes the test suite import the package with that bug in it (see conftest.py).
"""
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "nbs/_generated/planted_bugs.md"
MUTANT = None  # (module, source): tools/mutate.py sets it in a forked process


@dataclass(frozen=True)
class Bug:
    name: str       # what is wrong, in words
    module: str
    old: str        # occurs once in the module
    new: str

    @property
    def notebook(self):
        return next((ROOT / "nbs").glob(f"[0-9][0-9]_{self.module}.ipynb"))

    def plant(self, source):
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {source.count(self.old)} times in {self.module}")
        return source.replace(self.old, self.new)


def one(name, old, new):
    return Bug(name, "single_head", old, new)


MATMUL = "query.to(wide) @ key.to(wide).mT * scale"
BUGS = [
    one("scale missing", MATMUL, "query.to(wide) @ key.to(wide).mT"),
    one("scale multiplied instead of divided", "query.shape[-1] ** -0.5", "query.shape[-1] ** 0.5"),
    one("scale 1/d instead of 1/sqrt(d)", "query.shape[-1] ** -0.5", "1 / query.shape[-1]"),
    one("scale by the number of keys", "query.shape[-1] ** -0.5", "key.shape[-2] ** -0.5"),
    one("scale by the width of the values", "query.shape[-1] ** -0.5", "value.shape[-1] ** -0.5"),
    one("scale argument ignored", "if scale is None else scale", "if scale is None else query.shape[-1] ** -0.5"),
    one("weights scaled instead of scores", "weights = _masked_softmax(scores.expand(shape), attn_mask)",
        "weights = scale * _masked_softmax((scores / scale).expand(shape), attn_mask)"),
    one("softmax over the queries", "return scores.softmax(-1)                        # (..., Tq, Tk)",
        "return scores.softmax(-2)                        # (..., Tq, Tk)"),
    one("softmax over the queries when masked", "return scores.softmax(-1).masked_fill(blocked, 0.0)",
        "return scores.softmax(-2).masked_fill(blocked, 0.0)"),
    one("key.T reverses all axes of a 3-D tensor", MATMUL,
        "query.to(wide) @ key.to(wide).permute(*reversed(range(key.dim()))) * scale"),
    one("keys in reverse order", MATMUL, "query.to(wide) @ key.to(wide).mT.flip(-1) * scale"),
    one("mask polarity inverted", "blocked = ~attn_mask", "blocked = attn_mask"),
    one("float mask ignored", "scores = scores + attn_mask ", "scores = scores + 0 * attn_mask "),
    one("mask multiplied instead of filled", "scores = scores.masked_fill(blocked, -torch.inf) ",
        "scores = scores * ~blocked "),
    one("-1e9 instead of minus infinity", "scores = scores.masked_fill(empty, 0.0)              # (..., Tq, Tk)\n"
        "    return scores.softmax(-1).masked_fill(blocked, 0.0)",
        "scores = scores.clamp(min=-1e9)                      # (..., Tq, Tk)\n    return scores.softmax(-1)"),
    one("blocked row becomes NaN", "scores = scores.masked_fill(empty, 0.0)              # (..., Tq, Tk)\n"
        "    return scores.softmax(-1).masked_fill(blocked, 0.0)",
        "return scores.softmax(-1)"),
    one("NaN hidden forward, alive in the gradient",
        "scores = scores.masked_fill(blocked, -torch.inf)     # (..., Tq, Tk)\n"
        "    scores = scores.masked_fill(empty, 0.0)              # (..., Tq, Tk)\n"
        "    return scores.softmax(-1).masked_fill(blocked, 0.0)",
        "bias = torch.zeros_like(scores).masked_fill(blocked, -torch.inf)\n"
        "    return (scores + bias).softmax(-1).nan_to_num(0.0)"),
    one("large number behind the mask, alive in the gradient", "return scores.softmax(-1).masked_fill(blocked, 0.0)",
        "return scores.softmax(-1).masked_fill(empty, 0.0)"),
    one("softmax in half precision", "wide = torch.promote_types(query.dtype, torch.float32)", "wide = query.dtype"),
    one("result left in float32", "return context.to(query.dtype), weights.to(query.dtype)", "return context, weights"),
    one("dropout without rescaling", "kept = F.dropout(weights, dropout_p).to(wide)",
        "kept = ((1 - dropout_p) * F.dropout(weights, dropout_p)).to(wide)"),
    one("dropout never applied", "kept = F.dropout(weights, dropout_p).to(wide)", "kept = weights.to(wide)"),
    one("weights returned after dropout", "return context.to(query.dtype), weights.to(query.dtype)",
        "return context.to(query.dtype), kept.to(query.dtype)"),
    one("layer: values read through the key matrix", "self.v_proj(tokens)", "self.k_proj(tokens)"),
    one("layer: query and key matrices swapped", "return self.q_proj(tokens), self.k_proj(tokens)",
        "return self.k_proj(tokens), self.q_proj(tokens)"),
    one("layer: created in another order", "self.q_proj = nn.Linear(d_in, d_out, bias=qkv_bias)\n"
        "        self.k_proj = nn.Linear(d_in, d_out, bias=qkv_bias)",
        "self.k_proj = nn.Linear(d_in, d_out, bias=qkv_bias)\n"
        "        self.q_proj = nn.Linear(d_in, d_out, bias=qkv_bias)"),
    one("autocast narrows the scores", "torch.autocast(device_type, enabled=False)",
        "torch.autocast(device_type, enabled=torch.is_autocast_enabled(device_type))"),
    one("leading axes of the values ignored by the weights", "_masked_softmax(scores.expand(shape), attn_mask)",
        "_masked_softmax(scores, attn_mask)"),
    one("layer: fused kernel not reached for want of a head axis", "x[None].flatten(0, -3)[:, None]             # (B, 1, T, D)",
        "x[None].flatten(0, -3)                      # (B, T, D)"),
    one("layer: fused road is causal", "F.scaled_dot_product_attention(q, k, v)",
        "F.scaled_dot_product_attention(q, k, v, is_causal=True)"),
    one("layer: readable road keeps another scale", "out, weights = attention(q, k, v)",
        "out, weights = attention(q, k, v, scale=1.0)"),
    one("layer: biases always on", "self.v_proj = nn.Linear(d_in, d_out, bias=qkv_bias)",
        "self.v_proj = nn.Linear(d_in, d_out, bias=True)"),
]


def causal(name, old, new):
    return Bug(name, "causal", old, new)


def dropout(name, old, new):
    return Bug(name, "dropout", old, new)


RULE = "return key - query <= offset"
BUGS += [
    causal("diagonal +1: one future token is seen", RULE, "return key - query <= offset + 1"),
    causal("diagonal -1: a token cannot see itself", RULE, "return key - query < offset"),
    causal("triu for tril", RULE, "return key - query >= offset"),
    causal("polarity of the causal mask flipped", RULE, "return key - query > offset"),
    causal("offset ignored", RULE, "return key - query <= 0 * offset"),
    causal("offset subtracted", RULE, "return key - query <= -offset"),
    causal("default offset 0: aligned to the upper left corner", "offset = kv_len - q_len if offset is None else offset",
           "offset = 0 if offset is None else offset"),
    causal("default offset q_len - kv_len", "offset = kv_len - q_len if offset is None else offset",
           "offset = q_len - kv_len if offset is None else offset"),
    causal("offset 0 taken for no offset", "offset = kv_len - q_len if offset is None else offset",
           "offset = offset if isinstance(offset, Tensor) else offset or kv_len - q_len"),
    causal("offsets per row without an axis for the heads", "[:, None, None, None]      # (B, 1, 1, 1)",
           "[:, None, None]            # (B, 1, 1)"),
    causal("queries and keys swapped", "query = torch.arange(q_len, device=device)[:, None]      # (Tq, 1)\n"
           "    key = torch.arange(kv_len, device=device)                # (Tk,)",
           "query = torch.arange(q_len, device=device)               # (Tq,)\n"
           "    key = torch.arange(kv_len, device=device)[:, None]       # (Tk, 1)"),
    causal("length counts one pad as real", "real = keys < given[:, None]", "real = keys <= given[:, None]"),
    causal("padding polarity flipped", "real = given == 1", "real = given == 0"),
    causal("lengths pad on the left", "real = keys < given[:, None]", "real = kv_len - 1 - keys < given[:, None]"),
    causal("padding mask blanks rows instead of columns", "return real[:, None, None]                           # (B, 1, 1, Tk)",
           "return real[:, None, :, None]"),
    causal("padding mask without axes for heads and queries",
           "return real[:, None, None]                           # (B, 1, 1, Tk)", "return real"),
    causal("negative lengths accepted", '_check_values("lengths", given, 0, kv_len)',
           '_check_values("lengths", given, -9, kv_len)'),
    causal("lengths beyond kv_len accepted", '_check_values("lengths", given, 0, kv_len)',
           '_check_values("lengths", given, 0, 99)'),
    causal("bias on the keys that may be seen", "return bias.masked_fill(~attn_mask, -torch.inf)",
           "return bias.masked_fill(attn_mask, -torch.inf)"),
    causal("bias by multiplication: 0 * inf is NaN", "return bias.masked_fill(~attn_mask, -torch.inf)",
           "return (1 - attn_mask.to(dtype)) * -torch.inf"),
    causal("bias is a finite number", "return bias.masked_fill(~attn_mask, -torch.inf)",
           "return bias.masked_fill(~attn_mask, -1e4)"),
    causal("other numbers of a bias are lost in silence", "if _has_values(attn_bias) and other.any():", "if False:"),
    causal("polarity of nn.MultiheadAttention kept", "return ~drop if", "return drop if"),
    causal("heads before batch in a 3-D mask", "may.unflatten(0, (-1, num_heads))      # (..., H, Tq, Tk)",
           "may.unflatten(0, (num_heads, -1)).transpose(0, 1)"),
    causal("layer: the caller's mask instead of the causal one", "return attn_mask & causal ",
           "return attn_mask | attn_mask & causal "),
    causal("layer: either mask is enough", "return attn_mask & causal ", "return attn_mask | causal "),
    causal("layer: a float mask replaces the causal one", "return torch.where(causal, attn_mask, -torch.inf)    # (..., Tq, Tk)",
           "return attn_mask + 0 * causal                        # (..., Tq, Tk)"),
    causal("layer: causal only without weights", "readable = return_weights or dropout_p == 1      # kernels want p < 1\n"
           "    attn_mask, is_causal = _join_masks(\n        query, key, attn_mask, is_causal=is_causal, as_mask=readable,",
           "readable = return_weights or dropout_p == 1\n"
           "    attn_mask, is_causal = _join_masks(\n        query, key, attn_mask, is_causal=is_causal, as_mask=False,"),
    causal("layer: the mask is not cut to the length", "causal = causal_mask(q_len, kv_len, offset=offset, device=query.device)",
           "causal = causal_mask(q_len + 3, kv_len + 3, offset=offset, device=query.device)"),
    causal("layer: the caller's mask is ignored", "return _and_causal(attn_mask, causal), False", "return causal, False"),
    causal("layer: a bias of -1e9 swallows the scores", "bias = bias - bias.detach().amax(-1, keepdim=True) ",
           "bias = bias - 0 "),
    causal("layer: empty row reads what it may not", "return out.masked_fill(empty, 0.0)                   # (..., Tq, Dv)",
           "return out                                           # (..., Tq, Dv)"),
    causal("layer: garbage in the pads gets through", "            value.masked_fill(unseen, 0.0), attn_mask, empty)",
           "            value + 0, attn_mask, empty)"),
    causal("layer: not causal at all", "attn_mask, is_causal=True,", "attn_mask, is_causal=False,"),
    causal("layer: dropout not passed on", "dropout_p=dropout_p,\n                               return_weights=return_weights)",
           "dropout_p=0.0,\n                               return_weights=return_weights)"),
    dropout("dropout in eval", "self.dropout.p if self.dropout.training else 0.0", "self.dropout.p"),
    dropout("no dropout in training", "self.dropout.p if self.dropout.training else 0.0", "0.0"),
    dropout("dropout in eval only", "self.dropout.p if self.dropout.training else 0.0",
            "0.0 if self.dropout.training else self.dropout.p"),
    dropout("survivors are not scaled", "return super().forward(x, attn_mask=attn_mask, dropout_p=dropout_p,\n"
            "                               return_weights=return_weights)",
            "out = super().forward(x, attn_mask=attn_mask, dropout_p=dropout_p, return_weights=return_weights)\n"
            "        return out if return_weights else out * (1 - dropout_p)"),
    dropout("keeps with probability p", "nn.Dropout(dropout)", "nn.Dropout(1 - dropout)"),
    dropout("context_length is one too small", "x.shape[-2] > self.context_length", "x.shape[-2] >= self.context_length"),
    dropout("longer input is accepted", "x.shape[-2] > self.context_length", "x.shape[-2] > 2 * self.context_length"),
    dropout("longer input is cut in silence",
            '            raise ValueError("x must have at most context_length="\n'
            '                             f"{self.context_length} tokens, "\n'
            '                             f"got {x.shape[-2]}")\n',
            "            x = x[..., -self.context_length:, :]\n"),
    dropout("the caller's mask is dropped on the way", "forward(x, attn_mask=attn_mask, ", "forward(x, attn_mask=None, "),
    dropout("the mask is saved with the weights", "        self.context_length = context_length\n",
            "        self.context_length = context_length\n"
            '        self.register_buffer("mask", torch.ones(context_length, context_length))\n'),
    dropout("qkv_bias is ignored", "super().__init__(d_in, d_out, qkv_bias)", "super().__init__(d_in, d_out)"),
]


def wrapper(name, old, new):
    return Bug(name, "multi_head_wrapper", old, new)


def multi(name, old, new):
    return Bug(name, "multi_head", old, new)


ONE_HEAD = "CausalAttention(d_in, d_out, context_length, dropout, qkv_bias)"
BUGS += [
    wrapper("heads share one module", f"nn.ModuleList(\n            {ONE_HEAD}\n            for _ in range(num_heads))",
            f"nn.ModuleList(\n            [{ONE_HEAD}] * num_heads)"),
    wrapper("the mask of head 0 for all heads", "masks = attn_mask.split(1, dim=-3) ",
            "masks = [attn_mask[..., :1, :, :]] * H "),
    wrapper("masks of the heads in reverse", "zip(self.heads, masks)", "zip(self.heads, masks[::-1])"),
    wrapper("masks for each head only without a batch axis", "attn_mask.dim() > 2 and", "attn_mask.dim() == 3 and"),
    wrapper("mask ignored where weights are asked for", "head(x, attn_mask=mask,",
            "head(x, attn_mask=None if return_weights else mask,"),
    wrapper("weights stacked before the batch", "torch.stack(weights, dim=-3)", "torch.stack(weights, dim=0)"),
    wrapper("columns of the heads interleaved", "return torch.cat(found, dim=-1) ",
            "return torch.stack(found, dim=-1).flatten(-2) "),
    wrapper("heads in reverse where weights are asked for", "return torch.cat(outs, dim=-1)",
            "return torch.cat(outs[::-1], dim=-1)"),
    wrapper("heads without dropout", ONE_HEAD, "CausalAttention(d_in, d_out, context_length, 0.0, qkv_bias)"),
    wrapper("heads without the biases asked for", ONE_HEAD, "CausalAttention(d_in, d_out, context_length, dropout)"),
    wrapper("widths of input and head swapped", ONE_HEAD, "CausalAttention(d_out, d_in, context_length, dropout, qkv_bias)"),
]

CUT = "x = x.unflatten(-1, (num_heads, wide))               # (..., T, H, Dh)\n    return x.transpose(-3, -2) "
JOIN = "return x.transpose(-3, -2).flatten(-2) "
CAUSAL = "is_causal = self.is_causal and key is None"
BUGS += [
    multi("split: view without the transpose", CUT, "return x.reshape(*x.shape[:-2], num_heads, x.shape[-2], wide) "),
    multi("split: every H-th column instead of a block", "x.unflatten(-1, (num_heads, wide)) ",
          "x.unflatten(-1, (wide, num_heads)).mT "),
    multi("split: a copy instead of a view", "return x.transpose(-3, -2)   ", "return x.transpose(-3, -2).clone()   "),
    multi("merge: heads not transposed back", JOIN, "return x.reshape(*x.shape[:-3], x.shape[-2], -1) "),
    multi("merge: columns of the heads interleaved", JOIN, "return x.movedim(-3, -1).flatten(-2) "),
    multi("scores scaled by the width of all heads", "q = split_heads(self.q_proj(query), H) ",
          "q = split_heads(self.q_proj(query), H) * H ** -0.5 "),
    multi("keys and values swapped", "q, k, v, attn_mask,", "q, v, k, attn_mask,"),
    multi("values read through the matrix of the keys", "split_heads(self.v_proj(value), H) ",
          "split_heads(self.k_proj(value), H) "),
    multi("output matrix forgotten", "out = self.o_proj(merge_heads(context)) ", "out = merge_heads(context) "),
    multi("self-attention sees its future", CAUSAL, "is_causal = False"),
    multi("self-attention causal whatever the module says", CAUSAL, "is_causal = key is None"),
    multi("cross-attention causal by default", CAUSAL, "is_causal = self.is_causal"),
    multi("is_causal=False overruled", "if is_causal is None:", "if not is_causal:"),
    multi("causality only without a mask", "q, k, v, attn_mask, is_causal=is_causal,",
          "q, k, v, attn_mask, is_causal=is_causal and attn_mask is None,"),
    multi("mask ignored where weights are asked for too", "q, k, v, attn_mask,",
          "q, k, v, None if return_weights else attn_mask,"),
    multi("weights averaged over the heads", "weights = weights.reshape(",
          "weights = weights.mean(1, keepdim=True).expand_as(weights).reshape("),
    multi("fused function never used", "return_weights=return_weights)\n        out = self.o_proj",
          "return_weights=True)\n        weights = weights if return_weights else None\n        out = self.o_proj"),
    multi("the mask of the first head for all", "q, k, v, attn_mask,",
          "q, k, v, attn_mask if attn_mask is None or attn_mask.dim() < 3 else attn_mask[..., :1, :, :],"),
    multi("value defaults to the query", "value = key if value is None else value",
          "value = query if value is None else value"),
    multi("value without key accepted", "if key is None and value is not None:", "if False:"),
    multi("width of the keys ignored", "nn.Linear(k_in, d_out, bias=qkv_bias)", "nn.Linear(d_in, d_out, bias=qkv_bias)"),
    multi("width of the values defaults to that of the queries", "v_in = k_in if v_in is None", "v_in = d_in if v_in is None"),
    multi("qkv_bias ignored for the values", "nn.Linear(v_in, d_out, bias=qkv_bias)", "nn.Linear(v_in, d_out, bias=False)"),
    multi("out_bias ignored", "nn.Linear(d_out, d_out, bias=out_bias)", "nn.Linear(d_out, d_out)"),
    multi("matrices created in another order", "self.q_proj = nn.Linear(d_in, d_out, bias=qkv_bias)\n"
          "        self.k_proj = nn.Linear(k_in, d_out, bias=qkv_bias)",
          "self.k_proj = nn.Linear(k_in, d_out, bias=qkv_bias)\n"
          "        self.q_proj = nn.Linear(d_in, d_out, bias=qkv_bias)"),
    multi("weights dropped in evaluation too", "self.dropout.p if self.dropout.training else 0.0", "self.dropout.p"),
    multi("weights never dropped", "self.dropout.p if self.dropout.training else 0.0", "0.0"),
    multi("context_length not checked for keys", "if most is not None and", 'if most is not None and name == "query" and'),
    multi("context_length refused when reached", "x.shape[-2] > most:", "x.shape[-2] >= most:"),
    multi("unequal batches accepted", "if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:", "if False:"),
    multi("num_heads need not divide d_out", "if d_out % num_heads:", "if False:"),
    multi("from_torch: matrices in another order", 'for x, w in zip("qkv", weights)}\n    if layer.in_proj_bias',
          'for x, w in zip("kqv", weights)}\n    if layer.in_proj_bias'),
    multi("from_torch: biases in another order", 'zip("qkv", biases)', 'zip("kqv", biases)'),
    multi("from_torch: weights shared, not copied", "x.detach().clone() for name", "x.detach() for name"),
    multi("from_torch: dropout lost", "layer.dropout, layer.num_heads,", "0.0, layer.num_heads,"),
    multi("from_torch: always in training", "return ours.train(layer.training)", "return ours"),
    multi("from_torch: always causal", "is_causal=is_causal)\n        ours", "is_causal=True)\n        ours"),
    multi("from_torch: extra key accepted", "if layer.bias_k is not None or layer.add_zero_attn:", "if layer.add_zero_attn:"),
    multi("to_torch: biases become zeros", "else p.bias.detach().clone()", "else torch.zeros_like(p.bias)"),
    multi("to_torch: output matrix shared, not copied", "layer.o_proj.weight.detach().clone()",
          "layer.o_proj.weight.detach()"),
    multi("to_torch: output matrix transposed", "layer.o_proj.weight.detach().clone()",
          "layer.o_proj.weight.detach().T.clone()"),
    multi("to_torch: keys before queries", "projections = (layer.q_proj, layer.k_proj, layer.v_proj)",
          "projections = (layer.k_proj, layer.q_proj, layer.v_proj)"),
    multi("to_torch: length before batch", "batch_first=True, device", "batch_first=False, device"),
]


def grouped(name, old, new):
    return Bug(name, "grouped_query", old, new)


FOLD = "return x.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)"
FOLD_MASK = "return _fold(attn_mask.expand(-1, H, Tq, -1), num_kv_heads)"
POOL = 'heads = heads.mean(1) if method == "mean" else heads[:, 0].clone()'
BYTES = "return 2 * math.prod(sizes.values()) * dtype.itemsize"
BUGS += [
    grouped("repeat for repeat_interleave", "return x.repeat_interleave(group_size, dim=-3) ",
            "return torch.cat([x] * group_size, -3) "),
    grouped("repeat_kv copies tokens instead of heads", "x.repeat_interleave(group_size, dim=-3) ",
            "x.repeat_interleave(group_size, dim=-2) "),
    grouped("groups folded in the other order", FOLD,
            "return x.unflatten(1, (-1, num_kv_heads)).transpose(1, 2).flatten(2, 3)"),
    grouped("mask per head folded in the other order", FOLD_MASK,
            "mask = attn_mask.expand(-1, H, Tq, -1)\n"
            "    return mask.unflatten(1, (-1, num_kv_heads)).transpose(1, 2).flatten(2, 3)"),
    grouped("grouped: offset ignored", "is_causal=is_causal, offset=offset,", "is_causal=is_causal, offset=0,"),
    grouped("grouped: aligned to the lower right corner", "is_causal=is_causal, offset=offset,",
            "is_causal=is_causal, offset=key.shape[2] - Tq,"),
    grouped("one query always sees all keys", "attn_mask, is_causal=is_causal, offset=offset,",
            "attn_mask, is_causal=is_causal and Tq > 1, offset=offset,"),
    grouped("the kernel's causality on folded rows", "as_mask = fold or", "as_mask ="),
    grouped("scale lost on the fused road", "is_causal=is_causal, **options)\n    out",
            'is_causal=is_causal, **{**options, "scale": None})\n    out'),
    grouped("scale lost with weights", "attention(query, key, value, attn_mask, **options)",
            "attention(query, key, value, attn_mask, dropout_p)"),
    grouped("weights of a group token by token", "weights.reshape(B, H, Tq, key.shape[2])    # (B, H, Tq, Tk)",
            "weights.reshape(\n            B, Hkv, Tq, H // Hkv, key.shape[2]).transpose(2, 3).flatten(1, 2)"),
    grouped("keys and values copied on the hot path", "elif H != Hkv and not _reads_groups(query, value, attn_mask):",
            "elif H != Hkv:"),
    grouped("a query that sees nothing gives NaN", "out.reshape(B, H, Tq, value.shape[3]).to(dtype) ",
            "(out / (out != 0).any(-1, keepdim=True)).reshape(B, H, Tq, -1).to(dtype) "),
    grouped("dropout of weights in eval", "self.dropout.p if self.dropout.training else 0.0,", "self.dropout.p,"),
    grouped("the two dropouts swapped", "nn.Dropout(dropout)\n        self.out_dropout = nn.Dropout(out_dropout)",
            "nn.Dropout(out_dropout)\n        self.out_dropout = nn.Dropout(dropout)"),
    grouped("out_dropout forgotten", "        out = self.out_dropout(out)\n", ""),
    grouped("head_dim ignored", "if head_dim is None:\n        if d_model % num_heads:",
            "if True:\n        if head_dim is None and d_model % num_heads:"),
    grouped("keys as wide as the queries", "self.k_proj = nn.Linear(d_model, narrow,",
            "self.k_proj = nn.Linear(d_model, wide,"),
    grouped("grouped: biases always on", "self.v_proj = nn.Linear(d_model, narrow, bias=qkv_bias)",
            "self.v_proj = nn.Linear(d_model, narrow, bias=True)"),
    grouped("grouped: no bias at the end", "bias=out_bias)\n        self.q_norm", "bias=False)\n        self.q_norm"),
    grouped("is_causal of the layer ignored", "is_causal=self.is_causal,", "is_causal=True,"),
    grouped("mean over members of other groups", "heads = weight.unflatten(0, (layer.num_kv_heads, -1, layer.head_dim))",
            "heads = weight.unflatten(0, (-1, layer.num_kv_heads, layer.head_dim)).transpose(0, 1)"),
    grouped("last head of a group for the first", POOL, POOL.replace("[:, 0]", "[:, -1]")),
    grouped("biases of the first head, not their mean", POOL, POOL.replace('== "mean"', '== "mean" and weight.dim() == 2')),
    grouped("conversion shares memory", "new[name] = x.clone()", "new[name] = x"),
    grouped("conversion loses out_dropout", 'out_dropout=getattr(layer, "out_dropout", nn.Dropout(0)).p,', "out_dropout=0.0,"),
    grouped("cache: keys without values", BYTES, BYTES.replace("2 * ", "")),
    grouped("cache: two bytes whatever the dtype", BYTES, BYTES.replace("dtype.itemsize", "2")),
    grouped("rows of a group folded token by token", FOLD,
            "return x.unflatten(1, (num_kv_heads, -1)).transpose(2, 3).flatten(2, 3)"),
    grouped("mask of the first query head for its group", FOLD_MASK,
            "mask = attn_mask.expand(-1, H, Tq, -1).unflatten(1, (num_kv_heads, -1))\n"
            "    return mask[:, :, :1].expand(mask.shape).flatten(2, 3)"),
    grouped("grouped: default offset 1", "offset: int | Tensor = 0,", "offset: int | Tensor = 1,"),
    grouped("weights made when nobody asks", "readable = return_weights or dropout_p == 1 ", "readable = True "),
    grouped("more KV heads than query heads pass", "or q[1] % k[1]:", "or q[1] % k[1] and k[1] % q[1]:"),
    grouped("out_dropout before the projection", "out = self.o_proj(merge_heads(context))              # (B, T, D)\n"
            "        out = self.out_dropout(out)\n", "out = self.o_proj(self.out_dropout(merge_heads(context)))\n"),
    grouped("the layer loses the caller's mask", "            q, k, v, attn_mask, is_causal",
            "            q, k, v, None, is_causal"),
    grouped("mean where the first was asked for", POOL, "heads = heads.mean(1)"),
    grouped("values not pooled with the keys", "_pool_heads(x, grouped, method)",
            '_pool_heads(x, grouped, method if name[0] == "k" else "first")'),
    grouped("conversion shares memory of the first head", "heads[:, 0].clone()", "heads[:, 0]"),
    grouped("random keeps the old heads", 'elif method != "random":', "else:"),
    grouped("conversion loses the mode", "return grouped.train(layer.training)", "return grouped"),
    grouped("conversion loses is_causal", "dropout=layer.dropout.p, is_causal=layer.is_causal,", "dropout=layer.dropout.p,"),
    grouped("cache: bits for bytes", BYTES, BYTES + " * 8"),
    grouped("cache: batch_size forgotten", ',\n             "batch_size": batch_size}', "}"),
]


def cached(name, old, new):
    return Bug(name, "kv_cache", old, new)


KEYS = "self._keys = _written(self._keys, key, self._length)"
VALUES = "self._values = _written(self._values, value, self._length)"
GROWN = "self._length = self._length + key.shape[2]"
CHECKED = "        _check_new(self._keys, self._values, key, value, self._length)\n"
ROOM = "if length + key.shape[2] > keys.shape[2]:"
CROPPED = "self._length = length\n"
RESET = "self._length = 0\n        if self._keys.requires_grad"
KEPT = "kept = [x.index_select(0, index) for x in (self.keys, self.values)]"
WRITTEN = "self._keys = _written(self._keys, kept[0], 0)\n        self._values = _written(self._values, kept[1], 0)"
NBYTES = "self._keys.nbytes + self._values.nbytes"
SLOTS = "batch_size, num_kv_heads, max_len, width, dtype=dtype,"
BUGS += [
    cached("keys written a slot late", KEYS,
           KEYS.replace("self._length)", "min(\n            self._length + 1, self.max_len - key.shape[2]))")),
    cached("values written a slot late", VALUES,
           VALUES.replace("self._length)", "min(\n            self._length + 1, self.max_len - value.shape[2]))")),
    cached("values written to the first slots", VALUES, VALUES.replace("self._length)", "0)")),
    cached("keys kept as values", VALUES, VALUES.replace("value,", "key,")),
    cached("values never written", "        " + VALUES + "\n", ""),
    cached("length grows by one, whatever comes", GROWN, "self._length = self._length + 1"),
    cached("length is that of the last call", GROWN, "self._length = key.shape[2]"),
    cached("length is not moved on", "        " + GROWN + "\n", ""),
    cached("update returns all slots", "return self.keys, self.values", "return self._keys, self._values"),
    cached("update returns the new tokens only", "return self.keys, self.values", "return key, value"),
    cached("update returns values before keys", "return self.keys, self.values", "return self.values, self.keys"),
    cached("update returns copies", "return self.keys, self.values", "return self.keys.clone(), self.values.clone()"),
    cached("keys show one slot too many", "return self._keys[:, :, :self._length]",
           "return self._keys[:, :, :self._length + 1]"),
    cached("values show all slots", "return self._values[:, :, :self._length]", "return self._values"),
    cached("no room is noticed one token late", ROOM, ROOM.replace(">", "> 1 +")),
    cached("the last slot is never filled", ROOM, ROOM.replace(">", ">=")),
    cached("a full cache loses the rest in silence", ROOM + "\n", "if False:\n"),
    cached("a full cache starts again at slot 0", CHECKED,
           "        if self._length + key.shape[2] > self.max_len:\n            self._length = 0\n" + CHECKED),
    cached("length moved on before the check", CHECKED,
           "        past, self._length = self._length, self._length + key.shape[2]\n"
           "        _check_new(self._keys, self._values, key, value, past)\n        self._length = past\n"),
    cached("crop keeps one token too many", CROPPED + "\n    def reset",
           "self._length = min(length + 1, self._length)\n\n    def reset"),
    cached("crop keeps the last tokens", CROPPED + "\n    def reset",
           "first = self._length - length\n        for slots in (self._keys, self._values):\n"
           "            slots[:, :, :length] = slots[:, :, first:self._length].clone()\n"
           "        self._length = length\n\n    def reset"),
    cached("crop counts from the end", CROPPED + "\n    def reset", "self._length = self._length - length\n\n    def reset"),
    cached("crop may lengthen", "if length > self._length:", "if length > self.max_len:"),
    cached("reset forgets nothing", RESET, "if self._keys.requires_grad"),
    cached("reset forgets all but one token", RESET, RESET.replace("self._length = 0", "self._length = min(1, self._length)")),
    cached("reset keeps the old graph", "if self._keys.requires_grad or self._values.requires_grad:", "if False:"),
    cached("reorder of the keys only", "\n        self._values = _written(self._values, kept[1], 0)", ""),
    cached("reorder in the other direction", KEPT,
           KEPT.replace("index_select(0, index)", "clone().index_copy(0, index, x)")),
    cached("reorder of rows one by one, over each other", KEPT + "\n        " + WRITTEN,
           "for row, parent in enumerate(index.tolist()):\n            for x in (self.keys, self.values):\n"
           "                x[row] = x[parent]"),
    cached("reorder of heads", KEPT,
           KEPT.replace("index_select(0, index)", "index_select(1, index.clamp(max=x.shape[1] - 1))")),
    cached("slots for as many tokens as a head is wide", SLOTS, SLOTS.replace("max_len", "head_dim")),
    cached("slots and heads in the other order", SLOTS, SLOTS.replace("num_kv_heads, max_len", "max_len, num_kv_heads")),
    cached("values as wide as the keys", "for width in (head_dim, v_head_dim))", "for width in (head_dim, head_dim))"),
    cached("one memory for keys and values", "        self._length = 0\n\n    def __repr__",
           "        if head_dim == v_head_dim:\n            self._values = self._keys\n"
           "        self._length = 0\n\n    def __repr__"),
    cached("dtype of the cache ignored", "width, dtype=dtype,", "width, dtype=torch.float32,"),
    cached("gradients dropped", "slots, new.to(slots.dtype), 2,", "slots, new.detach().to(slots.dtype), 2,"),
    cached("gradients of old tokens dropped", "slots, new.to(slots.dtype), 2,", "slots.detach(), new.to(slots.dtype), 2,"),
    cached("in place where gradients are wanted", "if torch.is_grad_enabled() and (new.requires_grad or\n"
           "                                    slots.requires_grad):", "if False:"),
    cached("a copy at every call", "if torch.is_grad_enabled() and (new.requires_grad or\n"
           "                                    slots.requires_grad):", "if True:"),
    cached("an older graph is written over", "        return slots.detach().clone()", "        return slots.detach()"),
    cached("memory of the keys alone counted", NBYTES, "self._keys.nbytes"),
    cached("memory of the filled slots counted", NBYTES, "self.keys.nbytes + self.values.nbytes"),
    cached("cached heads may differ in number", "tuple(x.shape[:2]) == (B, Hkv)", "len(x) == B"),
    cached("any row may be asked for", '_check_values("index", index, 0, len(keys) - 1)',
           "index.clamp_(0, len(keys) - 1)"),
]

OFFSET = "offset = _check_cache(cache, q, attn_mask)"
ROTATED = "q, k = _rotate(torch.cat([q, k], 1), *rope).split(\n                [self.num_heads, Hkv], 1)"
TURN = "turned = torch.cat([first * cos - second * sin,\n                        second * cos + first * sin, rest], -1)"
UPDATED = "k, v = _keep(cache, q, k, v)"
BUGS += [
    grouped("layer: offset 0 with a cache", OFFSET, OFFSET.replace("offset =", "_ =")),
    grouped("layer: offset of the new length", UPDATED, UPDATED + "\n            offset = cache.length"),
    grouped("layer: offset one too small", OFFSET, OFFSET + " - 1"),
    grouped("layer: cache written, not read", UPDATED, "cache.update(k, v)"),
    grouped("layer: cache not written", UPDATED,
            "k, v = (torch.cat(pair, 2) for pair in zip((cache.keys, cache.values), (k, v)))"),
    grouped("layer: the mask is checked after the write", "    if attn_mask is not None:\n        kv_len = cache",
            "    if False:\n        kv_len = cache"),
    grouped("layer: the mask need only fit the new tokens", "kv_len = cache.length + x.shape[2]", "kv_len = x.shape[2]"),
    grouped("layer: result in the dtype of the cache", UPDATED, "k, v = cache.update(k, v)\n            q = q.to(k.dtype)"),
    grouped("layer: copies for the query heads are kept", UPDATED,
            UPDATED.replace("k, v)", "*(\n                repeat_kv(x, self.num_heads // Hkv) for x in (k, v)))")),
    grouped("layer: keys kept before rotation", f"            {ROTATED}\n        offset = 0\n        if cache is not None:\n"
            f"            {OFFSET}\n            {UPDATED}\n",
            f"            q, turned = _rotate(q, *rope), _rotate(k, *rope)\n        offset = 0\n        if cache is not None:\n"
            f"            {OFFSET}\n            {UPDATED}\n        if rope is not None:\n"
            "            k = torch.cat([k[:, :, :offset], turned], 2)\n"),
    grouped("layer: values are turned too", ROTATED, ROTATED + "\n            v = _rotate(v, *rope)"),
    grouped("layer: keys are not turned", ROTATED, "q = _rotate(q, *rope)"),
    grouped("layer: queries are not turned", ROTATED, "k = _rotate(k, *rope)"),
    grouped("layer: keys turned the other way", ROTATED, "q, k = _rotate(q, *rope), _rotate(k, rope[0], -rope[1])"),
    grouped("rotation: second point with the wrong sign", "second * cos + first * sin,", "second * cos - first * sin,"),
    grouped("rotation: pairs for halves", TURN, TURN.replace("first *", "x[..., 0:2 * half:2] *").replace(
        "second *", "x[..., 1:2 * half:2] *")),
    grouped("rotation: the rest becomes 0", "second * cos + first * sin, rest]", "second * cos + first * sin, 0 * rest]"),
    grouped("rotation in half precision", "x = x.to(torch.promote_types(dtype, torch.float32))\n    cos,",
            "cos, sin = cos.to(dtype), sin.to(dtype)\n    cos,"),
    grouped("rotation: one table row for all tokens", "cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3) ",
            "cos, sin = cos[:, None, -1:], sin[:, None, -1:] "),
    grouped("rotation: angles of the first text for all", "cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3) ",
            "cos, sin = cos[:1].unsqueeze(-3), sin[:1].unsqueeze(-3) "),
    grouped("rope that does not fit is not refused", "if not fits or 2 * half > Dh:", "if 2 * half > Dh:"),
]


def positions(name, old, new):
    return Bug(name, "positions", old, new)


WAVES = "waves = torch.stack([angle.sin(), angle.cos()], -1)  # (T, Half, 2)"
ROWS = "rows = positions if positions.dim() == 2 else positions[None]    # (B, T)"
SPEEDS = "return 1.0 / theta ** _pairs(dim, device)            # (Half,)"
ANGLES = "angles = rows[..., None].float() * speeds            # (B, T, Half)"
SORT = "return x.unflatten(-1, (-1, 2)).mT.flatten(-2)       # (..., Dh)"
TABLES = "return angles.cos() * factor, angles.sin() * factor"
LLAMA3 = "mixed = (1 - keep) * speeds / factor + keep * speeds     # (Half,)"
BUGS += [
    positions("sines: cosine first", WAVES, "waves = torch.stack([angle.cos(), angle.sin()], -1)"),
    positions("sines: all sines, then all cosines", WAVES, "waves = torch.stack([angle.sin(), angle.cos()], -2)"),
    positions("sines: positions from 1 on", "place = torch.arange(length, **wide)[:, None] ",
              "place = torch.arange(1, length + 1, **wide)[:, None] "),
    positions("sines: speed by column, not by pair", "pair = torch.arange(0, d_model, 2, **wide) ",
              "pair = torch.arange(0, (d_model + 1) // 2, **wide) "),
    positions("sines: angles in float32", '"dtype": torch.float64, "device": device', '"dtype": torch.float32, "device": device'),
    positions("rotary: positions start at 0 whatever they are", ROWS, ROWS + "\n    rows = rows - rows[:, :1]"),
    positions("rotary: one position too far", ANGLES, "angles = (rows[..., None].float() + 1) * speeds"),
    positions("rotary: turned backwards", TABLES, "return angles.cos() * factor, -angles.sin() * factor"),
    positions("rotary: sine and cosine swapped", TABLES, "return angles.sin() * factor, angles.cos() * factor"),
    positions("rotary: angles in bfloat16", ANGLES, "angles = (rows[..., None].bfloat16() * speeds.bfloat16()).float()"),
    positions("rotary: tables in bfloat16", TABLES,
              "return (angles.cos() * factor).bfloat16().float(), (angles.sin() * factor).bfloat16().float()"),
    positions("rotary: all texts at the positions of the first", ANGLES, "angles = rows[:1, :, None].float() * speeds"),
    positions("rotary: speeds grow", SPEEDS, "return theta ** _pairs(dim, device) / theta"),
    positions("rotary: theta ignored", SPEEDS, "return 1.0 / 10000.0 ** _pairs(dim, device)"),
    positions("rotary: speed by number, not by pair", "return even / dim  ", "return even / (2 * dim)  "),
    positions("rotary: rope_theta of the config ignored", "return dim, base, {", "return dim, theta, {"),
    positions("rotary: partial_rotary_factor ignored", "dim = int(head_dim * part)", "dim = int(head_dim * 1.0)"),
    positions("rotary: a rule of the older spelling ignored", 'for k in ("rope_type", "type") if k in given]',
              'for k in ("rope_type", "type") if given.pop(k, None) and k == "rope_type"]'),
    positions("rotary: an unknown entry passes", "    if missing or unknown:", "    if missing:"),
    positions("layouts swapped", "    if not interleaved:\n", "    if interleaved:\n"),
    positions("interleaved: not sorted back", "torch.cat([_mix_pairs(turning), rest], -1)", "torch.cat([turning, rest], -1)"),
    positions("interleaved: sorted the wrong way", SORT, "return x.unflatten(-1, (2, -1)).mT.flatten(-2)"),
    positions("interleaved: the rest of the head lost", "torch.cat([_mix_pairs(turning), rest], -1)",
              "torch.cat([_mix_pairs(turning), 0 * rest], -1)"),
    positions("conversion: heads mixed", "order = torch.arange(Dh, device=weight.device)\n",
              "order = torch.arange(Dh, device=weight.device)\n"
              "    weight = weight.unflatten(0, (Dh, num_heads)).transpose(0, 1).flatten(0, 1)\n"),
    positions("conversion: the way back",
              'change = _sort_pairs if to == "half_split"', 'change = _mix_pairs if to == "half_split"'),
    positions("conversion: rotary_dim ignored", "rotary_dim = Dh if rotary_dim is None else rotary_dim", "rotary_dim = Dh"),
    positions("linear: multiplied instead of divided",
              'speeds = speeds / scaling["factor"] ', 'speeds = speeds * scaling["factor"] '),
    positions("dynamic: grows from the first token", "grown = factor * max(seen, old) / old - (factor - 1)",
              "grown = factor * max(seen, 1) / 1 - (factor - 1)"),
    positions("dynamic: theta grows without the exponent", "return theta * grown ** (dim / (dim - 2))", "return theta * grown"),
    positions("dynamic: the length of the text, not the largest position",
              "seen = int(positions.max()) + 1 if positions.numel() else 0",
              "seen = positions.shape[-1]"),
    positions("llama3: fast and slow pairs swapped", LLAMA3, "mixed = keep * speeds / factor + (1 - keep) * speeds"),
    positions("llama3: slow pairs stay", "torch.where(wavelength > old / low, speeds / factor, mixed)",
              "torch.where(wavelength > old / low, speeds, mixed)"),
    positions("llama3: radians for wavelengths", "wavelength = 2 * math.pi / speeds ", "wavelength = 1 / speeds "),
    positions("yarn: ramp reversed",
              "keep = 1 - ((pair - low) / (high - low)).clamp(0, 1)", "keep = ((pair - low) / (high - low)).clamp(0, 1)"),
    positions("yarn: scores not enlarged", "return speeds, _yarn_factor(scaling)", "return speeds, 1.0"),
    positions("yarn: attention_factor squared", 'return scaling["attention_factor"]', 'return scaling["attention_factor"] ** 2'),
    positions("yarn: mscale alone", "return size(some) / size(every) if some and every", "return size(some) if some and every"),
    positions("yarn: betas ignored", 'turns = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)', "turns = 32, 1"),
    positions("yarn: truncate ignored", 'if scaling.get("truncate", True):', "if True:"),
]


def decoder(name, old, new):
    return Bug(name, "decoder_layer", old, new)


WIDE = "wide = x.to(torch.promote_types(x.dtype, torch.float32))"
NORMED, SQUARES = "normed = (wide * torch.rsqrt(mean_square + eps)).to(x.dtype)", "wide.square().mean(-1, keepdim=True)"
WEIGHTED = "return (weight * normed).to(x.dtype) "
GATED = ("gate = F.silu(self.gate_proj(x))                 # (..., T, F)\n"
         "        out = self.down_proj(gate * self.up_proj(x))     # (..., T, D)")
SKIP = "x = x + out                                      # (..., T, D)"
WORK = "x = x + self.mlp(self.post_attention_layernorm(x)) "
BUGS += [
    decoder("norm: squares in half precision", WIDE, "wide = x"),
    decoder("norm: weight before the rounding", NORMED, "normed = wide * torch.rsqrt(mean_square + eps)"),
    decoder("norm: 1 + weight, as Gemma has it", WEIGHTED, "return ((1 + weight) * normed).to(x.dtype) "),
    decoder("norm: result in the dtype of the weight", WEIGHTED, "return weight * normed "),
    decoder("norm: eps outside the root", "torch.rsqrt(mean_square + eps)", "(1 / (mean_square.sqrt() + eps))"),
    decoder("norm: eps left out", "torch.rsqrt(mean_square + eps)", "torch.rsqrt(mean_square)"),
    decoder("norm: sum instead of mean", SQUARES, "wide.square().sum(-1, keepdim=True)"),
    decoder("norm: over the tokens instead of the features", SQUARES, "wide.square().mean(-2, keepdim=True)"),
    decoder("norm: mean size instead of root mean square", SQUARES, "wide.abs().mean(-1, keepdim=True).square()"),
    decoder("norm: centred, as LayerNorm is", WIDE, WIDE + "\n    wide = wide - wide.mean(-1, keepdim=True)"),
    decoder("norm: the root is forgotten", "torch.rsqrt(mean_square + eps)", "(mean_square + eps).reciprocal()"),
    decoder("norm: weight never learned", "nn.Parameter(torch.ones(d_model))", "torch.ones(d_model)"),
    decoder("norm: weight starts at 0", "torch.ones(d_model)", "torch.zeros(d_model)"),
    decoder("norm: its own eps ignored", "rms_norm(x, self.weight, self.eps)", "rms_norm(x, self.weight, 1e-6)"),
    decoder("norm: eps of 0 accepted", "if not 0.0 < eps < math.inf:", "if not 0.0 <= eps < math.inf:"),
    decoder("norm: weight of another width let through", "weight.shape != x.shape[-1:]", "weight.dim() != 1"),
    decoder("network: gate and up swapped", GATED, GATED.replace("gate_proj", "other").replace("up_proj", "gate_proj").replace(
        "other", "up_proj")),
    decoder("network: activation on the product", GATED, "gate = self.gate_proj(x)\n"
            "        out = self.down_proj(F.silu(gate * self.up_proj(x)))"),
    decoder("network: no activation", "F.silu(self.gate_proj(x))", "self.gate_proj(x)     "),
    decoder("network: gelu for silu", "F.silu", "F.gelu"),
    decoder("network: sigmoid for silu", "F.silu", "F.sigmoid"),
    decoder("network: gate added instead of multiplied", "gate * self.up_proj(x)", "gate + self.up_proj(x)"),
    decoder("layer: norms on the stream", SKIP + "\n        " + WORK,
            "x = self.input_layernorm(x + out)\n        x = self.post_attention_layernorm(x + self.mlp(x)) "),
    decoder("layer: norm on what the network adds", WORK, "x = x + self.post_attention_layernorm(self.mlp(x)) "),
    decoder("layer: first skip missing", SKIP, "x = out"),
    decoder("layer: second skip missing", WORK, WORK.replace("x + ", "")),
    decoder("layer: skip from the normalised copy", SKIP, "x = self.input_layernorm(x) + out"),
    decoder("layer: first norm forgotten", "self.input_layernorm(x), rope=rope", "x, rope=rope"),
    decoder("layer: second norm forgotten", WORK, "x = x + self.mlp(x) "),
    decoder("layer: norms exchanged", SKIP + "\n        " + WORK, SKIP + "\n        x = x + self.mlp(self.input_layernorm(x)) "),
    decoder("layer: attention and network side by side", SKIP + "\n        " + WORK,
            "x = x + out + self.mlp(self.post_attention_layernorm(x)) "),
    decoder("layer: the stream is overwritten", SKIP, "x = x.add_(out)"),
    decoder("layer: mask not passed on", "attn_mask=attn_mask, return_weights=return_weights)",
            "attn_mask=None, return_weights=return_weights)"),
    decoder("layer: cache not passed on", "rope=rope, cache=cache,", "rope=rope, cache=None,"),
    decoder("layer: positions not passed on", "rope=rope, cache=cache,", "rope=None, cache=cache,"),
    decoder("layer: weights lost on the way", "return (x, weights) if return_weights else x",
            "return (x, None) if return_weights else x"),
    decoder("layer: head width of the config ignored", 'head_dim=getattr(config, "head_dim", None)', "head_dim=None"),
    decoder("layer: biases of q, k and v ignored", 'qkv_bias=getattr(config, "qkv_bias", False)', "qkv_bias=False"),
    decoder("layer: bias of o follows q, k and v", 'getattr(config, "out_bias", False)', 'getattr(config, "qkv_bias", False)'),
    decoder("layer: biases of the network ignored", 'bias=getattr(config, "mlp_bias", False)', "bias=False"),
    decoder("layer: dropout of the config ignored", 'dropout=getattr(config, "dropout", 0.0)', "dropout=0.0"),
    decoder("layer: eps of the second norm ignored", "RMSNorm(config.d_model,\n" + 48 * " " + "config.norm_eps)",
            "RMSNorm(config.d_model)"),
    decoder("layer: one norm for both places", "RMSNorm(config.d_model,\n" + 48 * " " + "config.norm_eps)",
            "self.input_layernorm"),
    decoder("layer: missing settings are not named", "if missing:", "if False:"),
]


def model(name, old, new):
    return Bug(name, "language_model", old, new)


BUGS += [
    model("decoder: windows one token too wide", "offset=past - window, device", "offset=past - window - 1, device"),
    model("decoder: windows from the corner, not from the position", "offset=past - window, device", "offset=-window, device"),
    model("decoder: pads count as positions", "attention_mask.long().cumsum(-1) - 1",
          "torch.ones_like(attention_mask).long().cumsum(-1) - 1"),
    model("decoder: positions start anew with a cache", "torch.arange(past, past + input_ids.shape[1],",
          "torch.arange(0, input_ids.shape[1],"),
    model("decoder: places of pads are taken from the new tokens", "return places[:, past:].clamp(min=0)",
          "return (attention_mask[:, past:].long().cumsum(-1) - 1).clamp(min=0)"),
    model("decoder: rotary positions in every layer", "rope=rope if turns[i] else None", "rope=rope"),
    model("decoder: rope_scaling of the config ignored", "config.rope_scaling) if any(turns)", "None) if any(turns)"),
    model("decoder: last norm left out", "x = self.model.norm(x[:, -logits_to_keep:])", "x = x[:, -logits_to_keep:]"),
    model("decoder: scores for the first places, not the last", "x[:, -logits_to_keep:]", "x[:, :logits_to_keep or None]"),
    model("decoder: one cache for all layers", "None if cache is None else cache[i]", "None if cache is None else cache[0]"),
    model("decoder: one cache for all layers accepted", "{*map(id, cache)}) < num_layers:", "cache) < num_layers:"),
    model("decoder: cache of another dtype than the weights", "dtype=like.dtype,", "dtype=None,"),
    model("decoder: windows of the config ignored", "attn_mask=masks[windows[i]]", "attn_mask=masks[None]"),
    model("decoder: the first layer's window everywhere", "attn_mask=masks[windows[i]]", "attn_mask=masks[windows[0]]"),
    model("decoder: pads forgotten where there is a window", "near if real is None else real & near)", "near)"),
    model("decoder: embeddings not tied", "        if config.tie_embeddings:\n            self.lm_head.weight = "
          "self.model.embed_tokens.weight", "        pass"),
    model("decoder: start with a standard deviation of 1", "nn.init.normal_(p, std=0.02)", "nn.init.normal_(p)"),
    model("decoder: logits_to_keep with labels accepted", "if labels is not None and logits_to_keep:", "if False:"),
    model("loss: labels not moved", "_loss(logits, labels), logits]", "_loss(torch.cat([logits, logits[:, :1]], 1), torch.cat("
          "[labels[:, :1], labels], 1)), logits]"),
    model("loss: a sum, not a mean", "ignore_index=-100)", "ignore_index=-100, reduction='sum')"),
    model("loss: pads count", "moved = F.pad(labels[:, 1:].long(), (0, 1), value=-100)",
          "moved = F.pad(labels[:, 1:].long().clamp(min=0), (0, 1), value=-100)"),
    model("loss: in half precision", "    wide = torch.promote_types(logits.dtype, torch.float32)\n    moved",
          "    wide = logits.dtype\n    moved"),
    # the first in the notebook: DecoderConfig looks up functions of later cells
    model("config: windows in some layers are windows in none", "if all(entry is usual for entry in given):",
          "if any(entry is usual for entry in given):"),
    model("config: eps of the file ignored", '"rms_norm_eps": "norm_eps", ', ""),
    model("config: head_dim of the file ignored", '"pad_token_id", "head_dim")\n_NAMES', '"pad_token_id")\n_NAMES'),
    model("config: rope_theta of rope_parameters ignored", 'theta = rules.pop("rope_theta", 10000.0 if theta is None else theta)',
          'rules.pop("rope_theta", 0)\n    theta = 10000.0 if theta is None else theta'),
    model("config: rope_theta beside rope_parameters ignored", '10000.0 if theta is None else theta)', '10000.0)'),
    model("config: older rope_scaling ignored", 'given.get("rope_scaling") or given.get("rope_parameters") or {}',
          'given.get("rope_parameters") or {}'),
    model("config: original length beside the rule ignored", "rules[old] = given.get(old) or rules.get(old) or longest",
          "rules[old] = rules.get(old) or longest"),
    model("config: windows in the first layers, not the last", "slides = [i >= first if", "slides = [i < first if"),
    model("config: SmolLM3's windows in the layers that turn", "else not rope_layers[i]", "else rope_layers[i]"),
    model("config: use_sliding_window ignored", 'if not own.get("use_sliding_window", True):', "if False:"),
    model("config: use_sliding_window of other families heeded", 'if not own.get("use_sliding_window", True):',
          'if not given.get("use_sliding_window", True):'),
    model("config: no_rope_layers read upside down", "return tuple(map(bool, turns[:num_layers]))",
          "return tuple(not turn for turn in turns[:num_layers])"),
    model("config: every fourth layer counted from 0", "(i + 1) % every != 0", "i % every != 0"),
    model("config: Qwen2 without biases", '"qkv_bias": family == "qwen2" or bias', '"qkv_bias": bias'),
    model("config: unsupported options ignored", "        if not fine:\n", "        if False:\n"),
    model("config: attention in both directions accepted", '"is_causal": (True,)}', '"is_causal": (True, False)}'),
    model("config: as many KV heads as query heads if not given", '"mistral": {"num_key_value_heads": 8',
          '"mistral": {"num_key_value_heads": None'),
    model("load: shapes not checked", "if shape != shapes[name]:", "if False:"),
    model("load: index may name other directories", "if not isinstance(name, str) or not name.endswith(\n"
          "                \".safetensors\") or set(name) & set('/\\\\:\\0'):", "if not isinstance(name, str):"),
    model("load: extra tensors ignored", '("too many in", set(found) - set(wanted))', '("too many in", set())'),
    model("load: missing tensors ignored", '("missing from", set(wanted) - set(found))', '("missing from", set())'),
    model("load: numbers stay in the file", "device, dtype, copy=True)", "device, dtype)"),
    model("load: tie lost", "    if config.tie_embeddings:\n        model.lm_head.weight = model.model", "    if False:\n"
          "        model.lm_head.weight = model.model"),
    model("load: a second table ignored", "second is not None and not torch.equal(second, table)", "False"),
    model("load: large headers are read", "if size > 2 ** 24:", "if False:"),
    model("load: the narrowest dtype of the file", "torch.promote_types(\n            widest, dtype)", "min(\n"
          "            widest, dtype, key=lambda kind: kind.itemsize)"),
    model("load: training mode", "return model.eval()", "return model"),
    model("save: tied table written twice", '             if not (model.config.tie_embeddings and name == "lm_head.weight")}',
          "             if True}\n    state = {name: x.clone() for name, x in state.items()}"),
    model("save: a lost tie is written", "if model.config.tie_embeddings and lm_head is not table and (", "if False and ("),
    model("sampling: temperature multiplies", "logits.to(wide) / temperature", "logits.to(wide) * temperature"),
    model("sampling: in half precision", "logits = logits.to(wide) / temperature", "logits = logits / temperature"),
    model("sampling: those that equal the last of top_k dropped", "logits < least", "logits <= least"),
    model("sampling: top_p keeps one too many", ".cumsum(-1) <= 1 - top_p", ".cumsum(-1) < 1 - top_p"),
    model("sampling: order of top_p not undone", "tail.scatter(-1, order, tail)", "tail"),
    model("sampling: top_p may drop all", "tail[..., -1] = False", "tail = tail.clone()"),
    model("generate: the first end ends all rows", "not (stops and ended.all())", "not (stops and ended.any())"),
    model("generate: rows that have ended go on", ".masked_fill(ended, pad)", ""),
    model("generate: only the first of several ends counts", "for stop in stops:", "for stop in stops[:1]:"),
    model("generate: new tokens count as pads", "F.pad(mask, (0, max_new_tokens), value=True)",
          "F.pad(mask, (0, max_new_tokens))"),
    model("generate: the mask is not handed on", "attention_mask=None if mask is None else mask[:, :now])",
          "attention_mask=None)"),
    model("generate: draws from the global generator", "torch.multinomial(shares, 1, generator=generator)",
          "torch.multinomial(shares, 1)"),
    model("generate: draws without the options", "process_logits(logits, *options).softmax(-1)", "logits.softmax(-1)"),
    model("generate: dropout while it writes", "    model.eval()\n    try:", "    try:"),
    model("generate: modes do not come back", "            part.training = training", "            pass"),
    model("generate: pads on the right accepted", "if not mask[:, -1].all():", "if False:"),
]


def translator(name, old, new):
    return Bug(name, "encoder_decoder", old, new)


SPLIT_K = "k = split_heads(self.k_proj(memory), H)          # (..., H, Tk, Dh)"
SPLIT_V = "v = split_heads(self.v_proj(memory), H)          # (..., H, Tk, Dh)"
ADDED = "x = x + self.dropout(out)                        # (..., T, D)"
NORMED_AFTER = "return x if self.norm_first else norm(x)"
CROSS = ("self._read(x, self.cross_attn_norm), keys, values,\n"
         "            attn_mask=memory_mask")
CROSS_ADDED = "x = self._add(x, out, self.cross_attn_norm)          # (..., Tq, D)"
EMBEDDED = "x = table(ids) * math.sqrt(table.embedding_dim)      # (B, T, D)"
PLACES = "place = (real.long().cumsum(1) - 1).clamp(min=0)"
STEP = "out = model.decode(ids[:, -1:] if use_cache else ids, memory,"
ENCODER_NORMS = "is_causal=False)\n        self.self_attn_norm, self.feed_forward_norm = ("
TO_DECODER = "tgt, memory, tgt_mask=tgt_may, memory_mask=src_may,"
NEXT_MASK = "src_mask, caches=caches,\n                           return_weights=return_weights)\n        logits,"
BUGS += [
    translator("cross-attention: keys and values exchanged", SPLIT_K + "\n        " + SPLIT_V,
               SPLIT_K.replace("k_proj", "v_proj") + "\n        " + SPLIT_V.replace("v_proj", "k_proj")),
    translator("cross-attention: values by the key matrix", SPLIT_V, SPLIT_V.replace("v_proj", "k_proj")),
    translator("cross-attention: heads cut by the wrong axis", SPLIT_K,
               "k = self.k_proj(memory).unflatten(-1, (-1, H)).movedim(-1, -3)"),
    translator("cross-attention: causal", "q, k, v, attn_mask, is_causal=False,", "q, k, v, attn_mask, is_causal=True,"),
    translator("cross-attention: mask of the memory ignored", CROSS, CROSS.replace("memory_mask", "None")),
    translator("cross-attention: mask turned around", CROSS, CROSS.replace(
        "memory_mask", "None if memory_mask is None else ~memory_mask if memory_mask.dtype == torch.bool else -memory_mask")),
    translator("cross-attention: queries without their norm", CROSS, CROSS.replace(
        "self._read(x, self.cross_attn_norm)", "x")),
    translator("cross-attention: skip missing", CROSS_ADDED, CROSS_ADDED.replace(
        "self._add(x, out,", "self._add(torch.zeros_like(x), out,")),
    translator("cross-attention: last output projection forgotten", "out = self.o_proj(merge_heads(context)) ",
               "out = merge_heads(context) "),
    translator("cross-attention: reads the target, not the memory", "keys, values = _projected(self, memory)",
               "keys, values = self.project_memory(x)"),
    translator("feed-forward of 2017: no activation", "hidden = self.activation(self.up_proj(x)) ", "hidden = self.up_proj(x) "),
    translator("feed-forward of 2017: activation at the end", "out = self.down_proj(self.dropout(hidden)) ",
               "out = self.activation(self.down_proj(self.dropout(hidden))) "),
    translator("feed-forward of 2017: gelu by another formula", '"gelu": F.gelu',
               '"gelu": lambda x: F.gelu(x, approximate="tanh")'),
    translator("feed-forward of 2017: bias kept", "self.up_proj = nn.Linear(d_model, d_ff, bias=bias)",
               "self.up_proj = nn.Linear(d_model, d_ff)"),
    translator("branches: pre-norm when post-norm is asked for", "return norm(x) if self.norm_first else x",
               "return norm(x)"),
    translator("branches: post-norm forgotten", NORMED_AFTER, "return x"),
    translator("branches: norm on the branch, not on the sum", ADDED + "\n        " + NORMED_AFTER,
               "return x + self.dropout(out) if self.norm_first else x + norm(self.dropout(out))"),
    translator("branches: skip missing", ADDED, "x = self.dropout(out)"),
    translator("branches: dropout forgotten", ADDED, "x = x + out"),
    translator("branches: the stream is overwritten", ADDED, "x = x.add_(self.dropout(out))"),
    translator("encoder layer: causal", ENCODER_NORMS, ENCODER_NORMS.replace("False", "True")),
    translator("encoder layer: mask not passed on", "out = self.self_attn(self._read(x, self.self_attn_norm),\n"
               "                             attn_mask=attn_mask,", "out = self.self_attn(self._read(x, self.self_attn_norm),"),
    translator("decoder with memory: sees its future", "dropout=dropout, is_causal=is_causal)",
               "dropout=dropout, is_causal=False)"),
    translator("decoder with memory: cache not passed on", "self._read(x, self.self_attn_norm), cache=cache,",
               "self._read(x, self.self_attn_norm), cache=None,"),
    translator("decoder with memory: maps exchanged", "return (x, weights, looks) if return_weights else x",
               "return (x, looks, weights) if return_weights else x"),
    translator("copies from PyTorch: two norms exchanged", '"norm2": "cross_attn_norm",\n    "norm3": "feed_forward_norm"',
               '"norm3": "cross_attn_norm",\n    "norm2": "feed_forward_norm"'),
    translator("copies from PyTorch: linear1 and linear2 as one", '"linear2": "feed_forward.down_proj"',
               '"linear1": "feed_forward.down_proj"'),
    translator("copies from PyTorch: order of the norms ignored", "norm_first=layer.norm_first,\n                   bias=",
               "\n                   bias="),
    translator("copies from PyTorch: activation ignored", "activation=copy.deepcopy(layer.activation),", "activation=F.relu,"),
    translator("copies from PyTorch: eps ignored", 'norm_eps=_one_of("eps", eps), **options)', "**options)"),
    translator("Transformer: last norm of the encoder forgotten", "x = self.encoder_norm(x) ", "x = x "),
    translator("Transformer: last norm of the decoder forgotten", "x = self.decoder_norm(x) ", "x = x "),
    translator("Transformer: the first layer's cache for all", "cache=caches[i] if caches", "cache=caches[0] if caches"),
    translator("Transformer: the first layer's memory for all", "else memory[i],", "else memory[0],"),
    translator("Transformer: mask of the source for the target", TO_DECODER,
               "tgt, memory, tgt_mask=src_may, memory_mask=tgt_may,"),
    translator("Transformer: pads of the source only hidden in the encoder", TO_DECODER,
               TO_DECODER.replace("src_may", "None")),
    translator("embedding: not scaled", EMBEDDED, "x = table(ids)"),
    translator("embedding: positions forgotten", "self.dropout(x + waves.to(x.dtype))", "self.dropout(x)"),
    translator("embedding: positions count pads", "self.waves[_positions(real, past, ids)]",
               "self.waves[_positions(None, past, ids)]"),
    translator("embedding: first place is 1", "self.waves[_positions(real, past, ids)]",
               "self.waves[_positions(real, past, ids) + 1]"),
    translator("embedding: past forgotten", "self.waves[_positions(real, past, ids)]",
               "self.waves[_positions(real if real is None else real[:, past:], 0, ids)]"),
    translator("embedding: table of the other language", "self._embed(tgt_ids, self.tgt_embed,",
               "self._embed(tgt_ids, self.src_embed,"),
    translator("embedding: tied to a copy", "self.lm_head.weight = self.tgt_embed.weight",
               "self.lm_head.weight = nn.Parameter(self.tgt_embed.weight.detach().clone())"),
    translator("translate: starts with the end token", "(len(src_ids), 1), bos_token_id)", "(len(src_ids), 1), eos_token_id)"),
    translator("translate: writes after the end", "best = best.masked_fill(ended, pad_token_id)", "best = best + 0"),
    translator("translate: stops when any row has ended", "if ended.all():", "if ended.any():"),
    translator("translate: never stops", "if ended.all():", "if False:"),
    translator("translate: mask of the source lost", "src_mask, caches=caches,\n" + 31 * " " + "return_weights=return_weights)\n"
               "            logits,", "caches=caches,\n" + 31 * " " + "return_weights=return_weights)\n            logits,"),
    translator("translate: source encoded without its mask", "model.encode(src_ids, src_mask), None",
               "model.encode(src_ids), None"),
    translator("translate: whole target again into the cache", STEP, STEP.replace("ids[:, -1:] if use_cache else ids", "ids")),
    translator("translate: reads the last token alone", STEP, STEP.replace("ids[:, -1:] if use_cache else ids", "ids[:, -1:]")),
    translator("translate: least likely token", "logits[:, -1:].argmax(-1)", "logits[:, -1:].argmin(-1)"),
    translator("translate: prediction of the first place", "logits[:, -1:].argmax(-1)", "logits[:, :1].argmax(-1)"),
]


def costs(name, old, new):
    return Bug(name, "costs", old, new)


BUGS += [
    costs("times: the same order in each round", "for name in order.sample([*functions], len(functions)):",
          "for name in functions:"),
    costs("times: the first round counts", "if number >= warm:", "if number >= 0:"),
    costs("times: the last round is lost", "range(warm + rounds)", "range(rounds)"),
    costs("ratios: of medians, not of rounds", "statistics.median(\n        a / b for a, b in zip(seconds, times[to]))",
          "statistics.median(seconds) / statistics.median(times[to])"),
    costs("ratios: upside down", "a / b for a, b in", "b / a for a, b in"),
    costs("ratios: the mean", "name: statistics.median(", "name: statistics.mean("),
    costs("peak: what is left at the end", "most = max(most, held)", "most = held"),
    costs("peak: everything that was ever taken", "held += event.nbytes()", "held += max(0, event.nbytes())"),
    costs("limits: sums are not counted", "2 * rows * width ** 2", "rows * width ** 2"),
    costs("limits: numbers for bytes", "numbers.nbytes", "numbers.numel()"),
    costs("oneDNN: stays after the block", "del layer.forward", "pass"),
    costs("oneDNN: not tried first", "return bool((got - want).abs().max() <= 1e-5 * want.abs().max())", "return True"),
    costs("oneDNN: gradients lost", "torch.is_grad_enabled() or forward", "forward"),
    costs("oneDNN: somebody else's patch is removed", 'if vars(layer).get("forward") is patch:', "if True:"),
    costs("oneDNN: bias forgotten", "return _onednn_linear(x, layer.weight, layer.bias)",
          "return _onednn_linear(x, layer.weight, None)"),
    costs("oneDNN: one layer's weights for all", "partial(_fast_forward, layer)",
          "partial(_fast_forward, [*chosen.values()][0])"),
]


def killed_by_tests(bug):
    """The first test that fails with the bug planted, or None. In a forked process: torch is loaded, the package is not."""
    import pytest

    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.environ.update(ATTN_NB_PLANT=bug.name, CI="")
            options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:anyio", "--assert=plain",
                       "--no-header", "--tb=no", "-o", "addopts="]
            code = 99
            with contextlib.suppress(BaseException):
                code = int(pytest.main([f"tests/test_{bug.module}.py", *options]))
                sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        found = re.search(r"^FAILED \S+?::(\w+)", said.read().decode(), flags=re.M)
    if code == 0:
        return None
    return found[1] if found else "import"


def all_killed_by_tests():
    """Name of each bug -> the test; asked of a fresh process, which has not loaded the package."""
    done = subprocess.run([sys.executable, "tests/planted.py", "--tests"], cwd=ROOT, check=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def print_killed_by_tests():
    # what the children need, loaded once; single threads survive a fork
    import hypothesis  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    with ThreadPoolExecutor(2) as pool:
        print(json.dumps(dict(zip((b.name for b in BUGS), pool.map(killed_by_tests, BUGS)))))


def report(chapter, tests):
    """The table that the book shows."""
    lines = ["| planted bug | chapter | caught by the cell | caught by the test |", "|---|---|---|---|"]
    for bug in BUGS:
        test = (tests[bug.name] or "nobody").removeprefix("test_").replace("_", " ")
        lines.append(f"| {bug.name} | {bug.notebook.stem[:2]} | `{chapter[bug.name]}` | {test} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__" and sys.argv[1:] == ["--tests"]:
    print_killed_by_tests()
elif __name__ == "__main__":
    import planted  # under its own name, so that other processes find it
    from run_chapter import all_killed_by_cells

    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(report(all_killed_by_cells(planted.BUGS), all_killed_by_tests()))
    print(REPORT.read_text())
