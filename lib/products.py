"""Products with a weight: oneDNN's for fp32 on a CPU, where it is the faster library, torch's elsewhere.

No gradients: for code that computes its own.
"""

from functools import partial

import torch
from torch.nn import functional

ONEDNN = torch.backends.mkldnn.is_available()
# what a pass over a layer takes its time for, as operations of torch
PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
if ONEDNN:
    PRODUCTS.append(torch.ops.mkldnn._linear_pointwise.default)


def linear(x, weight, bias=None):
    """x [..., in], weight [out, in], bias [out] → [..., out]."""
    if ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


def few_rows_linear(weight, bias):
    """x → linear(x, weight, bias), its weight laid out for products with few rows, which wait for memory."""
    if ONEDNN:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    weight = weight.t().contiguous().t()  # stored [in, out]
    return partial(functional.linear, weight=weight, bias=bias)
