"""Every error and warning of the package, read from its source, with … for what varies.

A message is the text of an exception or of a warning, what a function ``why..`` returns, what is
kept as a ``_reason``, and in C++ what PPCR_CHECK, a throw, ``return "..."`` and the members
``error`` and ``wrong`` say. Names of variables stand for all texts that they are given.
"""

import ast
import itertools
import re

VARIES = "…"
RAISED = re.compile(r"\w*(Error|Warning)|CannotBuild")
REASON = re.compile(r"_\w*reason|NO_?[A-Z]\w*")


def tidy(texts):
    """Without the package's own prefix, and without texts that say nothing by themselves."""
    for text in texts:
        text = re.sub(rf"{VARIES}(\.?{VARIES})+", VARIES, " ".join(text.split()))
        text = text.removeprefix("ppcr_ext: ")
        if re.search(r"[a-z]{2}", text):
            yield text


# ---- Python -----------------------------------------------------------------------------------


class Scope:
    """The texts that names are given in a function and in its module."""

    def __init__(self, nodes, outer=None):
        self.outer, self.values, self.of_reasons = outer, {}, False
        for node in nodes:
            if isinstance(node, ast.AnnAssign) and node.value:
                self._keep(node.target, node.value)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self._keep(target, node.value)

    def _keep(self, target, value):
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._keep(one, its)
        elif isinstance(target, ast.Name):
            self.values.setdefault(target.id, []).append(value)

    def texts(self, node, without=()):
        """All texts that an expression may have."""
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, int)):
            return {str(node.value)}
        if isinstance(node, ast.JoinedStr):
            return self._joined(node.values, without)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined((node.left, node.right), without)
        if isinstance(node, ast.FormattedValue):
            return self.texts(node.value, without)
        if isinstance(node, ast.IfExp):
            return self.texts(node.body, without) | self.texts(node.orelse, without)
        if isinstance(node, ast.BoolOp):
            return set().union(*(self.texts(value, without) for value in node.values))
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            found = [value for value in self._reaching(name, node) if value not in without]
            if found:
                return set().union(*(self.texts(value, (*without, value)) for value in found))
            if self.outer is not None and name not in self.values:
                return self.outer.texts(node, without)
        return {VARIES}

    def _reaching(self, name, use):
        """What the name may hold where it is used: what it was given before, back to the last time
        that every way to the use passes. Constants of other modules have no such order."""
        values = self.values.get(name, [])
        if self.outer is None:
            return values
        found = []
        for value in reversed([v for v in values if v.lineno <= use.lineno]):
            found.append(value)
            if use.blocks[: len(value.blocks)] == value.blocks:
                break
        return found

    def _joined(self, parts, without):
        return {"".join(p) for p in itertools.product(*(self.texts(p, without) for p in parts))}


def messages_of(node, scope):
    """The expressions in a function, or in a module without its functions, that are messages."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        again = isinstance(node.func, ast.Call) and getattr(node.func.func, "id", "") == "type"
        if RAISED.fullmatch(name) or again or name in ("warn", "exit"):
            yield from node.args[:1]
    elif isinstance(node, ast.Assign):
        if any(isinstance(t, ast.Name) and REASON.fullmatch(t.id) for t in node.targets):
            yield node.value
    elif isinstance(node, ast.AnnAssign) and node.value:
        if isinstance(node.target, ast.Name) and REASON.fullmatch(node.target.id):
            yield node.value
    elif isinstance(node, ast.Return) and node.value and scope.of_reasons:
        yield node.value


def inside(node):
    """The nodes of a function or module, without those of its functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from inside(child)


def mark_blocks(node, blocks=()):
    """Gives every node the blocks that it is in, from the outermost on."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                inner = (*blocks, (node, field)) if isinstance(child, ast.stmt) else blocks
                child.blocks = inner
                mark_blocks(child, inner)


def of_python(paths):
    """For every message the set of its texts."""
    trees = [ast.parse(path.read_text()) for path in paths]
    for tree in trees:
        mark_blocks(tree)
    # Constants are known by name in all modules.
    everywhere = Scope([node for tree in trees for node in tree.body if is_constant(node)])
    for tree in trees:
        module = Scope(list(inside(tree)), everywhere)
        for part in ast.walk(tree):
            if isinstance(part, (ast.Module, ast.FunctionDef)):
                own = list(inside(part))
                scope = module if part is tree else Scope(own, module)
                scope.of_reasons = re.match(r"_?why", getattr(part, "name", ""))
                for node in own:
                    for message in messages_of(node, scope):
                        yield set(tidy(scope.texts(message)))


def is_constant(node):
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(t, ast.Name) and t.id.isupper() for t in targets)


# ---- C++ --------------------------------------------------------------------------------------

LITERAL = r'"(?:[^"\\]|\\.)*"'
BEGINS = re.compile(
    r'PPCR_CHECK\(|throw std::runtime_error\(|return (?=")|\b(?:error|wrong) \+?= (?=[\w"])'
    r"|check_cuda\("
)


def balanced(text, begin, end):
    """What stands from ``begin`` up to an ``end`` outside of brackets and of literals."""
    depth, pieces = 0, [""]
    for token in re.findall(rf"{LITERAL}|.", text[begin:], re.S):
        if depth == 0 and token in end:
            if token != ",":
                return pieces
            pieces.append("")
            continue
        depth += (token in "([{") - (token in ")]}")
        pieces[-1] += token
    raise ValueError(f"no end of {text[begin : begin + 80]!r}")


def text_of(expression):
    """The literals of an expression in C++, with … for what stands between them."""
    condition, choice, rest = expression.partition(" ? ")
    if choice and '"' not in condition:
        return "|".join(map(text_of, re.split(r"\s+:\s", rest)))
    text = ""
    for token in re.findall(rf"{LITERAL}|[^\"]+", expression):
        if token[0] == '"':
            text += token[1:-1].replace(r"\"", '"')
        elif token.strip(" \n+"):
            text += VARIES
    return text


def of_cpp(paths):
    """For every message the set of its texts."""
    for path in paths:
        code = re.sub(r"(?m)^#define.*$|//.*$", "", path.read_text())
        for found in BEGINS.finditer(code):
            parts = balanced(code, found.end(), ",)" if found[0].endswith("(") else ";")
            if not found[0].startswith(("throw", "return")):
                parts = parts[1:] or parts  # without what is checked
            yield set(tidy("".join(map(text_of, parts)).split("|")))
