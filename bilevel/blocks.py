"""Group a module's parameters into blocks: the repeated layers, and what comes before and after them."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from bilevel.errors import InputError

EMBEDDING, HEAD, REST = "embedding", "head", "rest"


@dataclass(frozen=True)
class Blocks:
    """A partition of a module's trainable parameters into blocks.

    members: block name -> parameter names. A repeated block is named by its module path ("model.layers.3"), the others
        "embedding", "head" and "rest" (final norm and whatever else is neither repeated nor an embedding or head).
    repeated: the names of the repeated blocks, in the order of the forward pass.
    head_is_embedding: the output head has no parameters of its own (tied weights).
    """

    members: Mapping[str, tuple[str, ...]]
    repeated: tuple[str, ...] = ()
    head_is_embedding: bool = False

    @property
    def names(self) -> frozenset[str]:
        """The names of all blocks."""
        return frozenset(self.members)

    def parameters(self, names: frozenset[str]) -> list[str]:
        """The parameters of the named blocks, in a fixed order. Raises `InputError` for an unknown block."""
        unknown = names - self.names
        if unknown:
            raise InputError(f"no block is named {sorted(unknown)[0]!r}; this module has: {', '.join(self.members)}")
        return [parameter for block in self.members if block in names for parameter in self.members[block]]


def find_blocks(module: nn.Module) -> Blocks:
    """Find the repeated blocks of any module, without knowing its class.

    The repeated blocks are the entries of the `nn.ModuleList`, or `nn.Sequential` of modules of one class, that holds the
    most parameters (the outermost one where such lists nest). A module without one is a single block, "rest".
    Parameters that do not require gradients when the module is handed over belong to no block: they never train.
    """
    stack = _largest_stack(module)
    repeated = tuple(f"{stack}.{index}" for index in range(_length(module, stack))) if stack else ()
    embeddings = {id(p) for m in _outside(module, stack) if isinstance(m, nn.Embedding) for p in m.parameters()}
    source, head = named_embeddings(module)
    heads = {id(p) for p in head.parameters()} if head is not None else set()
    if source is not None:
        embeddings |= {id(p) for p in source.parameters()}

    members: dict[str, list[str]] = {EMBEDDING: [], **{name: [] for name in repeated}, REST: [], HEAD: []}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        index = name[len(stack) + 1 :].split(".", 1)[0] if stack and name.startswith(stack + ".") else None
        if index is not None and index.isdigit():
            block = f"{stack}.{index}"
        elif id(parameter) in embeddings:
            block = EMBEDDING
        elif id(parameter) in heads:
            block = HEAD
        else:
            block = REST
        members[block].append(name)
    filled = {block: tuple(parameters) for block, parameters in members.items() if parameters}
    return Blocks(filled, tuple(b for b in repeated if b in filled), bool(heads) and heads <= embeddings)


def named_embeddings(module: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The parts that the module itself calls its input and its output embedding, as those of transformers do."""
    return _method_result(module, "get_input_embeddings"), _method_result(module, "get_output_embeddings")


def _largest_stack(module: nn.Module) -> str:
    """The path of the stack with the most parameters, or "" if there is none."""
    best, most = "", 0
    for path, child in module.named_modules():
        if not path or not isinstance(child, nn.ModuleList | nn.Sequential) or len(child) < 2:
            continue
        if isinstance(child, nn.Sequential) and len({type(entry) for entry in child}) > 1:
            continue  # a pipeline of different stages; a ModuleList may mix kinds of layers and still be the model's stack
        size = sum(parameter.numel() for parameter in child.parameters())
        if size > most:  # strictly: of nested stacks of equal size the outer one is met first and kept
            best, most = path, size
    return best


def _length(module: nn.Module, path: str) -> int:
    stack = module.get_submodule(path)
    assert isinstance(stack, nn.ModuleList | nn.Sequential)
    return len(stack)


def _outside(module: nn.Module, stack: str) -> list[nn.Module]:
    return [child for path, child in module.named_modules() if not stack or not path.startswith(stack + ".")]


def _method_result(module: nn.Module, method: str) -> nn.Module | None:
    found = getattr(module, method, None)
    result = found() if callable(found) else None
    return result if isinstance(result, nn.Module) else None
