"""Show what a run decided and trained: `mixer show schedule|rows|catalog|cursor RUN`, all by computation."""

import argparse
import json
import shutil
import sys
from pathlib import Path

from jobs.corpus import add_storage, storage_of
from mixer import cli
from mixer.config import load
from mixer.control.record import Record, checkpoint_steps, read_record
from mixer.control.tables import catalog_lines, cursor_lines, part_of, schedule_lines, schedule_values, table
from mixer.core.errors import ConfigError, MixerError
from mixer.data import provenance
from mixer.data.catalogs import open_catalog
from mixer.data.corpus import CatalogRows, Corpus
from mixer.run import RunConfig, open_rows

WIDE = 120


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mixer show", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True)
    schedule = verbs.add_parser("schedule", help="weights over time as a table, with reason and lag")
    schedule.add_argument("--windows", metavar="A:B", help="only these, and each of them")
    schedule.add_argument("--json", action="store_true", help="JSON lines with weights and counts by name, unrounded")
    rows = verbs.add_parser("rows", help="which rows and documents were in a step; what a domain gave in some")
    asked = rows.add_mutually_exclusive_group(required=True)
    asked.add_argument("--step", type=int, metavar="N", help="every row of this step")
    asked.add_argument("--steps", metavar="A:B", help="a summary of these steps, by domain or of --domain")
    rows.add_argument("--domain", help="of this domain only")
    rows.add_argument("--rank", type=int, help="of one rank's rows only; needs --of")
    rows.add_argument("--of", type=int, metavar="W", help="how many ranks there are")
    rows.add_argument("--documents", action="store_true", help="and the documents in each row")
    rows.add_argument("--corpus", help="where the corpus lies, if not where the run's config says")
    rows.add_argument("--catalog", help="a catalog file over that corpus")
    rows.add_argument("--json", action="store_true", help="JSON lines")
    add_storage(rows)
    catalog = verbs.add_parser("catalog", help="the domains, and what changed where the catalog was switched")
    cursor = verbs.add_parser("cursor", help="where the run would go on, and what the next window will be")
    for verb in (schedule, rows, catalog, cursor):
        verb.add_argument("run", help="a run's folder, or a schedule.jsonl alone")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    record = read_record(args.run)
    if args.verb == "schedule":
        show_schedule(args, record)
    elif args.verb == "rows":
        show_rows(args, record) if args.steps is None else show_steps(args, record)
    elif args.verb == "catalog":
        print("\n".join(catalog_lines(record.schedule)))
    else:
        print("\n".join(cursor_lines(record, checkpoint_steps(record.folder))))
    return 0


def show_schedule(args: argparse.Namespace, record: Record) -> None:
    windows = part_of(args.windows, len(record.schedule), "--windows")
    if args.json:
        for value in schedule_values(record.schedule, windows):
            print(json.dumps(value, ensure_ascii=False))
    else:
        width = shutil.get_terminal_size((WIDE, 0)).columns
        print("\n".join(schedule_lines(record.schedule, windows, width)))


def show_rows(args: argparse.Namespace, record: Record) -> None:
    if (args.rank is None) != (args.of is None):
        raise ConfigError("--rank and --of belong together. Give both, as --rank 0 --of 4, or none for the whole step.")
    rank, world_size = args.rank or 0, args.of or 1
    found = provenance.rows_of_step(record.schedule, args.step, rank, world_size)
    if args.domain is not None:
        found = [row for row in found if row.domain == args.domain]
    row, inside = provenance.row_of_step(record.schedule, args.step)
    corpus, note = reach(args, record) if args.documents else (None, "")
    ranks = f", rank {rank} of {world_size}" if world_size > 1 else ""
    if not args.json:
        print(f"step {args.step} is step {inside} of window {row.window} ({row.reason}){ranks}: {len(found)} rows")
    lines: list[list[str]] = []
    for one in found:
        value = {"step": args.step, "window": row.window, **one._asdict()}
        line = [str(one.slot), one.domain, f"{one.row:,}", str(one.turn)]
        parts = []
        if corpus is not None and provenance.knows(corpus, row.catalog, one.domain):
            parts = provenance.documents_of(corpus, one.domain, one.row)
        elif args.documents:
            note = note or "the corpus that was found has other rows than the run's catalog; rows are given by number"
        if args.json:
            if parts:
                value["documents"] = [part._asdict() | {"document": part.document._asdict()} for part in parts]
            print(json.dumps(value, ensure_ascii=False))
        for part in parts:
            place = f"{part.begin}:{part.end}"
            source = f"{part.document.source}, record {part.document.record}"
            length = f"tokens {part.offset}:{part.offset + part.end - part.begin} of {part.tokens}"
            lines.append([*line, place, f"{part.document.domain} #{part.document.number}", source, length])
            line = [""] * 4
        if not parts:
            lines.append([*line, *[""] * 4])
    if not args.json:
        heads = ["slot", "domain", "row", "pass", "at", "document", "source", "part"]
        columns = 8 if args.documents and corpus is not None else 4
        print("\n".join(table(heads[:columns], [line[:columns] for line in lines], words=(1, 5, 6, 7))))
    if note:
        print(note, file=sys.stderr)


def show_steps(args: argparse.Namespace, record: Record) -> None:
    schedule, geometry = record.schedule, record.geometry
    if args.documents or args.rank is not None or args.of is not None:
        raise ConfigError("--documents, --rank and --of are about one step. Give --step N with them.")
    steps = part_of(args.steps, len(schedule) * geometry.window_steps, "--steps")
    assert steps is not None
    if args.domain is not None:
        found = provenance.given_in(schedule, steps.start, steps.stop, args.domain)
        if args.json:
            for one in found:
                print(json.dumps(one._asdict(), ensure_ascii=False))
            return
        num = sum(one.num_rows for one in found)
        slots = len(steps) * geometry.batch_rows
        print(f"{args.domain} gave {num:,} of the {slots:,} rows of steps {args.steps} ({num / slots:.2%})")
        heads = ["window", "steps", "weight", "rows", "given before", "given after", "passes"]
        lines = [
            [
                str(one.window),
                f"{one.first_step}:{one.first_step + one.num_steps}",
                f"{one.weight:.2%}",
                f"{one.num_rows:,}",
                f"{one.first:,}",
                f"{one.first + one.num_rows:,}",
                f"{one.passes:.3f}",
            ]
            for one in found
        ]
        print("\n".join(table(heads, lines, words=())))
        return
    totals = provenance.totals_in(schedule, steps.start, steps.stop)
    if args.json:
        print(json.dumps(totals, ensure_ascii=False))
        return
    num = sum(totals.values())
    lines = [[name, f"{rows:,}", f"{rows / num:.2%}"] for name, rows in sorted(totals.items())]
    print("\n".join(table(["domain", "rows", "share"], lines)))


def reach(args: argparse.Namespace, record: Record) -> tuple[CatalogRows | None, str]:
    """The corpus of a run, or the reason why it cannot be read."""
    try:
        if args.corpus is not None:
            corpus = Corpus.open(args.corpus, storage=storage_of(args), check="none")
            return (open_catalog(corpus, args.catalog) if args.catalog else corpus.by_source), ""
        if not record.config:
            return None, "no config says where the corpus lies; rows are given by number. Name it with --corpus."
        return open_rows(load(RunConfig, [Path(args.run) / "run.yaml"])), ""
    except (MixerError, OSError) as error:
        return None, f"the corpus cannot be read, so rows are given by number: {' '.join(str(error).split())}"


if __name__ == "__main__":
    raise SystemExit(cli.main(["show", *sys.argv[1:]]))
