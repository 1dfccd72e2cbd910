"""Pretrain the text encoder against pictures: python train/text_encoder.py configs/icons/text_encoder.yaml"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from diffusionfm.checkpoint import write_json
from diffusionfm.config import check_options, parse_args, user_errors
from diffusionfm.data.buckets import BucketConfig
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.training import (
    DataConfig,
    collate_pictures,
    fixed_samples,
    held_out_phrases,
    picture_batches,
)
from diffusionfm.needs import make_missing, require
from diffusionfm.objectives import Contrastive
from diffusionfm.sentences import SentenceTeacher
from diffusionfm.text import ImageTower, build_text_encoder
from diffusionfm.trainer import Trainer, TrainerConfig

# Words of one's own beside the words captions use: what a reader would type for the same thing.
PARAPHRASES = {
    "sneaker": "running shoe", "sofa": "couch and lamp", "automobile": "car", "bike": "bicycle", "bunny": "rabbit",
    "puppy": "dog", "kitten": "cat", "airplane": "plane", "cellphone": "mobile phone", "spectacles": "glasses",
    "infant": "baby", "blossom": "flower", "ocean": "water wave", "present": "wrapped gift", "cop": "police officer",
    "physician": "health worker", "timepiece": "watch", "boat": "sailboat", "hog": "pig", "lorry": "delivery truck",
}  # fmt: skip


@dataclass
class TextEncoderConfig:
    """Keys of a text-encoder run. `text` goes to the encoder's config, `image_tower` to ImageTower(**image_tower)."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    needs: dict[str, str] = field(default_factory=dict)
    tokenizer: str = "runs/icons/tokenizer/tokenizer"
    text: dict = field(default_factory=dict)
    image_tower: dict = field(default_factory=dict)
    objective: dict = field(default_factory=dict)
    teacher: bool = True  # learn word meanings from a sentence encoder too (needs the eval extra)
    candidates: int = 500  # held-out pictures among whose captions the right one must be found


def main(argv: list[str] | None = None) -> Path:
    """Train and report retrieval on held-out phrases; returns the run folder."""
    cfg = parse_args(
        TextEncoderConfig, argv, __doc__, "python train/text_encoder.py configs/icons/text_encoder.yaml"
    )
    with user_errors():
        make_missing(cfg.needs)
        require(tokenizer=cfg.tokenizer)
        check_options("image_tower", cfg.image_tower, ImageTower)
        check_options("objective", cfg.objective, Contrastive)
        torch.manual_seed(cfg.trainer.seed)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(cfg.tokenizer, local_files_only=True)
        data = picture_batches(cfg.data, cfg.trainer.batch_size, cfg.trainer.seed)
        held_out = ShardDataset(cfg.data.shards, split="heldout")
        teacher = SentenceTeacher() if cfg.teacher else None
        forbidden = held_out_phrases(held_out)
        words = [w for w in teacher.vocabulary() if w not in forbidden] if teacher else []
        encoder = build_text_encoder(tokenizer, **cfg.text)
        objective = Contrastive(
            encoder, tokenizer, ImageTower(**cfg.image_tower), teacher, words=words, **cfg.objective
        )
        judged = unlike_captions(held_out, cfg.candidates, cfg.data.buckets)
        run = Path(cfg.trainer.output_dir)

        def validate(step: int, networks: dict) -> dict[str, float]:
            report = {**retrieval(objective, judged), "paraphrase_top1": paraphrases(objective)}
            write_json(run / "report.json", {"step": step, "candidates": len(judged), **report})
            return {f"heldout_{name}": value for name, value in report.items()}

        trainer = Trainer(cfg.trainer, objective, data, resolved_config=cfg, validate=validate)
        trainer.fit()
        if trainer.accelerator.is_main_process:
            tokenizer.save_pretrained(run / "tokenizer")
    return run


def unlike_captions(dataset: ShardDataset, count: int, buckets: BucketConfig | None = None) -> list[dict]:
    """`count` samples spread over a dataset, no two with the same caption."""
    found: dict[str, dict] = {}
    for sample in fixed_samples(dataset, 2 * count, buckets):
        found.setdefault(sample["caption"], sample)
    return list(found.values())[:count]


@torch.no_grad()
def retrieval(objective: Contrastive, samples: list[dict]) -> dict[str, float]:
    """Share of pictures whose own caption comes first, and among the first five, of all the captions."""
    batch = collate_pictures(samples)
    device = next(objective.image_tower.parameters()).device
    pictures = torch.cat([objective.embed_pictures(part.to(device)) for part in batch["picture"].split(100)])
    captions = [s["caption"] for s in samples]
    texts = torch.cat([objective.embed_text(captions[k : k + 100])[0] for k in range(0, len(captions), 100)])
    order = (pictures @ texts.T).argsort(1, descending=True)
    hit = order == torch.arange(len(samples), device=order.device)[:, None]
    return {"top1": hit[:, :1].any(1).float().mean().item(), "top5": hit[:, :5].any(1).float().mean().item()}


@torch.no_grad()
def paraphrases(objective: Contrastive) -> float:
    """Share of words of one's own whose nearest caption, among all of them, is the one that means the same."""
    asked, meant = list(PARAPHRASES), list(PARAPHRASES.values())
    similarity = (
        objective.embed_text([f"a {w}" for w in asked])[0]
        @ objective.embed_text([f"a {w}" for w in meant])[0].T
    )
    return (similarity.argmax(1).cpu() == torch.arange(len(asked))).float().mean().item()


if __name__ == "__main__":
    main()
