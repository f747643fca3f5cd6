"""One file per verb of `mixer <verb>`: parse, call `mixer`, print; nothing else.

The first line of a file's docstring is its summary in `mixer --help`.
"""
