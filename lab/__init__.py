"""Section 4: the experiments, and what they print. `python badsnn.py COMMAND` comes here."""
