"""A backend in a process of its own, with an environment of its own.

Some frameworks are one thing a process: Keras has one backend, JAX one set of devices, each chosen
by the environment before the import. To have several of them in one matrix, all but one have to
live elsewhere.

Arrays, layers and functions stay in the other process, and are named here by a `RemoteObject`;
plain values, NumPy's arrays and errors are pickled. Each thread here has a thread of its own there.
"""

import itertools
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from threading import Lock, Thread, get_ident
from typing import Any, BinaryIO, ClassVar

import numpy as np

__all__ = ["RemoteBackend", "RemoteObject"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.ndarray, np.generic)
_ATTRIBUTES = (
    "modes",
    "compiled_modes",
    "missing_modes",
    "devices",
    "abilities",
    "mode_limits",
    "step_limit",
)


def _forwarded(name: str) -> Callable[..., Any]:
    """Return a method that runs in the other process, under the same name."""

    def method(self: "RemoteBackend | RemoteObject", *args: Any, **options: Any) -> Any:
        return self._process.call(self._number, name, args, options)

    method.__name__ = name
    return method


class RemoteBackend:
    """A backend whose calls run in a process of its own.

    A subclass defines the three class attributes; everything else is what the backend says there.

    Attributes
    ----------
    name : str
        What the matrix calls it.
    target : str
        The backend's class, as ``"package.module:Class"``.
    environment : mapping of str to str
        The variables of the environment that differ from this process's.

    Raises
    ------
    Exception
        On construction, what loading the backend raises there: a `ModuleNotFoundError` where its
        library is not installed.
    """

    name: str
    target: ClassVar[str]
    environment: ClassVar[Mapping[str, str]]

    modes: Sequence[str]
    compiled_modes: Sequence[str]
    missing_modes: Mapping[str, str]
    devices: Sequence[str]
    abilities: Mapping[str, str | None]
    mode_limits: Mapping[str, Mapping[str, str]]
    step_limit: int

    _number = 0

    def __init__(self) -> None:
        self._process = _Process(self.name, self.target, self.environment)
        weakref.finalize(self, self._process.stop)
        for attribute in _ATTRIBUTES:
            setattr(self, attribute, self._process.call(0, "__getattribute__", (attribute,), {}))

    dtypes = _forwarded("dtypes")
    from_numpy = _forwarded("from_numpy")
    to_numpy = _forwarded("to_numpy")
    device_of = _forwarded("device_of")
    dropout = _forwarded("dropout")
    gradient = _forwarded("gradient")
    layouts = _forwarded("layouts")
    traces = _forwarded("traces")
    words = _forwarded("words")
    key = _forwarded("key")
    traced_key = _forwarded("traced_key")
    layer = _forwarded("layer")


class RemoteObject:
    """Stands for an array, a layer or a function of the other process."""

    def __init__(self, process: "_Process", number: int) -> None:
        self._process = process
        self._number = number
        weakref.finalize(self, process.forget, number).atexit = False

    __call__ = _forwarded("__call__")
    save = _forwarded("save")
    load = _forwarded("load")
    vjp = _forwarded("vjp")

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


class _Process:
    """The calling end: sends calls, and hands each reply to the thread that waits for it."""

    def __init__(self, name: str, target: str, environment: Mapping[str, str]) -> None:
        self._name = name
        self._popen = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({target!r})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | dict(environment),
        )
        self._sending = Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}
        self._forgotten: list[int] = []
        Thread(target=self._receive, name=f"unidrop {name}", daemon=True).start()

    def call(
        self, number: int, method: str, args: Sequence[Any], options: Mapping[str, Any]
    ) -> Any:
        """Call a method of an object there, and return what it returns or raise what it raises."""
        reply: Future[Any] = Future()
        sent = _map((args, dict(options)), self._without_remotes)
        with self._sending:
            call = next(self._numbers)
            self._waiting[call] = reply
            forgotten, self._forgotten = self._forgotten, []
            try:
                _write(self._stdin, (call, get_ident(), forgotten, number, method, sent))
            except OSError:
                self._fail_all()
        return reply.result()

    def forget(self, number: int) -> None:
        """Let the other process drop an object, with the next call: finalisers must not wait."""
        self._forgotten.append(number)

    def stop(self) -> None:
        """End the other process."""
        with suppress(OSError):  # it has ended by itself, with something still to be sent to it
            self._stdin.close()
        self._popen.wait()
        self._stdout.close()

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
            except (EOFError, OSError, ValueError, pickle.UnpicklingError):
                self._fail_all()
                return
            reply = self._waiting.pop(call)
            if error is not None:
                reply.set_exception(error)
            else:
                reply.set_result(_map(value, self._with_remotes))

    def _with_remotes(self, value: Any) -> Any:
        return RemoteObject(self, value.number) if isinstance(value, _Named) else value

    def _fail_all(self) -> None:
        for call in list(self._waiting):
            reply = self._waiting.pop(call, None)
            if reply is not None:
                reply.set_exception(RuntimeError(f"the process of backend {self._name} has ended"))


class _Server:
    """The serving end: has the objects, and runs each calling thread's calls in order."""

    def __init__(self, target: str, replies: BinaryIO) -> None:
        self._target = target
        self._replies = replies
        self._sending = Lock()
        self._numbers = itertools.count(1)
        self._objects: dict[int, Any] = {}
        self._threads: dict[int, ThreadPoolExecutor] = {}

    def serve(self, requests: BinaryIO) -> None:
        """Answer calls until there are no more."""
        while True:
            try:
                call, thread, forgotten, *what = pickle.load(requests)
            except EOFError:
                return
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
            module, _, name = self._target.partition(":")
            self._objects[number] = getattr(import_module(module), name)()
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
    """Return an error as one of Python's own types: the caller may lack the framework's."""
    kind = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
    text = str(error) if kind is type(error) else f"{type(error).__name__}: {error}"
    try:
        portable: BaseException = kind(text)
        return portable
    except TypeError:  # one that is made of more than a text
        return RuntimeError(f"{type(error).__name__}: {error}")


def _write(stream: BinaryIO, message: object) -> None:
    stream.write(pickle.dumps(message))
    stream.flush()


def serve(target: str) -> None:
    """Answer the calls that come by standard input, and end with it."""
    # What a framework prints must not stand between replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _Server(target, replies).serve(sys.stdin.buffer)
    # Some frameworks' threads outlive the interpreter, and then abort it.
    os._exit(0)
