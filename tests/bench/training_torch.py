"""The other side of `tests.bench.train`: encoder and LLM are transformers' classes, connectors plain
modules of torch, and the loop is the one that its tutorials show."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn

from tests.bench import train

# Those of `training_ours.OPTIM`.
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-8}
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0


class Align(nn.Module):
    """softmax(LN_2(LN_1(F W1) W2)) E."""

    def __init__(self, weights: dict[str, torch.Tensor], eps: float):
        super().__init__()
        self.w1, self.w2 = (_linear(weights, name) for name in ("w1", "w2"))
        self.ln1, self.ln2 = (_norm(weights, name, eps) for name in ("ln1", "ln2"))

    def forward(self, features: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        logits = self.ln2(self.w2(self.ln1(self.w1(features))))
        return logits.softmax(-1) @ table


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, weights: dict[str, torch.Tensor], eps: float):
        super().__init__()
        self.fc1, self.fc2 = (_linear(weights, name) for name in ("fc1", "fc2"))

    def forward(self, features: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(features)))


class Model(nn.Module):
    """The whole model, read from a folder that `training_ours.write` wrote; the LLM's attention is
    one that transformers knows by name."""

    def __init__(self, folder: Path, attention: str = "sdpa"):
        super().__init__()
        self.vision = transformers.SiglipVisionModel.from_pretrained(folder / "vision")
        self.llm = transformers.LlamaForCausalLM.from_pretrained(
            folder / "llm", attn_implementation=attention
        )
        name = json.loads((folder / "connector" / "config.json").read_text())["name"]
        weights = load_file(folder / "connector" / "model.safetensors")
        eps = self.llm.config.rms_norm_eps
        self.connector = {"align": Align, "mlp": MLP}[name](weights, eps)

    def forward(
        self, pixels: torch.Tensor, text: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Returns the loss of sequences of one tile and then text."""
        features = self.vision(pixels).last_hidden_state
        embedding = self.llm.get_input_embeddings()
        visual = self.connector(features, embedding.weight)
        inputs = torch.cat([visual, embedding(text)], 1)
        # Only positions of text have targets.
        logits = self.llm(
            inputs_embeds=inputs, use_cache=False, logits_to_keep=text.shape[1]
        ).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def start(case: str, connector: str, folder: Path) -> tuple[int, Callable[[], float]]:
    """Returns the number of parameters, and what takes a step and returns its loss."""
    torch.set_num_threads(train.NUM_THREADS)
    transformers.utils.logging.disable_progress_bar()
    model = Model(folder).train()
    optimizer = make_optimizer(model)
    batch = np.load(folder / "batch.npz")
    num_image = int((batch["loss_weights"][0] == 0).sum())
    text, targets = (
        torch.tensor(batch[name][:, num_image:]).long() for name in ("tokens", "targets")
    )
    # As SigLIP's processor normalises them.
    pixels = torch.tensor(batch["tiles"][:, 0]).permute(0, 3, 1, 2).float() / 127.5 - 1

    def step() -> float:
        optimizer.zero_grad()
        loss = model(pixels, text, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        return loss.item()

    return sum(x.numel() for x in model.parameters()), step


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW over the parameters of a model."""
    # Matrices alone decay, and not positions.
    decays = {
        name: x.ndim > 1 and "position_embedding" not in name
        for name, x in model.named_parameters()
    }
    groups = [
        {
            "params": [x for name, x in model.named_parameters() if decays[name] is whether],
            "weight_decay": WEIGHT_DECAY * whether,
        }
        for whether in (True, False)
    ]
    return torch.optim.AdamW(groups, **ADAMW, fused=True)


def _linear(weights: dict[str, torch.Tensor], name: str) -> nn.Linear:
    # Kernels are [in, out], torch's [out, in].
    kernel = weights[f"{name}.kernel"].T.contiguous()
    has_bias = f"{name}.bias" in weights
    linear = nn.Linear(*kernel.T.shape, bias=has_bias)
    linear.load_state_dict(
        {"weight": kernel, **({"bias": weights[f"{name}.bias"]} if has_bias else {})}
    )
    return linear


def _norm(weights: dict[str, torch.Tensor], name: str, eps: float) -> nn.LayerNorm:
    scale, bias = (weights[f"{name}.{part}"] for part in ("scale", "bias"))
    norm = nn.LayerNorm(scale.shape, eps)
    norm.load_state_dict({"weight": scale, "bias": bias})
    return norm
