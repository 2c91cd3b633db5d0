"""Tokens from what the stages compute.

generate     sequences of tokens: stops, several at a time
sampling     temperature, top-k, top-p, penalties, as transformers computes them
speculative  a draft model's tokens, checked by the split one
breakdown    where the time of a token goes
"""
