"""The gateway: the process of `hearth serve`. Access, limits, routing, supervision of workers.

Contract: it never parses an answer, only forwards its bytes; it answers at once, with an error if need be,
whatever its workers do.
"""
