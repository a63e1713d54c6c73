"""Every config field does something, and is documented."""

import ast
import runpy
from collections import defaultdict
from pathlib import Path

import pytest

from rlsys.config import Config, Section, SftConfig
from rlsys.config.fields import (
    config_fields,
    config_sections,
    first_sentence,
    optional_sections,
)

ROOT = Path(__file__).parents[3]
SCHEMAS = (Config, SftConfig)
CONFIG_FILES = sorted((ROOT / "rlsys" / "config").rglob("*.py"))
ALL_FIELDS = {name: info for schema in SCHEMAS for name, info in config_fields(schema).items()}
ALL_SECTIONS = {
    name for schema in SCHEMAS for name in [*config_sections(schema), *optional_sections(schema)]
}
# These show or check fields. What only they read would have no effect on a run.
DISPLAY = {"config", "preflight", "commands", "memory.py", "cli.py"}
# These stand in preflight/ and decide what a run does.
DECIDE = {"grpo_restarts.py", "before_start.py", "before_sft.py", "run_folder.py"}
# The config writes these into other fields (tests/unit/preflight/test_preflight_hub.py).
WRITTEN_INTO_OTHERS = {"hub"}


def section_of_class() -> dict[str, str]:
    """Class name -> name of its section, "" for the top level."""
    return {
        base.__name__: name
        for schema in SCHEMAS
        for name, cls in (config_sections(schema) | optional_sections(schema)).items()
        for base in cls.__mro__
        if issubclass(base, Section) and base is not Section
    } | {"Config": "", "RunConfig": "", "SftConfig": ""}


class FieldReads(ast.NodeVisitor):
    """The `section.field` that a module reads.

    An expression is a section when it is a name annotated with the section's class, `x.<section>`
    of a config (anything called `config`, or annotated as one), or was assigned from one of these.
    """

    def __init__(self, tree: ast.Module, own_class: bool = False):
        self.sections: dict[str, str] = {}  # unparsed expression -> section
        self.reads: set[str] = set()
        self.own_class = own_class
        for _ in range(3):  # aliases of aliases
            self.visit(tree)

    def resolve(self, node: ast.expr) -> str | None:
        text = ast.unparse(node)
        if text in self.sections:
            return self.sections[text]
        if text == "config" or text.endswith(".config"):
            return ""
        if text.endswith(".used_teacher"):  # the section, where the run has a teacher
            return "teacher"
        if isinstance(node, ast.Attribute) and (outer := self.resolve(node.value)) is not None:
            name = f"{outer}.{node.attr}".lstrip(".")
            return name if name in ALL_SECTIONS else None
        return None

    def bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=True):
                self.bind(one, other)
        elif (section := self.resolve(value)) is not None:
            self.sections[ast.unparse(target)] = section

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if self.own_class and node.name in section_of_class():
            self.sections["self"] = section_of_class()[node.name]
        self.generic_visit(node)

    def annotate(self, name: str, annotation: ast.expr | None) -> None:
        kind = ast.unparse(annotation).strip("'\"") if annotation else ""
        if kind in section_of_class():
            self.sections[name] = section_of_class()[kind]

    def visit_arg(self, node: ast.arg) -> None:
        self.annotate(node.arg, node.annotation)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.annotate(ast.unparse(node.target), node.annotation)
        self.annotate("self." + ast.unparse(node.target), node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        section = self.resolve(node.value)
        if section is not None and isinstance(node.ctx, ast.Load):
            self.reads.add(f"{section}.{node.attr}".lstrip("."))
        self.generic_visit(node)


def fields_read_in_a_run() -> set[str]:
    reads: set[str] = set()
    for path in (ROOT / "rlsys").rglob("*.py"):
        if path.name in DECIDE or not DISPLAY.intersection(path.relative_to(ROOT / "rlsys").parts):
            reads |= FieldReads(ast.parse(path.read_text("utf-8"))).reads
    # A property that is read stands for the fields that it is derived from.
    methods = defaultdict(list)  # of a class and of those that it derives from
    for file in CONFIG_FILES:
        for cls in ast.parse(file.read_text("utf-8")).body:
            if isinstance(cls, ast.ClassDef) and cls.name in section_of_class():
                for n in cls.body:
                    if isinstance(n, ast.FunctionDef):
                        name = f"{section_of_class()[cls.name]}.{n.name}".lstrip(".")
                        methods[name].append(ast.ClassDef(cls.name, [], [], [n], []))
    pending = [name for name in methods if name in reads]
    while pending:
        module = ast.Module(methods[pending.pop()], [])
        found = FieldReads(module, own_class=True).reads - reads
        reads |= found
        pending += [name for name in found if name in methods]
    return reads


def test_the_reader_sees_reads_and_nothing_else():
    tree = ast.parse(
        "def f(config: Config, c: PolicyConfig):\n"
        "    grpo, g = config.grpo, 3\n"
        "    self.section = c\n"
        "    grpo.beta, self.section.lr, config.rollout.top_k, other.top_p, g.epsilon\n"
        "    config.seed\n"
    )
    fields = FieldReads(tree).reads & set(config_fields())
    assert fields == {"grpo.beta", "policy.lr", "rollout.top_k", "seed"}


def test_every_field_is_read_outside_config():
    unread = set(ALL_FIELDS) - fields_read_in_a_run() - WRITTEN_INTO_OTHERS
    assert not unread, f"fields that nothing reads: {sorted(unread)}"


@pytest.mark.parametrize("name", ALL_FIELDS)
def test_every_field_has_a_docstring(name):
    assert first_sentence(ALL_FIELDS[name].description)


def test_the_page_of_the_config_is_current():
    script = runpy.run_path(str(ROOT / "scripts" / "config_docs.py"))
    page = (ROOT / "docs" / "config.md").read_text("utf-8")
    assert page == script["markdown"](), "run: python scripts/config_docs.py"
