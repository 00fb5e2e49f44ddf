"""Every command of the README, of docs/ and of the docstrings is one that its script takes."""

import argparse
import importlib
import re
import shlex
import sys

import pytest
from helpers import ROOT

PATTERN = r"(?:\w+=\S+ )*(?:python|torchrun(?: --\S+ [^\s-]\S*)*) (?:-m ((?:tools|studies)\.\w+)|(\w+)\.py) ([^#]*)"
FILES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*.py"))]
FILES += sorted(
    path
    for path in [*ROOT.glob("tools/*.py"), *ROOT.glob("studies/*.py")]
    if path.stem not in ("render", "app")
)  # which take packages


class Parsed(Exception):
    """Raised in place of what a script would do."""


def commands(path) -> list[tuple[str, str]]:
    """(module, arguments) of a file's commands; what a table's row or a sentence only begins is left out."""
    text = re.sub(r" *\\\n +", " ", path.read_text())
    if path.suffix == ".md":
        blocks = re.compile(r"^```\n(.*?)^```", re.S | re.M)
        lines = [line for block in blocks.findall(text) for line in block.splitlines()]
        lines += [span.replace("\n", " ") for span in re.findall("`([^`]+)`", blocks.sub("", text))]
    else:
        lines = text.split('"""')[1].splitlines() if text else []
    found = filter(None, (re.match(PATTERN, line.strip()) for line in lines))
    return [(match[1] or match[2], match[3]) for match in found if "..." not in match[3]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_parse(path, monkeypatch):
    real = argparse.ArgumentParser.parse_args

    def parse(self, *args):
        real(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    found = commands(path)
    assert len(found) >= {"README.md": 12, "train.py": 3, "data.py": 3}.get(path.name, 0)
    for module, rest in found:
        monkeypatch.setattr(sys, "argv", [module, *shlex.split(rest)])
        with pytest.raises(Parsed):
            importlib.import_module(module).main()
