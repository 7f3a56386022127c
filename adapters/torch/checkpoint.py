"""Activation checkpointing: makes a recomputation by `torch.utils.checkpoint` reuse its masks.

Requirements this design meets:

* The first execution of a call reads and advances a layer's call number, once. Recomputations, in
  any order and number, replay that number.
* No tensor and no graph lives longer than without dropout. The log of a region is an attribute of
  the object that PyTorch keeps for the region, and is freed with it.
* Outside of checkpoints it costs three calls into PyTorch, and walks neither hooks nor frames.

PyTorch has no public way to find the region that is running. So this file, and no other, uses
private parts of PyTorch; tests fail if those change:

* A non-reentrant region is a `_CheckpointFrame`. While it runs, first or again, hooks for saved
  tensors are active, and their closures refer to it.
* A reentrant region is the ``ctx`` of `CheckpointFunction`, an autograd node. While it recomputes,
  it is the current node of the backward pass. While it runs for the first time, only the Python
  stack refers to it. The stack is walked only if forward-mode gradients are disabled, as PyTorch
  disables them in the forward method of a `torch.autograd.Function`.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["CheckpointLog", "current_log"]

_MODULE = "torch.utils.checkpoint"
_FORWARD_HOOK = "_checkpoint_hook.__init__.<locals>.pack_hook"
_RECOMPUTATION_HOOK = "_recomputation_hook.__init__.<locals>.pack_hook"
_REENTRANT_FORWARD = CheckpointFunction.forward.__code__
_REENTRANT_BACKWARD = CheckpointFunction.backward.__code__

_get_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_pop_hooks = torch._C._autograd._pop_saved_tensors_default_hooks
_push_hooks = torch._C._autograd._push_saved_tensors_default_hooks
_get_hooks_error = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message
_get_backward_id = torch._C._current_graph_task_id
_is_forward_mode_enabled = torch._C._is_fwd_grad_enabled

_NO_BACKWARD = -1


class CheckpointLog:
    """The call numbers and keys of the checkpointed regions that are running."""

    def __init__(self, replay: "_Replay | None", records: "list[_Record]") -> None:
        self._replay = replay
        self._records = records

    @property
    def replays(self) -> bool:
        """Whether this is a recomputation, which must `replay` the original values."""
        return self._replay is not None

    def replay(self) -> Any:
        """Return the value of the same call in the first execution."""
        if self._replay is None:
            raise RuntimeError("a first execution has no values to replay")
        value = self._replay.next()
        self.append(value)
        return value

    def append(self, value: Any) -> None:
        """Append the value of a call, for recomputations to replay."""
        for record in self._records:
            record.values.append(value)

    def rollback(self) -> None:
        """Forget the last call, which raised."""
        for record in self._records:
            record.values.pop()
        if self._replay is not None:
            self._replay.step_back()


class _Record:
    """The values of the calls in a region, in order."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        # The number of values that each recomputation has replayed, by backward pass.
        self.positions: dict[Any, int] = {}


class _Replay:
    """One recomputation of a region."""

    def __init__(self, record: _Record, backward_id: Any) -> None:
        self._record = record
        self._backward_id = backward_id

    def next(self) -> Any:
        position = self._record.positions.get(self._backward_id, 0)
        if position == len(self._record.values):
            raise RuntimeError(
                "torch.utils.checkpoint: the recomputation makes more training calls of dropout "
                f"than the {position} that the forward pass made: leave a model in training or in "
                "evaluation between the two"
            )
        self._record.positions[self._backward_id] = position + 1
        return self._record.values[position]

    def step_back(self) -> None:
        self._record.positions[self._backward_id] -= 1


def current_log() -> CheckpointLog | None:
    """Return the log of the checkpointed regions that are running, or None outside of any."""
    if (
        _get_top_hooks(True) is None
        and _get_backward_id() == _NO_BACKWARD
        and _is_forward_mode_enabled()
    ):
        return None
    forwards: list[Any] = []
    node = _find_reentrant_node()
    for region, backward_id in _regions_of_hooks():
        if backward_id is None:
            forwards.append(region)
        elif node is None:
            return _make_log(forwards, region, backward_id)
    if node is not None:
        return _make_log(forwards, node, _get_backward_id())
    return _make_log(forwards) if forwards or not _is_forward_mode_enabled() else None


def _make_log(
    forwards: list[Any], recomputed: Any = None, backward_id: Any = None
) -> CheckpointLog | None:
    """Return the log of regions that run for the first time, inside one that recomputes."""
    if not _is_forward_mode_enabled():
        forwards = [*forwards, *_reentrant_forwards()]
    if recomputed is None and not forwards:
        return None
    replay = None if recomputed is None else _Replay(_get_record(recomputed), backward_id)
    return CheckpointLog(replay, [_get_record(region) for region in forwards])


def _get_record(region: Any) -> _Record:
    """Return the record of a region, which is an attribute of the region."""
    record: _Record | None = getattr(region, "_unidrop_record", None)
    if record is None:
        record = region._unidrop_record = _Record()
    return record


def _find_reentrant_node() -> Any:
    """Return the innermost region if it is reentrant and recomputes, else None.

    A backward pass inside the region has other current nodes.
    """
    if _get_backward_id() == _NO_BACKWARD:
        return None
    node = torch._C._current_autograd_node()
    return node if getattr(node, "_forward_cls", None) is CheckpointFunction else None


def _reentrant_forwards() -> Iterator[Any]:
    """Yield the reentrant regions that run for the first time, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _REENTRANT_FORWARD:
            yield frame.f_locals["ctx"]
        elif frame.f_code is _REENTRANT_BACKWARD:
            return
        frame = frame.f_back


def _regions_of_hooks() -> Iterator[tuple[Any, Any]]:
    """Yield each non-reentrant region that runs and its backward pass's id, the innermost first.

    The id is None if the region runs for the first time. A recomputation ends the search, because
    regions outside of it do not contain its calls.
    """
    for pack in _pack_hooks():
        if pack.__module__ != _MODULE:
            continue
        if pack.__qualname__ == _FORWARD_HOOK:
            yield _get_closure(pack)["frame"], None
        elif pack.__qualname__ == _RECOMPUTATION_HOOK:
            values = _get_closure(inspect.unwrap(pack))
            yield values["target_frame_ref"](), values["gid"]
            return


def _pack_hooks() -> list[Callable[..., Any]]:
    """Return all hooks that pack saved tensors, the innermost first."""
    top = _get_top_hooks(True)
    if top is None:
        return []
    if _get_hooks_error() is not None:
        return [top[0]]
    hooks = []
    try:
        while (top := _get_top_hooks(True)) is not None:
            hooks.append(top)
            _pop_hooks()
    finally:
        for pack, unpack in reversed(hooks):
            _push_hooks(pack, unpack)
    return [pack for pack, _ in hooks]


def _get_closure(function: Any) -> dict[str, Any]:
    """Return the variables that a function closes over, by name."""
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
