"""Write the JSON Schemas beside this module."""

from pathlib import Path

from grainwatch.schemas import write

for path in write(Path(__file__).parent):
    print(path)
