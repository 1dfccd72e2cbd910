"""Train the tokenizer on captions: python train/tokenizer.py configs/icons/tokenizer.yaml trainer.output_dir=RUN"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from diffusionfm.config import parse_args, user_errors
from diffusionfm.data.training import all_captions
from diffusionfm.needs import make_missing
from diffusionfm.text import train_tokenizer


@dataclass
class OutputConfig:
    """Where to write. `steps` is accepted for symmetry with the other recipes; training reads every caption once."""

    output_dir: str = "runs/tokenizer"
    steps: int = 1


@dataclass
class TokenizerConfig:
    """Keys of a tokenizer run."""

    trainer: OutputConfig = field(default_factory=OutputConfig)
    shards: str = "data/icons"
    needs: dict[str, str] = field(default_factory=dict)
    vocab_size: int = 4096
    context: int = 96


def main(argv: list[str] | None = None) -> Path:
    """Write RUN/tokenizer/; the same captions give the same files. Returns the run folder."""
    cfg = parse_args(TokenizerConfig, argv, __doc__, "python train/tokenizer.py configs/icons/tokenizer.yaml")
    with user_errors():
        make_missing(cfg.needs)
        run = Path(cfg.trainer.output_dir)
        captions = all_captions(cfg.shards)
        tokenizer = train_tokenizer(captions, cfg.vocab_size, cfg.context)
        tokenizer.save_pretrained(run / "tokenizer")
        lengths = [len(ids) for ids in tokenizer(captions[:5000])["input_ids"]]
        mean = sum(lengths) / len(lengths)
        print(f"{len(tokenizer)} tokens from {len(captions)} captions; a caption has {mean:.1f} on average")
    return run


if __name__ == "__main__":
    main()
