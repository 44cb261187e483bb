"""Tests of plans: resolved, worked off by a stand-in for train.py, and by train.py itself."""
