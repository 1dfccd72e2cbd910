"""Other people's encoders at toy size with random weights, written to folders as their own libraries write them."""

from __future__ import annotations

from pathlib import Path

import torch

CAPTIONS = [
    "a red circle on white",
    "a photograph of a lighthouse at dusk, long exposure",
    "two dogs asleep on a blue sofa",
    "café, naïve",
]


def write_tokenizer(folder: Path, end: str = "</s>", ends: bool = True, limit: int = 512) -> int:
    """A byte-level BPE tokenizer; `ends` marks the end of each text, as T5's does and Qwen's does not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=end,
        model_max_length=limit,
        padding_side="left",
    )
    fast.save_pretrained(folder)
    return len(fast)


def write_text(folder: Path, kind: str = "t5", width: int = 32) -> Path:
    """A text model of T5's, Qwen's or CLIP's class and its tokenizer in one folder, as repositories hold them."""
    import transformers as t

    torch.manual_seed(0)
    causal = kind == "qwen3"
    vocab = write_tokenizer(
        folder, "<|endoftext|>" if causal else "</s>", not causal, 131072 if causal else 512
    )
    small = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "t5":
        config = t.T5Config(
            vocab_size=vocab,
            d_model=width,
            d_ff=2 * width,
            d_kv=16,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
        )
        t.T5ForConditionalGeneration(config).save_pretrained(folder)  # with its decoder, as it comes
    elif kind == "qwen3":
        config = t.Qwen3Config(
            **small, num_key_value_heads=1, head_dim=16, intermediate_size=64, tie_word_embeddings=False
        )
        t.Qwen3ForCausalLM(config).save_pretrained(folder)
    else:
        config = t.CLIPTextConfig(**small, intermediate_size=64, max_position_embeddings=77, eos_token_id=1)
        t.CLIPTextModel(config).save_pretrained(folder)
    return folder


def write_vae(folder: Path, kind: str = "flux") -> Path:
    """An autoencoder of SDXL's, FLUX's or DC-AE's class; the last is 8x down here, where the real one is 32x."""
    from diffusers import AutoencoderDC, AutoencoderKL

    torch.manual_seed(0)
    if kind == "dcae":
        vae = AutoencoderDC(
            latent_channels=8,
            attention_head_dim=8,
            encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 16, 16),
            decoder_block_out_channels=(8, 8, 16, 16),
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), (5,)),
            decoder_qkv_multiscales=((), (), (), (5,)),
            scaling_factor=0.41407,
        )
    else:
        flux = kind == "flux"
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            norm_num_groups=4,
            latent_channels=16 if flux else 4,
            scaling_factor=0.3611 if flux else 0.13025,
            shift_factor=0.1159 if flux else None,
            use_quant_conv=not flux,
            use_post_quant_conv=not flux,
        )
    vae.save_pretrained(folder)
    return folder
