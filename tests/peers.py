"""PyTorch's own layer with the weights of ours, plain loops for parity tests, and a recorder of what operations make."""
import itertools
import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attn_nb.testing import assert_parity

HALVES = [torch.bfloat16, torch.float16]


def multihead_of(layer, dropout=0.0):
    """nn.MultiheadAttention in float64, one head, with the matrices and biases of `layer` and the identity after them."""
    width = layer.q_proj.in_features
    theirs = nn.MultiheadAttention(width, 1, dropout=dropout, batch_first=True).double()
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        theirs.out_proj.weight.copy_(torch.eye(width))
        theirs.out_proj.bias.zero_()
    return theirs


def looped_heads(q, k, v, num_heads, mask=None, causal=False):
    """All heads' context, (B, Tq, D), from a loop over rows, queries and heads; mask as ours, of any shape that broadcasts."""
    (batch, q_len, width), kv_len = q.shape, k.shape[1]
    bias = torch.zeros(batch, num_heads, q_len, kv_len, dtype=torch.float64)
    if mask is not None:
        bias = bias + (mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(~mask, -math.inf))
    size, found = width // num_heads, []
    for b, i, h in itertools.product(range(batch), range(q_len), range(num_heads)):
        keys = [j for j in range(kv_len) if bias[b, h, i, j] > -math.inf and (not causal or j <= i + kv_len - q_len)]
        block = slice(h * size, (h + 1) * size)
        scores = k[b, keys, block] @ q[b, i, block] / math.sqrt(size) + bias[b, h, i, keys]
        found.append(scores.softmax(0) @ v[b, keys, block])
    return torch.cat(found).reshape(batch, q_len, width)


def looped_layer(state, num_heads, query, key, value, mask=None, causal=False):
    """A layer of heads from the matrices q_proj, k_proj, v_proj and, if there is one, o_proj."""
    q, k, v = (F.linear(x, state[f"{p}_proj.weight"], state.get(f"{p}_proj.bias")) for p, x in zip("qkv", (query, key, value)))
    out = looped_heads(q, k, v, num_heads, mask, causal)
    return F.linear(out, state["o_proj.weight"], state.get("o_proj.bias")) if "o_proj.weight" in state else out


def stacked(state, num_heads):
    """The weights of separate heads as one matrix for each projection: head h gets rows h*Dh .. (h+1)*Dh - 1."""
    ends = [name.removeprefix("heads.0.") for name in state if name.startswith("heads.0.")]
    return {end: torch.cat([state[f"heads.{h}.{end}"] for h in range(num_heads)]) for end in ends}


def multihead_state(state, width):
    """Weights under our names, q_proj .. o_proj, under those of nn.MultiheadAttention; no o_proj: the identity."""
    weights, biases = ([state[f"{p}_proj.{end}"] for p in "qkv" if f"{p}_proj.{end}" in state] for end in ("weight", "bias"))
    packed = all(w.shape == weights[0].shape for w in weights)
    theirs = {"in_proj_weight": torch.cat(weights)} if packed else {f"{p}_proj_weight": w for p, w in zip("qkv", weights)}
    theirs["out_proj.weight"] = state.get("o_proj.weight", torch.eye(width, dtype=torch.float64))
    if biases:
        theirs["in_proj_bias"] = torch.cat(biases)
    if biases or "o_proj.bias" in state:
        theirs["out_proj.bias"] = state.get("o_proj.bias", torch.zeros(width, dtype=torch.float64))
    return theirs


def lively(layer):
    """Weights for which scores of N(0, 1) inputs have a standard deviation of about 2; every bias counts too."""
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 1.4 * p.shape[1] ** -0.5 if p.dim() == 2 else 0.5)
    return layer


def assert_parity_with_parameters(layer, theirs, *inputs, pick=lambda out: out, **options):
    """assert_parity, and the gradients of the layer's parameters too; theirs takes these, by name, before the inputs."""
    names, values = zip(*layer.named_parameters())

    def ours(*xs):
        return pick(torch.func.functional_call(layer, dict(zip(names, xs[len(inputs):])), xs[:len(inputs)], options))

    assert_parity(ours, lambda *xs: theirs(dict(zip(names, xs[len(inputs):])), *xs[:len(inputs)]), *inputs, *values)


class Recorder(TorchDispatchMode):
    """The sizes of all memory that operations fill, in numbers."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.made[x.untyped_storage().nbytes() // x.element_size()] += 1
        return out


def with_parameters(layer, run):
    """run(x) as a function of x and of all parameters."""
    names = [name for name, _ in layer.named_parameters()]

    class Runner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return run(x)
    return lambda x, *ps: torch.func.functional_call(Runner(), {f"layer.{n}": p for n, p in zip(names, ps)}, (x,))


def gap(ours, theirs, *inputs):
    """Largest difference of the outputs; or of the gradients, compared with the largest gradient, if that is more."""
    found = []
    for fn in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = fn(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, weight)])
    out, *grads = [(a - b).abs().max().item() for a, b in zip(*found)]
    return max(out, max(grads) / max(g.abs().max().item() for g in found[1][1:]))
