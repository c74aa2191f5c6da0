"""The vocabulary of `rules`: kinds of torch functions, by their names without underscores at the ends."""

from typing import Literal

Kind = Literal[
    "structure", "sum", "scale", "linear", "product", "quotient", "elementwise", "maximum", "either", "norm",
    "batch_norm", "softmax", "statistic", "attention", "gated",
]  # fmt: skip
"""Kinds of operations: those that move values, add them up, or multiply them by a constant; `linear` with weights;
products and quotients of two features; functions of one value; the largest of several values of a feature, or of two
features; norms by the features' own mean and variance; batch norm; softmax; means of squares; whole attention; GLU."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES = _names(
    """
    view reshape view_as reshape_as flatten unflatten permute transpose t T mT H mH swapaxes swapdims movedim
    moveaxis squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile contiguous clone to
    float double half bfloat16 type type_as cpu cuda cat concat concatenate stack hstack vstack dstack split
    split_with_sizes chunk tensor_split unbind narrow select index_select index_copy getitem setitem copy
    take_along_dim gather roll flip rot90 pad constant_pad_nd dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_dropout identity pixel_shuffle pixel_unshuffle channel_shuffle masked_fill tril triu diagonal alias
    unfold as_tensor where masked_select atleast_1d
    """
)
ADDS = _names(
    """
    add sub subtract rsub neg negative positive sum mean cumsum avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample fold
    """
)
WEIGHS = _names(
    """
    linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul rmatmul mm bmm mv dot
    einsum addmm baddbmm tensordot bilinear
    """
)
MULTIPLIES = _names(
    """
    mul multiply rmul prod
    """
)
DIVIDES = _names(
    """
    div divide true_divide truediv rdiv rtruediv
    """
)
FUNCTIONS = _names(
    """
    relu relu6 hardtanh threshold clamp clamp_min clamp_max clip elu celu selu gelu silu mish softplus sigmoid
    special_expit tanh hardswish hardsigmoid leaky_relu prelu logsigmoid log_sigmoid softsign rrelu hardshrink
    softshrink tanhshrink logit special_logit erf exp expm1 exp2 log log1p log2 log10 abs absolute sin cos tan
    sinh cosh asin acos atan pow sqrt rsqrt square reciprocal sign special_log_ndtr special_ndtr nan_to_num
    """
)
POWERS = _names(
    """
    pow reciprocal rsqrt sqrt square
    """
)
LARGEST = _names(
    """
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin max min
    topk sort
    """
)

ACTIVATIONS = _names(
    """
    relu relu6 hardtanh threshold clamp clamp_min clamp_max clip elu celu selu gelu silu mish softplus sigmoid
    special_expit tanh hardswish hardsigmoid leaky_relu prelu logsigmoid log_sigmoid softsign rrelu hardshrink
    softshrink tanhshrink logit special_logit maximum minimum
    """
)
"""Functions of one value that grow with it, or nearly so."""
SIGMOIDS = frozenset(["sigmoid", "special_expit", "hardsigmoid"])
"""Functions that make gates."""
KINDS: dict[str, Kind] = {
    **dict.fromkeys(MOVES, "structure"), **dict.fromkeys(ADDS, "sum"), **dict.fromkeys(WEIGHS, "linear"),
    **dict.fromkeys(MULTIPLIES, "product"), **dict.fromkeys(DIVIDES, "quotient"),
    **dict.fromkeys(FUNCTIONS, "elementwise"), **dict.fromkeys(LARGEST, "maximum"),
    **dict.fromkeys(("maximum", "minimum"), "either"),
    **dict.fromkeys(("layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize"), "norm"),
    **dict.fromkeys(("var", "std", "norm", "linalg_vector_norm", "linalg_norm"), "statistic"),
    "batch_norm": "batch_norm", "softmax": "softmax", "scaled_dot_product_attention": "attention",
    "multi_head_attention_forward": "attention", "glu": "gated",
}  # fmt: skip
"""The kind of each function, of those with features as operands; constants turn a product into a `scale`."""

SILENT = _names(
    """
    __bool__ __hash__ __len__ __repr__ _assert _is_view _version data_ptr device dim dtype element_size grad
    grad_fn is_complex is_contiguous is_cpu is_cuda is_floating_point is_inference is_leaf is_meta is_mps
    is_nested is_quantized is_sparse item layout names ndim numel requires_grad shape size storage_offset stride
    tolist
    """
)
"""Functions that give no tensor."""
ONLY_SHAPES = _names(
    """
    empty_like full_like new_empty new_full new_ones new_tensor new_zeros ones_like rand_like randn_like
    zeros_like
    """
)
"""Functions that read no values of their tensors."""
INDEXES = _names(
    """
    gather getitem index_select masked_select take_along_dim
    """
)
"""Functions that take values from places."""
SHIFTS = _names(
    """
    add neg negative positive rsub sub subtract
    """
)
"""Sums of two tensors, and the negative."""
CASTS = _names(
    """
    bfloat16 clone contiguous detach double float half to type type_as
    """
)
"""Functions that copy values."""
LAST = _names(
    """
    clamp log log_softmax logit sigmoid softmax special_expit special_logit
    """
)
"""Functions that may turn a network's logits into probabilities, and back, at its end."""
KEEPS = _names(
    """
    Alias Cat Clone Reshape ReshapeAlias Select Slice Squeeze ToCopy UnsafeView Unsqueeze View
    """
)
"""Nodes of the autograd graph that move values."""
COMPARES = {"gt": True, "ge": True, "lt": False, "le": False}
"""Comparisons with 0, and whether they find the positive values."""
