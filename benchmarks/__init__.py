"""The cost of dropout: unidrop, each framework's own dropout and a multiply, side by side.

Run ``python -m benchmarks`` from the root of the clone.
"""
