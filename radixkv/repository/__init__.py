"""A source tree as a prompt: which files, in which order, under which budget. Needs no model and no torch.

list_files ─▶ Listing ──┐
read_history ─▶ History ─┴─▶ Packing.of ─▶ Packing      radixkv.engine.Repository asks questions about it
"""

from radixkv.repository.files import Listing, Skipped, SourceFile, list_files
from radixkv.repository.history import History, read_history
from radixkv.repository.packing import PackedFile, Packing
from radixkv.repository.shelf import Shelf

__all__ = ["History", "Listing", "PackedFile", "Packing", "Shelf", "Skipped", "SourceFile", "list_files", "read_history"]
