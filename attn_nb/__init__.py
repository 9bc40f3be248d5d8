"""Attention, one idea at a time. The book's notebooks are the source; see https://github.com/OWNER/attn_nb."""
__version__ = "0.1.0"

from .causal import CausalSelfAttention, bias_to_mask, causal_mask, mask_from_mha, mask_to_bias, padding_mask
from .costs import interleaved_times, machine_limits, median_ratios, onednn_linears, peak_memory
from .decoder_layer import DecoderLayer, RMSNorm, SwiGLU, rms_norm
from .dropout import CausalAttention
from .encoder_decoder import (
    CrossDecoderLayer,
    EncoderLayer,
    FeedForward,
    Seq2SeqTransformer,
    Transformer,
    translate,
)
from .grouped_query import GroupedQueryAttention, grouped_attention, kv_cache_bytes, repeat_kv
from .kv_cache import KVCache
from .language_model import DecoderConfig, DecoderLM, generate, process_logits
from .multi_head import MultiHeadAttention, merge_heads, split_heads
from .multi_head_wrapper import MultiHeadAttentionWrapper
from .plot import alignment_theatre, cache_steps, kv_calculator, mask_grid, plot_attention, rotary_dial, slider_bars, use_book_style
from .positions import apply_rotary, convert_rotary_layout, rope_cos_sin, sinusoidal_positions
from .single_head import SelfAttention, attention
from .testing import (
    assert_as_precise,
    assert_cache_equals_full,
    assert_causal,
    assert_eval_deterministic,
    assert_parity,
    assert_permutation_equivariant,
    assert_rows_sum_to_one,
    catches,
    tolerance,
)

__all__ = [
    "CausalAttention", "CausalSelfAttention", "CrossDecoderLayer", "DecoderConfig", "DecoderLM", "DecoderLayer",
    "EncoderLayer", "FeedForward", "GroupedQueryAttention", "KVCache", "MultiHeadAttention",
    "MultiHeadAttentionWrapper", "RMSNorm", "SelfAttention", "Seq2SeqTransformer", "SwiGLU", "Transformer",
    "alignment_theatre", "apply_rotary", "assert_as_precise", "assert_cache_equals_full", "assert_causal",
    "assert_eval_deterministic", "assert_parity", "assert_permutation_equivariant", "assert_rows_sum_to_one",
    "attention", "bias_to_mask", "cache_steps", "catches", "causal_mask", "convert_rotary_layout", "generate",
    "grouped_attention", "interleaved_times", "kv_cache_bytes", "kv_calculator", "machine_limits",
    "mask_from_mha", "mask_grid", "mask_to_bias", "median_ratios", "merge_heads", "onednn_linears",
    "padding_mask", "peak_memory", "plot_attention", "process_logits", "repeat_kv", "rms_norm", "rope_cos_sin",
    "rotary_dial", "sinusoidal_positions", "slider_bars", "split_heads", "tolerance", "translate",
    "use_book_style",
]
