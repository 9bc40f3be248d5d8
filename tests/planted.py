"""Bugs planted by name. Each must be caught twice: by a cell of its chapter, and by the tests.

    python tests/planted.py           # rewrite the report that the book shows

ATTN_NB_PLANT=<name> makes the test suite import the package with that bug in it (see conftest.py).
"""
import os
import re
import subprocess
import sys
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
    causal("layer: causal only without weights", "or return_weights\n                      or q_len", "or q_len"),
    causal("layer: the mask is not cut to the length", "causal = causal_mask(q_len, kv_len, device=query.device)",
           "causal = causal_mask(q_len + 3, kv_len + 3, device=query.device)"),
    causal("layer: the caller's mask is ignored", "attn_mask = _and_causal(attn_mask, causal)",
           "attn_mask = causal"),
    causal("layer: a bias of -1e9 swallows the scores", "bias = bias - bias.detach().amax(-1, keepdim=True) ",
           "bias = bias - 0 "),
    causal("layer: empty row reads what it may not", "return out.masked_fill(empty, 0.0)                   # (..., Tq, Dv)",
           "return out                                           # (..., Tq, Dv)"),
    causal("layer: garbage in the pads gets through", "value = value.masked_fill(unseen, 0.0) ", "value = value + 0 "),
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


def killed_by_tests(bug):
    """The first test that fails with the bug planted, or None."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"tests/test_{bug.module}.py", "-x", "-q", "-m", "not slow", "-p",
         "no:cacheprovider", "-p", "no:anyio", "--assert=plain", "--no-header", "--tb=no", "-o", "addopts="],
        cwd=ROOT, env={**os.environ, "ATTN_NB_PLANT": bug.name, "CI": ""}, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    found = re.search(r"^FAILED \S+?::(\w+)", done.stdout, flags=re.M)
    return found[1] if found else "import"


def all_killed_by_tests():
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((b.name for b in BUGS), pool.map(killed_by_tests, BUGS)))


def report(chapter, tests):
    """The table that the book shows."""
    lines = ["| planted bug | chapter | caught by the cell | caught by the test |", "|---|---|---|---|"]
    for bug in BUGS:
        test = (tests[bug.name] or "nobody").removeprefix("test_").replace("_", " ")
        lines.append(f"| {bug.name} | {bug.notebook.stem[:2]} | `{chapter[bug.name]}` | {test} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from run_chapter import all_killed_by_cells

    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(report(all_killed_by_cells(BUGS), all_killed_by_tests()))
    print(REPORT.read_text())
