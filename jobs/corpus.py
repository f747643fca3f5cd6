"""Show what a corpus holds, or verify that it still does: `mixer corpus show|verify PATH`."""

import argparse
import os
import sys
import time

from mixer import cli
from mixer.data.corpus import Corpus
from mixer.data.storage import Storage
from mixer.data.verify import verify


def add_storage(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("storage", "credentials come from the store's own variables and profiles")
    group.add_argument("--storage-endpoint", help="of an S3-compatible store, as http://10.0.0.7:9000")
    group.add_argument("--storage-region")
    group.add_argument("--storage-anonymous", action="store_true")


def storage_of(args: argparse.Namespace) -> Storage:
    return Storage(endpoint=args.storage_endpoint, region=args.storage_region, anonymous=args.storage_anonymous)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer corpus", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True)
    show = verbs.add_parser("show", help="a table of its domains")
    check = verbs.add_parser("verify", help="read every byte again and name all that differs")
    check.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    for verb in (show, check):
        verb.add_argument("path", help="a folder, or an s3:// or gs:// URI")
        add_storage(verb)
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    corpus = Corpus.open(args.path, storage=storage_of(args), check="none")
    return print_table(corpus) if args.verb == "show" else print_verify(corpus, args.threads)


def print_table(corpus: Corpus) -> int:
    manifest = corpus.manifest
    rows = [
        (
            name,
            d.documents,
            d.rows,
            d.tokens,
            d.padding,
            len(d.shards),
            sum(shard.bytes for shard in d.shards),
        )
        for name, d in manifest.domains.items()
    ]
    totals = [sum(column) for column in zip(*(numbers for _, *numbers in rows), strict=True)]
    width = max([len("domain"), *(len(row[0]) for row in rows)])
    heads = ("documents", "rows", "tokens", "padding", "shards", "bytes")
    print(f"{'domain':{width}}" + "".join(f"{head:>16}" for head in heads))
    for name, *numbers in [*rows, ("all", *totals)]:
        print(f"{name:{width}}" + "".join(f"{number:>16,}" for number in numbers))
    keys = ", ".join(f"{key} ({kind})" for key, kind in sorted(manifest.layout.metadata.items())) or "none"
    tokenizer = manifest.tokenizer
    print(f"rows of {manifest.layout.row_tokens} tokens ({manifest.layout.dtype}); metadata: {keys}")
    print(f"tokenizer {tokenizer.kind} {tokenizer.identity[:16]} of {tokenizer.vocab_size}, EOS {tokenizer.eos}")
    print(f"fingerprint {corpus.fingerprint}")
    return 0


def print_verify(corpus: Corpus, threads: int) -> int:
    begun = time.monotonic()
    shown = begun

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= 1 or done == total:
            shown = time.monotonic()
            rate = done / 1e6 / max(shown - begun, 1e-9)
            print(f"{done / max(total, 1):5.0%} of {total / 1e6:,.1f} MB, {rate:,.0f} MB/s", file=sys.stderr)

    lines = verify(corpus, threads=threads, progress=progress)
    for line in lines:
        print(line)
    num_rows = sum(domain.rows for domain in corpus.manifest.domains.values())
    found = f"{len(lines)} differences" if lines else "as its manifest says"
    print(f"{corpus.root}: {len(corpus.shards)} shards, {num_rows:,} rows: {found}")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["corpus", *sys.argv[1:]]))
