"""Any causal language model of the `transformers` package, behind the same call as our `Decoder`.

The package is optional and loaded when a model is made. Nothing it could run is run: no code from the hub, and
weights from safetensors files only. Attention is kept inside documents by a mask and by positions that start
anew; models that mix positions in other ways (state spaces, convolutions) carry text across documents all the same.
"""

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixer.core.errors import ConfigError
from mixer.training.model import Documents, TokenLosses, attention_mask, token_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalOptions:
    """Either `name`, a folder or a name on the hub, or `kind`, a model type, made anew from `config`."""

    name: str | None = None
    revision: str | None = None
    kind: str | None = None  # such as gpt2, llama, qwen3
    config: dict[str, Any] = field(default_factory=dict[str, Any])  # values of the model's own configuration
    weights: bool = True  # those of `name`; false: its shape only
    recompute: bool = False

    def __post_init__(self) -> None:
        if (self.name is None) == (self.kind is None):
            raise ConfigError(f"name={self.name} and kind={self.kind}; needed exactly one of the two.")


class CausalModel(nn.Module):
    """Tokens to logits, or with targets to `TokenLosses`."""

    def __init__(self, options: CausalOptions, vocab_size: int, *, seed: int = 0) -> None:
        super().__init__()
        library = _library()
        with torch.random.fork_rng([]):  # made on the CPU, where the seed decides alone
            torch.manual_seed(seed)
            self.model: Any = _make(library, options, vocab_size)
        self.model.train()  # a model read from files comes for evaluation
        self.vocab_size = vocab_size
        if options.recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(
        self, tokens_bs: Tensor, documents: Documents | None = None, target_bs: Tensor | None = None
    ) -> Tensor | TokenLosses:
        inputs: dict[str, Any] = {}
        if documents is not None:
            device = tokens_bs.device.type
            low = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if low else self.model.dtype
            unseen = torch.zeros((), dtype=dtype, device=tokens_bs.device)
            mask = unseen.masked_fill(~attention_mask(documents), torch.finfo(dtype).min)
            inputs = {"attention_mask": mask, "position_ids": documents.position_bs}
        logits = self.model(input_ids=tokens_bs, use_cache=False, **inputs).logits[..., : self.vocab_size]
        return logits if target_bs is None else token_losses(logits, target_bs)

    @property
    def layers(self) -> nn.ModuleList:
        """The units to shard and compile: the longest list of modules."""
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len)

    def rate_scales(self) -> dict[str, float]:
        return {}

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, row_tokens: int) -> float:
        """As `Decoder.flops_per_token` counts, with heads as wide as the model."""
        config = self.model.config.get_text_config()
        within = sum(weight.numel() for layer in self.layers for weight in layer.parameters() if weight.ndim >= 2)
        output = config.vocab_size * config.hidden_size
        return 6.0 * (within + output) + 12.0 * config.num_hidden_layers * config.hidden_size * row_tokens


def _library() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"the model needs the package transformers, which cannot be imported ({error}). "
                          "Install it: pip install 'mixer[transformers]'.") from error  # fmt: skip


def _make(library: Any, options: CausalOptions, vocab_size: int) -> Any:
    try:
        if options.kind is not None:
            config = library.AutoConfig.for_model(options.kind, **({"vocab_size": vocab_size} | options.config))
        else:
            config = library.AutoConfig.from_pretrained(options.name, revision=options.revision, **options.config)
        if config.get_text_config().vocab_size < vocab_size:
            raise ConfigError(
                f"the model has {config.get_text_config().vocab_size} tokens, the corpus {vocab_size}. Prepare the "
                "corpus with the model's tokenizer, or make a model by kind."
            )
        if options.kind is not None or not options.weights:
            return library.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return library.AutoModelForCausalLM.from_pretrained(
            options.name, revision=options.revision, config=config, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        wanted = options.name or options.kind
        raise ConfigError(f"transformers has no causal model for {wanted!r}: {error}") from error
