"""Makes docs/cli.md, docs/api.md and the tables in docs/failures.md and docs/architecture.md from the code.

    python docs/generate.py           # writes them
    python docs/generate.py --check   # exit code 1 if one of them differs from the code

They are made from the parser's actions and the sources' syntax trees, so that all versions of Python make the same.
"""

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "wsm_ds"
sys.path.insert(0, str(PACKAGE.parent))  # the code beside these pages, not an installed one
MARKERS = "<!-- begin: made by docs/generate.py -->\n", "<!-- end -->\n"
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Ranks|Memory|Example|Examples|Note|Source):(.*)$")
ITEM = re.compile(r"^(\*{0,2}\w[\w.]*(?:, \*{0,2}\w[\w.]*)*)(?: \([^)]*\))?: ?(.*)$")
LISTS = ("Args", "Attributes", "Raises")

CLI_HEAD = """# Command line

Made by `docs/generate.py` from the code. `python -m wsm_ds` is the same as `wsm-ds`.
"""
COMPLETION = """## Completion

bash and zsh can complete commands, flags and paths. Install the package shtab (`pip install '.[completion]'`), and add
the first line to `~/.bashrc`, or the second one to `~/.zshrc`, below `compinit`:

```text
eval "$(wsm-ds --print-completion bash)"
eval "$(wsm-ds --print-completion zsh)"
```
"""
API_HEAD = """# Python

Made by `docs/generate.py` from the code: the names of `wsm_ds`, and `wsm_ds.training.TrainingJob`.

`StrPath` stands for `str | os.PathLike[str]`. `import wsm_ds` makes `WSMLR` and `WSDLR` known to DeepSpeed. It imports
neither torch nor DeepSpeed; each name is loaded when it is first used.

<!-- fmt: off -->
"""


def cli_page(parser: argparse.ArgumentParser) -> str:
    """The page of the command line: every command with its arguments."""
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    texts = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    lines = [CLI_HEAD, "| command | |", "|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {_cell(text)} |" for name, text in texts.items()]
    lines += ["", *_epilog(parser)]
    for name in texts:
        lines += _command(f"{parser.prog} {name}", name, commands.choices[name], parser.epilog)
    lines.append(COMPLETION)
    return "\n".join(lines).rstrip() + "\n"


def _command(command: str, name: str, parser: argparse.ArgumentParser, common_epilog: str | None) -> Iterator[str]:
    yield f"## {name}\n"
    yield f"{_sentence(_joined(parser.description or ''))}\n"
    arguments = [f"[{_metavar(a)}]" if a.nargs == "?" else _metavar(a) for a in parser._get_positional_actions()]
    yield f"```text\n{' '.join([command, *arguments, '[options]'])}\n```\n"
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        if not actions:
            continue
        yield f"| {group.title} | |\n|---|---|"
        for action in actions:
            yield f"| {_words(action)} | {_cell(_help(action))} |"
        yield ""
    yield from _epilog(parser, without=common_epilog or "")


def _epilog(parser: argparse.ArgumentParser, without: str = "") -> list[str]:
    """The text below the options, but for paragraphs that stand in another."""
    paragraphs = re.split(r"\n\n+", textwrap.dedent(parser.epilog or "").strip())
    epilog = "\n\n".join(paragraph for paragraph in paragraphs if paragraph not in without)
    if not epilog:
        return []
    if parser.formatter_class is argparse.HelpFormatter:
        return [_sentence(_joined(epilog)), ""]
    return [f"```text\n{epilog}\n```", ""]


def _metavar(action: argparse.Action) -> str:
    if action.metavar is not None:
        return str(action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar))
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def _words(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else f" {_metavar(action)}"
    if not action.option_strings:
        return f"`{_metavar(action)}`"
    return f"`{', '.join(action.option_strings)}{value}`".replace("|", "\\|")


def _help(action: argparse.Action) -> str:
    text = (action.help or "") % vars(action)  # as argparse does it: %(default)g, %%
    return f"{text} (required)" if action.required and action.option_strings else text


def _joined(text: str) -> str:
    return " ".join(text.split())


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "…", ":", ")", "`")) or not text else f"{text}."


def _cell(text: str) -> str:
    pieces = _joined(text).replace("|", "\\|").split("`")  # every second piece is code
    pieces[::2] = [piece.replace("*", "\\*").replace("<", "&lt;") for piece in pieces[::2]]
    return "`".join(pieces)


def api_page() -> str:
    """The page of the library: signatures and docstrings of the public names."""
    import wsm_ds
    import wsm_ds.training
    from wsm_ds.training import TrainingJob

    names = sorted((name for name in wsm_ds.__all__ if name != "__version__"), key=str.lower)
    values: dict[str, Any] = {name: getattr(wsm_ds, name) for name in names}
    lines = [API_HEAD, "| name | |", "|---|---|"]
    for name, value in [*values.items(), ("wsm_ds.training", wsm_ds.training)]:
        lines.append(f"| [`{name}`](#{name.lower().replace('.', '')}) | {_cell(_first(value))} |")
    lines.append("")
    for name, value in values.items():
        lines += _entry(name, value)
    lines += ["## wsm_ds.training\n", markdown(inspect.getdoc(wsm_ds.training) or ""), ""]
    lines += _entry("TrainingJob", TrainingJob, level=3)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _first(value: Any) -> str:
    return _joined((inspect.getdoc(value) or "").partition("\n\n")[0])


def _entry(name: str, value: Any, level: int = 2) -> Iterator[str]:
    yield f"{'#' * level} {name}\n"
    if not inspect.isclass(value) and not inspect.isfunction(value):
        return
    node = _node(value)
    yield f"```python\n{_signature(name, node)}\n```\n"
    yield from _unpacked(node, value.__module__)
    yield markdown(inspect.getdoc(value) or "") + "\n"
    seen: set[str] = set()
    for parent in [value, *_unlisted_bases(value)] if inspect.isclass(value) else []:
        if parent is not value:
            yield f"From `{parent.__name__}`: {markdown(inspect.getdoc(parent) or '')}\n"
        for member in _node(parent).body:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_") and member.name not in seen:
                seen.add(member.name)
                if ast.get_docstring(member):
                    yield from _member(member)


def _unlisted_bases(value: type) -> list[type]:
    """The classes that a class inherits from and that have no entry of their own."""
    import wsm_ds

    ours = [base for base in value.__mro__[1:] if base.__module__.startswith("wsm_ds.") and base.__doc__]
    return [base for base in ours if base.__name__ not in wsm_ds.__all__ and not issubclass(base, Exception)]


def _unpacked(node: ast.FunctionDef | ast.ClassDef, module: str) -> Iterator[str]:
    """The keywords that `**options: Unpack[…]` of a function in a module stands for."""
    from wsm_ds.planning import recipe_options
    from wsm_ds.planning.recipe import MergeRecipe

    if isinstance(node, ast.FunctionDef) and node.args.kwarg and node.args.kwarg.annotation:
        match = re.fullmatch(r"Unpack\[(\w+)\]", ast.unparse(node.args.kwarg.annotation))
        if match:
            fields = set(MergeRecipe.model_fields)
            of_recipes = getattr(recipe_options, match[1], None)
            options = of_recipes or getattr(sys.modules[module], match[1])
            names = set(options.__optional_keys__)
            listed = ["all fields"] if fields <= names else [f"`{name}`" for name in sorted(names & fields)]
            further = "".join(f", and `{name}`" for name in sorted(names - fields))
            yield f"`{match[1]}`: {', '.join(listed)} of [`MergeRecipe`](#mergerecipe){further}.\n"
            if of_recipes is None:
                yield markdown(inspect.getdoc(options) or "") + "\n"


def _member(node: ast.FunctionDef) -> Iterator[str]:
    is_property = any(ast.unparse(decorator) in ("property", "cached_property") for decorator in node.decorator_list)
    text = _function(f".{node.name}", node)
    yield f"```python\n{text.replace('() -> ', ': ') if is_property else text}\n```\n"
    yield markdown(ast.get_docstring(node) or "") + "\n"


def _node(value: Any) -> ast.FunctionDef | ast.ClassDef:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    return node


def _signature(name: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.FunctionDef):
        return _function(name, node)
    makers = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"]
    if makers:
        return f"class {_function(name, makers[0])}".removesuffix(" -> None")
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    fields = [
        _field(member)
        for member in node.body
        if isinstance(member, ast.AnnAssign) and not ast.unparse(member.target).startswith("_")
    ]
    return "\n".join([f"class {name}({bases})" if bases else f"class {name}", *fields])


def _function(name: str, node: ast.FunctionDef) -> str:
    arguments = _arguments(node.args)
    if arguments and arguments[0] in ("self", "cls"):
        del arguments[0]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) > 100:
        line = "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])
    return line.replace("'", '"')


def _arguments(arguments: ast.arguments) -> list[str]:
    """Each argument with its annotation and default; `/` and `*` where they stand."""
    positional = [*arguments.posonlyargs, *arguments.args]
    missing = [None] * (len(positional) - len(arguments.defaults))
    parts = [_argument(a, d) for a, d in zip(positional, [*missing, *arguments.defaults], strict=True)]
    if arguments.posonlyargs:
        parts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        parts.append(f"*{_argument(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_argument(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return [*parts, f"**{_argument(arguments.kwarg, None)}"] if arguments.kwarg else parts


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    equals = " = " if annotation else "="
    return f"{argument.arg}{annotation}" + (f"{equals}{ast.unparse(default)}" if default else "")


def _field(node: ast.AnnAssign) -> str:
    """A field of a class; of pydantic's `Field(…)` the default alone."""
    default = node.value
    if isinstance(default, ast.Call) and ast.unparse(default.func) in ("Field", "field"):
        given = {keyword.arg: keyword.value for keyword in default.keywords}
        default = given.get("default", ast.Constant(...) if "default_factory" in given else None)
    value = f" = {ast.unparse(default)}" if default else ""
    return f"    {ast.unparse(node.target)}: {ast.unparse(node.annotation)}{value}".replace("'", '"')


def markdown(docstring: str) -> str:
    """A Google-style docstring as Markdown: sections as lists, indented examples as code."""
    lines, out, section = docstring.splitlines(), list[str](), ""
    for line in lines:
        head = SECTION.match(line)
        if head:
            section, rest = head[1], head[2].strip()
            out += ["", f"**{section}:** {rest}".rstrip(), ""]
        elif section and line and not line.startswith(" "):
            section = ""
            out += ["", line]
        elif section in LISTS and re.match(r"    \S", line) and (item := ITEM.match(line[4:])):
            names = ", ".join(f"`{name}`" for name in item[1].split(", "))
            out.append(f"- {names}: {item[2]}")
        elif section in LISTS and line.strip():
            out.append(f"  {line.strip()}")
        elif section and section not in ("Example", "Examples"):
            out.append(line.strip())
        else:
            out.append(line)
    return _with_code("\n".join(out)).strip()


def _with_code(text: str) -> str:
    """Paragraphs that are indented or begin with `>>>` as fenced code."""
    lines, out, is_code = text.splitlines(), list[str](), False
    for number, line in enumerate(lines):
        begins = line.startswith("    ") or line.lstrip().startswith(">>>")
        if begins and not is_code:
            is_code = True
            out += ["", "```python" if ">>>" in line or "(" in line or line.strip().startswith("#") else "```text"]
        elif is_code and not begins and (line and not line.startswith(" ") and not _continues(lines, number)):
            is_code = False
            out += ["```", ""]
        elif is_code and not line and not any(rest.startswith("    ") for rest in lines[number + 1 : number + 2]):
            is_code = False
            out += ["```"]
        out.append(line[4:] if is_code and line.startswith("    ") else line)
    return "\n".join([*out, "```"] if is_code else out)


def _continues(lines: list[str], number: int) -> bool:
    """Whether a line is what a doctest prints."""
    return number > 0 and lines[number - 1].lstrip().startswith((">>>", "..."))


def error_table() -> str:
    """The table of errors: name, what it means, the command's exit code."""
    from wsm_ds import errors

    classes = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.WsmError) and value is not errors.WsmError
    ]
    rows = [f"| `{c.__name__}` | {_cell(_first(c))} | {_exit_code(c)} |" for c in classes]
    return "\n".join(["| error | meaning | exit code |", "|---|---|---|", *rows, ""])


def _exit_code(error: Any) -> str:
    return "that of the rank" if error.__name__ == "PeerFailed" else str(error.exit_code)


def package_table() -> str:
    """The table of packages: first line of the docstring, and what each imports; the highest first."""
    paths = [path for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")]
    paths += [path.parent for path in PACKAGE.glob("*/__init__.py")]
    imports = {path.stem: _imports(path) for path in paths}

    def depth(name: str) -> int:
        return 1 + max(map(depth, imports[name]), default=0)

    rows = []
    for path in sorted(paths, key=lambda path: (-depth(path.stem), path.stem)):
        source = path / "__init__.py" if path.is_dir() else path
        text = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
        rows.append(f"| `{path.stem}` | {_cell(text)} | {', '.join(sorted(imports[path.stem]))} |")
    return "\n".join(["| package or module | what it is | imports |", "|---|---|---|", *rows, ""])


def _imports(path: Path) -> set[str]:
    """The packages and modules of wsm_ds that one of them imports, itself left out."""
    names = set[str]()
    for source in path.rglob("*.py") if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "wsm_ds":
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wsm_ds."):
                names.add((node.module or "").split(".")[1])
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()} - {path.stem}


def _with_section(page: str, section: str) -> dict[Path, str]:
    """A page with the section between its markers replaced."""
    path = DOCS / page
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKERS[0])
    return {path: before + MARKERS[0] + section + MARKERS[1] + rest.partition(MARKERS[1])[2]}


def pages() -> dict[Path, str]:
    """Every page that is made from the code, with its text."""
    from wsm_ds import cli

    whole = {DOCS / "cli.md": cli_page(cli.parser()), DOCS / "api.md": api_page()}
    return whole | _with_section("failures.md", error_table()) | _with_section("architecture.md", package_table())


def main() -> int:
    """Writes the pages, or with --check compares them with the code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page differs")
    is_checking = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if is_checking:
            print(f"{path} is not what the code says; run python docs/generate.py", file=sys.stderr)
        else:
            path.write_text(pages()[path], encoding="utf-8")
    return int(is_checking and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
