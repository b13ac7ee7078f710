"""`python -m pgolf size`: the bytes of an artifact before training (estimate.py) and after it (command.py); how to save
some (savings.py). Not bundled."""
