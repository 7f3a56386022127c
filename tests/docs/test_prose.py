"""The prose lint reports each wording to avoid, skips code, and passes on the repository."""

import lint_prose
import pytest


@pytest.mark.parametrize("rule", lint_prose.RULES, ids=lambda rule: rule.name)
def test_reports_the_example_of_each_rule(rule):
    text = f"# Title\n\nA first line.\n\n{rule.example.strip('`')}\n"
    for suffix, source in [(".md", text), (".py", f'"""{text}"""\n')]:
        found = [(line, match.name) for line, match, _ in lint_prose.find_matches(source, suffix)]
        assert found == [(5, rule.name)]


@pytest.mark.parametrize(
    "text",
    [
        "A line that has\nto go on.\n",
        "> A quotation has\n> to go on.\n",
        "- An item has\n  to go on.\n",
    ],
)
def test_finds_a_wording_across_lines_of_markdown(text):
    assert [line for line, _, _ in lint_prose.find_matches(text, ".md")] == [1]


@pytest.mark.parametrize(
    "text",
    [
        "# A comment that has\n# to go on.\n",
        'raise ValueError(\n    "a message that has "\n    f"to go on: {x}"\n)\n',
    ],
)
def test_finds_a_wording_across_lines_of_python(text):
    assert len(list(lint_prose.find_matches(text, ".py"))) == 1


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".md", "Call `has~to` here.\n"),
        (".md", "A link to [it](has-to/is~no.md).\n"),
        (".md", "```python\nx = 'has~to'\n```\n"),
        (".md", "Code:\n\n    it has~to\n\nMore.\n"),
        (".md", "The last word has\n\nto be another paragraph.\n"),
        (".py", "x = 1 if y is~no else 2\n"),
        (".py", '"""Return 1.\n\n>>> "has~to"\n"""\n'),
        (".py", 'x = f"{has~to}"\n'),
        (".py", 'x = r"has~to"\n'),
        (".py", 'f("a word it has", "to")\n'),
    ],
)
def test_skips_code_and_separate_texts(suffix, text):
    # The "~" keeps the lint from reporting this file.
    assert list(lint_prose.find_matches(text.replace("~", " "), suffix)) == []


def test_prints_each_match_and_exits_with_1(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("The first line.\n\nIt has~to go.\n".replace("~", " "), encoding="utf-8")
    monkeypatch.setattr(lint_prose, "ROOT", tmp_path)
    monkeypatch.setattr(lint_prose, "list_files", lambda paths: [page])
    assert lint_prose.main([]) == 1
    assert capsys.readouterr().out.startswith("page.md:3: has-to: ")


def test_finds_no_wording_to_avoid_in_repository(capsys):
    assert lint_prose.main([]) == 0, capsys.readouterr().out
