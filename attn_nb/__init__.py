"""Attention, one idea at a time. The book's notebooks are the source; see https://github.com/OWNER/attn_nb."""
__version__ = "0.1.0"

from .plot import plot_attention, slider_bars, use_book_style
from .single_head import SelfAttention, attention
from .testing import (
    assert_as_precise,
    assert_causal,
    assert_parity,
    assert_permutation_equivariant,
    assert_rows_sum_to_one,
    catches,
    tolerance,
)

__all__ = [
    "SelfAttention", "assert_as_precise", "assert_causal", "assert_parity", "assert_permutation_equivariant",
    "assert_rows_sum_to_one", "attention", "catches", "plot_attention", "slider_bars", "tolerance", "use_book_style",
]
