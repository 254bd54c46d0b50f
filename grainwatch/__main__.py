"""``python -m grainwatch``: the command, where its script is not on the path."""

from grainwatch.cli import main

if __name__ == "__main__":
    main()
