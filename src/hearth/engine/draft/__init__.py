"""Speculative decoding: who guesses the next tokens, how many guesses fit, and whether guessing pays.

Whether a guess is right is decided in `hearth.engine.choose`, so nothing here can change what is generated.
"""
