"""The structure in a CIF, or one line that says what is wrong with it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np

from pipelines.laue.atom_sites import CifSite, read_sites
from pipelines.laue.symmetry import METRIC_TOLERANCE, Operations, contradiction, metric_misfit

Cell = tuple[float, float, float, float, float, float]

_LENGTH_A = (1.5, 500.0)
_LARGEST_BYTES = 64 << 20

_FLAT = 1e-6
"""Volume², in units of (a b c)², of a cell that has none."""

_CELL_TAGS = tuple(f"_cell_{kind}" for kind in ("length_a", "length_b", "length_c")) + tuple(
    f"_cell_angle_{name}" for name in ("alpha", "beta", "gamma")
)
_OPERATION_TAGS = ("_space_group_symop_operation_xyz", "_symmetry_equiv_pos_as_xyz")
_NAME_TAGS = ("_space_group_name_H-M_alt", "_symmetry_space_group_name_H-M")
_HALL_TAGS = ("_space_group_name_Hall", "_symmetry_space_group_name_Hall")
_NUMBER_TAGS = ("_space_group_IT_number", "_symmetry_Int_Tables_number")


@dataclass(frozen=True)
class CifStructure:
    """What a CIF says.

    Attributes
    ----------
    cell_A_deg : tuple of 6 float
    space_group : str
        Extended Hermann-Mauguin symbol, "R -3 c:R" on rhombohedral axes.
    sites : tuple of CifSite
    remarks : tuple of str
        What a user should know about how the file was read; a sentence each, without the file's name.
    doubtful : bool
        Whether one of them says that the structure factors may be wrong.
    """

    cell_A_deg: Cell
    space_group: str
    sites: tuple[CifSite, ...]
    remarks: tuple[str, ...]
    doubtful: bool


def read_cif(path: Path) -> CifStructure:
    """Read the structure in a CIF.

    Raises
    ------
    ValueError
        If it holds none, several or an impossible one; the message names the file, the thing and
        what to do.
    """
    try:
        return _structure(_block(_text(path)))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _structure(block: gemmi.cif.Block) -> CifStructure:
    cell = _cell(block)
    group, of_group = _space_group(block, cell)
    basis = np.array(gemmi.UnitCell(*cell).orth.mat.tolist())
    if metric_misfit(Operations.of(group).rotation, basis) > METRIC_TOLERANCE:
        raise ValueError(contradiction(group, cell))
    sites, remarks, doubts = read_sites(block, group, basis)
    return CifStructure(cell, group.xhm(), sites, (*of_group, *remarks, *doubts), bool(doubts))


# ---------------------------------------------------------------- the file


def _text(path: Path) -> str:
    if path.stat().st_size > _LARGEST_BYTES:
        raise ValueError(
            f"is larger than {_LARGEST_BYTES >> 20} MiB; give the structure alone, without measured data"
        )
    content = path.read_bytes()
    if not content.strip():
        raise ValueError("the file is empty; expected a CIF with a structure")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace").lstrip("\ufeff")
    if b"\0" in content:
        raise ValueError("is a binary file, not a CIF")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")  # names of authors in old files


def _block(text: str) -> gemmi.cif.Block:
    """The one data block that describes a structure; others (text, references, powder data) are passed by."""
    try:
        blocks = list(gemmi.cif.read_string(text))
    except (ValueError, RuntimeError) as error:
        where = re.sub(r"^string:(\d+)\S*(?: in \S+)?: ", r"line \1: ", " ".join(str(error).split()))
        raise ValueError(f"is not a readable CIF: {where}") from error
    with_cell = [block for block in blocks if any(_value(block, tag) for tag in _CELL_TAGS)]
    if not with_cell:
        if any(block.find_value("_cell.length_a") for block in blocks):
            raise ValueError(
                "has dotted names (_cell.length_a), as macromolecular CIFs do; give one with _cell_length_a"
            )
        raise ValueError("no data block has a cell (_cell_length_a ...); give the CIF of a structure")
    with_sites = [block for block in with_cell if len(block.find_values("_atom_site_fract_x"))]
    if not with_sites:
        raise ValueError("no atom sites (_atom_site_fract_x ...); structure factors need them")
    if len(with_sites) > 1:
        names = ", ".join(block.name for block in with_sites[:8]) + (" ..." if len(with_sites) > 8 else "")
        raise ValueError(f"holds {len(with_sites)} structures ({names}); give a file with one data block")
    return with_sites[0]


def _value(block: gemmi.cif.Block, *tags: str) -> str:
    """The first of some items that is there, "" where none is or its value is ? or . (unknown)."""
    for tag in tags:
        raw = block.find_value(tag)
        if raw is not None and not gemmi.cif.is_null(raw):
            return " ".join(gemmi.cif.as_string(raw).split())
    return ""


def _cell(block: gemmi.cif.Block) -> Cell:
    values = []
    for tag in _CELL_TAGS:
        text = _value(block, tag)
        if not text:
            raise ValueError(f"{tag} is missing; the cell needs three lengths and three angles")
        value = gemmi.cif.as_number(text)
        if not math.isfinite(value):
            raise ValueError(f"{tag} is {text!r}, expected a number")
        if "length" in tag and not _LENGTH_A[0] <= value <= _LENGTH_A[1]:
            low, high = _LENGTH_A
            raise ValueError(f"{tag} is {value:g}, expected {low:g} to {high:g} angstrom")
        values.append(value)
    a, b, c, alpha, beta, gamma = values
    ca, cb, cg = (math.cos(math.radians(angle)) for angle in values[3:])
    volume2 = 1 - ca * ca - cb * cb - cg * cg + 2 * ca * cb * cg
    if volume2 <= _FLAT or not all(0 < angle < 180 for angle in values[3:]):
        raise ValueError(f"no cell has the angles {alpha:g}, {beta:g}, {gamma:g} deg")
    return a, b, c, alpha, beta, gamma


# ---------------------------------------------------------------- symmetry


def _space_group(block: gemmi.cif.Block, cell: Cell) -> tuple[gemmi.SpaceGroup, list[str]]:
    """The group, from the operations where they are listed: the coordinates are meant for these.

    Symbol, Hall symbol and number must be of the same type of group. Only a setting may differ,
    because many files have the symbol of the type ("P 21/c") beside operations of P 21/n.
    """
    symbol = _value(block, *_NAME_TAGS).replace("(", "").replace(")", "")
    number = _value(block, *_NUMBER_TAGS)
    named = _by_name(symbol, cell)
    by_hall = _by_hall(_value(block, *_HALL_TAGS))
    listed = _by_operations(block)
    found = [(what, group) for what, group in _sources(symbol, named, by_hall, listed) if group is not None]
    if not found:
        raise ValueError(_no_group(symbol, number))
    what, group = found[0]
    for other, contradicting in found[1:]:
        if contradicting.number != group.number:
            raise ValueError(
                f"{what} ({group.xhm()}) and {other} ({contradicting.xhm()}) contradict each other;"
                " correct the one that is wrong"
            )
    if number.isdecimal() and int(number) != group.number:
        raise ValueError(
            f"{what} ({group.xhm()}, number {group.number}) and the group's number in the file ({number})"
            " contradict each other; correct the one that is wrong"
        )
    if listed is None and by_hall is None and group.ext in ("1", "2") and ":" not in symbol:
        raise ValueError(
            f"space group {symbol!r} has two choices of the origin, and no symmetry operations say which is"
            f" meant; write '{group.hm}:1' or '{group.hm}:2'"
        )
    remarks = []
    if named is not None and named.hm != group.hm:
        remarks.append(f"space group is named {symbol}, {what} are those of {group.xhm()}: {what} count")
    return group, remarks


def _sources(
    symbol: str,
    named: gemmi.SpaceGroup | None,
    by_hall: gemmi.SpaceGroup | None,
    listed: gemmi.SpaceGroup | None,
) -> list[tuple[str, gemmi.SpaceGroup | None]]:
    return [
        ("the symmetry operations", listed),
        ("the Hall symbol", by_hall),
        (f"the space group symbol {symbol!r}", named),
    ]


def _by_name(symbol: str, cell: Cell) -> gemmi.SpaceGroup | None:
    # The angles tell rhombohedral from hexagonal axes where the symbol does not.
    return gemmi.find_spacegroup_by_name(symbol, cell[3], cell[5]) if symbol else None


def _by_hall(symbol: str) -> gemmi.SpaceGroup | None:
    if not symbol:
        return None
    try:
        return gemmi.find_spacegroup_by_ops(gemmi.symops_from_hall(symbol))
    except RuntimeError as error:
        raise ValueError(f"the Hall symbol {symbol!r} is none; correct or remove it") from error


def _by_operations(block: gemmi.cif.Block) -> gemmi.SpaceGroup | None:
    texts = next((found for tag in _OPERATION_TAGS if len(found := block.find_values(tag))), None)
    if texts is None:
        return None
    operations = []
    for text in texts:
        if gemmi.cif.is_null(text):
            continue
        plain = gemmi.cif.as_string(text)
        try:
            operations.append(gemmi.Op(plain))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"symmetry operation {plain!r}: expected one like '-x,y+1/2,z'") from error
    if not operations:
        return None
    group = gemmi.find_spacegroup_by_ops(gemmi.GroupOps(operations))
    if group is None:
        raise ValueError(
            f"the {len(operations)} symmetry operations are not all of one tabulated space group;"
            " list all of a standard setting"
        )
    return group


def _no_group(symbol: str, number: str) -> str:
    if symbol:
        return f"space group {symbol!r} is unknown; write a Hermann-Mauguin symbol such as 'F m -3 m'"
    if number.isdecimal() and (group := gemmi.find_spacegroup_by_number(int(number))) is not None:
        return (
            f"the space group is given by its number {number} alone, which leaves the setting open; write the"
            f" symbol, for example {_NAME_TAGS[0]} '{group.hm}'"
        )
    return f"the space group is missing; write its symbol ({_NAME_TAGS[0]}) or its symmetry operations"
