"""Checkpointing by `torch.utils.checkpoint`: a recomputation sees what the first execution drew.

Requirements this design meets:

* A layer's call number is read and advanced once, by the first execution of a call; whatever is
  computed again, in whatever order and however often, sees the number of then.
* No tensor and no graph lives longer for it. What a region's first execution drew is written to the
  object that PyTorch itself keeps for the region, and dies with it.
* Where no checkpoint is in force it costs three questions to PyTorch, and nothing is walked.

PyTorch has no public way to ask which region is running, so this file, and no other, names private
parts of it; tests say so when they change:

* A region of the non-reentrant kind is its `_CheckpointFrame`. While it runs for the first time,
  and while it is computed again, hooks for saved tensors are in force whose closures hold it.
* A region of the reentrant kind is the node of `CheckpointFunction`, its ``ctx``. While it is
  computed again, that is the node which the backward pass is at. While it runs for the first time
  only the Python stack tells, which is walked where forward-mode gradients are off, as they are in
  the forward function of an `torch.autograd.Function`.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["CheckpointLog", "current_log"]

_MODULE = "torch.utils.checkpoint"
_FIRST = "_checkpoint_hook.__init__.<locals>.pack_hook"
_AGAIN = "_recomputation_hook.__init__.<locals>.pack_hook"
_FORWARD = CheckpointFunction.forward.__code__
_BOUNDARIES = (CheckpointFunction.backward.__code__,)

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_pop_hooks = torch._C._autograd._pop_saved_tensors_default_hooks
_push_hooks = torch._C._autograd._push_saved_tensors_default_hooks
_hooks_are_disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message
_task = torch._C._current_graph_task_id
_forward_mode_is_on = torch._C._is_fwd_grad_enabled

_NO_TASK = -1


class CheckpointLog:
    """What the calls in the regions that are running here draw, first or again."""

    def __init__(self, again: "_Again | None", first: "list[_Record]") -> None:
        self._again = again
        self._first = first

    @property
    def are_again(self) -> bool:
        """Whether this is a recomputation, so that what is drawn is what was drawn then."""
        return self._again is not None

    def take(self) -> Any:
        """Return what the same call drew when it was first executed."""
        if self._again is None:
            raise RuntimeError("nothing has been drawn before: this is a first execution")
        drawn = self._again.take()
        self.keep(drawn)
        return drawn

    def keep(self, drawn: Any) -> None:
        """Keep what a call drew for the recomputations that are to come."""
        for record in self._first:
            record.drawn.append(drawn)

    def undo(self) -> None:
        """Forget the last call, which raised."""
        for record in self._first:
            record.drawn.pop()
        if self._again is not None:
            self._again.step_back()


class _Record:
    """What the calls of a region drew, in their order."""

    def __init__(self) -> None:
        self.drawn: list[Any] = []
        # Where each recomputation is; there is one for each backward pass.
        self.taken: dict[Any, int] = {}


class _Again:
    """A recomputation of a region."""

    def __init__(self, record: _Record, execution: Any) -> None:
        self._record = record
        self._execution = execution

    def take(self) -> Any:
        index = self._record.taken.get(self._execution, 0)
        if index == len(self._record.drawn):
            raise RuntimeError(
                "torch.utils.checkpoint: the recomputation makes more training calls of dropout "
                f"than the {index} that the forward pass made: leave a model in training or in "
                "evaluation between the two"
            )
        self._record.taken[self._execution] = index + 1
        return self._record.drawn[index]

    def step_back(self) -> None:
        self._record.taken[self._execution] -= 1


def current_log() -> CheckpointLog | None:
    """Return the draws of the checkpointed regions that are running; None if there are none."""
    if _top_hooks(True) is None and _task() == _NO_TASK and _forward_mode_is_on():
        return None
    first: list[Any] = []
    node = _reentrant_node()
    for region, execution in _regions_of_hooks():
        if execution is None:
            first.append(region)
        elif node is None:
            return _draws(first, region, execution)
    if node is not None:
        return _draws(first, node, _task())
    return _draws(first) if first or not _forward_mode_is_on() else None


def _draws(first: list[Any], again: Any = None, execution: Any = None) -> CheckpointLog | None:
    if not _forward_mode_is_on():
        first = [*first, *_reentrant_forwards()]
    if again is None and not first:
        return None
    running = None if again is None else _Again(_record(again), execution)
    return CheckpointLog(running, [_record(region) for region in first])


def _record(region: Any) -> _Record:
    """Return a region's record, which is an attribute of the region."""
    record: _Record | None = getattr(region, "_unidrop_record", None)
    if record is None:
        record = region._unidrop_record = _Record()
    return record


def _reentrant_node() -> Any:
    """Return the reentrant region that is being computed again, if the innermost one is of those.

    Inside the backward pass that such a region runs, other nodes are current.
    """
    if _task() == _NO_TASK:
        return None
    node = torch._C._current_autograd_node()
    return node if getattr(node, "_forward_cls", None) is CheckpointFunction else None


def _reentrant_forwards() -> Iterator[Any]:
    """Yield the reentrant regions that run for the first time, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _FORWARD:
            yield frame.f_locals["ctx"]
        elif frame.f_code in _BOUNDARIES:
            return
        frame = frame.f_back  # type: ignore[assignment] # None at the end


def _regions_of_hooks() -> Iterator[tuple[Any, Any]]:
    """Yield the non-reentrant regions that run, the innermost first, and the backward pass's id.

    The id is None where a region runs for the first time. What is outside of a recomputation has
    no part in it.
    """
    for pack in _pack_hooks():
        if pack.__module__ != _MODULE:
            continue
        if pack.__qualname__ == _FIRST:
            yield _closure(pack)["frame"], None
        elif pack.__qualname__ == _AGAIN:
            values = _closure(inspect.unwrap(pack))
            yield values["target_frame_ref"](), values["gid"]
            return


def _pack_hooks() -> list[Callable[..., Any]]:
    """Return the hooks that pack saved tensors, the innermost first: also those under others."""
    top = _top_hooks(True)
    if top is None:
        return []
    if _hooks_are_disabled() is not None:
        return [top[0]]
    hooks = []
    try:
        while (top := _top_hooks(True)) is not None:
            hooks.append(top)
            _pop_hooks()
    finally:
        for pack, unpack in reversed(hooks):
            _push_hooks(pack, unpack)
    return [pack for pack, _ in hooks]


def _closure(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
