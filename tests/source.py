"""Python source as tokens and as definitions: what planted bugs and the ledger of kills are made of.

Two pieces of code are the same here if their tokens are: white space, line breaks, comments, kinds of quotes (f-strings
excepted) and a comma before a closing bracket make no difference.
"""
import ast
import re
from dataclasses import dataclass
from functools import lru_cache

TOKEN = re.compile(r"""
    (?P<break>\n)
  | (?P<space>(?:[^\S\n]|\\\n)+)
  | (?P<comment>\#[^\n]*)
  | (?P<string>[rbfu]{0,2}(?:\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))
  | (?P<number>0[xbo]\w+|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:e[+-]?\d+)?j?)
  | (?P<word>\w+)
  | (?P<operator>\*\*=|//=|>>=|<<=|\.\.\.|->|:=|==|!=|<=|>=|\*\*|//|<<|>>|[-+*/%&|^@]=|.)
""", re.X | re.I)


@dataclass(frozen=True)
class Token:
    text: str
    start: int
    end: int


@lru_cache(None)
def tokens(source):
    """The tokens that mean something, with their places."""
    found = []
    for m in TOKEN.finditer(source):
        if m.lastgroup in ("break", "space", "comment"):
            continue
        text = m[0]
        if m.lastgroup == "string" and "f" not in re.match(r"\w*", text)[0].lower():
            text = repr(ast.literal_eval(text))
        if text in ")]}" and found and found[-1].text == ",":
            found.pop()
        found.append(Token(text, m.start(), m.end()))
    return found


@lru_cache(None)
def logical_lines(source):
    """[(start, end)] of the lines as Python sees them: a call that is wrapped over three lines is one."""
    depth, start, found = 0, 0, []
    for m in TOKEN.finditer(source):
        if m.lastgroup == "operator":
            depth += (m[0] in "([{") - (m[0] in ")]}")
        if m.lastgroup == "break" and depth == 0:
            found.append((start, m.start()))
            start = m.end()
    return [*found, (start, len(source))]


def find(pattern, source, start=0, end=None):
    """[(start, end)] of the places between start and end that have the tokens of the pattern."""
    words = [t.text for t in tokens(pattern)]
    have = [t for t in tokens(source) if start <= t.start and (end is None or t.end <= end)]
    texts = [t.text for t in have]
    return [(have[n].start, have[n + len(words) - 1].end) for n in range(len(have) - len(words) + 1)
            if texts[n:n + len(words)] == words]


@lru_cache(None)
def definitions(source):
    """Name -> (start, end) of functions, classes, methods (`KVCache.crop`) and module-level constants."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}

    def walk(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found[prefix + node.name] = starts[first - 1], starts[node.end_lineno]
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            found[prefix + name.id] = starts[node.lineno - 1], starts[node.end_lineno]

    walk(ast.parse(source).body, "")
    return found


def change(source, name, old, new):
    """The source with `old`, found once inside the definition `name`, replaced by `new`.

    Lines of `new` are indented like the statement that is changed. Shape comments of the changed lines go: a bug must die by
    what it computes, not by a comment that was right before."""
    if name not in definitions(source):
        raise ValueError(f"no definition of {name}")
    places = find(old, source, *definitions(source)[name])
    if len(places) != 1:
        raise ValueError(f"{old!r} occurs {len(places)} times in {name}")
    (start, end), = places
    lines = [(a, b) for a, b in logical_lines(source) if a < end and start < b]
    first, last = lines[0][0], lines[-1][1]
    indent = re.match(r"[ \t]*", source[first:])[0]
    new = ("\n" + indent).join(new.split("\n"))
    before, after = map(without_shapes, (source[first:start], source[end:last]))
    return source[:first] + before + new + after + source[last:]


def without_shapes(text):
    """Without the comments that tell a shape."""
    return "".join(m[0] for m in TOKEN.finditer(text) if m.lastgroup != "comment" or not re.match(r"# *\(", m[0]))


def words(node):
    """The identifiers in a piece of syntax: names and arguments as they are, attributes with a dot before them."""
    found = set()
    for n in ast.walk(node):
        found |= {getattr(n, key) for key in ("id", "arg") if isinstance(getattr(n, key, None), str)}
        if isinstance(n, ast.Attribute):
            found.add(f".{n.attr}")
    return found


def undocumented(source):
    """The syntax of a file without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def parts(source):
    """Name of each top-level definition -> its syntax without docstrings; "" -> everything else, imports left out."""
    found = {"": []}
    for node in undocumented(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, []).append(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for n in ast.walk(target):
                    if isinstance(n, ast.Name):
                        found.setdefault(n.id, []).append(node)
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            found[""].append(node)
    return found


@lru_cache(None)
def index(sources):
    """(word -> places of definitions, place -> (text, words in it)) of some files; `.method` leads to classes that have it."""
    places, known = {}, {}
    for n, source in enumerate(sources):
        for name, nodes in parts(source).items():
            if not name:
                continue
            known[n, name] = "\n".join(map(ast.dump, nodes)), set().union(*map(words, nodes))
            methods = {f".{m.name}" for c in nodes if isinstance(c, ast.ClassDef) for m in c.body
                       if isinstance(m, ast.FunctionDef) and m.name != "forward"}
            for word in {name} | methods:
                places.setdefault(word, []).append((n, name))
    return places, known


@lru_cache(None)
def closure(roots, sources):
    """What the words in `roots` (a frozenset) lead to in these files (a tuple of texts), as text: the definitions of those
    names, and of the names in them.

    Names decide, not types: `x.update` leads to every class with a method of that name. Layout, comments and docstrings do
    not count."""
    places, known = index(sources)
    done, seen, todo = set(), set(), set(roots)
    while todo:
        seen.add(word := todo.pop())
        for place in places.get(word, []):
            if place not in done:
                done.add(place)
                todo |= known[place][1] - seen
    return "\n".join(known[place][0] for place in sorted(done))
