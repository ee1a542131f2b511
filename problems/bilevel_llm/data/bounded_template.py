"""A chat template, rendered as transformers does it, but stopped when it runs on or builds gigabytes.

A template is a program that comes with a model, so it may have been written by anybody. In transformers' sandbox it cannot
reach files or code, but it can loop for hours, and `"x" * 10**10` takes all memory. Here, whatever makes a value grow (`+`,
`*`, `%`, `**`, `~`, slices, lists, methods, filters, output) pays for what it is about to make, every turn of a loop and
every call pays a little, and each of them looks at the clock.

Not caught: a single operation on values that have been paid for is never interrupted, such as the comparison of two long
texts or of deeply nested lists, and neither is the parsing of the template, whose length is limited instead.
"""

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, Sized, ValuesView
from functools import wraps
from time import monotonic
from typing import Any

from jinja2 import Environment, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LONGEST_SOURCE = 1_000_000
"""Characters of a template's source; those of published models have a few thousand."""

CHARACTERS, SECONDS = 50_000_000, 10.0
"""What writing a conversation may take at most, beside a share for each of its characters. Templates of published models
take some ten times the characters of the conversation, and far less than a second."""

CHARACTERS_PER_CHARACTER, SECONDS_PER_CHARACTER = 200, 1e-5

_ITEM = 8  # what an item of a list, a turn of a loop or a call counts, in characters
_GROWING = frozenset({
    "batch", "center", "expandtabs", "indent", "join", "ljust", "pprint", "replace", "rjust", "slice", "sum", "tojson",
    "translate", "urlize", "wordwrap", "xmlattr", "zfill",
})  # methods of texts, and filters, that return more than they are given: at most the product of the sizes  # fmt: skip
_FORMATTING = frozenset({"format", "format_map"})
_FREE = frozenset({"count", "d", "default", "first", "last", "length"})  # filters that copy nothing
_PLACE = re.compile(r"%[^a-zA-Z%]*|\{[^}]*")  # of a value in a format, with its width
_WIDTH_IS_A_VALUE = re.compile(r"%[^a-zA-Z%]*\*|\{[^{}]*\{")
_OF_JINJA = frozenset({"_loop_vars", "_block_vars", "caller"})  # what it adds to the arguments of a call
_NESTED = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class LimitExceeded(Exception):
    """A template was stopped. Says what it did."""


class BoundedTemplate:
    """A compiled template.

    Raises `LimitExceeded` for a source of more than `LONGEST_SOURCE` characters, and what jinja2 raises for a wrong one.
    """

    def __init__(self, source: str) -> None:
        if len(source) > LONGEST_SOURCE:
            raise LimitExceeded(f"is longer than {LONGEST_SOURCE:,} characters")
        self._environment = _Environment()
        self._template = self._environment.from_string(source)

    def render(self, messages: Sequence[Mapping[str, str]], **variables: Any) -> str:
        """The text of the conversation.

        Raises `LimitExceeded`, and whatever a template that is a program can raise.
        """
        self._environment.start(messages)
        return self._template.render(messages=messages, **variables)

    def render_marked(self, messages: Sequence[Mapping[str, str]], **variables: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the (start, end) of what the template marks with `{% generation %}`. Raises as `render`."""
        self._environment.start(messages)
        blocks: list[str] = []
        marks: list[tuple[int, int]] = []
        with self._environment.activate_tracker(blocks, marks):  # transformers' extension, which reads the blocks so far
            for block in self._template.generate(messages=messages, **variables):
                blocks.append(block)
        return "".join(blocks), marks


class _Budget:
    """What is left of the characters and the time of one rendering."""

    def __init__(self, conversation: int) -> None:
        self._characters = self._left = CHARACTERS + CHARACTERS_PER_CHARACTER * conversation
        self._seconds = SECONDS + SECONDS_PER_CHARACTER * conversation
        self._end = monotonic() + self._seconds

    def spend(self, characters: int) -> None:
        self._left -= characters
        if self._left < 0:
            raise LimitExceeded(f"makes more than {self._characters:,} characters of a conversation")
        if monotonic() > self._end:
            raise LimitExceeded(f"takes more than {self._seconds:.0f} seconds for a conversation")

    def written(self, value: Any) -> int:
        """The characters that a value has when it is written out, with all that is in it, however often it is there."""
        if type(value) is str:
            return len(value)
        size, rest = 0, [value]
        while rest:
            item = rest.pop()
            size += _ITEM
            if isinstance(item, str | bytes):
                size += len(item)
            elif isinstance(item, int):
                size += item.bit_length() // 3
            elif isinstance(item, range):
                size += _ITEM * len(item)
            elif isinstance(item, Mapping):
                rest += item.keys()
                rest += item.values()
            elif isinstance(item, _NESTED):
                rest += item
            elif isinstance(item, Namespace):
                rest.append(item._Namespace__attrs)
            if size > self._left or monotonic() > self._end:
                self.spend(size)
        return size


class _Metered(CodeGenerator):
    """Compiles a template so that it pays for what jinja2 would not hand to its environment."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._hand_to("joined", nodes.Tuple(node.nodes, "load"), frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._visit_literal(super().visit_List, node, node.items, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self._visit_literal(super().visit_Tuple, node, node.items if node.ctx == "load" else (), frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._visit_literal(super().visit_Dict, node, [pair.value for pair in node.items], frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            return super().visit_Getitem(node, frame)
        self.write("environment.sliced(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for part in (node.arg.start, node.arg.stop, node.arg.step):
            self.visit(part if part is not None else nodes.Const(None), frame)
            self.write(", ")
        self.write("))")
        return None

    def _visit_literal(self, visit: Callable[..., None], node: Any, items: Sequence[nodes.Node], frame: Frame) -> None:
        """A list and the like. Each use of a value counts as a copy, or a nest of lists of itself would cost nothing."""
        if all(isinstance(item, nodes.Const) for item in items):
            return visit(node, frame)
        self.write("environment.held(")
        visit(node, frame)
        self.write(")")
        return None

    def _hand_to(self, method: str, parts: nodes.Tuple, frame: Frame) -> None:
        self.write(f"environment.{method}(")
        CodeGenerator.visit_Tuple(self, parts, frame)
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    """The environment in which transformers renders templates, with a budget."""

    code_generator_class = _Metered
    intercepted_binops = frozenset({"+", "*", "%", "**"})

    budget: _Budget
    activate_tracker: Callable[..., Any]  # of transformers' extension

    def __init__(self) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        theirs: Environment = _compile_jinja_template("").environment
        super().__init__(
            trim_blocks=theirs.trim_blocks,
            lstrip_blocks=theirs.lstrip_blocks,
            extensions=[*map(type, theirs.extensions.values())],
            optimized=False,  # nothing is computed before there is a budget
            finalize=_pay_for_output,
        )
        self.globals.update(theirs.globals)
        del self.globals["lipsum"]  # random words, as many as one asks for
        self.filters.update({name: self._metered(name, function) for name, function in theirs.filters.items()})
        self.start(())

    def start(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Begin to count."""
        self.budget = _Budget(sum(len(value) for message in messages for value in message.values()))

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        blocks: list[Any] = [*source.find_all(nodes.For), *source.find_all(nodes.Macro), *source.find_all(nodes.CallBlock)]
        for block in blocks:
            text = sum(len(data.data) for data in block.find_all(nodes.TemplateData))
            turn = nodes.EnvironmentAttribute(f"budget.spend({_ITEM + text})")  # written as it is, behind "environment."
            block.body.insert(0, nodes.ExprStmt(turn, lineno=block.lineno))
        return super()._generate(source, *args, **options)

    def held(self, value: Any) -> Any:
        """A new list and the like."""
        self.budget.spend(self.budget.written(value))
        return value

    def joined(self, parts: Sequence[Any]) -> str:
        """The operator `~`."""
        self.budget.spend(sum(map(self.budget.written, parts)))
        return "".join(map(str, parts))

    def sliced(self, value: Any, part: slice) -> Any:
        """A part of a text or list."""
        self.budget.spend(_length(value))
        return value[part]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator that can make something large."""
        size = _length(left) + _length(right)
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "%" and isinstance(left, str | bytes):
            size += self._formatted(left, right if isinstance(right, tuple) else (right,))
        elif operator == "**" and numbers:
            size += left.bit_length() * abs(right)
        elif operator == "*" and not numbers:
            size += self._product(left, right)
        self.budget.spend(size)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A function or method."""
        args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)  # or nobody knows their size
        given = [*args, *(value for name, value in kwargs.items() if name not in _OF_JINJA)]
        __self.budget.spend(__self._of_call(__obj, given))
        return super().call(__context, __obj, *args, **kwargs)

    def _of_call(self, function: Any, given: Sequence[Any]) -> int:
        if isinstance(function, Macro | LoopContext | BlockReference):
            return _ITEM
        method = getattr(function, "__wrapped__", function)  # as the sandbox does with str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes):
            return _ITEM + self._made(getattr(method, "__name__", ""), owner, given)
        if isinstance(owner, int):
            return _ITEM + self._product(*given)
        return _ITEM + _length(owner) + sum(map(self.budget.written, given))

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays."""
        if name in _FREE:
            return function
        first = int(hasattr(function, "jinja_pass_arg"))

        @wraps(function)
        def filter(*args: Any, **kwargs: Any) -> Any:
            if name in _GROWING:
                args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
            self.budget.spend(self._made(name, args[first], [*args[first + 1 :], *kwargs.values()]))
            return function(*args, **kwargs)

        return filter

    def _made(self, name: str, value: Any, given: Sequence[Any]) -> int:
        """At most what a method of a text, or a filter, makes of a value."""
        if name in _FORMATTING:
            return self._formatted(value, given)
        if name in _GROWING:
            return max(1, self.budget.written(value)) * self._product(*given)
        return _length(value) + sum(map(_length, given))

    def _formatted(self, form: Any, given: Sequence[Any]) -> int:
        text = str(form) if isinstance(form, str) else repr(form)
        places = _PLACE.findall(text)
        widths = sum(int(number) for place in places for number in re.findall(r"\d+", place))
        if _WIDTH_IS_A_VALUE.search(text):
            widths += sum(self._product(value) for one in given for value in (one if isinstance(one, _NESTED) else [one]))
        return len(text) + widths + len(places) * self.budget.written(list(given))

    def _product(self, *values: Any) -> int:
        product = 1
        for value in values:
            if isinstance(value, int):
                product *= abs(value) + 1
            elif value is not None:
                product *= self.budget.written(value) + 1
        return product


@pass_context
def _pay_for_output(context: Context, value: Any) -> Any:
    budget: _Budget = context.environment.budget  # type: ignore[attr-defined]
    budget.spend(budget.written(value))
    return value


def _length(value: Any) -> int:
    """The characters of a text, or its equivalent for the items of anything else, without what is in them."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // _ITEM
    try:
        return _ITEM * len(value) if isinstance(value, Sized) else 1
    except Exception:  # an undefined name says so where it is used
        return 1
