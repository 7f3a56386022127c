"""Objects in a process of their own, with an environment of its own, and calls to them from here.

Arrays, layers and functions stay in the other process, and are named here by a `RemoteObject`;
plain values, NumPy's arrays and errors are pickled. Each thread here has a thread of its own there,
the first of them the main one.
"""

import gc
import itertools
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from queue import SimpleQueue
from threading import Lock, Thread, get_ident
from typing import IO, Any, BinaryIO

import numpy as np

__all__ = [
    "Process",
    "ProcessEndedError",
    "RemoteObject",
    "error_text",
    "forwarded",
    "made",
    "serve",
    "writable",
]

# Modules whose errors cross as they are.
_OF_BOTH_ENDS = ("builtins", "unidrop.conformance.backend")

_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.ndarray, np.generic)


def forwarded(name: str) -> Callable[..., Any]:
    """Return a method that runs in the other process, under the same name."""

    def method(self: Any, *args: Any, **options: Any) -> Any:
        return self._process.call(self._number, name, args, options)

    method.__name__ = name
    return method


def made(target: str) -> Any:
    """Return a new object of a class that is named as ``"package.module:Class"``."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)()


def error_text(error: BaseException) -> str:
    """Return an error's type and text, whatever they hold, as text that can be written anywhere."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        text = f"{type(error).__name__}: its text could not be made"
    return writable(text)


def writable(text: str) -> str:
    """Return text without what UTF-8 can't hold, such as undecodable parts of a file's name."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class ProcessEndedError(RuntimeError):
    """Raised by a call to a process that has ended, or ends before it answers."""


class RemoteObject:
    """Stands for an array, a layer or a function of the other process."""

    def __init__(self, process: "Process", number: int) -> None:
        self._process = process
        self._number = number
        weakref.finalize(self, process.forget, number).atexit = False

    __call__ = forwarded("__call__")
    save = forwarded("save")
    load = forwarded("load")
    vjp = forwarded("vjp")

    @property
    def calls(self) -> Any:
        """A layer's call number, which may be set."""
        return self._process.call(self._number, "__getattribute__", ("calls",), {})

    @calls.setter
    def calls(self, value: Any) -> None:
        self._process.call(self._number, "__setattr__", ("calls", value), {})


class _Named:
    """The number of an object of the serving process, on its way between the two."""

    def __init__(self, number: int) -> None:
        self.number = number


def _map(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return a value with each of its leaves changed, in plain containers."""
    if isinstance(value, Mapping):
        return {key: _map(item, leaf) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_map(item, leaf) for item in value])
    return leaf(value)


class Process:
    """The calling end: sends calls, and hands each reply to the thread that waits for it."""

    def __init__(
        self,
        name: str,
        target: str,
        environment: Mapping[str, str],
        printed: IO[bytes] | None = None,
    ) -> None:
        """Start a process, whose target is ``"package.module:Class"``.

        What it prints goes to a file, or if there is none where this process's errors go.
        """
        self._name = name
        # Without the current folder, whose files may have the names of packages.
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({target!r})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            # So that it can be ended with whatever it has forked, and the keyboard interrupts one.
            start_new_session=True,
            env=os.environ | dict(environment),
        )
        self._sending = Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}
        self._forgotten: list[int] = []
        Thread(target=self._receive, name=f"unidrop {name}", daemon=True).start()

    def call(
        self,
        number: int,
        method: str,
        args: Sequence[Any],
        options: Mapping[str, Any],
        *,
        timeout: float | None = None,
    ) -> Any:
        """Call a method of an object there, and return what it returns or raise what it raises.

        Number 0 is the target. Raises TimeoutError where there is no answer within so many seconds.
        """
        reply: Future[Any] = Future()
        sent = _map((args, dict(options)), self._without_remotes)
        with self._sending:
            call = next(self._numbers)
            self._waiting[call] = reply
            forgotten, self._forgotten = self._forgotten, []
            try:
                _write(self._stdin, (call, get_ident(), forgotten, number, method, sent))
            except (OSError, ValueError):  # it has ended, or been ended
                self._fail_all()
        return reply.result(timeout)

    def forget(self, number: int) -> None:
        """Let the other process drop an object, with the next call: finalisers must not wait."""
        self._forgotten.append(number)

    def stop(self) -> None:
        """End the other process, once nothing is asked of it."""
        with suppress(OSError):  # it has ended by itself, with something still to be sent to it
            self._stdin.close()
        self._popen.wait()
        self._end_group()

    def kill(self) -> None:
        """End the other process at once, whatever it does, and what it has forked."""
        self._end_group()
        self.stop()

    def _end_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # nothing of it is left
            os.killpg(self._popen.pid, signal.SIGKILL)

    @property
    def _stdin(self) -> BinaryIO:
        assert self._popen.stdin is not None
        return self._popen.stdin  # type: ignore[return-value] # what Popen opens is a BinaryIO

    @property
    def _stdout(self) -> BinaryIO:
        assert self._popen.stdout is not None
        return self._popen.stdout  # type: ignore[return-value]

    @staticmethod
    def _without_remotes(value: Any) -> Any:
        return _Named(value._number) if isinstance(value, RemoteObject) else value

    def _receive(self) -> None:
        while True:
            try:
                call, error, value = pickle.load(self._stdout)
            except Exception:  # it has ended, or what it sends can't be read here
                self._fail_all()
                self._stdout.close()
                return
            reply = self._waiting.pop(call)
            if error is not None:
                reply.set_exception(error)
            else:
                reply.set_result(_map(value, self._with_remotes))

    def _with_remotes(self, value: Any) -> Any:
        return RemoteObject(self, value.number) if isinstance(value, _Named) else value

    def _fail_all(self) -> None:
        error = ProcessEndedError(f"the process of {self._name} has ended{self._how()}")
        for call in list(self._waiting):
            reply = self._waiting.pop(call, None)
            if reply is not None:
                reply.set_exception(error)

    def _how(self) -> str:
        """Return in which way the process has ended, if it has."""
        try:
            status = self._popen.wait(timeout=1)
        except subprocess.TimeoutExpired:  # it has closed its output, and goes on
            return ""
        if status < 0:
            return f", by signal {signal.Signals(-status).name}"
        return f", with exit status {status}"


class _Server:
    """The serving end: has the objects, and runs each calling thread's calls in order."""

    def __init__(self, target: str, replies: BinaryIO) -> None:
        self._target = target
        self._replies = replies
        self._sending = Lock()
        self._numbers = itertools.count(1)
        self._objects: dict[int, Any] = {}
        self._own: SimpleQueue[Any] = SimpleQueue()
        self._threads: dict[int, ThreadPoolExecutor] = {}

    def serve(self, requests: BinaryIO) -> None:
        """Answer calls, those of the thread that called first on this one."""
        Thread(target=self._receive, args=(requests,), daemon=True).start()
        while True:
            self._answer(*self._own.get())

    def _receive(self, requests: BinaryIO) -> None:
        """Hand each call to its thread; end the process, whatever it does, where nobody calls."""
        first = None
        while True:
            try:
                call, thread, forgotten, *what = pickle.load(requests)
            except EOFError:
                # Not by an exception: some frameworks' threads outlive the interpreter, and then
                # abort it.
                os._exit(0)
            first = first or thread
            if thread == first:
                self._own.put((call, forgotten, *what))
                continue
            if thread not in self._threads:
                self._threads[thread] = ThreadPoolExecutor(1)
            self._threads[thread].submit(self._answer, call, forgotten, *what)

    def _answer(
        self, call: int, forgotten: Sequence[int], number: int, method: str, sent: Any
    ) -> None:
        error = value = None
        try:
            for gone in forgotten:
                self._objects.pop(gone, None)
            args, options = _map(sent, self._with_objects)
            value = _map(getattr(self._object(number), method)(*args, **options), self._named)
        except BaseException as raised:  # whatever it is, it is the caller's
            error = _portable(raised)
        with self._sending:
            _write(self._replies, (call, error, value))

    def _object(self, number: int) -> Any:
        if number not in self._objects:
            self._objects[number] = made(self._target)
        return self._objects[number]

    def _with_objects(self, value: Any) -> Any:
        return self._objects[value.number] if isinstance(value, _Named) else value

    def _named(self, value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        number = next(self._numbers)
        self._objects[number] = value
        return _Named(number)


def _portable(error: BaseException) -> BaseException:
    """Return an error as one that the caller has too, who may lack the framework's own."""
    kind = next(base for base in type(error).__mro__ if base.__module__ in _OF_BOTH_ENDS)
    text = error_text(error)
    if kind is type(error):
        text = text.partition(": ")[2]
    try:
        portable: BaseException = kind(text)
        return portable
    except TypeError:  # one that is made of more than a text
        return RuntimeError(error_text(error))


def _write(stream: BinaryIO, message: object) -> None:
    stream.write(pickle.dumps(message))
    stream.flush()


def serve(target: str) -> None:
    """Answer the calls that come by standard input, and end with it."""
    # Compilers make so much that lives on that looking for garbage takes a tenth of their time.
    gc.set_threshold(20_000, 50, 50)
    # What a framework prints must not stand between replies, nor a child read what is asked.
    requests = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if hasattr(os, "register_at_fork"):
        # Or the caller would not learn that this process has ended, before its children have.
        os.register_at_fork(after_in_child=lambda: os.close(replies.fileno()))
    _Server(target, replies).serve(requests)
