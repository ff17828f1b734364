"""Prefixes that were read before, with the state after each: a radix tree over token ids, bounded in bytes.

Holds no tensors of its own: an entry's state is whatever the runner made.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Entry:
    """The state after `length` tokens. logits: of the next token, None where they were not kept."""

    length: int
    state: Any
    logits: Any
    nbytes: int


class Node:
    """edge: the tokens from the parent to here. children: by the first token of their edges."""

    __slots__ = ("children", "edge", "entry", "parent")

    def __init__(self, edge: "array[int]", parent: "Node | None"):
        self.edge, self.parent = edge, parent
        self.children: dict[int, Node] = {}
        self.entry: Entry | None = None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first items are equal; of two lists, comparing halves of what is left."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low, high = 0, n  # equal up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class StateCache:
    """max_bytes: of states, logits and tokens; 0 keeps nothing. Those that were not used for longest go first.

    token_bytes: of a token: a small state after a long text may weigh less than the text.

    Each root is a tree of its own: None for a new document, or the name of the state that the tokens follow.
    """

    def __init__(self, max_bytes: int, token_bytes: int = 4):
        self.max_bytes, self.token_bytes = max_bytes, token_bytes
        self.nbytes = self.tokens = self.hits = self.misses = 0  # nbytes: without the tokens
        self._roots: dict[str | None, Node] = {}
        self._used: OrderedDict[Node, str | None] = OrderedDict()  # nodes with an entry, the least recent first

    def __len__(self) -> int:
        return len(self._used)

    def find(self, root: str | None, tokens: "array[int]", align: int = 1) -> Entry | None:
        """The longest kept prefix of `tokens`; all of them only if the logits after them were kept.

        align: the length is a multiple of it, unless it is that of all tokens.
        """
        best = None
        for node, depth in self._walk(root, tokens):
            entry = node.entry
            if entry is not None and (entry.logits is not None if depth == len(tokens) else depth % align == 0):
                best = node
        if best is None:
            return None
        self._used.move_to_end(best)
        return best.entry

    def count(self, is_hit: bool) -> None:
        """A sequence began, from an entry or from nothing."""
        self.hits, self.misses = self.hits + is_hit, self.misses + (not is_hit)

    def holds(self, root: str | None, tokens: "array[int]") -> bool:
        """Whether the state after exactly these tokens is kept, with logits."""
        end = [node for node, depth in self._walk(root, tokens) if depth == len(tokens)]
        return bool(end) and end[0].entry is not None and end[0].entry.logits is not None

    def add(self, root: str | None, tokens: "array[int]", entry: Entry) -> None:
        """Keep the state after all of `tokens`, unless it alone is too large. Logits that were kept are not lost."""
        if entry.nbytes + self.token_bytes * len(tokens) > self.max_bytes:
            return
        node = self._node_of(root, tokens)
        if node.entry is None or entry.logits is not None:
            self.nbytes += entry.nbytes - (node.entry.nbytes if node.entry else 0)
            node.entry = entry
        self._used[node] = root
        self._used.move_to_end(node)
        while self.nbytes + self.token_bytes * self.tokens > self.max_bytes:
            oldest, of_root = self._used.popitem(last=False)
            assert oldest.entry is not None
            self.nbytes -= oldest.entry.nbytes
            oldest.entry = None
            self._prune(oldest, of_root)

    def drop_root(self, root: str) -> None:
        """Forget all that follows this state."""
        nodes = [self._roots.pop(root)] if root in self._roots else []
        for node in nodes:
            nodes += node.children.values()
            self.tokens -= len(node.edge)
            if node.entry is not None:
                del self._used[node]
                self.nbytes -= node.entry.nbytes

    def _walk(self, root: str | None, tokens: "array[int]") -> Iterator[tuple[Node, int]]:
        """The nodes whose whole path is a prefix of `tokens`, with the lengths of the paths."""
        node, depth = self._roots.get(root), 0
        while node is not None and depth < len(tokens):
            node = node.children.get(tokens[depth])
            if node is None or tokens[depth : depth + len(node.edge)] != node.edge:
                return
            depth += len(node.edge)
            yield node, depth

    def _node_of(self, root: str | None, tokens: "array[int]") -> Node:
        """The node at the end of this path, made if it is not there."""
        node, depth = self._roots.setdefault(root, Node(array("i"), None)), 0
        while depth < len(tokens):
            child = node.children.get(tokens[depth])
            if child is None:
                child = node.children[tokens[depth]] = Node(tokens[depth:], node)
                self.tokens += len(child.edge)
            else:
                same = common_prefix(child.edge, tokens[depth : depth + len(child.edge)])
                if same < len(child.edge):  # split the edge
                    middle = Node(child.edge[:same], node)
                    node.children[tokens[depth]] = middle
                    child.edge, child.parent = child.edge[same:], middle
                    middle.children[child.edge[0]] = child
                    child = middle
            node, depth = child, depth + len(child.edge)
        return node

    def _prune(self, node: Node, root: str | None) -> None:
        """Remove what no longer leads to an entry, and join an edge that no longer needs a node in its middle."""
        while node.parent is not None and node.entry is None and not node.children:
            del node.parent.children[node.edge[0]]
            self.tokens -= len(node.edge)
            node = node.parent
        if node.parent is None:
            if not node.children:
                self._roots.pop(root, None)
        elif node.entry is None and len(node.children) == 1:
            (child,) = node.children.values()
            child.edge, child.parent = node.edge + child.edge, node.parent
            node.parent.children[child.edge[0]] = child
