"""PyTorch's own layer with the weights of ours, for parity tests."""
import torch
from torch import nn


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
