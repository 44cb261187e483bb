"""What mixes tokens: one file per attention, all behind the contract in base.py."""
