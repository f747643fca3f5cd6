"""Regroup or select the rows of a corpus into other domains, as a small catalog file.

mixer catalog data/corpus --out by-topic.json --by topic,quality
mixer catalog data/corpus --out best.json --score quality --top-share 0.3
mixer catalog data/corpus --out chosen.json --rows chosen.parquet
mixer catalog data/corpus --show by-topic.json
"""

import argparse
import sys

from jobs.corpus import add_storage, storage_of
from mixer import cli
from mixer.core.errors import ConfigError
from mixer.data.catalogs import open_catalog, save_catalog
from mixer.data.corpus import CatalogRows, Corpus
from mixer.data.selection import Selection, select


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mixer catalog", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("path", help="the corpus: a folder, or an s3:// or gs:// URI")
    top.add_argument("--out", help="the catalog file to write")
    top.add_argument("--show", metavar="FILE", help="print the domains of a catalog file, write nothing")
    top.add_argument("--by", default="", metavar="KEYS", help="metadata keys, as topic,quality")
    top.add_argument("--within-source", action="store_true", help="put the source domain's name before the values")
    top.add_argument("--score", metavar="KEY", help="a metadata column of numbers to select rows by")
    top.add_argument("--cut", type=float, help="keep rows whose score is at least this")
    top.add_argument("--keep", choices=("above", "below"), default="above", help="which side of the cut")
    top.add_argument("--top-share", type=float, help="of each new domain keep this share of its rows, the best")
    top.add_argument("--rows", metavar="FILE", help="a list of rows: domain or shard, row, perhaps name")
    top.add_argument("--drop-empty", action="store_true", help="leave out source domains without rows")
    add_storage(top)
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if (args.out is None) == (args.show is None):
        raise ConfigError("give one of --out FILE (write a catalog) and --show FILE (print one).")
    corpus = Corpus.open(args.path, storage=storage_of(args), drop_empty=args.drop_empty)
    if args.show is not None:
        return print_domains(open_catalog(corpus, args.show))
    selection = Selection(
        by=tuple(key.strip() for key in args.by.split(",") if key.strip()),
        within_source=args.within_source,
        score=args.score,
        cut=args.cut,
        keep=args.keep,
        top_share=args.top_share,
        rows=args.rows,
    )
    rows = select(corpus, selection)
    save_catalog(rows, args.out, selection.to_dict())
    return print_domains(rows)


def print_domains(rows: CatalogRows) -> int:
    domains = rows.catalog.domains
    width = max(len("domain"), *(len(domain.name) for domain in domains))
    print(f"{'domain':{width}}{'rows':>16}{'spans':>12}")
    for number, domain in enumerate(domains):
        print(f"{domain.name:{width}}{domain.num_rows:>16,}{len(rows.spans_of(number)):>12,}")
    taken, there = int(rows.catalog.num_rows_d.sum()), sum(shard.rows for shard in rows.shards)
    print(f"{len(domains)} domains hold {taken:,} of the corpus's {there:,} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["catalog", *sys.argv[1:]]))
