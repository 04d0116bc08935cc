"""Trained claims as immutable zarr v3 parts in the run directory: flat values and run lengths, a table a level.

`archive/part-000012.zarr` is the claim of iteration 12, written aside, synced and renamed, so a part that has its
final name is whole. Any zarr or xarray reads it without pmdflow.
"""

from pmdflow.store.archive.parts import catalog, is_archived, part_iteration, part_path, parts
from pmdflow.store.archive.reading import open_part, read_attrs, read_part, read_table
from pmdflow.store.archive.writing import write_part

__all__ = [
    "catalog",
    "is_archived",
    "open_part",
    "part_iteration",
    "part_path",
    "parts",
    "read_attrs",
    "read_part",
    "read_table",
    "write_part",
]
