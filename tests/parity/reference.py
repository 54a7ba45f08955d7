"""The reference implementations, in float32 on CPU; only the venv of `make test-parity` has
them."""

from pathlib import Path

import numpy as np
import torch
import transformers

SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
DINOV2_MEAN = (0.485, 0.456, 0.406)
DINOV2_STD = (0.229, 0.224, 0.225)


@torch.no_grad()
def llm_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of the class that the folder's config.json names."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor(tokens)).logits.numpy()


@torch.no_grad()
def siglip_features(folder: Path, pixels: np.ndarray) -> np.ndarray:
    """Last hidden states [B, P, E] of uint8 pixels [B, Y, X, 3], of any SigLIP."""
    normalised = torch.tensor(scaled(pixels, SIGLIP_MEAN, SIGLIP_STD))
    fields = (folder / "config.json").read_text()
    if "siglip2" in fields:
        model = transformers.Siglip2VisionModel.from_pretrained(folder, dtype=torch.float32).eval()
        return naflex_features(model, normalised)
    model = transformers.SiglipVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model(normalised).last_hidden_state.numpy()


@torch.no_grad()
def naflex_features(model: torch.nn.Module, pixels: torch.Tensor) -> np.ndarray:
    """Last hidden states [B, P, E] of a NaFlex SigLIP 2 of square pixels [B, 3, Y, X]."""
    patch = model.config.patch_size
    side = pixels.shape[2] // patch
    patches = pixels.reshape(-1, 3, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1)
    patches = patches.reshape(len(pixels), side**2, -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32)
    shapes = torch.tensor([[side, side]] * len(pixels))
    return model(
        patches, pixel_attention_mask=mask, spatial_shapes=shapes
    ).last_hidden_state.numpy()


@torch.no_grad()
def dinov2_features(folder: Path, pixels: np.ndarray) -> np.ndarray:
    """Last hidden states [B, P, E] of a Dinov2Model that has no class token."""
    model = transformers.Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
    return features_without_class_token(model, pixels)


def features_without_class_token(model: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Last hidden states [B, P, E]: patches and their positions alone go through the encoder."""
    return without_class_token(model, torch.tensor(scaled(pixels, DINOV2_MEAN, DINOV2_STD)))


@torch.no_grad()
def without_class_token(model: torch.nn.Module, pixels: torch.Tensor) -> np.ndarray:
    """The same of pixels [B, 3, Y, X] that are normalised."""
    embedded = model.embeddings(pixels)[:, 1:]
    states = model.encoder(embedded)
    states = getattr(states, "last_hidden_state", states)
    return model.layernorm(states).numpy()


def scaled(pixels: np.ndarray, mean: tuple, std: tuple) -> np.ndarray:
    return ((pixels.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)).transpose(
        0, 3, 1, 2
    )
