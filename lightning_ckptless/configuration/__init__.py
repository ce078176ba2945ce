"""The machinery of options: declared once, set by keywords, command lines and environment variables.

The options themselves are declared in `options.py` and `membership/launch/config.py`.
"""
