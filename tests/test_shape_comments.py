"""Shape comments of exported code are checked while the suite runs (conftest.py); here: that this works."""
import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import shape_comments
import torch

from attn_nb.causal import causal_mask, mask_from_mha, padding_mask
from attn_nb.decoder_layer import DecoderLayer
from attn_nb.dropout import CausalAttention
from attn_nb.encoder_decoder import Seq2SeqTransformer, translate
from attn_nb.grouped_query import GroupedQueryAttention, grouped_attention, repeat_kv
from attn_nb.language_model import DecoderConfig, DecoderLM, generate
from attn_nb.multi_head import MultiHeadAttention
from attn_nb.multi_head_wrapper import MultiHeadAttentionWrapper
from attn_nb.plot import plot_attention, rotary_dial, slider_bars
from attn_nb.positions import apply_rotary, rope_cos_sin, sinusoidal_positions
from attn_nb.single_head import SelfAttention, attention
from attn_nb.testing import assert_cache_equals_full

MODULES = sorted(p for p in Path("attn_nb").glob("*.py") if not p.stem.startswith("_"))
GOOD = '''
def f(q, k, v):
    """Doc."""
    scores = q @ k.mT                # (..., Tq, Tk)
    a, b = scores, scores.sum(-1)    # (B, Tq, Tk), (B, Tq)
    return scores @ v                # (B, Tq, Dv)
'''


def run(source):
    namespace = {}
    exec(compile(shape_comments.instrument(source, "made_up.py"), "made_up.py", "exec"), namespace)
    return namespace["f"](torch.zeros(2, 4, 8), torch.zeros(2, 5, 8), torch.zeros(2, 5, 3))


def test_true_comments_pass():
    assert run(GOOD).shape == (2, 4, 3)


@pytest.mark.parametrize("old, new", [("(B, Tq, Dv)", "(B, Tk, Dv)"), ("(..., Tq, Tk)", "(..., Tk, Tq)"),
                                      ("(B, Tq, Dv)", "(B, Tq, 2*Dv)"), ("(B, Tq, Dv)", "(B, H, Tq, Dv)"),
                                      (", (B, Tq)", ", (B, Tk)"), ("(B, Tq, Dv)", "(B, Tq, 4)")])
def test_wrong_comments_fail(old, new):
    with pytest.raises(AssertionError, match="made_up.py:"):
        run(GOOD.replace(old, new))


def test_the_first_comment_is_checked_against_the_documented_arguments():
    one = '''
def f(q, k, v):
    """Doc.

    Args:
        q: (B, Tq, D), the queries.
        k, v: (..., Tk, any), keys and values.
    """
    return q @ k.mT                  # (..., Tq, Tk)
'''
    assert run(one).shape == (2, 4, 5)
    with pytest.raises(AssertionError, match="the comment says Tk=5, the axis has 4"):
        run(one.replace("# (..., Tq, Tk)", "# (..., Tk, Tq)"))


@pytest.mark.parametrize("new", ["(B, Tq, Dv) or so", "(b, tq, dv)", "(B Tq Dv)", "(B, ..., Dv)"])
def test_unreadable_comments_fail(new):
    with pytest.raises(shape_comments.UnreadableComment):
        run(GOOD.replace("(B, Tq, Dv)", new))
    with pytest.raises(shape_comments.UnreadableComment, match="belongs on an assignment"):
        run(GOOD.replace('"""Doc."""', "print()  # (B, T)"))


def test_every_shape_comment_of_the_package_has_run():
    query, key, value = torch.randn(2, 4, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 3)
    attention(query, key, value)
    attention(query, key, value, torch.ones(4, 6).bool())
    attention(query, key, value, torch.ones(4, 6))
    SelfAttention(8, 3)(query)
    SelfAttention(8, 3)(query, return_weights=True)
    plot_attention(torch.eye(3))
    plot_attention(torch.eye(3), attn_mask=torch.eye(3).bool())
    slider_bars(torch.eye(3), steps="abc", bars="abc", alt="three bars")
    causal_mask(4, 6, offset=torch.tensor([0, 2]))
    real = padding_mask(torch.tensor([4, 3]))
    mask_from_mha(torch.ones(6, 4, 4).bool(), torch.zeros(2, 4).bool(), num_heads=3)
    layer = CausalAttention(8, 3, context_length=4, dropout=0.5)
    for mask in (None, real, torch.randn(4, 4)):
        for weights_too in (False, True):
            layer(query, attn_mask=mask, return_weights=weights_too)
    for weights_too in (False, True):
        MultiHeadAttentionWrapper(8, 3, 4, 0.5, num_heads=2)(query, return_weights=weights_too)
        MultiHeadAttention(8, 6, 6, 0.5, num_heads=2, v_in=3)(query, key, value, return_weights=weights_too)
        GroupedQueryAttention(8, 4, 2)(query, return_weights=weights_too)
    config = SimpleNamespace(d_model=8, num_heads=4, num_kv_heads=2, d_ff=6, norm_eps=1e-6, qk_norm=True)
    DecoderLayer(config)(query, rope=(torch.ones(1, 4, 1), torch.zeros(1, 4, 1)))
    lm, ids = DecoderLM(DecoderConfig(9, 8, 2, 4, 2, 6, windows=(2, None))), torch.ones(2, 4, dtype=torch.long)
    lm(ids, ids, labels=ids)
    lm(ids)
    generate(lm, ids, max_new_tokens=2)
    generate(lm, ids, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), max_new_tokens=2, do_sample=True, top_k=4, top_p=0.5)
    seq, ids = Seq2SeqTransformer(5, 7, 8, 2, 1, 1, 6), torch.ones(2, 4, dtype=torch.long)
    seq(ids, ids[:, :3], ids == 1, ids[:, :3] == 1)
    translate(seq, ids, max_new_tokens=2, bos_token_id=1, eos_token_id=2, return_weights=True)
    assert_cache_equals_full(lambda new, past: (
        total := (0 if past is None else past) + new.cumsum(1), total[:, -1:]), query)
    heads = torch.randn(2, 6, 4, 8)
    repeat_kv(heads, 2)
    grouped_attention(heads[:, :, :1], heads[:, :3], heads[:, :3], real)
    rotary_dial(torch.eye(2), torch.eye(2), torch.ones(2), alt="two arrows")
    sinusoidal_positions(4, 5)
    old = {"factor": 2.0, "original_max_position_embeddings": 3}
    for scaling in (None, {"type": "linear", "factor": 2.0}, {"type": "dynamic", **old}, {"type": "yarn", **old},
                    {"type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **old}):
        rope = rope_cos_sin(torch.arange(4), 6, scaling=scaling)
        for interleaved in (False, True):
            apply_rotary(heads, *rope, interleaved=interleaved)
            apply_rotary(heads[0], *rope, interleaved=interleaved)
    GroupedQueryAttention(8, 1, 1)(query, rope=rope)
    for path in MODULES:
        wanted = {(path.name, line) for line in shape_comments.comments(path.read_text(), path.name)}
        assert wanted <= shape_comments.SEEN, f"never executed: {sorted(wanted - shape_comments.SEEN)}"


def test_lines_that_change_a_shape_say_so():
    """A heuristic: products, transposes and reshapes in exported code carry a shape comment."""
    words = (" @ ", ".mT", ".view(", ".reshape(", ".transpose(", ".softmax(", "scaled_dot_product_attention(")
    for path in MODULES:
        source = path.read_text()
        commented = set(shape_comments.comments(source, path.name))
        for node in ast.walk(ast.parse(source)):         # a statement of several lines ends in its comment
            if isinstance(node, (ast.Assign, ast.Return)) and node.end_lineno in commented:
                commented |= {*range(node.lineno, node.end_lineno)}
        inside = False
        for number, line in enumerate(source.splitlines(), 1):
            inside ^= line.count('"""') % 2
            code = line.split("#")[0]
            if not inside and '"""' not in line and any(w in code for w in words):
                assert number in commented, f"{path.name}:{number}: no shape comment: {line.strip()}"
