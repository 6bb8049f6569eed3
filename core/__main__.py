"""``python -m edgepack`` is the command line."""

from edgepack.cli import main

main()
