"""One file per verb of `mixer <verb>`: parse, call `mixer`, print; nothing else.

The first line of a file's docstring is its summary in `mixer --help`. A file has `parser()` and
`main(argv)`, and ends with the lines that let `python -m jobs.<verb>` behave as `mixer <verb>` does:

    if __name__ == "__main__":
        raise SystemExit(cli.main(["<verb>", *sys.argv[1:]]))
"""
