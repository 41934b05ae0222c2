"""`python -m lab COMMAND`, which is what `python badsnn.py COMMAND` runs."""
from lab.cli import main

main()
