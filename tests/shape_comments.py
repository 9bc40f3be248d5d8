"""Turn trailing shape comments of exported code, such as `# (B, H, Tq, Dh)`, into checks that run.

Each letter is one size per call; `...` is any number of leading axes; `H*Dh` is a product. A line that assigns or
returns several tensors lists one shape for all, or one for each: `# (..., Tq, Dv), (..., Tq, Tk)`.
"""
import ast
import io
import re
import tokenize
from functools import lru_cache
from pathlib import Path

import torch

SHAPE = re.compile(r"\(([^()]*)\)")
ITEM = re.compile(r"[A-Z][A-Za-z]*|\d+")
ARGUMENT = re.compile(r"^\s+(\w+(?:, \w+)*): \(([^()]+)\)", re.M)
SEEN = set()  # (file, line) of every comment that was checked


class UnreadableComment(Exception):
    pass


def parse(comment, where):
    """`# (B, T), (B,)` -> [["B", "T"], ["B"]]; None for a comment that is not about shapes."""
    text = comment.lstrip("# ").rstrip()
    if not text.startswith("("):
        return None
    shapes = [[item.strip() for item in s.split(",") if item.strip()] for s in SHAPE.findall(text)]
    readable = re.fullmatch(r"\([^()]*\)(, \([^()]*\))*", text) and all(
        (item == "..." and n == 0) or all(ITEM.fullmatch(part.strip()) for part in item.split("*"))
        for shape in shapes for n, item in enumerate(shape))
    if not readable:
        raise UnreadableComment(f"{where}: cannot read the shape comment {comment!r}")
    return shapes


def documented(docstring):
    """Argument -> axes, from lines such as `query: (..., Tq, D), any float dtype`."""
    return {name: [item.strip() for item in axes.split(",")]
            for names, axes in ARGUMENT.findall(docstring or "") for name in names.split(", ")
            if re.fullmatch(r"[\w\s,.]+", axes)}


def bind(env, arguments, axes):
    """Take the letters of the arguments from the docstring; what does not fit is the function's own business."""
    for name, items in axes.items():
        tensor = arguments.get(name)
        if isinstance(tensor, torch.Tensor) and not torch.compiler.is_compiling():
            items = [i for i in items if i and i != "..."]
            if tensor.dim() >= len(items):
                for item, size in zip(items[::-1], tuple(tensor.shape)[::-1]):
                    env.setdefault(item, size)


def size_of(item, env, actual, where):
    """Bind or compare one axis."""
    parts = [p.strip() for p in item.split("*")]
    if len(parts) == 1 and not parts[0].isdigit():
        want = env.setdefault(parts[0], actual)
    else:
        want = 1
        for p in parts:
            want *= int(p) if p.isdigit() else env.get(p, actual)
    assert want == actual, f"{where}: the comment says {item}={want}, the axis has {actual}"


def check(env, value, shapes, file, line):
    """Called by the instrumented code after the line has run."""
    if torch.compiler.is_compiling():
        return value
    values = value if isinstance(value, tuple) else (value,)
    shapes = shapes * len(values) if len(shapes) == 1 else shapes
    where = f"{file}:{line}"
    assert len(values) == len(shapes), f"{where}: {len(shapes)} shapes for {len(values)} tensors"
    for tensor, items in zip(values, shapes):
        sizes = list(tensor.shape)
        if items[:1] == ["..."]:
            items = items[1:]
            sizes = sizes[len(sizes) - len(items):]
        assert len(items) == len(sizes), f"{where}: the comment says {items}, the shape is {tuple(tensor.shape)}"
        for item, size in zip(items, sizes):
            size_of(item, env, size, where)
    SEEN.add((file, line))
    return value


def comments(source, file):
    """Line -> shapes, for every shape comment."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (shapes := parse(token.string, f"{file}:{token.start[0]}")):
            found[token.start[0]] = shapes
    return found


class Instrument(ast.NodeTransformer):
    def __init__(self, shapes, file):
        self.shapes, self.file, self.used = shapes, file, set()

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        names = {a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]}
        axes = {n: a for n, a in documented(ast.get_docstring(node, clean=False)).items() if n in names}
        arguments = "{" + ", ".join(f"{name!r}: {name}" for name in axes) + "}"
        bind_line = f"\n_shape_bind(_shape_env, {arguments}, {axes!r})" if axes else ""
        body = ast.parse("_shape_env = {}" + bind_line).body
        node.body[1 if ast.get_docstring(node) else 0:0] = body
        return node

    def wrap(self, node, value):
        line = node.end_lineno
        if line not in self.shapes:
            return value
        self.used.add(line)
        call = ast.parse(f"_shape_check(_shape_env, 0, {self.shapes[line]!r}, {self.file!r}, {line})").body[0].value
        call.args[1] = value
        return call

    def visit_Assign(self, node):
        node.value = self.wrap(node, node.value)
        return node

    visit_AnnAssign = visit_AugAssign = visit_Assign

    def visit_Return(self, node):
        if node.value is not None:
            node.value = self.wrap(node, node.value)
        return node


def instrument(source, file):
    """The module's AST with every shape comment checked; a comment on another kind of line is an error."""
    shapes = comments(source, file)
    tree, worker = ast.parse(source), Instrument(shapes, file)
    tree = worker.visit(tree)
    if unused := shapes.keys() - worker.used:
        raise UnreadableComment(f"{file}:{min(unused)}: a shape comment belongs on an assignment or a return")
    start = 1 if ast.get_docstring(tree) else 0
    tools = "import shape_comments\n_shape_bind, _shape_check = shape_comments.bind, shape_comments.check"
    tree.body[start:start] = ast.parse(tools).body
    return ast.fix_missing_locations(tree)


@lru_cache(None)
def compiled(source, path):
    """A module's code with its shape comments checked."""
    return compile(instrument(source, Path(path).name), path, "exec")
