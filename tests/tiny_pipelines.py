"""Diffusers pipelines of every kind with small random weights, saved as anybody's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

WORDS = ("a", "photo", "of", "wren", "owl", "rook")


def unet(channels: int = 3, size: Any = 8, classes: int | None = None) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=classes,
    )


def ddpm(folder: Path, channels: int = 3, size: Any = 8) -> None:
    DDPMPipeline(unet(channels, size), DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)


def ddim(folder: Path, channels: int = 3, size: Any = 8) -> None:
    DDIMPipeline(unet(channels, size), DDIMScheduler(num_train_timesteps=20)).save_pretrained(folder)


def classes(folder: Path, count: int = 3) -> None:
    """Class-conditional, as train-generator saves it."""
    scheduler = DDIMScheduler(num_train_timesteps=20)
    ConsistencyModelPipeline(unet(classes=count), scheduler).save_pretrained(folder)


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def dit(folder: Path) -> None:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    for parameter in transformer.parameters():  # the last layers are zero at first: images would all be alike
        torch.nn.init.normal_(parameter, std=0.3)
    names = {i: f"class {i}, kind {i}" for i in range(1000)} | {134: "crane", 517: "crane"}
    DiTPipeline(transformer, vae(), DDIMScheduler()).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "id2label": names})
    )  # as facebook/DiT has it


def text(folder: Path, safety: bool = False) -> None:
    """Stable Diffusion: U-Net, autoencoder, CLIP text encoder and its tokenizer; `safety`: with a filter."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    torch.manual_seed(0)
    tokens = tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokens,
        unet=net,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=checker() if safety else None,
        feature_extractor=extractor() if safety else None,
        requires_safety_checker=safety,
    ).save_pretrained(folder)


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows WORDS, from a vocabulary and merges."""
    from transformers import CLIPTokenizer

    merges, pieces = [], sorted({letter for word in WORDS for letter in word})
    vocabulary = [*pieces, *(f"{piece}</w>" for piece in pieces)]
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = ["".join(parts[:2]), *parts[2:]]
            vocabulary.append(parts[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def checker() -> Any:
    """A safety filter of random weights that objects to some images."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    text_config = CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    config = CLIPConfig(text_config=text_config.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    made = StableDiffusionSafetyChecker(config)
    torch.nn.init.normal_(made.concept_embeds)
    torch.nn.init.normal_(made.special_care_embeds)
    torch.nn.init.constant_(made.concept_embeds_weights, 0.805)
    torch.nn.init.constant_(made.special_care_embeds_weights, 0.9)
    return made


def extractor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


KINDS: dict[str, Callable[..., None]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "classes": classes,
    "dit": dit,
    "text": text,
}
