"""Counts what code does to tensors, also where the tensors have shapes and no numbers.

A *shadow* is a tensor on the device "meta". Inside `Meter`, whatever is computed from shadows is one too, but
for integers and truth values: these stay real, so that loops, masks and lengths run as they would. An integer
that would come of a shadow, such as a drawn token, is TOKEN, a truth value False. So a model of seven billion
parameters samples, scores and takes its gradient here without memory, by the very code that runs on a GPU.

    flop          as torch.utils.flop_counter counts them: matrix products and attention, masked pairs too
    operations    that touch numbers; on a GPU a kernel each
    bytes_read    by those, an expanded dimension once, of a table only the rows that are looked up
    syncs         where the code asks for the value of a tensor, and a GPU would have to finish first
    saved         bytes held for the backward pass, parameters apart: at most at any one time

What runs on a GPU in other kernels (CUDA graphs, flash attention's own masks) is counted as the CPU's code
does it.
"""

import functools
import itertools
import traceback
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
sdpa = torch.nn.functional.scaled_dot_product_attention
TOKEN = 7  # an ordinary id

NO_WORK = {  # operations that move no numbers, beside views
    "_unsafe_view",
    "alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
}
LOOK_UP = {"embedding", "gather", "index", "index_select"}  # read as much as they return
OVERWRITE = {"copy_", "fill_", "index_copy_", "index_fill_", "index_put_", "scatter_", "zero_"}
SYNCS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "masked_select", "bincount"}
SYNC_METHODS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}


class Meter:
    """with Meter() as meter: …; then meter.parts[name] is a Counter, meter.saved the bytes.

    With `meter.part(name)` inside, what is done there counts as that part's; else it counts as "rest".
    """

    def __init__(self):
        self.parts = defaultdict(Counter)
        self.name = "rest"
        self.sites = Counter()  # where the code waited: {"file:line": times}
        self.frozen = set()  # storages that are there anyway
        self.held = Counter()  # storage: tensors that are saved of it
        self.saved_now = 0
        self.saved = 0

    def __enter__(self):
        self.stack = ExitStack()
        self.stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
        self.stack.enter_context(Operations(self))
        self.stack.enter_context(Functions(self))
        return self

    def __exit__(self, *error):
        self.stack.close()

    def leave_out(self, model):
        """Its weights are not held for the backward pass alone."""
        for weight in itertools.chain(model.parameters(), model.buffers()):
            self.frozen.add(weight.untyped_storage()._cdata)

    @contextmanager
    def part(self, name):
        outer = self.name
        self.name = name
        yield
        self.name = outer

    def count(self, **what):
        self.parts[self.name].update(what)

    def sync(self):
        self.count(syncs=1)
        frames = traceback.extract_stack()
        ours = [frame for frame in frames if "/torch/" not in frame.filename and frame.filename != __file__]
        self.sites[f"{ours[-1].filename}:{ours[-1].lineno}"] += 1

    def _pack(self, tensor):
        return Saved(self, tensor)

    def _unpack(self, saved):
        return saved.tensor


class Saved:
    """One tensor that is held for the backward pass."""

    def __init__(self, meter, tensor):
        self.meter = meter
        self.tensor = tensor
        storage = tensor.untyped_storage()
        self.key = storage._cdata
        self.bytes = storage.nbytes()
        meter.held[self.key] += 1
        if meter.held[self.key] == 1 and self.key not in meter.frozen:
            meter.saved_now += self.bytes
            meter.saved = max(meter.saved, meter.saved_now)

    def __del__(self):
        self.meter.held[self.key] -= 1
        if self.meter.held[self.key] == 0 and self.key not in self.meter.frozen:
            self.meter.saved_now -= self.bytes


# ------------------------------------------------------------------------------------------------ operations


class Operations(TorchDispatchMode):
    """Sees every operation on its way to a kernel."""

    def __init__(self, meter):
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        inputs = tensors([args, kwargs.values()])
        if waits(name, args, kwargs):
            self.meter.sync()
        output = run(func, name, args, kwargs, inputs)
        if func._overloadpacket in FLOP:
            self.meter.count(flop=FLOP[func._overloadpacket](*args, **kwargs, out_val=output))
        to_device = name == "_to_copy" and is_meta(kwargs.get("device")) and not is_shadow(inputs[0])
        if name not in NO_WORK and not is_view(func) and not to_device:
            self.meter.count(operations=1, bytes_read=bytes_read(name, inputs, output))
        return output


def attention_flop(query, key, *others, **options):
    """[b, h, q, d] and [b, hkv, k, d] → FLOP of the two products, as flop_counter has them for a GPU."""
    batch, heads, queries, size = query.shape
    return 2 * 2 * batch * heads * queries * key.shape[2] * size


def attention_backward_flop(grad, query, key, *others, **options):
    """Five products: the scores again, d value, d scores, d query, d key."""
    return attention_flop(query, key) * 5 // 2


FLOP = flop_registry | {  # which knows the kernels of a GPU alone
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop,
}


def waits(name, args, kwargs):
    """Whether a GPU would have to finish first: a value is asked for, or numbers decide on a shape."""
    if name == "index" or name == "index_put_":
        return any(is_mask(index) for index in args[1] if index is not None)
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in SYNCS


@functools.cache
def is_view(func):
    """Whether it returns one of its arguments, seen differently."""
    for value in func._schema.returns:
        if value.alias_info is not None and not value.alias_info.is_write:
            return True
    return False


def is_mask(tensor):
    return tensor.dtype in (torch.bool, torch.uint8)


def bytes_read(name, inputs, output):
    if name in OVERWRITE:
        inputs = inputs[1:]
    if name in LOOK_UP:
        inputs = inputs[1:] + tensors([output])
    return sum(map(distinct_bytes, inputs))


def tensors(values):
    """All tensors in nested lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors(value)
    return found


def distinct_bytes(tensor):
    """Of an expanded dimension once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


# ------------------------------------------------------------------------------------------------ shadows


def is_shadow(value):
    return isinstance(value, torch.Tensor) and value.is_meta


def is_meta(device):
    return device is not None and torch.device(device).type == "meta"


def run(func, name, args, kwargs, inputs):
    """Do `func` on shadows where any of its inputs is one or a shadow is asked for, else as it is."""
    from_shadow = any(tensor.is_meta for tensor in inputs)
    if not from_shadow and not is_meta(kwargs.get("device")):
        return func(*args, **kwargs)
    if name == "_local_scalar_dense":
        return 1.0
    if from_shadow and kwargs.get("device") is not None:  # a shadow stays one wherever it is sent
        kwargs = kwargs | {"device": torch.device("meta")}
    if name == "index":  # how many rows a mask takes, only its numbers tell
        args = (args[0], spelled_out(args[1]))
    if all(tensor.is_meta for tensor in inputs):
        output = func(*args, **kwargs)
    else:
        output = func(*tree_map(as_shadow, args), **tree_map(as_shadow, kwargs))
    if all(tensor.is_floating_point() for tensor in tensors([output])):
        return output
    shape_alone = name.startswith("new_") or name.endswith("_like")
    if from_shadow and not shape_alone:
        return tree_map(as_real, output)
    if "device" in kwargs:
        kwargs = kwargs | {"device": "cpu"}
    return func(*tree_map(as_blank, args), **tree_map(as_blank, kwargs))


def spelled_out(indices):
    """Masks as the places they take."""
    places = []
    for index in indices:
        if index is not None and is_mask(index):
            places += index.nonzero(as_tuple=True)
        else:
            places.append(index)
    return places


def as_shadow(value):
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return value.to("meta")
    return value


def as_blank(value):
    """A real tensor of a shadow's shape, for what looks at the shape alone."""
    if is_shadow(value):
        return torch.empty(value.shape, dtype=value.dtype)
    return value


def as_real(value):
    """An integer or truth value out of a shadow."""
    if is_shadow(value) and not value.is_floating_point():
        return torch.full(value.shape, False if value.dtype == torch.bool else TOKEN, dtype=value.dtype)
    return value


class Functions(TorchFunctionMode):
    """Sees the calls that an operation would not show:

    values asked of a real tensor, tensors made of a list, and attention, which decides for itself what to run
    and would not choose a fused kernel for a shadow.
    """

    def __init__(self, meter):
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in SYNC_METHODS:
            self.meter.sync()
            if is_shadow(args[0]):
                return func(torch.zeros(args[0].shape))
        if func is torch.tensor and is_meta(kwargs.get("device")):
            made = func(*args, **(kwargs | {"device": "cpu"}))
            return made.to("meta") if made.is_floating_point() else made
        if func is sdpa and is_shadow(args[0]):
            return fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def fused_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """What scaled_dot_product_attention runs on a CPU."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_zeros(attn_mask.shape)
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    output, _ = attention(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    return output
