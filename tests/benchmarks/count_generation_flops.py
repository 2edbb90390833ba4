"""FLOPs of an image of Stable Diffusion 2.1, from its published shapes: no weights, no device.

    python tests/benchmarks/count_generation_flops.py --resolution 768 --steps 25

Counts one forward of the U-Net, of the text encoder and of the image decoder; classifier-free guidance runs the first two
twice. The shapes are those of the model's published configuration files.
"""

import argparse

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

TOKENS, WIDTH, LATENT = 77, 1024, 8  # of a prompt; of its embedding; pixels per latent pixel


def flops(module: torch.nn.Module, *inputs: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        getattr(module, "decode", module)(*inputs)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resolution", type=int, default=768)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    side = args.resolution // LATENT
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96,
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=WIDTH,
            use_linear_projection=True,
        )
        decoder = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=23, num_attention_heads=16
            )
        )
        latent, tokens = torch.empty(1, 4, side, side), torch.empty(1, TOKENS, dtype=torch.long)
        step = flops(unet, latent, torch.tensor(1), torch.empty(1, TOKENS, WIDTH))
        picture, prompt = flops(decoder, latent), flops(text, tokens)
    total = 2 * args.steps * step + 2 * prompt + picture
    millions = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    print(f"U-Net of {millions:.0f} million parameters, {args.resolution} px: {step:.3g} FLOPs a forward")
    print(
        f"decoder {picture:.3g}, text encoder {prompt:.3g}; an image in {args.steps} steps with guidance {total:.3g}"
    )
    for images in (10**5, 10**6):
        print(
            f"{images:,} images: {images * total:.3g} FLOPs, {images * total / 1e14 / 3600:,.0f} hours at 1e14 FLOP/s"
        )


if __name__ == "__main__":
    main()
