"""Find wordings in documentation, docstrings, comments and messages that the style rules out.

    python tools/lint_prose.py              check every tracked .md and .py file
    python tools/lint_prose.py docs README.md

The lint prints one line per match, ``file:line: rule: text (advice)``, and exits with 1 if it
finds any. It reads the prose of Markdown files, and the comments, docstrings and string literals
of Python files. It skips code, everything between backticks, and raw strings (patterns).
"""

import argparse
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

_INLINE, _CODE = "\0", "\1"  # what replaces code in a sentence and between texts


class Rule(NamedTuple):
    """A wording to avoid: a regular expression, and one sentence that it must match.

    A space in the pattern matches a line break too. The sentence is in backticks, so that the
    lint does not report its own file.
    """

    name: str
    advice: str
    pattern: str
    example: str


# A sentence or a clause begins here.
_START = r"(?:(?:^|\n *(?:[-*] )?|[.;!?] )\(?)(?:and |but |so )?"
_PRODUCTS = "CuPy|Dask|Flax|JAX|Keras|LLVM|MLX|NumPy|PyTorch|TensorFlow|XLA"

RULES = (
    Rule(
        "is-no",
        "write `not a`",
        r"(?<!\bthere\s)\b(?:is|are|was|were) (?-i:none|no)\b"
        r"(?! (?:longer|more|less|later|larger)\b)",
        "`A mask is no output.`",
    ),
    Rule(
        "has-to",
        "write `must`",
        r"\b(?:has|have|had|having) to\b",
        "`The layer has to count.`",
    ),
    Rule(
        "that-of",
        "repeat the noun",
        r"\b(?:that|those) of\b",
        "`The mask is that of the eager call.`",
    ),
    Rule(
        "of-which",
        "start a new sentence",
        r"\b(?:of|in|on|by|to|for|from|with) (?:which|whom|whose|what|whatever)\b",
        "`A record, of which one field is used.`",
    ),
    Rule(
        "who-does",
        "name the person, for example `users`",
        r"\b(?:whoever|whosoever)\b|\b(?:for|of|to|by|and) who\b|\n *who(?! [^.]*\?)",
        "`It helps whoever writes a kernel.`",
    ),
    Rule(
        "what-subject",
        "name the thing",
        _START + r"what(?:ever)?(?: else)? (?!if\b)[^.?`\n]{0,60}(?=[.,;])",
        "`What does not fit in the cache costs more.`",
    ),
    Rule(
        "person",
        "name the person, for example `users`",
        r"\b(?:any|some|every|no)body\b",
        "`Somebody else made this mask.`",
    ),
    Rule(
        "error-message",
        "write `<argument> must be <accepted>, got <value!r>`",
        r", but got\b",
        "`p is wrong, but got 2.`",
    ),
    Rule(
        "here-and-now",
        "write `when the call runs`",
        r"\bhere and now\b",
        "`The key is drawn here and now.`",
    ),
    Rule(
        "for-because",
        "write `because`",
        r"(?:[,;] |\()for (?:it|they|there|we|this|that|these|those|its|no|nothing) ",
        "`It is slow, for it allocates.`",
    ),
    Rule(
        "where-condition",
        "write `if` or `when`",
        r"\bwhere (?:not|none|no|nothing|there (?:is|are))\b",
        "`Where there is a GPU, it is used.`",
    ),
    Rule(
        "odd-verb",
        "write `is`, `has`, `returns`, `shows`, `states` or `reports`",
        r"\b(?:stands?|stood)\b(?!-| (?:for|in|out)\b)|\b(?:lies|says|tells|gives|gave)\b",
        "`The reason stands below.`",
    ),
    Rule(
        "odd-passive",
        "make the caller the subject, or write `checked`",
        r"\b(?:is|are|was|were|be|been) (?:asked|told)\b",
        "`The backend is asked for its modes.`",
    ),
    Rule(
        "comes-of",
        "write `results in`, `becomes` or `follows`",
        r"\b(?:comes?|becomes?) (?:of|to (?:it|the same))\b|\bwhat (?:becomes|comes)\b",
        "`See what becomes of the cache.`",
    ),
    Rule(
        "actual",
        "write `actual` or `got`",
        r"\bcame\b",
        "`Two masks were expected, one came.`",
    ),
    Rule(
        "takes-the-path",
        "write `uses`",
        r"\b(?:take|takes|took|taking) (?:the |its |an? |that )?(?:\w+ )?(?:path|kernels?)\b",
        "`The array takes the fused path.`",
    ),
    Rule(
        "again",
        "write `recomputes`, `recompiles`, `retraces` or `reruns`",
        r"\b(?:comput|compil|trac|record|run|runs|ran)(?:e|es|ed|ing)?(?: \w+){,2} again\b",
        "`The backward pass computes the mask again.`",
    ),
    Rule(
        "of-its-own",
        "write `its own`",
        r"\bof (?:its|their|your|one's|his|my|our|a) own\b"
        r"(?! (?!(?:and|or|in|for|with|is|to|at)\b)\w)"
        r"|\bof (?:yours|theirs|ours)\b",
        "`It runs in a process of its own.`",
    ),
    Rule(
        "does-as",
        "write `behaves like`",
        r"\b(?:do|does|did) as\b",
        "`The layer does as the framework does.`",
    ),
    Rule(
        "archaic",
        "write plain English",
        r"\b(?:thereof|therein|thereby|thereupon|whereof|whereby|wherein|hence|lest|albeit|whence"
        r"|ere|upon|whilst|amongst|likewise|anew|forthwith|all the same|needs not)\b",
        "`The key is drawn anew.`",
    ),
    Rule(
        "vocabulary",
        "write `capability`, `mutant` or `mutation`",
        r"\babilit(?:y|ies)\b|\bplanted\b",
        "`A backend declares its abilities.`",
    ),
    Rule(
        "british",
        "use American spelling",
        r"\b(?:behaviour|colour|favour|flavour|neighbour|honour|labour)\w*"
        r"|\b(?:normal|initial|serial|optim|recogn|organ|real|parallel|vector|special|general|util"
        r"|minim|maxim|summar|synchron|material|canonical|custom|random|quant|final|memor|regular"
        r"|token|visual|emphas|symbol|equal)is(?:e[ds]?|ing|ation)\b"
        r"|\b(?:centre|metre|grey|artefact|judgement|catalogue|analyse[ds]?|programme|defence"
        r"|licence|towards|labelled|labelling|modelled|modelling|cancelled|travelled)\b",
        "`The behaviour differs.`",
    ),
    Rule(
        "possessive",
        "write `Keras's`, `JAX's`",
        rf"(?<!['\w])(?:{_PRODUCTS})'(?![\w'])",
        "`It calls Keras' own layer.`",
    ),
    Rule(
        "product-possessive",
        "write `NumPy arrays`, `TensorFlow eager tensors`, `Python integers`",
        rf"\b(?:{_PRODUCTS}|Python)'s (?:eager )?(?:arrays?|tensors?|integers?|numbers?|layers?)\b",
        "`It accepts TensorFlow's eager tensors.`",
    ),
    Rule(
        "long-sentence",
        "split it: 15 words are common, 40 too many",
        r"(?:[^\s.:!?|\1]+ ){40}",
        f"`It runs {'and runs ' * 20}on.`",
    ),
)


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r" (?![*+?])", " +", pattern), re.IGNORECASE)


_COMPILED = [(rule, _compile(rule.pattern)) for rule in RULES]


def _blank(match: re.Match[str]) -> str:
    """Replace code by a character that no rule matches, and keep its length and its lines."""
    return re.sub(r"[^\n]", _CODE, match[0])


def _blank_inline_code(text: str) -> str:
    code = r"(`+)(?!`)(?:(?!\n *\n).)+?(?<!`)\1(?!`)"
    return re.sub(code, lambda match: _INLINE * len(match[0]), text, flags=re.DOTALL)


def read_markdown(text: str) -> str:
    """Return a page with everything blanked but its prose."""
    text = re.sub(r"^( *)(```+).*?^\1\2 *$", _blank, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<=\n\n)(?: {4}.*\n|\n)+", _blank, text)
    return re.sub(r"(?<=\])\([^)]*\)", _blank, _blank_inline_code(text))


def read_python(text: str) -> str:
    """Return a module with everything blanked but comments, docstrings and string literals."""
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    prose = list(re.sub(r"\S", _CODE, text))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        first = starts[token.start[0] - 1] + token.start[1]
        if token.type == tokenize.COMMENT:
            kept = re.sub(r"^#+", lambda mark: " " * len(mark[0]), token.string)
        elif token.type == tokenize.STRING:
            kept = _read_string(token.string)
        elif token.type == getattr(tokenize, "FSTRING_MIDDLE", None):
            kept = token.string
        else:
            continue
        prose[first : first + len(kept)] = _blank_inline_code(kept)
    return "".join(prose)


def _read_string(literal: str) -> str:
    """Blank a literal's prefix, quotes, escapes, replacement fields and doctests."""
    prefix, quote, body = re.fullmatch(r"(\w*)('''|\"\"\"|'|\")(.*)\2", literal, re.DOTALL).groups()
    if "r" in prefix.lower():
        return re.sub(r"\S", _CODE, literal)
    body = re.sub(r"\\.|^ *(?:>>>|\.\.\. ).*$", _blank, body, flags=re.MULTILINE)
    if "f" in prefix.lower():
        body = re.sub(r"\{[^{}]*\}", _blank, body)
    return " " * (len(prefix) + len(quote)) + body + " " * len(quote)


def _join_lines(text: str) -> str:
    """Replace each line break within a paragraph by spaces, and keep the length."""
    within = r"(?<=\S) *\n[ >]*(?=[^\s>|#*-])"
    return re.sub(within, lambda match: " " * len(match[0]), text)


def find_matches(text: str, suffix: str) -> Iterator[tuple[int, Rule, str]]:
    """Yield the line, the rule and the text of each wording to avoid."""
    prose = _join_lines({".md": read_markdown, ".py": read_python}[suffix](text))
    for rule, pattern in _COMPILED:
        for match in pattern.finditer(prose):
            found = match[0].lstrip("\n -*.:;,!?(")
            line = text.count("\n", 0, match.end() - len(found)) + 1
            yield line, rule, " ".join(found.replace(_INLINE, "`").split())


def list_files(paths: Sequence[str]) -> list[Path]:
    """Return the tracked Markdown and Python files under the paths."""
    command = ["git", "ls-files", "--", *(str(Path(path).resolve()) for path in paths)]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.splitlines() if name.endswith((".md", ".py"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check files, print the matches and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", help="files or folders (default: all tracked files)")
    failed = False
    for path in list_files(parser.parse_args(arguments).paths):
        matches = find_matches(path.read_text(encoding="utf-8"), path.suffix)
        for line, rule, text in sorted(matches, key=lambda match: match[0]):
            failed = True
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            print(f"{path.relative_to(ROOT)}:{line}: {rule.name}: {shown} ({rule.advice})")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
