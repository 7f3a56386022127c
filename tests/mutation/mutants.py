"""Choose mutants: small changes of the product's code, found in its syntax trees."""

import ast
import hashlib
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["unidrop/*.py", "unidrop/fused/*.py", "adapters/**/*.py"]
NOT_MUTATED = {"unidrop/testing.py"}  # a tool of conformance

COMPARISONS = {"Lt": "LtE", "LtE": "Lt", "Gt": "GtE", "GtE": "Gt", "Eq": "NotEq", "NotEq": "Eq"}
COMPARISONS |= {"Is": "IsNot", "IsNot": "Is", "In": "NotIn", "NotIn": "In"}
ARITHMETIC = {"Add": "Sub", "Sub": "Add", "Mult": "FloorDiv", "FloorDiv": "Mult", "Div": "Mult"}
ARITHMETIC |= {"Mod": "FloorDiv", "LShift": "RShift", "RShift": "LShift", "Pow": "Mult"}
ARITHMETIC |= {"BitAnd": "BitOr", "BitOr": "BitAnd", "BitXor": "BitOr"}
# Names that a programmer can confuse: words of a key, call numbers, places and sizes in memory.
ORDERED = re.compile(
    r"(lo|hi|low|high|key|words?|site|step|seed|calls?|first|last|count|start|stop|begin|end|rows?"
    r"|columns?|address|source|target|strides?|offsets?|index|shape|tile|counter|c\d|k\d|x\d)\d?$"
)
ROLLBACK = re.compile(r"roll_?back|undo|restore|set_rng_state|increment_version|release|reset")


@dataclass(frozen=True)
class Mutant:
    """One change: in the file, bytes ``start`` to ``end`` become ``new``."""

    file: str
    line: int
    kind: str
    start: int
    end: int
    old: str
    new: str

    @property
    def id(self) -> str:
        """Name the mutant by its text and column, so that moved lines keep their result."""
        source = (ROOT / self.file).read_bytes()
        begin = source.rfind(b"\n", 0, self.start) + 1
        text = source[begin : source.find(b"\n", self.end)].decode()
        named = "\0".join([self.file, self.kind, text, str(self.start - begin), self.new])
        return hashlib.sha256(named.encode()).hexdigest()[:10]

    def source(self) -> bytes:
        """Return the text of the changed file."""
        source = (ROOT / self.file).read_bytes()
        return source[: self.start] + self.new.encode() + source[self.end :]

    def apply(self, folder: Path) -> None:
        """Write the changed file into a copy of the repository."""
        path = folder / self.file
        path.write_bytes(self.source())
        # Python recompiles a file if its time has changed.
        changed = (ROOT / self.file).stat().st_mtime + 1 + int(self.id, 16) % 10**6
        os.utime(path, (changed, changed))


def places(file: str) -> Iterator[Mutant]:
    """Yield every mutant of a file. The tool runs only a few of them."""
    source = (ROOT / file).read_bytes()
    begins = [0, *(match.end() for match in re.finditer(b"\n", source))]

    def mutant(node: Any, kind: str, new: str) -> Mutant:
        start = begins[node.lineno - 1] + node.col_offset
        end = begins[node.end_lineno - 1] + node.end_col_offset
        return Mutant(file, node.lineno, kind, start, end, source[start:end].decode(), new)

    def changed(node: Any, kind: str, **fields: Any) -> Mutant:
        other = deepcopy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        text = ast.unparse(other)
        return mutant(node, kind, f"({text})" if isinstance(node, ast.expr) else text)

    def visit(node: ast.AST, undoing: bool, top: bool) -> Iterator[Mutant]:
        match node:
            case ast.Constant(value=bool() as value):
                yield mutant(node, "constant", str(not value))
            case ast.Constant(value=int() | float() as value):
                yield mutant(node, "constant", str(value + 1))
                yield mutant(node, "constant", f"({value - 1})")
            case ast.Compare(ops=[op, *others]):
                swapped = getattr(ast, COMPARISONS[type(op).__name__])()
                yield changed(node, "comparison", ops=[swapped, *others])
            case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op).__name__ in ARITHMETIC:
                if not (top and isinstance(op, ast.BitOr)):  # an alias of a type
                    swapped = getattr(ast, ARITHMETIC[type(op).__name__])()
                    yield changed(node, "arithmetic", op=swapped)
            case ast.UnaryOp(op=ast.USub() | ast.Invert()):
                yield mutant(node, "arithmetic", f"({ast.unparse(node.operand)})")
            case ast.UnaryOp(op=ast.Not()):
                yield mutant(node, "condition", f"({ast.unparse(node.operand)})")
            case ast.BoolOp():
                swapped = ast.Or() if isinstance(node.op, ast.And) else ast.And()
                yield changed(node, "condition", op=swapped)
            case ast.If() | ast.While() | ast.IfExp():
                yield mutant(node.test, "condition", f"(not ({ast.unparse(node.test)}))")
            case ast.Raise():
                yield mutant(node, "raise", "pass")
            case ast.Expr(value=ast.Call() as call):
                is_rollback = undoing or ROLLBACK.search(ast.unparse(call.func))
                yield mutant(node, "rollback" if is_rollback else "statement", "pass")
            case ast.Assign(targets=[ast.Subscript()]) if not top:
                yield mutant(node, "statement", "pass")
            case ast.Tuple(elts=[first, second]) if _are_alike(first, second):
                yield changed(node, "order", elts=[second, first])
            case ast.Call():
                yield from calls(node)
        if isinstance(node, ast.AugAssign):
            yield mutant(node, "rollback" if undoing else "statement", "pass")
        for child, inside in _children(node):
            is_function = isinstance(node, ast.FunctionDef | ast.Lambda)
            yield from visit(child, undoing or inside, top and not is_function)

    def calls(node: ast.Call) -> Iterator[Mutant]:
        device = [word for word in node.keywords if word.arg != "device"]
        if len(device) < len(node.keywords):
            yield changed(node, "device", keywords=device)
        if re.fullmatch(r"(?s).*\.to\([\w.]*device\)", ast.unparse(node)):
            yield mutant(node, "device", f"({ast.unparse(node.func.value)})")
        if ast.unparse(node.func) in ("min", "max", "isinstance"):
            return
        for i, (first, second) in enumerate(zip(node.args, node.args[1:], strict=False)):
            if _are_alike(first, second):
                args = [*node.args[:i], second, first, *node.args[i + 2 :]]
                yield changed(node, "order", args=args)
                break
        words = {word.arg: word for word in node.keywords}
        if {"lo", "hi"} <= words.keys():
            names = {"lo": "hi", "hi": "lo"}
            swapped = [ast.keyword(names.get(w.arg or "", w.arg), w.value) for w in node.keywords]
            yield changed(node, "order", keywords=swapped)

    yield from visit(ast.parse(source), undoing=False, top=True)


_SIMPLE = ast.Name | ast.Attribute | ast.Subscript


def _are_alike(first: ast.expr, second: ast.expr) -> bool:
    """Tell whether two expressions could be mistaken for each other."""
    texts = [re.sub(r"\[.*\]$", "", ast.unparse(node)).split(".")[-1] for node in (first, second)]
    simple = isinstance(first, _SIMPLE) and isinstance(second, _SIMPLE)
    return simple and texts[0] != texts[1] and all(map(ORDERED.search, texts))


def _children(node: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
    """Yield the children of a node that may change, and whether they undo a failure."""
    skipped = {"annotation", "returns", "decorator_list", "bases", "type_params"}
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        return  # messages, and hints for type checkers
    if isinstance(node, ast.keyword) and node.arg in ("strict", "stacklevel", "maxsize"):
        return
    if isinstance(node, ast.Assign | ast.AnnAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if ast.unparse(target) in ("__all__", "__slots__", "__version__"):
            return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        skipped |= {"test", "body"}
    if isinstance(node, ast.FunctionDef) and all(
        isinstance(line, ast.Expr | ast.Raise)
        and not isinstance(getattr(line, "value", 0), ast.Call)
        for line in node.body
    ):
        skipped |= {"body"}  # an abstract method, or an overload
    for name, value in ast.iter_fields(node):
        if name not in skipped:
            undoes = name == "finalbody" or isinstance(node, ast.ExceptHandler)
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield child, undoes


def choose(total: int, seed: int) -> list[Mutant]:
    """Return a share of each file's places, of all kinds in turn, at most one in a line."""
    paths = sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)})
    files = [path.relative_to(ROOT).as_posix() for path in paths]
    found = {file: list(places(file)) for file in files if file not in NOT_MUTATED}
    number = sum(map(len, found.values()))
    chosen = []
    for file, mutants in found.items():
        random.Random(f"{seed} {file}").shuffle(mutants)
        by_kind: dict[str, list[Mutant]] = defaultdict(list)
        for mutant in mutants:
            by_kind[mutant.kind].append(mutant)
        always = by_kind.pop("rollback", []) + by_kind["device"][:2]  # kinds with few places
        # The first of each kind, then the second of each.
        turns = [turn for ms in by_kind.values() for turn in enumerate(ms)]
        others = [mutant for _, mutant in sorted(turns, key=lambda turn: turn[0])]
        quota = len(always) + max(2, round(total * len(mutants) / number))
        lines: dict[int, Mutant] = {}
        for mutant in always + others:
            if len(lines) < quota and mutant.line not in lines and _compiles(mutant):
                lines[mutant.line] = mutant
        chosen += lines.values()
    return chosen


def _compiles(mutant: Mutant) -> bool:
    try:
        compile(mutant.source(), mutant.file, "exec")
    except SyntaxError:
        return False
    return True
