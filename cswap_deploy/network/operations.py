"""What the operations of an exported graph do to the places of elements, by name."""

from __future__ import annotations

import re

import torch
from torch import fx

from cswap_deploy.network.nodes import CONSUMING, opname

MOVING = {
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "permute",
    "transpose", "t",
    "movedim", "moveaxis", "swapaxes", "unsqueeze", "squeeze", "slice", "select", "narrow",
    "index_select", "index", "expand", "expand_as", "repeat", "repeat_interleave", "tile", "chunk",
    "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split", "unbind", "roll",
    "flip", "rot90", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "native_channel_shuffle", "constant_pad_nd", "pad", "unfold", "cat", "concat", "concatenate",
    "stack", "hstack", "vstack", "diagonal", "numpy_T", "mT", "adjoint", "atleast_1d",
}  # fmt: skip
"""Operations that move elements and do not change them."""

RESHAPING = {
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "unflatten", "pixel_shuffle",
    "pixel_unshuffle", "cat", "concat", "concatenate", "stack", "channel_shuffle",
    "native_channel_shuffle", "unfold",
}  # fmt: skip
"""Those of them after which labels may differ along more dimensions than before."""

SAME = {
    "clone", "contiguous", "alias", "detach", "dropout", "alpha_dropout", "feature_dropout",
    "native_dropout", "to", "_to_copy", "type_as", "float", "lift_fresh_copy", "hardswish",
    "hardsigmoid", "relu6", "hardtanh", "softplus", "elu", "selu", "celu", "mish", "logsigmoid",
    "log_sigmoid", "threshold", "rrelu", "leaky_relu", "silu", "gelu", "zeros_like", "ones_like",
    "full_like", "empty_like", "rand_like", "randn_like", "nan_to_num", "bernoulli",
}  # fmt: skip
"""Operations of one tensor whose elements stay where they are."""

REDUCING = {
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod",
    "logsumexp", "linalg_vector_norm", "norm", "all", "any", "argmax", "argmin", "nansum",
}  # fmt: skip
ALONG = {
    "softmax",
    "log_softmax",
    "_softmax",
    "_log_softmax",
    "softmin",
    "cumsum",
    "cumprod",
    "sort",
}
SPATIAL = re.compile(
    r"(?:adaptive_|fractional_)?(?:avg|max|lp)_pool|upsample|_upsample|reflection_pad|"
    r"replication_pad|grid_sampler"
)


def convolves(node: fx.Node) -> bool:
    """Whether a node multiplies with a weight, as a convolution or a linear layer does."""
    name = opname(node)
    return node.target in CONSUMING or name in {
        "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "linear",
    }  # fmt: skip


def pointwise(node: fx.Node) -> bool:
    """Whether a node joins its inputs element by element."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def module_of(node: fx.Node) -> str:
    """The innermost module in whose forward an operation is; empty for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str([path for path, _ in stack.values()][-1]) if stack else ""


def said(node: fx.Node) -> str:
    """An operation as people know it, with the module it is in."""
    name, module = opname(node), module_of(node)
    return f"{name} in {module}" if module else name
