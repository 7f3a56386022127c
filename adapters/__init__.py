"""How each framework says dropout: `numpy`, `torch`, `keras` and `tensorflow`; none knows another.

No module is imported before its user imports it, so only the frameworks in use need be installed.
"""
