"""Experiments: `python -m experiments.NAME {train,eval,duel}`."""
