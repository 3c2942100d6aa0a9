"""A device that is none: tensors on it lie in the CPU's memory, but meet the CPU's own tensors only
where PyTorch lets a GPU's do so.

Its name is PyTorch's ``meta``, which needs no driver. Inside ``pretend_device()`` a tensor made on
``meta`` has values, and an operation that would stop a GPU, or wait for one, is noticed.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map
from triton.runtime.interpreter import GridExecutor

import helpers.quick_interpreter  # noqa: F401

META = torch.device("meta")
DEVICE = META
"""What the tensors say they are on."""
aten = torch.ops.aten
TRANSFERS = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING |= {aten._index_put_impl_.default}
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
WAITING |= {aten.equal.default}
NOT_RUN = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default}
NOT_RUN |= {aten.new_empty.default, aten.detach.default, aten._local_scalar_dense.default}


def efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: None,
    compute_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """A GPU's, by the CPU's; its log-sum-exps are padded to a multiple of 32 queries."""
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    output, lse = flash(query, key, value, dropout, causal, scale=scale)
    padding = -lse.shape[-1] % 32
    return output, torch.nn.functional.pad(lse, (0, padding), value=float("nan")), lse, lse


SUBSTITUTES = {aten._scaled_dot_product_efficient_attention.default: efficient_attention}


class OnDevice(torch.Tensor):
    """``on_cpu`` is where its values lie."""

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=META,
        )
        made.on_cpu = real
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE

    is_cuda = property(lambda self: DEVICE.type == "cuda")
    is_cpu = is_meta = property(lambda self: False)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def pin_memory(self) -> Any:
        raise AssertionError("only tensors of the CPU can be pinned")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of pretend_device()")


class PretendGraph:
    """Launches that were captured, with the very arguments and results that they had.

    Attributes:
        replays: of all graphs.
    """

    replays = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._launches: list[tuple[Callable[[], Any], list[Any]]] = []

    def add(self, launch: Callable[[], Any], result: Any) -> None:
        self._launches.append((launch, tree_flatten(result)[0]))

    def replay(self) -> None:
        PretendGraph.replays += 1
        with _disable_current_modes():
            for launch, results in self._launches:
                for old, new in zip(results, tree_flatten(launch())[0], strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def __len__(self) -> int:
        return len(self._launches)


class PretendDevice(TorchDispatchMode):
    """Runs every operation on the CPU, and checks where its tensors are said to be.

    Attributes:
        waits: operations that would have made the host wait for the device.
        launches: operations that a device runs: all but views and empty tensors.
        graph: what captures them.
        in_use, peak: bytes of the device's tensors, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches: list[str] = []
        self.graph: PretendGraph | None = None
        self.in_use = self.peak = 0
        self._tensors_of: Counter[int] = Counter()

    def _made(self, tensor: OnDevice) -> OnDevice:
        storage = tensor.on_cpu.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        if not self._tensors_of[at]:
            self.in_use += size
            self.peak = max(self.peak, self.in_use)
        self._tensors_of[at] += 1
        weakref.finalize(tensor, self._gone, at, size)
        return tensor

    @contextmanager
    def capture(self, graph: PretendGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
        """In place of ``torch.cuda.graph``."""
        waits, self.graph = len(self.waits), graph
        try:
            yield
        finally:
            self.graph = None
        assert not self.waits[waits:], f"a captured step waits: {self.waits[waits:]}"

    def view_of(self, tensor: torch.Tensor) -> OnDevice:
        """The same memory, as pinned memory is seen from a GPU."""
        return self._made(OnDevice(tensor))

    def _gone(self, at: int, size: int) -> None:
        self._tensors_of[at] -= 1
        if not self._tensors_of[at]:
            self.in_use -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        on_device = bool(ours)
        if func not in TRANSFERS:
            self._check(func, args, tensors)
        wanted = kwargs.get("device")
        if wanted is not None:
            on_device = torch.device(wanted) == META
            kwargs["device"] = "cpu"
        if (ours or on_device) and _waits(func, args, on_device) and not kwargs.get("non_blocking"):
            self.waits.append(str(func))
        owners = {id(x.on_cpu): x for x in ours}
        call = functools.partial(
            SUBSTITUTES.get(func, func), *tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs)
        )
        result = call()
        if ours or on_device:
            self._ran(func, call, result)

        def wrap(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) in owners:
                return owners[id(x)]
            return self._made(OnDevice(x)) if on_device else x

        return tree_map(wrap, result)

    def _ran(self, func: Any, call: Callable[[], Any], result: Any) -> None:
        if not _is_view(func) and func not in NOT_RUN:
            self.launches.append(str(func))
            if self.graph is not None:
                self.graph.add(call, result)

    def _check(self, func: Any, args: tuple, tensors: list[torch.Tensor]) -> None:
        if func in INDEXING:
            tensors = [args[0], *args[2:3]] if isinstance(args[0], OnDevice) else tensors
            tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
        # A scalar of the CPU goes along with anything.
        here = {isinstance(x, OnDevice) for x in tensors if isinstance(x, OnDevice) or x.dim()}
        if len(here) > 1:
            shapes = [(type(x).__name__, tuple(x.shape)) for x in tensors]
            raise RuntimeError(f"{func}: tensors of the device and of the CPU: {shapes}")


def _waits(func: Any, args: tuple, on_device: bool) -> bool:
    """Whether the host waits for the device; ``on_device``: what comes of it is there."""
    if func is aten._to_copy.default:
        return isinstance(args[0], OnDevice) != on_device
    if func is aten.copy_.default:
        return isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice)
    if func in INDEXING:  # a mask is counted, an index of the CPU is copied
        indices = [x for x in args[1] if x is not None]
        return any(x.dtype == torch.bool or not isinstance(x, OnDevice) for x in indices)
    return func in WAITING


def _is_view(func: Any) -> bool:
    """Whether what it returns is memory of its arguments, which it does not write."""
    returned = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _to_meta(x: Any) -> Any:
    if isinstance(x, (str, torch.device)) and str(x).startswith("cuda"):
        return META
    return x


class FromNumbers(TorchFunctionMode):
    """PyTorch makes tensors of Python's numbers itself; here they are copied from the CPU. And it
    would ask a driver for what is to be pinned or made on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **kwargs or {})
        args, kwargs = tree_map(_to_meta, args), tree_map(_to_meta, dict(kwargs or {}))
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.pin_memory:
            return args[0].clone()
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
            return func(args[0], index, *args[2:])
        if func not in (torch.tensor, torch.Tensor.new_tensor):
            return func(*args, **kwargs)
        default = "cpu" if func is torch.tensor else args[0].device
        device = kwargs.pop("device", None) or default
        if func is torch.Tensor.new_tensor:
            kwargs.setdefault("dtype", args[0].dtype)
            func, args = torch.tensor, args[1:]
        return func(*args, **kwargs).to(_to_meta(device))


def _launch(mode: PretendDevice, self: GridExecutor, *args: Any, **kwargs: Any) -> None:
    """Triton's interpreter, for tensors of the device only."""
    mode.launches.append(self.fn.__name__)
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    assert all(isinstance(x, OnDevice) for x in tensors), "a kernel was given a tensor of the CPU"
    kwargs = {k: _on_cpu(x) for k, x in kwargs.items()}
    launch = functools.partial(interpret, self, *map(_on_cpu, args), **kwargs)
    with _disable_current_modes():
        launch()
    if mode.graph is not None:
        mode.graph.add(launch, None)


interpret = GridExecutor.__call__


def _on_cpu(x: Any) -> Any:
    return x.on_cpu if isinstance(x, OnDevice) else x


@contextmanager
def pretend_device() -> Iterator[PretendDevice]:
    mode = PretendDevice()

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        _launch(mode, self, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", launch), FromNumbers(), mode:
        yield mode
