"""A sample of the training documents, and a tokenizer learnt from it.

Every domain gives an equal part of the sample, from units spread evenly over it: the first documents
of each. So a small domain has its say in the vocabulary, and the sample follows from the inputs and
options alone. Documents that will be held out for validation are not in it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mixer.data.reading import Reading
from mixer.data.staging import Context, Unit, is_validation, key_of
from mixer.data.storage import Storage, put
from mixer.data.tokens import pieces_of, train_bpe

MIN_UNIT_BYTES = 256 << 10  # fewer units give more each, rather than all of them next to nothing
DOCUMENT_CHARS = 1 << 20  # one huge document must not be the whole sample


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleJob:
    key: str
    unit: Unit
    num_bytes: int
    context: Context


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    storage: Storage
    staging: str
    keys: tuple[str, ...]
    vocab_size: int


def sample_jobs(units: Sequence[Unit], num_bytes: int, context: Context) -> list[SampleJob]:
    """Which units of a domain give how much."""
    num_units = max(1, min(len(units), num_bytes // MIN_UNIT_BYTES))
    chosen = [units[place * len(units) // num_units] for place in range(num_units)]
    per_unit = max(1, num_bytes // num_units)
    return [
        SampleJob(key=key_of(["sample", unit.key, per_unit]), unit=unit, num_bytes=per_unit, context=context)
        for unit in chosen
    ]


def take_sample(job: SampleJob) -> int:
    """Write the sample of one unit into the staging folder, and say how many bytes it has."""
    context = job.context
    reading = Reading(context.storage, job.unit.options, context.metadata, job.unit.where)
    texts: list[str] = []
    num_bytes = 0
    for text in _texts(job, reading):
        texts.append(pieces_of(text, DOCUMENT_CHARS)[0])
        num_bytes += len(texts[-1].encode())
        if num_bytes >= job.num_bytes:
            break
    filesystem, root = context.storage.locate(context.staging)
    put(filesystem, root, f"{job.key}.sample.json", json.dumps(texts).encode())
    return num_bytes


def _texts(job: SampleJob, reading: Reading) -> Iterator[str]:
    for part in job.unit.parts:
        for document in reading.documents(part.file, part.slice):
            if not is_validation(document.text, job.unit.validation_share, job.context.seed):
                yield document.text


def train(job: TrainJob) -> str:
    """The tokenizer.json learnt from the samples, in their order."""
    filesystem, root = job.storage.locate(job.staging)

    def texts() -> Iterator[str]:
        for key in job.keys:
            with filesystem.open_input_stream(f"{root}/{key}.sample.json", compression=None) as stream:
                yield from json.loads(stream.read())

    return train_bpe(texts(), job.vocab_size)
