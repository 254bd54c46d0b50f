"""The classical indexer: from spots to crystals, their number unknown beforehand.

The way of a frame: `search` seeds candidates by votes of angles (`vote`), `trials` refines (`refine`) and
judges them (`match`, `evidence`, `rivals`), `assign` gives each spot its crystal and refines strain;
`indexer` is the door.
"""
