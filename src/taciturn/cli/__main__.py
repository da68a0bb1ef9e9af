"""python -m taciturn.cli"""

from taciturn.cli import main

main()
