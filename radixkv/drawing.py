"""A radix tree drawn as text, for people."""

from __future__ import annotations

from radixkv.node import Node
from radixkv.prefix import TOKEN_BYTES
from radixkv.tree import RadixTree

__all__ = ["draw"]


def draw(tree: RadixTree, max_nodes: int) -> str:
    """One node a line: its tokens' count and head, its pages, its locks. Cost: O(max_nodes) and their siblings."""
    lines: list[str] = []
    for name, root in tree.roots.items():
        lines.append(f"namespace {name.hex()[:12] or 'default'}")
        stack: list[tuple[Node, str, bool]] = []
        _push_children(stack, root, "")
        while stack and len(lines) < max_nodes:
            node, indent, last = stack.pop()
            lines.append(f"{indent}{'└─' if last else '├─'} {_describe(node, tree.page_size)}")
            _push_children(stack, node, indent + ("   " if last else "│  "))
        if stack:
            lines.append(f"... {tree.num_nodes} nodes in all")
    return "\n".join(lines) or "(empty)"


def _describe(node: Node, page_size: int) -> str:
    head = memoryview(node.key).cast("i")[:4].tolist()
    ids = ",".join(map(str, head)) + (",…" if len(node.key) > 4 * TOKEN_BYTES else "")
    pages = node.pages.tolist()
    shown = str(pages) if len(pages) <= 6 else f"[{', '.join(map(str, pages[:5]))}, … {len(pages)}]"
    lock = f" locks {node.lock_count}" if node.lock_count else ""
    return f"{len(pages) * page_size} tokens ({ids}) pages {shown} tick {node.tick}{lock}"


def _push_children(stack: list[tuple[Node, str, bool]], node: Node, indent: str) -> None:
    children = list((node.children or {}).values())
    stack.extend((child, indent, index == 0) for index, child in enumerate(reversed(children)))
