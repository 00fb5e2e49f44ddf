"""What the README, docs/ and docstrings name is there: commands, tests; and flags have help."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import ROOT

COMMAND = re.compile(
    r"(?:\w+=\S+ )*"  # environment variables
    r"(?:python|torchrun(?: --\S+ [^\s-]\S*)*) "
    r"(?:-m (?P<module>(?:tools|studies)\.\w+)|(?P<script>\w+)\.py) "
    r"(?P<arguments>[^#]*)"
)
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.S | re.M)

NEED_PACKAGES = ("app", "render")  # gradio, Blender
MODULES = sorted(
    path
    for folder in (".", "tools", "studies")
    for path in (ROOT / folder).glob("*.py")
    if path.stem not in NEED_PACKAGES
)
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SCRIPTS = [path for path in MODULES if "\ndef main(" in path.read_text()]


class Parsed(Exception):
    """Raised in place of what a script would do with its arguments. It holds the parser."""


@pytest.fixture
def parse_only(monkeypatch):
    """Scripts parse their arguments and raise Parsed. Presets are found as from ROOT."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self, *args):
        parse_args(self, *args)
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.chdir(ROOT)


def commands(path: Path) -> list[tuple[str, str]]:
    """(module, arguments) of each command in a file.

    What a table's row or a sentence only begins, with "...", is left out.
    """
    text = path.read_text()
    if path.suffix == ".py":
        parts = text.split('"""')
        text = parts[1] if len(parts) > 1 else ""
    text = re.sub(r" *\\\n +", " ", text)  # continued lines
    if path.suffix == ".py":
        lines = text.splitlines()
    else:
        lines = "\n".join(FENCED.findall(text)).splitlines()
        for span in re.findall("`([^`]+)`", FENCED.sub("", text)):
            lines.append(span.replace("\n", " "))
    found = []
    for line in lines:
        match = COMMAND.match(line.strip())
        if match and "..." not in match["arguments"]:
            found.append((match["module"] or match["script"], match["arguments"]))
    return found


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=lambda path: path.name)
def test_commands_parse(path, monkeypatch, parse_only):
    for module, arguments in commands(path):
        monkeypatch.setattr(sys, "argv", [module, *shlex.split(arguments)])
        with pytest.raises(Parsed):
            importlib.import_module(module).main()


@pytest.mark.parametrize("name, at_least", [("README.md", 8), ("train.py", 3)])
def test_commands_are_found(name, at_least):
    assert len(commands(ROOT / name)) >= at_least


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tests_that_a_page_names_are_there(path):
    tests = "".join(file.read_text() for file in ROOT.glob("tests/test_*.py"))
    for name in re.findall(r"`(test_\w+)`", path.read_text()):
        assert f"def {name}(" in tests


def all_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The flags of a parser and of its subcommands."""
    flags = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                flags.extend(all_flags(subparser))
        else:
            flags.append(action)
    return flags


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_flag_has_help(path, monkeypatch):
    def give_parser(self, *args):
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", give_parser)
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(name).main()
    parser = parsed.value.args[0]
    assert parser.description
    for flag in all_flags(parser):
        assert flag.help, flag


def test_help_tells_the_defaults(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("train").main()
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "optimiser steps (A.1) (default: 30000)" in printed
