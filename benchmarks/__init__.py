"""What dropout costs: unidrop, each framework's own and a plain multiply, side by side.

Run ``python -m benchmarks`` from the root of the clone.
"""
