"""Tests of plans: resolved, run by a stand-in for train.py, and by train.py itself."""
