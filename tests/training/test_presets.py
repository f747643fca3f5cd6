"""The models that come with mixer: each file loads, and has as many parameters as its name says."""

from dataclasses import dataclass, field

import pytest
import torch

from mixer import config
from mixer.training.model import Decoder, DecoderOptions, Mup

FOLDER = config.shipped() / "model"
SIZES = {  # tokens, parameters
    "0.5m": (257, 523_296),
    "2m": (257, 1_957_920),
    "8m": (8_192, 7_999_744),
    "30m": (32_000, 29_990_784),
    "125m": (50_257, 123_587_328),
    "350m": (50_257, 359_842_816),
    "1b": (50_257, 1_004_881_920),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    model: DecoderOptions = field(default_factory=DecoderOptions)


def test_every_file_is_known() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*SIZES, "mup"}


@pytest.mark.parametrize("name", SIZES)
def test_parameters(name: str) -> None:
    options = config.load(Section, [FOLDER / f"{name}.yaml"]).model
    vocab, parameters = SIZES[name]
    with torch.device("meta"):
        model = Decoder(options, vocab)
    assert model.num_parameters == parameters
    said = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert parameters == pytest.approx(said, rel=0.05)


@pytest.mark.parametrize("name", SIZES)
def test_mup_goes_with_every_size(name: str) -> None:
    options = config.load(Section, [FOLDER / f"{name}.yaml", FOLDER / "mup.yaml"]).model
    assert options.mup == Mup(base_dim=256, base_head_dim=32)
    assert options.width_ratio == options.dim / 256
